"""Put one profile together: attribution, summed rows and observations become a `Telemetry`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from agnitra_lab.contracts import Behavior, DeviceInfo, GpuTelemetry, TelemetryRecord
from agnitra_lab.profiler.attribution import Attribution, attribute
from agnitra_lab.profiler.event_table import Kind
from agnitra_lab.profiler.graphs import RootGraphs, capture_roots
from agnitra_lab.profiler.markers import ModuleMarkers, module_paths
from agnitra_lab.profiler.observe import NO_CUDA, SAMPLE_PERIOD_MS, Observation, memory_of
from agnitra_lab.profiler.rows import OpTables, RowKey, first_shapes, sum_rows
from agnitra_lab.profiler.session import ProfilerSession
from agnitra_lab.profiler.sweep import busy_ns
from agnitra_lab.profiler.telemetry import Telemetry

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
        num_calls: profiled calls of the target.
        plain_ms: wall times of unprofiled calls.
        should_trace: whether to capture graphs.
        name, workload, phase, items_per_call, item_unit: for the record.
        device_info: of the device; described when None.
        notes: in plain words, for the user.
    """

    observation: Observation
    session: ProfilerSession | None
    shape_session: ProfilerSession | None = None
    num_calls: int = 1
    plain_ms: list[float] = field(default_factory=list)
    should_trace: bool = True
    name: str | None = None
    workload: str | None = None
    phase: Literal["prefill", "decode"] | None = None
    items_per_call: int | None = None
    item_unit: str | None = None
    device_info: DeviceInfo | None = None
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
        return Telemetry(record=_record(capture, None, RootGraphs(), None, ModuleMarkers(), num_events=None))
    markers = session.markers
    graphs = capture_roots(markers.roots) if capture.should_trace else RootGraphs(note="no graph was asked for")
    attribution = attribute(session.table, _paths(markers), graphs.handoffs)
    has_device = bool(np.any(session.table.kind == Kind.KERNEL))
    tables = sum_rows(
        attribution,
        has_device=has_device,
        num_calls=capture.num_calls,
        shapes=_recorded_shapes(capture, graphs),
        label=graphs.label,
    )
    record = _record(capture, tables, graphs, attribution, markers, num_events=len(session.table))
    telemetry = Telemetry(
        record=record,
        all_ops=tables.ops,
        all_kernels=tables.kernels,
        graph=_main_graph(graphs, attribution),
        graph_nodes=graphs.nodes(),
        graph_capture_ms=graphs.capture_ms,
        attribution=attribution,
    )
    capture.session = capture.shape_session = None
    return telemetry


def _paths(markers: ModuleMarkers) -> dict[int, tuple[int, str]]:
    return module_paths({index: call.module for index, call in markers.roots.items()}, markers.modules)


def _recorded_shapes(capture: Capture, graphs: RootGraphs) -> dict[RowKey, tuple[int, ...]] | None:
    session = capture.shape_session
    if session is None or session.table is None:
        return None
    handoffs = _by_module(session.markers, capture.session.markers if capture.session else session.markers, graphs)
    return first_shapes(attribute(session.table, _paths(session.markers), handoffs))


def _by_module(markers: ModuleMarkers, traced: ModuleMarkers, graphs: RootGraphs) -> dict[int, Any]:
    """Carry graphs from one session's marker numbers to another's, by the identity of the root modules."""
    graph_of = {id(traced.modules[index]): handoff for index, handoff in graphs.handoffs.items()}
    return {index: graph_of[id(call.module)] for index, call in markers.roots.items() if id(call.module) in graph_of}


def _main_graph(graphs: RootGraphs, attribution: Attribution) -> Any:
    if len(graphs.handoffs) <= 1:
        return next(iter(graphs.handoffs.values()), None)
    spent: dict[int, int] = dict.fromkeys(graphs.handoffs, 0)
    for row in np.flatnonzero(attribution.table.kind == Kind.OP).tolist():
        root = attribution.places[row].root
        if root in spent:
            spent[root] += int(attribution.nesting.self_ns[row])
    return graphs.handoffs[max(spent, key=lambda root: spent[root])]


def _record(
    capture: Capture,
    tables: OpTables | None,
    graphs: RootGraphs,
    attribution: Attribution | None,
    markers: ModuleMarkers,
    *,
    num_events: int | None,
) -> TelemetryRecord:
    seen = capture.observation
    profiled_ms = seen.wall_ms / capture.num_calls
    is_timed_cell = not capture.plain_ms and capture.workload is None
    wall_ms = statistics.median(capture.plain_ms) if capture.plain_ms else profiled_ms if is_timed_cell else None
    tokens_per_call = capture.items_per_call if capture.item_unit == "tokens" else None
    return TelemetryRecord(
        bottleneck=tables.bottleneck if tables else None,
        events=tables.ops[:MAX_RECORD_ROWS] if tables else (),
        gpu=_gpu(capture, attribution, wall_ms or profiled_ms),
        behavior=_behavior(seen),
        name=capture.name,
        workload=capture.workload,
        phase=capture.phase,
        wall_ms=wall_ms,
        profiled_ms=profiled_ms if attribution is not None else None,
        num_repeats=max(1, len(capture.plain_ms)),
        items_per_call=capture.items_per_call,
        item_unit=capture.item_unit,
        tokens_per_second=tokens_per_call / (wall_ms / 1e3) if tokens_per_call and wall_ms else None,
        total_self_ms=tables.total_self_ms if tables else None,
        attributed_share=tables.attributed_share if tables else None,
        kernels=tables.kernels[:MAX_RECORD_ROWS] if tables else (),
        memory=memory_of(seen, [call.module for call in markers.roots.values()]),
        device=capture.device_info or _describe(attribution),
        num_events=num_events,
        num_graph_nodes=len(graphs.nodes()) or None,
        graph_note=graphs.note,
        notes=tuple([*capture.notes, *([markers.note] if markers.note else [])]),
    )


def _describe(attribution: Attribution | None) -> DeviceInfo:
    from agnitra_lab.device.info import describe

    has_kernels = attribution is not None and bool(np.any(attribution.table.kind == Kind.KERNEL))
    return describe("cuda" if has_kernels else "cpu")


def _gpu(capture: Capture, attribution: Attribution | None, wall_ms: float) -> GpuTelemetry:
    seen = capture.observation
    if attribution is None or not np.any(attribution.table.kind == Kind.KERNEL):
        reason = "no GPU kernel was recorded" if torch.cuda.is_available() else NO_CUDA
        return GpuTelemetry(reason=reason, samples=tuple(seen.samples))
    # Kernel times do not stretch under the profiler, the host's do: the plain wall time is the honest divisor.
    busy_ms = busy_ns(attribution.table) / 1e6 / capture.num_calls
    return GpuTelemetry(
        gpu_utilisation=min(1.0, busy_ms / wall_ms) if wall_ms > 0 else None,
        reason=seen.sample_reason,
        busy_ms=busy_ms,
        sample_period_ms=SAMPLE_PERIOD_MS if seen.samples else None,
        samples=tuple(seen.samples),
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
