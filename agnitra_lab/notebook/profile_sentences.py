"""What the profile card says in sentences: the bottleneck, the GPU, what profiling cost, and what is missing."""

from __future__ import annotations

from agnitra_lab.contracts.device import DevicePeaks
from agnitra_lab.contracts.telemetry import Bottleneck, GpuTelemetry, Overhead, TelemetryRecord
from agnitra_lab.notebook.profile_names import is_other_owner, node_name, short_op, short_source
from agnitra_lab.notebook.profile_roofline import bound_of, roofline_nodes
from agnitra_lab.notebook.profile_rows import share_text
from agnitra_lab.report import numbers

_LAUNCH_BOUND = 0.5
_TOGETHER = 1.5
_NEED_GPU = "the same cell on a machine with an NVIDIA GPU also gives kernels, idle time, energy and counters"
# A reason in the telemetry says what is missing; these say how to get it, unless the reason does so itself.
_REMEDIES = (
    (("no cuda device",), "same cell", _NEED_GPU),
    (("not installed", "no module named"), "pip install", "pip install nvidia-ml-py"),
    (
        ("may not read", "permission", "insufficient", "privilege", "not allowed", "rights"), "NVreg_",
        "run as root, or let the administrator load the driver with NVreg_RestrictProfilingToAdminUsers=0",
    ),
)  # fmt: skip
_MEASURE_PEAKS = "agnitra_lab.device.peaks.measure_peaks(device, dtype)"


def bottleneck_sentence(record: TelemetryRecord, peaks: DevicePeaks | None = None) -> str:
    """The bottleneck in one sentence, which starts with the host where the GPU mostly waits for it.

    Args:
        record: the telemetry.
        peaks: measured ceilings; with them the sentence tells what limits the node.
    """
    top = record.bottleneck
    idle = record.gpu.idle
    waits = idle.launch_bound_share if idle and idle.launch_bound_share is not None else 0.0
    lead = (
        f"The GPU waits for the host {100 * waits:.0f}% of the time (launch-bound); " if waits > _LAUNCH_BOUND else ""
    )
    if top is None:
        if record.num_events is None and record.notes:
            return "The code ran unprofiled, so its bottleneck is not known."
        return f"{lead}no op ran." if lead else "No op ran in this cell, so there is no bottleneck."
    share = f", {numbers.share(top.share)} of the self time" if top.share is not None else ""
    source = f" ({short_source(top.source)})" if top.source else ""
    op = short_op(top.op) if "<" in top.op or "(" in top.op else top.op
    took = f"{numbers.milliseconds(top.latency_ms)}{share}{_where(top)}{source}{_ceiling(record, top, peaks)}."
    together = _together(record, top)
    return f"{lead}the largest op, {op}, takes {took}{together}" if lead else f"{op} takes {took}{together}"


def _together(record: TelemetryRecord, top: Bottleneck) -> str:
    """The place of numbered layers that takes most in all, where that is far more than the one op."""
    spent: dict[str, tuple[float, int]] = {}
    for spot in record.hotspots:
        share, _ = spent.get(spot.place, (0.0, 0))
        spent[spot.place] = share + spot.share, spot.num_places
    place, (share, num_places) = max(spent.items(), key=lambda item: item[1][0], default=("", (0.0, 0)))
    if share < _TOGETHER * (top.share or 1.0):
        return ""
    layers = f"the {num_places} modules {place} take" if num_places > 1 else f"{place} takes"
    return f" In all {layers} {numbers.share(min(1.0, share))}."


def gpu_sentence(gpu: GpuTelemetry) -> str:
    """What is known of the GPU, in one sentence."""
    if gpu.gpu_utilisation is None:
        return f"GPU: {_with_remedy(gpu.reason or 'the driver gave no reading')}."
    busy = f", {numbers.milliseconds(gpu.busy_ms)} of kernels" if gpu.busy_ms is not None else ""
    return f"GPU: busy {numbers.share(gpu.gpu_utilisation)} of the wall time{busy}."


def overhead_sentence(overhead: Overhead) -> str | None:
    """What profiling cost, in one sentence; None when nothing is known of it."""
    parts = []
    if overhead.num_markers is not None:
        each = f" at {overhead.marker_us:.1f} us" if overhead.marker_us is not None else ""
        parts.append(f"{overhead.num_markers:,} marker{'' if overhead.num_markers == 1 else 's'}{each}")
    if overhead.event_us is not None:
        parts.append(f"op events at {overhead.event_us:.2f} us")
    if overhead.launch_us is not None and overhead.num_launches is not None:
        parts.append(f"{overhead.num_launches:,} launches at {overhead.launch_us:.2f} us")
    spent = ", ".join(parts)
    read = f"reading it took {numbers.milliseconds(overhead.read_ms)} of CPU time" if overhead.read_ms else ""
    if read and overhead.graph_ms:
        read += f", {numbers.milliseconds(overhead.graph_ms)} of it for the graph"
    if overhead.share is not None:
        amount = "less than 0.1%" if overhead.share < 0.001 else f"about {100 * overhead.share:.2g}%"
        how = "of the profiled time, measured against plain calls" if overhead.is_measured else "of this run"
        cost = f"Overhead: profiling cost {amount} {how}"
        return f"{cost}{f': {spent}' if spent else ''}{f'; {read}' if read else ''}."
    told = "; ".join(filter(None, (spent, read)))
    return f"Overhead: {told}." if told else None


