"""Put one profile together: attribution, summed rows and observations become a `Telemetry`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agnitra_lab.contracts import Behavior, DeviceInfo, DevicePeaks, GpuTelemetry, TelemetryRecord
from agnitra_lab.device.peaks import measure_peaks
from agnitra_lab.profiler import inductor
from agnitra_lab.profiler.attribution import Context, attribute
from agnitra_lab.profiler.event_table import BACKWARD_PREFIX, EventTable, Kind
from agnitra_lab.profiler.graphs import RootGraphs, capture_roots
from agnitra_lab.profiler.hotspots import hotspots
from agnitra_lab.profiler.markers import ModuleMarkers, module_paths
from agnitra_lab.profiler.memory import memory_frame, peak_bytes, peak_shares
from agnitra_lab.profiler.nodes import node_events, peak_dtype
from agnitra_lab.profiler.observe import NO_CUDA, Observation, memory_of
from agnitra_lab.profiler.overhead import overhead_of
from agnitra_lab.profiler.phases import phase_times
from agnitra_lab.profiler.places import Attribution
from agnitra_lab.profiler.regions import COMPILING_LABEL, PROGRAM_CALL, REGION
from agnitra_lab.profiler.rows import OpTables, RowKey, first_shapes, sum_rows
from agnitra_lab.profiler.session import ProfilerSession
from agnitra_lab.profiler.sweep import GRAPH_LAUNCHES, Nesting, sweep
from agnitra_lab.profiler.telemetry import Telemetry
from agnitra_lab.profiler.timeline import busy_ms, idle_of, timeline_of

MAX_RECORD_ROWS = 50
# The driver averages over up to a second; a shorter stretch reads what came before it.
_NVML_WINDOW_MS = 1000.0


@dataclass
class Capture:
    """Everything that one profile collected.

    Attributes:
        observation: of the profiled calls.
        session: of the profiled calls, None when they ran unprofiled.
        shape_session: of the pass that recorded shapes, None without one.
        memory_session: of the pass that recorded memory, None without one.
        num_calls: profiled calls of the target.
        plain_ms: wall times of unprofiled calls.
        should_measure_peaks: whether to measure the device's ceilings for the roofline.
        name, workload, phase, items_per_call, item_unit: for the record.
        device_info: of the device; described when None.
        reference: attribution of the same kernels, for CUDA graphs of unknown origin.
        on_progress: told in short lines what is being done.
        ended_s: CPU time of the process at the end of the code.
        notes: in plain words, for the user.
    """

    observation: Observation
    session: ProfilerSession | None
    shape_session: ProfilerSession | None = None
    memory_session: ProfilerSession | None = None
    num_calls: int = 1
    plain_ms: list[float] = field(default_factory=list)
    should_measure_peaks: bool = True
    name: str | None = None
    workload: str | None = None
    phase: Literal["prefill", "decode"] | None = None
    items_per_call: int | None = None
    item_unit: str | None = None
    device_info: DeviceInfo | None = None
    reference: Attribution | None = None
    on_progress: Callable[[str], None] | None = None
    ended_s: float = field(default_factory=time.process_time)
    notes: list[str] = field(default_factory=list)


def build_telemetry(capture: Capture) -> Telemetry:
    """Attribute, sum and describe.

    Args:
        capture: what was collected; its sessions are emptied, so that no model outlives the profile.

    Returns:
        The telemetry. A capture without a session has no rows, and its notes say why.
    """
    session = capture.session
    if session is None or session.table is None:
        return Telemetry(record=_record(capture, None, None, RootGraphs(), ModuleMarkers()))
    _tell(capture, f"reading {len(session.table):,} events")
    markers, table = session.markers, session.table
    nesting = sweep(table)
    _tell(capture, "tracing the graph")
    graphs = _graphs(markers, table, nesting)
    context = Context(
        module_paths(markers), graphs.graphs, markers.gradients, inductor.loaded_programs(), capture.reference
    )
    attribution = attribute(table, context, nesting)
    has_device = bool(np.any(table.kind == Kind.KERNEL))
    shapes = _recorded_shapes(capture, context)
    tables = sum_rows(attribution, has_device=has_device, num_calls=capture.num_calls, shapes=shapes)
    peaks = _peaks(capture, graphs, has_device)
    nodes = node_events(attribution, tables, graphs, peaks)
    record = _record(capture, tables, attribution, graphs, markers)
    record = record.model_copy(
        update={
            "nodes": tuple(sorted(nodes, key=lambda node: -node.latency_ms)[:MAX_RECORD_ROWS]),
            "phases": phase_times(attribution, markers.roots, graphs.phases, has_device=has_device),
            "timeline": timeline_of(attribution),
            "hotspots": hotspots(tables.ops, tables.kernels),
            "peaks": peaks,
        }
    )
    record, memory = _with_memory(capture, record, context)
    read_ms = (time.process_time() - capture.ended_s) * 1e3
    overhead = overhead_of(attribution, record, capture.num_calls, read_ms, graphs.capture_ms)
    telemetry = Telemetry(
        record=record.model_copy(update={"overhead": overhead}),
        all_ops=tables.ops,
        all_kernels=tables.kernels,
        all_nodes=nodes,
        graph=_main_graph(graphs, attribution),
        graph_capture_ms=graphs.capture_ms,
        attribution=attribution,
        memory_timeline=memory,
    )
    markers.forget_inputs()
    capture.session = capture.shape_session = capture.memory_session = None
    return telemetry


def _tell(capture: Capture, line: str) -> None:
    if capture.on_progress is not None:
        capture.on_progress(line)


def _graphs(markers: ModuleMarkers, table: EventTable, nesting: Nesting) -> RootGraphs:
    ran = {int(index) for index in nesting.module[nesting.root_event[_compiled_rows(table, nesting)]]}
    compiled = {index for index in ran if _is_compiled(markers.roots[index].module)}
    has_backward = bool(len(table.ids_of(BACKWARD_PREFIX)))
    graphs = capture_roots(markers.roots, compiled, compiled if has_backward else ())
    if has_backward:
        # A training step runs the prompt's ops, and is no prefill.
        graphs.phases = {}
    return graphs


def _compiled_rows(table: EventTable, nesting: Nesting) -> NDArray[np.int64]:
    """Return, inside root calls, the rows of compiled regions and of the ops that launched a CUDA graph."""
    regions = np.flatnonzero(table.named(REGION, PROGRAM_CALL) & (table.kind == Kind.OP))
    launches = np.flatnonzero(table.named(*GRAPH_LAUNCHES) & (table.kind == Kind.RUNTIME))
    hosts = np.flatnonzero(table.kind <= Kind.MARKER)
    launchers = hosts[np.isin(table.correlation[hosts], table.linked[launches])]
    rows = np.concatenate([regions, launchers])
    return rows[nesting.root_event[rows] >= 0]


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _recorded_shapes(capture: Capture, context: Context) -> dict[RowKey, tuple[int, ...]] | None:
    session = capture.shape_session
    if session is None or session.table is None:
        return None
    return first_shapes(attribute(session.table, context))


def _peaks(capture: Capture, graphs: RootGraphs, has_device: bool) -> DevicePeaks | None:
    dtype = peak_dtype([node for _, node in graphs.nodes()])
    if not capture.should_measure_peaks or dtype is None:
        return None
    _tell(capture, "measuring the device's ceilings")
    try:
        return measure_peaks("cuda" if has_device else "cpu", getattr(torch, dtype))
    except (RuntimeError, AttributeError):
        # Out of memory beside the user's model: a profile without a roofline is still a profile.
        return None


def _main_graph(graphs: RootGraphs, attribution: Attribution) -> Any:
    if len(graphs.handoffs) <= 1:
        return next(iter(graphs.handoffs.values()), None)
    table, nesting = attribution.table, attribution.nesting
    ops = np.flatnonzero((table.kind == Kind.OP) & (nesting.root_event >= 0))
    roots = nesting.module[nesting.root_event[ops]]
    spent = {root: int(nesting.self_ns[ops][roots == root].sum()) for root in graphs.handoffs}
    return graphs.handoffs[max(spent, key=lambda root: spent[root])]


def _with_memory(capture: Capture, record: TelemetryRecord, context: Context) -> tuple[TelemetryRecord, Any]:
    session = capture.memory_session
    if session is None or session.allocations is None or session.table is None or record.memory is None:
        return record, None
    attribution = attribute(session.table, context)
    hosts = np.flatnonzero(session.table.kind <= Kind.ANNOTATION)
    row_of = dict(zip(session.table.correlation[hosts].tolist(), hosts.tolist(), strict=True))

    def place_of(correlation: int) -> tuple[str | None, str | None]:
        row = row_of.get(correlation)
        places = attribution.places
        return (None, None) if row is None else (places.node_name(row), places.module_path(row))

    allocations = session.allocations
    update: dict[str, Any] = {"peak_nodes": peak_shares(allocations, place_of)}
    if record.memory.peak_memory_bytes is None and (peak := peak_bytes(allocations)) is not None:
        update |= {"peak_memory_bytes": peak, "source": "the profiler's memory pass, within one call", "reason": None}
    memory = record.memory.model_copy(update=update)
    return record.model_copy(update={"memory": memory}), memory_frame(allocations, place_of)


def _record(
    capture: Capture,
    tables: OpTables | None,
    attribution: Attribution | None,
    graphs: RootGraphs,
    markers: ModuleMarkers,
) -> TelemetryRecord:
    seen, session = capture.observation, capture.session
    paused_ms = session.paused_ns / 1e6 if session is not None else 0.0
    profiled_ms = max(0.0, seen.wall_ms - paused_ms) / capture.num_calls
    wall_ms = statistics.median(capture.plain_ms) if capture.plain_ms else None
    if wall_ms is None and capture.items_per_call is None:
        # The code ran once, profiled: that is its wall time.
        wall_ms = profiled_ms
    tokens_per_call = capture.items_per_call if capture.item_unit == "tokens" else None
    phases = set(graphs.phases.values())
    return TelemetryRecord(
        bottleneck=tables.bottleneck if tables else None,
        events=tables.ops[:MAX_RECORD_ROWS] if tables else (),
        gpu=_gpu(capture, attribution, wall_ms or profiled_ms),
        behavior=_behavior(seen),
        name=capture.name,
        workload=capture.workload,
        phase=capture.phase or (next(iter(phases)) if len(phases) == 1 else None),
        wall_ms=wall_ms,
        profiled_ms=profiled_ms if attribution is not None else None,
        num_repeats=max(1, len(capture.plain_ms)),
        items_per_call=capture.items_per_call,
        item_unit=capture.item_unit,
        tokens_per_second=tokens_per_call / (wall_ms / 1e3) if tokens_per_call and wall_ms else None,
        total_self_ms=tables.total_self_ms if tables else None,
        attributed_share=tables.owners.exact_node if tables and tables.owners else None,
        owners=tables.owners if tables else None,
        kernels=tables.kernels[:MAX_RECORD_ROWS] if tables else (),
        memory=memory_of(seen, [call.module for call in markers.roots.values()]),
        device=capture.device_info or _describe(attribution),
        num_events=_num_events(capture, attribution),
        num_dropped_events=attribution.table.num_dropped if attribution is not None else None,
        num_graph_nodes=len(graphs.nodes()) or None,
        graph_note=graphs.note,
        notes=tuple(
            [
                *capture.notes,
                *_budget_notes(capture),
                *_compile_notes(attribution),
                *([markers.note] if markers.note else []),
            ]
        ),
    )


def _num_events(capture: Capture, attribution: Attribution | None) -> int | None:
    session = capture.session
    if attribution is None or session is None:
        return None
    # No events of ours is not the same as none at all.
    return len(attribution.table) or (None if session.is_taken_over else 0)


def _budget_notes(capture: Capture) -> list[str]:
    session = capture.session
    if session is None or session.table is None:
        return []
    notes = []
    if session.is_taken_over:
        notes.append("Another torch profiler started in the code and took the events; those before it are lost.")
    kept, dropped = len(session.table), session.table.num_dropped
    if dropped:
        notes.append(f"Past the event budget: the first {kept:,} of {kept + dropped:,} events are kept.")
    if session.is_cut:
        notes.append(f"Past the event budget of {kept:,} events the rest of the code ran unprofiled.")
    return notes


def _compile_notes(attribution: Attribution | None) -> list[str]:
    if attribution is None:
        return []
    table, places = attribution.table, attribution.places
    ids = [index for index, label in enumerate(places.labels) if label.text == COMPILING_LABEL]
    rows = np.isin(places.label, ids) & (table.kind == Kind.OP)
    if not rows.any():
        return []
    seconds = float(attribution.nesting.self_ns[rows].sum()) / 1e9
    return [f"torch.compile compiled during this capture ({seconds:.1f} s); run the code once before to leave it out."]


def _describe(attribution: Attribution | None) -> DeviceInfo:
    from agnitra_lab.device.info import describe

    has_kernels = attribution is not None and bool(np.any(attribution.table.kind == Kind.KERNEL))
    return describe("cuda" if has_kernels else "cpu")


def _gpu(capture: Capture, attribution: Attribution | None, wall_ms: float) -> GpuTelemetry:
    seen = capture.observation
    sampled: dict[str, Any] = {
        "sample_period_ms": seen.sample_period_ms if seen.samples else None,
        "samples": tuple(seen.samples),
        "num_samples": len(seen.samples),
        "energy_j": seen.energy_j,
        "energy_reason": seen.energy_reason,
        "throttle": seen.throttle,
        "gpm": seen.gpm,
    }
    if attribution is None or not np.any(attribution.table.kind == Kind.KERNEL):
        reason = "no GPU kernel was recorded" if torch.cuda.is_available() else NO_CUDA
        return GpuTelemetry(reason=reason, **sampled)
    # Kernel times do not stretch under the profiler, the host's do: the plain wall time is the honest divisor.
    device_ms = busy_ms(attribution) / capture.num_calls
    return GpuTelemetry(
        gpu_utilisation=min(1.0, device_ms / wall_ms) if wall_ms > 0 else None,
        reason=seen.sample_reason,
        busy_ms=device_ms,
        idle=idle_of(attribution, capture.num_calls),
        **sampled,
    )


def _behavior(seen: Observation) -> Behavior:
    readings = [sample.gpu_utilisation for sample in seen.samples if sample.gpu_utilisation is not None]
    powers = [sample.power_w for sample in seen.samples if sample.power_w is not None]
    is_long = seen.wall_ms >= _NVML_WINDOW_MS
    reason = seen.sample_reason
    if readings and not is_long:
        reason = f"the capture took {seen.wall_ms:.0f} ms, and NVML averages over up to {_NVML_WINDOW_MS:.0f} ms"
    return Behavior(
        # NVML reads in percent.
        gpu_util_mean=min(1.0, statistics.fmean(readings) / 100.0) if readings and is_long else None,
        reason=reason,
        power_w_mean=statistics.fmean(powers) if powers else None,
        cpu_utilisation=seen.cpu_utilisation,
    )
