"""Known cheats around checks and timings: each is caught, in the gate or in the timed loop, with its reason."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from agnitra_lab.benchmark.compare import compare
from agnitra_lab.benchmark.effects import put_back_functions
from agnitra_lab.benchmark.equivalence import check
from agnitra_lab.contracts.workload import Workload

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()
X = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
WORKLOAD = Workload("mlp", MODEL, (X,))
# The gate calls an honest candidate once a seed.
NUM_GATE_CALLS = 3


@pytest.fixture(autouse=True)
def functions_are_put_back() -> Iterator[None]:
    yield
    put_back_functions()


def _gate_problems(candidate: Callable[..., Any], workload: Workload = WORKLOAD) -> str:
    found = check(workload, candidate)
    assert not found.is_equivalent
    return "; ".join(found.problems)


def _timed_problems(candidate: Callable[..., Any], workload: Workload = WORKLOAD) -> str:
    found = compare(workload, candidate, candidate_name="cheat", budget_s=0.0)
    assert found.verdict == "not_equivalent"
    return "; ".join(found.equivalence.problems)


def _after_the_gate(cheat: Callable[..., Any]) -> Callable[..., Any]:
    """Compute honestly for as many calls as the gate makes, and cheat from then on."""
    num_calls = 0

    def candidate(x: torch.Tensor) -> Any:
        nonlocal num_calls
        num_calls += 1
        return MODEL(x) if num_calls <= NUM_GATE_CALLS else cheat(x)

    return candidate


# Remembered and made-up outputs


def test_an_output_remembered_by_shape_is_caught() -> None:
    memory: dict[Any, torch.Tensor] = {}
    assert "tolerances off" in _gate_problems(lambda x: memory.setdefault(x.shape, MODEL(x)).clone())


def test_an_output_remembered_by_address_is_caught_when_the_address_comes_again() -> None:
    memory: dict[int, torch.Tensor] = {}
    # One address for all inputs, as an allocator that reuses a block gives.
    assert "tolerances off" in _gate_problems(lambda x: memory.setdefault(0 * x.data_ptr(), MODEL(x)).clone())


def test_fresh_inputs_of_the_gate_have_addresses_that_no_earlier_call_had() -> None:
    seen: list[torch.Tensor] = []

    def candidate(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return MODEL(x)

    assert check(WORKLOAD, candidate).is_equivalent
    assert len({x.data_ptr() for x in seen}) == len(seen) == NUM_GATE_CALLS
    assert not any(torch.equal(seen[0], later) for later in seen[1:])


@pytest.mark.parametrize(
    "made_up",
    [
        torch.zeros_like,
        torch.ones_like,
        torch.empty_like,
        lambda x: x.clone(),
        lambda x: MODEL(x).mean(0).expand(64, 32).clone(),
    ],
    ids=["zeros", "ones", "unwritten", "the input", "the mean"],
)
def test_a_made_up_output_is_caught(made_up: Callable[..., Any]) -> None:
    assert "output:" in _gate_problems(made_up)


def test_the_input_itself_as_the_output_is_caught_by_its_memory_too() -> None:
    assert "shares memory with input" in _gate_problems(lambda x: x)


def test_zeros_after_the_gate_are_caught_in_the_timed_loop() -> None:
    assert "timed outputs differ" in _timed_problems(_after_the_gate(torch.zeros_like))


def test_an_output_remembered_by_shape_after_the_gate_is_caught_in_the_timed_loop() -> None:
    memory: dict[Any, torch.Tensor] = {}
    cheat = _after_the_gate(lambda x: memory.setdefault(x.shape, MODEL(x)).clone())
    assert "timed outputs differ" in _timed_problems(cheat)


def test_one_buffer_for_all_outputs_is_caught() -> None:
    buffer = torch.empty(64, 32)
    assert "of one call is overwritten by the next" in _gate_problems(lambda x: buffer.copy_(MODEL(x)))


def test_one_buffer_is_allowed_where_the_baseline_returns_one_as_well() -> None:
    buffers = [torch.empty(64, 32), torch.empty(64, 32)]
    workload = Workload("buffer", lambda x: buffers[0].copy_(MODEL(x)), (X,))
    assert check(workload, lambda x: buffers[1].copy_(MODEL(x))).problems == ()


# Late and lazy work


class Lazy(torch.Tensor):
    """Computes when somebody looks."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [MODEL(item.as_subclass(torch.Tensor)) if isinstance(item, Lazy) else item for item in args]
        return func(*plain, **(kwargs or {}))


def test_a_tensor_that_computes_when_it_is_compared_is_caught() -> None:
    assert "has type Lazy" in _gate_problems(lambda x: x.clone().as_subclass(Lazy))


def test_a_function_or_an_object_in_place_of_the_output_is_caught() -> None:
    assert "has type" in _gate_problems(lambda x: lambda: MODEL(x))


def _deferred(x: torch.Tensor) -> torch.Tensor:
    """Return at once, and let a thread fill the output after a while."""
    out, wanted = torch.zeros(64, 32), MODEL(x)
    threading.Timer(0.05, lambda: out.copy_(wanted)).start()
    return out


def test_work_left_to_a_thread_is_caught_in_the_gate() -> None:
    assert "tolerances off" in _gate_problems(_deferred)


