"""The timed loop: its order, what stands outside the clock, and what it leaves behind. No absolute times."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agnitra_lab.benchmark import timing
from agnitra_lab.benchmark.equivalence import verify
from agnitra_lab.benchmark.outputs import fingerprint, fingerprints_match
from agnitra_lab.benchmark.timing import is_plain, measure_kernel, sample_kernel, time_group, time_pair
from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.device.exclusive import DeviceTurn, take_turns


def _inputs(_index: int) -> Inputs:
    return (torch.randn(64),), {}


def test_calls_alternate_a_b_b_a_then_b_a_a_b() -> None:
    calls: list[str] = []
    time_pair(
        lambda x: calls.append("A"), lambda x: calls.append("B"), _inputs,
        device="cpu", budget_s=0.0, min_pairs=4, max_pairs=4,
    )  # fmt: skip
    timed = "".join(calls)[-8:]
    assert timed == "ABBABAAB"


@pytest.mark.parametrize("num_sides", [2, 3, 5, 6])
def test_in_a_group_each_side_follows_each_other_one_equally_often(num_sides: int) -> None:
    calls: list[str] = []
    sides = {name: (lambda x, name=name: calls.append(name)) for name in "abcdef"[:num_sides]}
    found = time_group(
        sides, _inputs, device="cpu", budget_s=0.0, min_rounds=2 * num_sides, max_rounds=2 * num_sides
    )  # fmt: skip
    timed = calls[-2 * num_sides * num_sides :]
    rounds = [timed[start : start + num_sides] for start in range(0, len(timed), num_sides)]
    assert all(sorted(one) == sorted(sides) for one in rounds)
    followers = Counter(pair for one in rounds for pair in itertools.pairwise(one))
    assert set(followers.values()) == {2}
    assert len(followers) == num_sides * (num_sides - 1)
    assert {name: times.size for name, times in found.wall_ms.items()} == dict.fromkeys(sides, 2 * num_sides)
    assert found.device_ms == {}


def test_a_timed_loop_has_the_device_to_itself(tmp_path: Path) -> None:
    other, seen = DeviceTurn(tmp_path / "lock"), []

    def call(x: torch.Tensor) -> None:
        waiting = threading.Thread(target=lambda: other.hold().__enter__(), daemon=True)
        if not seen:
            seen.append(waiting)
            waiting.start()
        seen[0].join(timeout=0.01)
        assert seen[0].is_alive()

    take_turns(tmp_path / "lock")
    try:
        time_group({"only": call}, _inputs, device="cpu", budget_s=0.0, min_rounds=4)
        measured = len(seen)
    finally:
        take_turns(None)
    assert measured == 1
    seen[0].join(timeout=10)
    assert not seen[0].is_alive()


def test_pairs_are_as_many_as_asked_and_every_time_is_positive() -> None:
    found = time_pair(torch.sum, torch.sum, _inputs, device="cpu", budget_s=0.0, min_pairs=12)
    assert found.baseline_ms.size == found.candidate_ms.size == 12
    assert (found.baseline_ms > 0).all()
    assert found.baseline_device_ms is None


def test_no_more_than_the_most_pairs_are_taken() -> None:
    found = time_pair(torch.sum, torch.sum, _inputs, device="cpu", budget_s=60.0, max_pairs=6)
    assert found.candidate_ms.size == 6


def test_preparation_stands_outside_the_clock() -> None:
    def slow_inputs(index: int) -> Inputs:
        time.sleep(0.02)
        return _inputs(index)

    found = time_pair(
        torch.sum, torch.sum, slow_inputs, device="cpu", budget_s=0.0, min_pairs=4, reset=lambda side: time.sleep(0.02)
    )
    assert np.median(found.baseline_ms) < 20


def test_a_call_that_sleeps_is_timed_as_longer() -> None:
    found = time_pair(
        torch.sum, lambda x: time.sleep(0.01), _inputs, device="cpu", budget_s=0.0, min_pairs=4, max_pairs=4
    )
    assert (found.candidate_ms > 9).all()
    assert np.median(found.candidate_ms / found.baseline_ms) > 1


def test_consecutive_calls_never_see_the_same_address() -> None:
    source = torch.randn(1000)
    addresses: list[int] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        addresses.append(x.data_ptr())
        return x

    time_pair(note, note, lambda index: ((source.clone(),), {}), device="cpu", budget_s=0.0, min_pairs=4)
    assert all(left != right for left, right in itertools.pairwise(addresses))


def test_grad_mode_is_off_in_each_call_and_the_collector_rests() -> None:
    seen: list[tuple[bool, bool]] = []

    def note(x: torch.Tensor) -> None:
        seen.append((torch.is_grad_enabled(), gc.isenabled()))

    time_pair(note, note, _inputs, device="cpu", budget_s=0.0, min_pairs=4, max_pairs=4)
    assert seen[-8:] == [(False, False)] * 8
    assert torch.is_grad_enabled()
    assert gc.isenabled()


def test_the_collector_is_back_on_after_a_call_that_raises() -> None:
    calls = iter(range(100))

    def breaks_late(x: torch.Tensor) -> None:
        if next(calls) > 5:
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        time_pair(torch.sum, breaks_late, _inputs, device="cpu", budget_s=0.0)
    assert gc.isenabled()


def test_a_call_that_replaces_the_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def cheat(x: torch.Tensor) -> None:
        monkeypatch.setattr(time, "perf_counter_ns", lambda: 0)
        time.sleep(0.005)

    found = time_pair(torch.sum, cheat, _inputs, device="cpu", budget_s=0.0, min_pairs=4, max_pairs=4)
    assert (found.candidate_ms > 4).all()


def test_every_output_leaves_a_fingerprint_with_its_side_and_round() -> None:
    found = time_pair(torch.neg, torch.neg, _inputs, device="cpu", budget_s=0.0, min_pairs=4, max_pairs=4)
    rounds = [index for side, index, _ in found.prints if side == "baseline"]
    assert rounds == sorted(set(rounds)) == [index for side, index, _ in found.prints if side == "candidate"]
    assert rounds == list(range(len(rounds)))


def test_the_number_of_threads_is_left_alone() -> None:
    before = torch.get_num_threads()
    time_pair(torch.sum, torch.sum, _inputs, device="cpu", budget_s=0.0, min_pairs=2)
    assert torch.get_num_threads() == before


def test_a_kernel_is_measured_many_times_and_the_slower_one_takes_longer() -> None:
    calls = []

    def slow() -> None:
        calls.append(1)
        time.sleep(0.004)

    assert measure_kernel(slow, device="cpu") > measure_kernel(lambda: None, device="cpu")
    assert len(calls) >= 2 + timing._MIN_KERNEL_SAMPLES


def test_sampling_a_kernel_ends_when_it_is_hopeless_and_the_last_sample_is_not_asked_about() -> None:
    seen: list[int] = []

    def is_hopeless(samples: Sequence[float], after: int) -> bool:
        seen.append(len(samples))
        return len(samples) == after

    samples, is_cut = sample_kernel(lambda: None, device="cpu", is_hopeless=lambda taken: is_hopeless(taken, 4))
    assert (len(samples), is_cut, seen) == (4, True, [1, 2, 3, 4])
    seen.clear()
    samples, is_cut = sample_kernel(lambda: None, device="cpu", is_hopeless=lambda taken: is_hopeless(taken, 99))
    assert len(samples) == len(seen) + 1 and not is_cut


def test_a_kernel_that_cannot_launch_raises_its_own_error() -> None:
    def broken() -> None:
        raise RuntimeError("out of shared memory")

    with pytest.raises(RuntimeError, match="shared memory"):
        measure_kernel(broken, device="cpu")


OUTPUTS: dict[str, Any] = {
    "float32": torch.randn(1000, generator=torch.Generator().manual_seed(0)),
    "bfloat16": torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "integers": torch.arange(100),
    "bool": torch.arange(100) % 7 == 0,
    "complex": torch.randn(50, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)),
    "empty": torch.empty(0),
    "with nan": torch.tensor([1.0, float("nan"), 2.0]),
    "nested": {"a": [torch.ones(3), torch.arange(4.0)]},
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_fingerprint_matches_itself(name: str) -> None:
    prints = fingerprint(OUTPUTS[name])
    assert fingerprints_match(fingerprint(OUTPUTS[name]), prints, [1e-4] * len(prints))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "integers", "bool", "complex"])
def test_a_fingerprint_differs_from_that_of_zeros_and_of_a_flipped_output(name: str) -> None:
    output = OUTPUTS[name]
    wanted = fingerprint(output)
    for other in (torch.zeros_like(output), output.flip(0)):
        assert not fingerprints_match(fingerprint(other), wanted, [1e-4])


def test_a_fingerprint_forgives_reordered_sums() -> None:
    output = OUTPUTS["float32"]
    assert fingerprints_match(fingerprint(output * (1 + 1e-6)), fingerprint(output), [1e-4])


def test_outputs_that_only_just_agree_show_nothing_of_fresh_inputs() -> None:
    model = torch.nn.Linear(8, 8)
    workload = Workload("linear", model, (torch.randn(16, 8),))
    for scale, agrees in ((1.0, True), (1 + 2e-4, True), (1 + 8e-4, False)):
        found = verify(workload, lambda x, scale=scale: model(x) * scale)
        assert found.agrees_by_prints == agrees
        for seed, prints in found.candidate_prints.items():
            assert fingerprints_match(prints, found.baseline_prints[seed], found.rtols)


@pytest.mark.parametrize(("is_brief", "least", "most"), [(True, 20, 24), (False, 50, 54)])
def test_a_timing_ends_once_more_pairs_would_change_nothing(is_brief, least, most, monkeypatch):
    # A clock that only the two sides move: a busy machine would make their times spread until the last pair.
    now_ns = 0

    def lasting(ms: float):
        def side(x):
            nonlocal now_ns
            now_ns += int(ms * 1e6)

        return side

    monkeypatch.setattr(timing, "_clock_ns", lambda: now_ns)
    found = time_pair(lasting(4.0), lasting(1.0), _inputs, device="cpu", budget_s=60.0, is_brief=is_brief)
    assert least <= len(found.baseline_ms) <= most


@pytest.mark.parametrize(
    ("baseline", "candidate", "expected"),
    [
        ([30.0] * 20, [1.0] * 20, True),
        ([1.0] * 20, [30.0] * 20, True),
        ([30.0] * 19, [1.0] * 19, False),
        ([1.2] * 40, [1.0] * 40, False),
        ([30.0] * 20, [1.0, 1.4] * 10, False),
    ],
    ids=["plainly faster", "plainly slower", "too few", "close", "its own time is not known"],
)
def test_pairs_are_enough_when_the_faster_side_and_the_candidates_own_time_are_plain(baseline, candidate, expected):
    assert is_plain(baseline, candidate, 20) is expected
