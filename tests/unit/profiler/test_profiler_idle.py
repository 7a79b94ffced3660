"""Idle time and busy shares, against a count of every nanosecond of small windows."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.profiler.idle import busy_bins, idle_time, union_ns

# Nanoseconds since 1970, as the profiler gives them: beyond the integers that a float holds exactly.
_EPOCH_NS = 1_795_539_875_359_745_795
_KERNELS = st.lists(
    st.tuples(st.integers(-20, 120), st.integers(0, 30), st.one_of(st.just(None), st.integers(0, 60))), max_size=12
)


def _columns(kernels: list[tuple[int, int, int | None]]) -> tuple[list[int], list[int], list[int]]:
    """Start, end and launch of kernels given as (start, duration, lead of the launch or None)."""
    starts = [_EPOCH_NS + start for start, _, _ in kernels]
    ends = [_EPOCH_NS + start + duration for start, duration, _ in kernels]
    launches = [-1 if lead is None else _EPOCH_NS + start - lead for start, _, lead in kernels]
    return starts, ends, launches


def _counted(kernels: list[tuple[int, int, int | None]], window_ns: int) -> tuple[int, int, int, int]:
    """Busy, host, kernel and unknown nanoseconds, one by one."""
    spent = [0, 0, 0, 0]
    for now in range(window_ns):
        if any(start <= now < start + duration for start, duration, _ in kernels):
            spent[0] += 1
            continue
        following = [(start, lead) for start, duration, lead in kernels if start > now and duration]
        first = min((start for start, _ in following), default=None)
        leads = [lead for start, lead in following if start == first and lead is not None]
        if first is None:
            spent[1] += 1
        elif not leads:
            spent[3] += 1
        else:
            spent[1 if now < first - max(leads) else 2] += 1
    return spent[0], spent[1], spent[2], spent[3]


@given(kernels=_KERNELS, window_ns=st.integers(0, 100))
def test_idle_time_is_what_counting_every_nanosecond_gives(
    kernels: list[tuple[int, int, int | None]], window_ns: int
) -> None:
    found = idle_time(*_columns(kernels), _EPOCH_NS, _EPOCH_NS + window_ns)
    busy, host, kernel, unknown = _counted(kernels, window_ns)
    parts = [found.host_wait_ms, found.kernel_wait_ms, found.unknown_ms]
    assert parts == [host / 1e6, kernel / 1e6, unknown / 1e6]
    assert found.idle_ms == pytest.approx((window_ns - busy) / 1e6)
    assert found.launch_bound_share == (host / window_ns if window_ns else None)


@given(kernels=_KERNELS, window_ns=st.integers(0, 100), num_calls=st.integers(1, 7))
def test_the_parts_of_idle_time_sum_to_it_exactly(
    kernels: list[tuple[int, int, int | None]], window_ns: int, num_calls: int
) -> None:
    found = idle_time(*_columns(kernels), _EPOCH_NS, _EPOCH_NS + window_ns, num_calls=num_calls)
    assert found.host_wait_ms + found.kernel_wait_ms + found.unknown_ms == found.idle_ms


@given(kernels=_KERNELS, window_ns=st.integers(1, 100), num_bins=st.integers(1, 40))
def test_the_mean_of_the_bins_is_the_union_over_the_window(
    kernels: list[tuple[int, int, int | None]], window_ns: int, num_bins: int
) -> None:
    starts, ends, _ = _columns(kernels)
    inside = np.clip(np.array([starts, ends], dtype=np.int64), _EPOCH_NS, _EPOCH_NS + window_ns)
    bins = busy_bins(starts, ends, _EPOCH_NS, _EPOCH_NS + window_ns, num_bins)
    assert len(bins) == num_bins
    assert all(0.0 <= share <= 1.0 for share in bins)
    assert fmean(bins) == pytest.approx(union_ns(*inside) / window_ns, abs=1e-12)
    assert union_ns(*inside) == _counted(kernels, window_ns)[0]


def test_a_gap_is_split_at_the_launch_of_the_kernel_that_ends_it() -> None:
    #        kernel 0-10, gap 10-50 with the launch at 35, kernel 50-60, tail to 100
    found = idle_time([0, 50], [10, 60], [0, 35], 0, 100)
    assert (found.host_wait_ms, found.kernel_wait_ms) == ((25 + 40) / 1e6, 15 / 1e6)
    assert found.num_gaps == 2


def test_a_launch_ahead_of_the_gap_leaves_nothing_to_the_host() -> None:
    found = idle_time([0, 50], [10, 100], [0, 5], 0, 100)
    assert (found.host_wait_ms, found.kernel_wait_ms) == (0.0, 40 / 1e6)


def test_overlapping_streams_leave_no_gap() -> None:
    assert idle_time([0, 40], [60, 100], [-1, -1], 0, 100).num_gaps == 0


def test_the_tail_belongs_to_the_host_unless_later_work_was_launched_in_it() -> None:
    assert idle_time([0], [10], [0], 0, 100).host_wait_ms == 90 / 1e6
    followed = idle_time([0, 120], [10, 130], [0, 40], 0, 100)
    assert (followed.host_wait_ms, followed.kernel_wait_ms) == (30 / 1e6, 60 / 1e6)


def test_times_and_gaps_are_of_one_call() -> None:
    found = idle_time([10, 30, 50], [20, 40, 60], [10, 30, 50], 0, 60, num_calls=3)
    assert found.idle_ms == 10 / 1e6
    assert found.num_gaps == 1


def test_nothing_at_all_has_no_union_and_an_idle_window() -> None:
    assert union_ns([], []) == 0
    assert idle_time([], [], [], 0, 100).host_wait_ms == 100 / 1e6
    assert busy_bins([], [], 0, 100, 2) == (0.0, 0.0)


def test_an_empty_window_has_no_bins_and_no_idle_time() -> None:
    assert busy_bins([0], [10], 5, 5, 4) == ()
    found = idle_time([0], [10], [0], 5, 5)
    assert found.idle_ms == 0.0
    assert found.launch_bound_share is None
