"""What the time line says as a whole: the device's busy time, why it was idle, and the picture of both."""

from __future__ import annotations

import numpy as np

from agnitra_lab.contracts import IdleTime, Timeline
from agnitra_lab.profiler.event_table import Kind
from agnitra_lab.profiler.idle import busy_bins, idle_time, union_ns
from agnitra_lab.profiler.places import Attribution

NUM_BINS = 120


def busy_ms(attribution: Attribution) -> float:
    """Return the milliseconds in which at least one kernel ran."""
    table = attribution.table
    kernels = table.kind == Kind.KERNEL
    return union_ns(table.start_ns[kernels], table.end_ns[kernels]) / 1e6


def idle_of(attribution: Attribution, num_calls: int) -> IdleTime | None:
    """Split the device's time without a kernel by cause, over the span of the capture's events.

    The host is slower under the profiler, so what is launch-bound here is an upper bound of what it is without.
    """
    table, launch = attribution.table, attribution.nesting.launch
    kernels = np.flatnonzero(table.kind == Kind.KERNEL)
    window = _window(attribution)
    if not len(kernels) or window is None:
        return None
    launched = launch[kernels]
    launch_start_ns = np.where(launched >= 0, table.start_ns[np.maximum(launched, 0)], -1)
    return idle_time(table.start_ns[kernels], table.end_ns[kernels], launch_start_ns, *window, num_calls=num_calls)


def timeline_of(attribution: Attribution) -> Timeline | None:
    """Return the capture in equal bins, None when nothing ran."""
    table, nesting = attribution.table, attribution.nesting
    window = _window(attribution)
    if window is None:
        return None
    ops = np.flatnonzero((table.kind == Kind.OP) & (nesting.top_op == np.arange(len(table))))
    kernels = np.flatnonzero(table.kind == Kind.KERNEL)
    return Timeline(
        bin_ms=(window[1] - window[0]) / NUM_BINS / 1e6,
        host_busy=busy_bins(table.start_ns[ops], table.end_ns[ops], *window, NUM_BINS),
        device_busy=(
            busy_bins(table.start_ns[kernels], table.end_ns[kernels], *window, NUM_BINS) if len(kernels) else ()
        ),
    )


def _window(attribution: Attribution) -> tuple[int, int] | None:
    table = attribution.table
    is_program = (table.kind == Kind.OP) | (table.kind == Kind.KERNEL) | (table.kind == Kind.MARKER)
    rows = np.flatnonzero(is_program & ~attribution.nesting.is_own)
    if not len(rows):
        return None
    return int(table.start_ns[rows].min()), int(table.end_ns[rows].max())