def test_work_left_to_a_thread_after_the_gate_is_caught_in_the_timed_loop() -> None:
    assert "timed outputs differ" in _timed_problems(_after_the_gate(_deferred))


# Replaced functions


def _replacing(owner: Any, name: str, function: Any) -> Callable[..., Any]:
    def candidate(x: torch.Tensor) -> torch.Tensor:
        setattr(owner, name, function)
        return MODEL(x)

    return candidate


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (time, "perf_counter"),
        (time, "perf_counter_ns"),
        (torch, "manual_seed"),
        (torch, "randn"),
        (torch, "randint"),
        (torch, "isfinite"),
        (torch.Tensor, "clone"),
        (torch.cuda, "synchronize"),
        (torch.cuda, "Event"),
        (torch.cuda.Event, "elapsed_time"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_replaced_function_is_named_and_put_back(owner: Any, name: str) -> None:
    original = getattr(owner, name)
    problems = _gate_problems(_replacing(owner, name, lambda *args, **kwargs: original(*args, **kwargs)))
    assert f"the candidate replaces {owner.__name__}.{name}" in problems
    assert getattr(owner, name) is original


def test_a_replaced_function_is_put_back_when_the_candidate_raises() -> None:
    original = torch.randn

    def candidate(x: torch.Tensor) -> torch.Tensor:
        torch.randn = torch.zeros  # type: ignore[assignment]
        raise ValueError("no kernel")

    assert "the candidate replaces torch.randn" in _gate_problems(candidate)
    assert torch.randn is original


def test_torchs_own_replacements_are_no_cheat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "manual_seed", torch.no_grad()(torch.manual_seed))
    assert put_back_functions() == []


def test_a_clock_that_stands_still_after_the_gate_does_not_make_a_candidate_faster() -> None:
    original = time.perf_counter_ns

    def slow(x: torch.Tensor) -> torch.Tensor:
        time.perf_counter_ns = lambda: 0  # type: ignore[assignment]
        deadline = original() + 4_000_000
        while original() < deadline:
            pass
        return MODEL(x)

    found = compare(WORKLOAD, _after_the_gate(slow), candidate_name="clock", budget_s=0.0)
    assert found.candidate_latency.latency_ms_p50 > 3.5


# Inputs


def test_zeroing_the_input_after_the_call_is_caught() -> None:
    def candidate(x: torch.Tensor) -> torch.Tensor:
        out = MODEL(x)
        x.zero_()
        return out

    assert "is left different" in _gate_problems(candidate)


def test_a_change_of_one_input_element_by_one_rounding_step_is_caught() -> None:
    def candidate(x: torch.Tensor) -> torch.Tensor:
        out = MODEL(x)
        x[0, 0] *= 1 + 2**-20
        return out

    assert "is left different" in _gate_problems(candidate)


def test_zeroing_the_workloads_own_inputs_so_that_all_later_ones_are_zero_is_caught() -> None:
    own = X.clone()
    workload = Workload("mlp", MODEL, (own,))

    def candidate(x: torch.Tensor) -> torch.Tensor:
        out = MODEL(x)
        own.zero_()
        return out

    assert "timed outputs differ" in _timed_problems(candidate, workload)


def test_answers_kept_for_the_known_seeds_fail_on_any_other_seed() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
    std, mean = (X - X.mean()).square().mean().sqrt(), X.mean()
    known = [torch.randn(X.numel(), generator=generator) * std + mean for generator in generators]
    answers = [(drawn.view_as(X), MODEL(drawn.view_as(X)).detach()) for drawn in known]

    def candidate(x: torch.Tensor) -> torch.Tensor:
        return next((out.clone() for drawn, out in answers if torch.equal(drawn, x)), torch.zeros(64, 32))

    assert check(WORKLOAD, candidate).is_equivalent, "the answers are the right ones"
    assert not check(WORKLOAD, candidate, seeds=(3, 4, 5)).is_equivalent


def test_answers_remembered_by_value_are_not_met_again_while_the_clock_runs() -> None:
    remembered: list[tuple[torch.Tensor, torch.Tensor]] = []
    hits: list[bool] = []

    def candidate(x: torch.Tensor) -> torch.Tensor:
        known = next((out for given, out in remembered if torch.equal(given, x)), None)
        hits.append(known is not None)
        remembered.append((x.clone(), MODEL(x).detach()))
        return remembered[-1][1].clone()

    found = compare(WORKLOAD, candidate, candidate_name="memo", budget_s=1.0)
    timed = hits[-found.candidate_latency.num_samples :]
    # The seeds of the check come back while the calls warm up, one of them at most once the clock runs.
    assert sum(timed) <= 1 < len(timed)


# Precision


class Rounded(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.inner = dtype, MODEL

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_output_of_another_dtype_is_caught(dtype: torch.dtype) -> None:
    assert f"has dtype {dtype}" in _gate_problems(Rounded(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_an_output_rounded_on_its_way_is_caught(dtype: torch.dtype) -> None:
    assert "error against fp64" in _gate_problems(lambda x: MODEL(x).to(dtype).float())


def test_a_complex_or_integer_output_that_hides_the_error_is_caught() -> None:
    assert "has dtype torch.complex64" in _gate_problems(lambda x: torch.complex(MODEL(x), torch.zeros(64, 32)))
    assert "has dtype torch.int32" in _gate_problems(lambda x: MODEL(x).int())
