"""Baseline against candidate, end to end on the CPU with small models."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from agnitra_lab.benchmark.compare import compare
from agnitra_lab.contracts.device import DevicePeaks
from agnitra_lab.contracts.measurement import Comparison
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import PatchError

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
WORKLOAD = Workload("mlp", MODEL, (torch.randn(8, 16),), items_per_call=8, item_unit="samples")


def _slowed(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.005)
    return MODEL(x)


def test_a_candidate_that_sleeps_is_slower() -> None:
    found = compare(WORKLOAD, _slowed, candidate_name="slowed", budget_s=0.3)
    assert found.verdict == "slower"
    assert found.speedup.high < 1


def test_a_candidate_without_the_baselines_sleep_is_faster() -> None:
    found = compare(WORKLOAD, MODEL, baseline=_slowed, baseline_name="slowed", candidate_name="plain", budget_s=0.3)
    assert found.verdict == "faster"
    assert found.speedup.low > 1
    assert found.candidate_items_per_second > found.baseline_items_per_second
    assert found.candidate_items_per_second == pytest.approx(8e3 / found.candidate_latency.latency_ms_p50)


def test_a_comparison_survives_json() -> None:
    found = compare(WORKLOAD, MODEL, candidate_name="same", budget_s=0.0, seeds=(4, 5))
    assert Comparison.from_json(found.to_json()) == found
    assert found.seeds == (4, 5)
    assert found.baseline == "eager"


def test_outputs_that_turn_wrong_after_the_check_are_caught_in_the_timed_loop() -> None:
    num_calls = 0

    def honest_at_first(x: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return MODEL(x) if num_calls <= 5 else torch.zeros(8, 8)

    found = compare(WORKLOAD, honest_at_first, candidate_name="cheat", budget_s=0.0)
    assert found.verdict == "not_equivalent"
    assert "timed outputs differ" in found.equivalence.problems[-1]


def test_a_wrong_candidate_is_timed_shortly_for_the_record() -> None:
    found = compare(WORKLOAD, lambda x: torch.zeros(8, 8), candidate_name="zeros", budget_s=5.0)
    assert found.verdict == "not_equivalent"
    assert found.candidate_latency.num_samples >= 4


def test_a_time_under_the_physical_floor_is_refused() -> None:
    peaks = DevicePeaks(copy_bandwidth_gb_per_s=10.0, gemm_tflop_per_s=1.0, gemm_dtype="float32")

    def slow(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.15)
        return MODEL(x)

    found = compare(
        WORKLOAD, MODEL, candidate_name="too fast", baseline=slow, budget_s=0.0, floor_ms=500.0, peaks=peaks
    )
    assert found.verdict == "not_equivalent"
    assert "faster than the device allows" in found.equivalence.problems[-1]
    assert found.floor_reason is not None
    assert "1 TFLOP/s in float32" in found.floor_reason


def test_a_floor_that_the_baseline_undercuts_says_nothing_of_a_candidate() -> None:
    found = compare(WORKLOAD, MODEL, candidate_name="same", budget_s=0.0, floor_ms=1e6)
    assert found.equivalence.is_equivalent
    assert (found.floor_ms, found.floor_reason) == (None, None)


def test_a_candidate_that_raises_is_named_with_its_reason() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no kernel for this shape")

    with pytest.raises(PatchError, match=r"'broken' does not run.*no kernel for this shape"):
        compare(WORKLOAD, broken, candidate_name="broken")


def test_a_candidate_that_raises_while_it_is_timed_is_named_too() -> None:
    num_calls = 0

    def breaks_late(x: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 5:
            raise RuntimeError("late")
        return MODEL(x)

    with pytest.raises(PatchError, match=r"raised while it was timed.*late"):
        compare(WORKLOAD, breaks_late, candidate_name="late", budget_s=0.0)


class Counter(nn.Module):
    """Adds up what it has seen, so that each call depends on the ones before it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total += x.sum(0)
        return self.total.clone()


def test_state_is_put_back_before_each_timed_call_and_at_the_end() -> None:
    model = Counter()
    workload = Workload("counter", model, (torch.randn(8, 16),))
    found = compare(workload, lambda x: model(x), candidate_name="same", budget_s=0.0)
    assert found.equivalence.problems == ()
    assert model.total.abs().sum() == 0


@pytest.mark.slow
class Counting(nn.Module):
    """Writes to the cache that it is given, at a place that the cache counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
        cache["keys"].index_copy_(0, cache["length"].reshape(1), self.project(x))
        cache["length"].add_(1)
        return cache["keys"].cumsum(0)


def test_inputs_of_a_cache_that_stays_in_its_place_are_drawn_as_it_was_given() -> None:
    """As transformers' static caches, which promise their address; here nothing draws them but their own values."""
    cache = {"keys": torch.randn(64, 16), "length": torch.tensor(3)}
    for tensor in cache.values():
        torch._dynamo.mark_static_address(tensor)
    kept = {name: tensor.clone() for name, tensor in cache.items()}
    addresses: set[int] = set()

    class Twin(Counting):
        def forward(self, x: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
            addresses.add(given["keys"].data_ptr())
            return super().forward(x, given)

    model, twin = Counting().eval(), Twin().eval()
    twin.load_state_dict(model.state_dict())
    workload = Workload("counting", model, (torch.randn(1, 16), cache))
    found = compare(workload, twin, candidate_name="same", budget_s=0.2)
    assert found.equivalence.is_equivalent, found.equivalence.problems
    assert addresses == {cache["keys"].data_ptr()}
    assert all(torch.equal(cache[name], kept[name]) for name in cache)


def test_torch_compile_passes_the_same_gate() -> None:
    pytest.importorskip("triton")
    found = compare(WORKLOAD, torch.compile(MODEL), candidate_name="compile", budget_s=0.3)
    assert found.equivalence.problems == ()
