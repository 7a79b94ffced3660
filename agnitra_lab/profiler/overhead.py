"""What profiling costs, measured on this machine in this process: the profiler's own events and our markers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from agnitra_lab.contracts import Overhead, TelemetryRecord
from agnitra_lab.profiler.event_table import Kind
from agnitra_lab.profiler.markers import ModuleMarkers
from agnitra_lab.profiler.places import Attribution
from agnitra_lab.profiler.session import ProfilerSession, is_profiler_active

_NUM_CALLS = 100
_NUM_ROUNDS = 5


class _Empty(torch.nn.Module):
    def forward(self) -> None:
        """Do nothing: what a call costs is then the call itself."""


class _Caller(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = _Empty()

    def forward(self) -> None:
        for _ in range(_NUM_CALLS):
            self.part()


@dataclass(frozen=True)
class UnitCosts:
    """Microseconds that each adds to the host's time under the profiler.

    Attributes:
        event_us: an op event.
        marker_us: a module marker.
        launch_us: beside its op event, the launch of a kernel; None without a GPU.
    """

    event_us: float
    marker_us: float
    launch_us: float | None


@cache
def unit_costs(*, has_device: bool) -> UnitCosts | None:
    """Measure what profiling adds, None while a profiler runs.

    Measured once a process, in about 10 ms on a CPU: the best of a few rounds of small calls with and without.
    """
    if is_profiler_active():
        return None
    value = torch.zeros(1, device="cuda" if has_device else "cpu")

    def ops() -> None:
        for _ in range(_NUM_CALLS):
            value.view(1)

    def launches() -> None:
        for _ in range(_NUM_CALLS):
            value.zero_()

    caller = _Caller()
    calls: list[Callable[[], object]] = [ops, caller, *([launches] if has_device else [])]
    plain = [_best_us(call) for call in calls]
    markers = ModuleMarkers()
    with torch.no_grad(), ProfilerSession(has_device=has_device, markers=markers):
        caller()
        profiled = [_best_us(call) for call in calls]
    markers.forget_inputs()
    added = [max(after - before, 0.0) / _NUM_CALLS for before, after in zip(plain, profiled, strict=True)]
    # zero_ is two op events and one launch.
    return UnitCosts(added[0], added[1], max(added[2] - 2 * added[0], 0.0) if has_device else None)


def _best_us(call: Callable[[], object]) -> float:
    best_ns = 2**62
    for _ in range(_NUM_ROUNDS):
        started_ns = time.perf_counter_ns()
        call()
        best_ns = min(best_ns, time.perf_counter_ns() - started_ns)
    return best_ns / 1e3


def overhead_of(
    attribution: Attribution, record: TelemetryRecord, num_calls: int, read_ms: float, graph_ms: float
) -> Overhead:
    """Say what profiling cost a capture: as measured where the code ran without the profiler too, else estimated.

    Args:
        attribution: its events.
        record: with the wall times.
        num_calls: profiled calls.
        read_ms: CPU time from the end of the code to the tables.
        graph_ms: of it, tracing graphs.
    """
    kinds = attribution.table.kind
    has_device = bool(np.any(kinds == Kind.KERNEL))
    costs = unit_costs(has_device=has_device)
    if costs is None:
        return Overhead(read_ms=read_ms, graph_ms=graph_ms)
    num_markers = int(np.count_nonzero(kinds == Kind.MARKER)) // num_calls
    num_ops = int(np.count_nonzero(kinds == Kind.OP)) // num_calls
    launch = attribution.nesting.launch
    num_launches = len(np.unique(launch[launch >= 0])) // num_calls
    marker_ms = num_markers * costs.marker_us / 1e3
    added_ms = marker_ms + (num_ops * costs.event_us + num_launches * (costs.launch_us or 0.0)) / 1e3
    profiled_ms, wall_ms = record.profiled_ms or 0.0, record.wall_ms or 0.0
    is_measured = 0.0 < wall_ms != profiled_ms
    share = (
        1.0 - wall_ms / profiled_ms if is_measured and profiled_ms else added_ms / profiled_ms if profiled_ms else None
    )
    return Overhead(
        marker_us=costs.marker_us,
        num_markers=num_markers,
        event_us=costs.event_us,
        launch_us=costs.launch_us,
        num_launches=num_launches if has_device else None,
        marker_ms=marker_ms,
        share=min(1.0, max(0.0, share)) if share is not None else None,
        is_measured=is_measured,
        read_ms=read_ms,
        graph_ms=graph_ms,
    )