def notes(record: TelemetryRecord, peaks: DevicePeaks | None = None) -> list[str]:
    """Everything that is said below the pictures, one sentence or two each, in reading order."""
    found = [
        gpu_sentence(record.gpu),
        *_idle(record.gpu),
        *_driver(record),
        *_counters(record.gpu),
        *_memory(record),
        *([f"Graph: {record.graph_note.rstrip('.')}."] if record.graph_note else []),
        *_roofline(record, peaks),
    ]
    if record.overhead and (sentence := overhead_sentence(record.overhead)):
        found.append(sentence)
    if record.num_dropped_events:
        seen = f" of {record.num_events + record.num_dropped_events:,}" if record.num_events else ""
        found.append(
            f"Dropped: {record.num_dropped_events:,}{seen} events were past the event budget, and their time is in no "
            "table. Profile fewer calls at once to keep them all."
        )
    return [numbers.plain_text(note) for note in (*found, *record.notes)]


def _where(top: Bottleneck) -> str:
    module = f"module {top.module_path}" if top.module_path else None
    # An optimiser and a gradient are no nodes: their names say what they are.
    kind = "" if top.node and is_other_owner(top.node) else "node "
    node = f"{kind}{node_name(top.node)}" if top.node else None
    place = " of ".join(filter(None, (node, module)))
    return f", at {place}" if place else ""


def _ceiling(record: TelemetryRecord, top: Bottleneck, peaks: DevicePeaks | None) -> str:
    if top.node is None:
        return ""
    named = [node for node in record.nodes if node.node == top.node and node.module_path == top.module_path]
    share = named[0].roofline_share if named else None
    if share is None:
        return ""
    bound = bound_of(named[0], peaks)
    allowed = f"what its {bound} allow" if bound else "what the roofline allows"
    return f", and runs at {100 * share:.0f}% of {allowed}"


def _idle(gpu: GpuTelemetry) -> list[str]:
    idle = gpu.idle
    if idle is None or not idle.idle_ms:
        return []
    causes = (
        (idle.host_wait_ms, "for the host to launch"),
        (idle.kernel_wait_ms, "between launched kernels"),
        (idle.unknown_ms, "unknown"),
    )
    parts = ", ".join(f"{share_text(min(1.0, ms / idle.idle_ms))} {cause}" for ms, cause in causes)
    gaps = f" in {idle.num_gaps:,} gap{'' if idle.num_gaps == 1 else 's'}" if idle.num_gaps else ""
    return [f"GPU idle: {numbers.milliseconds(idle.idle_ms)}{gaps}; of it {parts}."]


def _driver(record: TelemetryRecord) -> list[str]:
    """Energy and clocks, as the driver counts them."""
    gpu, behavior = record.gpu, record.behavior
    found = []
    if gpu.energy_j is not None:
        power = f", {behavior.power_w_mean:.0f} W on average" if behavior.power_w_mean is not None else ""
        found.append(f"Energy: {gpu.energy_j:,.{0 if gpu.energy_j >= 100 else 2}f} J over the capture{power}.")
    elif gpu.energy_reason and gpu.energy_reason != gpu.reason:
        found.append(f"Energy: {numbers.ABSENT}: {_with_remedy(gpu.energy_reason)}.")
    num_samples = gpu.num_samples if gpu.num_samples is not None else len(gpu.samples)
    if gpu.throttle:
        found.append(f"Clocks: lowered during the capture ({', '.join(gpu.throttle)}), so times may be longer.")
    elif num_samples and any(sample.throttle_reasons is not None for sample in gpu.samples):
        every = f", one every {gpu.sample_period_ms:.0f} ms" if gpu.sample_period_ms else ""
        found.append(f"Clocks: not lowered in {num_samples:,} sample{'' if num_samples == 1 else 's'}{every}.")
    # The reason for no GPU at all is the GPU's own sentence.
    if gpu.gpu_utilisation is not None:
        found += [f"Driver samples: {_with_remedy(reason)}." for reason in _distinct(gpu.reason, behavior.reason)]
    return found


def _counters(gpu: GpuTelemetry) -> list[str]:
    gpm = gpu.gpm
    if gpm is None:
        return []
    named = (
        ("SMs", gpm.sm_utilisation),
        ("occupancy", gpm.sm_occupancy),
        ("tensor cores", gpm.tensor_utilisation),
        ("memory bandwidth", gpm.dram_bandwidth_utilisation),
        ("fp32 units", gpm.fp32_utilisation),
    )
    known = ", ".join(f"{name} {numbers.share(value)}" for name, value in named if value is not None)
    reason = _with_remedy(gpm.reason) if gpm.reason else ""
    if not known:
        return [f"Counters: {numbers.ABSENT}: {reason or 'the driver gave no reading'}."]
    return [f"Counters: {known} of their peaks{f' ({reason})' if reason else ''}."]


def _memory(record: TelemetryRecord) -> list[str]:
    memory = record.memory
    if memory is None or memory.reason is None or memory.peak_memory_bytes is not None:
        return []
    return [f"Memory: {_with_remedy(memory.reason)}."]


def _roofline(record: TelemetryRecord, peaks: DevicePeaks | None) -> list[str]:
    if not record.nodes:
        return []
    if not roofline_nodes(record):
        return ["Roofline: FLOPs and bytes of the nodes are not known; they take a graph with shapes."]
    if peaks is None or peaks.copy_bandwidth_gb_per_s is None:
        return [f"Roofline: the picture takes measured ceilings; {_MEASURE_PEAKS} gives them in half a second."]
    return []


def _with_remedy(reason: str) -> str:
    text = numbers.plain_text(reason).rstrip(".")
    lowered = text.lower()
    for words, sign, remedy in _REMEDIES:
        if any(word in lowered for word in words) and sign.lower() not in lowered:
            return f"{text}. To get it: {remedy}"
    return text


def _distinct(*reasons: str | None) -> list[str]:
    return list(dict.fromkeys(reason for reason in reasons if reason))
