"""Where a device stood still and why: the gaps between intervals, by the kernel that ended each, and busy shares.

Every sum is over the union of the intervals, so that kernels that overlap on several streams count once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agnitra_lab.contracts import IdleTime

_Int64 = NDArray[np.int64]
_NEVER = np.iinfo(np.int64).max


def idle_time(
    kernel_start_ns: ArrayLike,
    kernel_end_ns: ArrayLike,
    launch_start_ns: ArrayLike,
    window_start_ns: int,
    window_end_ns: int,
    *,
    num_calls: int = 1,
) -> IdleTime:
    """Split a window's time without a kernel by what the device waited for.

    A gap is judged by the kernel that ends it. Up to the start of that kernel's launch call the device waited for the
    host (not at all when the launch came before the gap); from there on for the kernel: a dependency, or the device's
    own launch latency. Where several kernels start together, the earliest known launch counts. Where no kernel
    follows, nothing was launched, and the tail of the window is the host's.

    Args:
        kernel_start_ns, kernel_end_ns: int64[n], all GPU work of all streams, in any order; empty intervals are left
            out. Work after the window only tells what the window's tail waited for.
        launch_start_ns: int64[n], when each launch call began on the host, on the same clock; negative for unknown.
        window_start_ns, window_end_ns: the stretch of time to account for.
        num_calls: calls of the target that the window holds; times and the number of gaps are of one call.

    Returns:
        The idle time; `host_wait_ms + kernel_wait_ms + unknown_ms`, added in this order, is `idle_ms` to the last bit.
        `launch_bound_share` is None for an empty window.
    """
    window_ns = max(0, int(window_end_ns) - int(window_start_ns))
    start, end, launch = _by_start(kernel_start_ns, kernel_end_ns, launch_start_ns, int(window_start_ns))
    # What follows the last kernel is a gap too; a launch at the window's end leaves all of it to the host.
    gap_end = np.minimum(np.append(start, window_ns), window_ns)
    launch = np.append(launch, window_ns)
    gap_start = np.minimum(np.maximum.accumulate(np.append(0, end)), window_ns)
    is_gap = gap_end > gap_start
    gap_start, gap_end, launch = gap_start[is_gap], gap_end[is_gap], launch[is_gap]
    is_known = launch != _NEVER
    launched = np.clip(launch, gap_start, gap_end)
    host_ns = int((launched - gap_start)[is_known].sum())
    kernel_ns = int((gap_end - launched)[is_known].sum())
    unknown_ns = int((gap_end - gap_start)[~is_known].sum())
    host_ms, kernel_ms, unknown_ms = (part / 1e6 / num_calls for part in (host_ns, kernel_ns, unknown_ns))
    num_gaps = len(gap_start)
    return IdleTime(
        idle_ms=host_ms + kernel_ms + unknown_ms,
        host_wait_ms=host_ms,
        kernel_wait_ms=kernel_ms,
        unknown_ms=unknown_ms,
        launch_bound_share=host_ns / window_ns if window_ns else None,
        num_gaps=max(1, round(num_gaps / num_calls)) if num_gaps else 0,
    )


def busy_bins(
    start_ns: ArrayLike, end_ns: ArrayLike, window_start_ns: int, window_end_ns: int, num_bins: int
) -> tuple[float, ...]:
    """Return the share of each of `num_bins` equal bins of the window that the union of the intervals covers.

    Args:
        start_ns, end_ns: int64[n], in any order.
        window_start_ns, window_end_ns: what the bins divide.
        num_bins: how many bins.

    Returns:
        `num_bins` shares from 0 to 1, 0 where nothing ran; empty for an empty window or no bins.
    """
    window_ns = int(window_end_ns) - int(window_start_ns)
    if window_ns <= 0 or num_bins <= 0:
        return ()
    start, end = _union(start_ns, end_ns)
    if not len(start):
        return (0.0,) * num_bins
    # Nanoseconds since 1970 do not fit a float's 53 bits; those since the window's start do.
    corners = (np.stack([start, end], axis=1) - int(window_start_ns)).ravel()
    covered = np.zeros(len(corners), dtype=np.int64)
    covered[1::2] = np.cumsum(end - start)
    covered[2::2] = covered[1:-1:2]
    at_edge = np.interp(np.linspace(0, window_ns, num_bins + 1), corners, covered)
    return tuple(np.clip(np.diff(at_edge) * (num_bins / window_ns), 0.0, 1.0).tolist())


def union_ns(start_ns: ArrayLike, end_ns: ArrayLike) -> int:
    """Return the time that at least one interval covers, in nanoseconds.

    Args:
        start_ns, end_ns: int64[n], in any order.
    """
    start, end = _union(start_ns, end_ns)
    return int((end - start).sum())


def _union(start_ns: ArrayLike, end_ns: ArrayLike) -> tuple[_Int64, _Int64]:
    """Merge intervals that overlap or touch; the merged ones are in order, apart, and none is empty."""
    start, end = np.asarray(start_ns, dtype=np.int64), np.asarray(end_ns, dtype=np.int64)
    is_kept = end > start
    start, end = start[is_kept], end[is_kept]
    if not len(start):
        return start, end
    order = np.argsort(start, kind="stable")
    start, reached = start[order], np.maximum.accumulate(end[order])
    # A new one opens where an interval starts after everything before it has ended.
    opens = np.flatnonzero(start[1:] > reached[:-1])
    return start[np.append(0, opens + 1)], reached[np.append(opens, len(start) - 1)]


def _by_start(
    start_ns: ArrayLike, end_ns: ArrayLike, launch_ns: ArrayLike, origin_ns: int
) -> tuple[_Int64, _Int64, _Int64]:
    """Order kernels by start, then by launch; times count from the origin, an unknown launch is `_NEVER`."""
    start, end, launch = (np.asarray(column, dtype=np.int64) for column in (start_ns, end_ns, launch_ns))
    is_kept = end > start
    start, end, launch = start[is_kept] - origin_ns, end[is_kept] - origin_ns, launch[is_kept]
    launch = np.where(launch < 0, _NEVER, launch - origin_ns)
    order = np.argsort(start, kind="stable")
    if np.any(np.diff(start[order]) == 0):
        # Two keys take several times as long as one, and few captures have kernels that start together.
        order = np.lexsort((launch, start))
    return start[order], end[order], launch[order]
