"""A measurement that hangs, raises or is hopeless costs its time and no more."""

import itertools
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.contracts.search import KernelConfig, Measurement, SearchSpace
from agnitra_lab.errors import SearchError, TemplateError
from agnitra_lab.refine import measuring
from agnitra_lab.refine.bound import Bound, rank_sum_p, sampled
from agnitra_lab.refine.measuring import Meter, failure_class
from agnitra_lab.refine.search import search

PARAMS = {"BLOCK": (1, 2, 4, 8), "warps": (1, 2, 4)}
SPACE = SearchSpace(
    template="any", shape=(8,), dtype="float32", params=PARAMS,
    configs=tuple(
        KernelConfig(template="any", params=dict(zip(PARAMS, values, strict=True)))
        for values in itertools.product(*PARAMS.values())
    ),
)  # fmt: skip
CONFIG = SPACE.configs[0]


def test_a_measurement_that_hangs_is_a_timeout_and_the_search_goes_on() -> None:
    stuck = threading.Event()

    def measure(config: KernelConfig) -> float:
        if config == SPACE.configs[5]:
            stuck.wait(60)
        return 1.0 + config.params["BLOCK"]

    result = search(SPACE, measure, sampler="exhaustive", max_trials=12, trial_timeout_s=0.2)
    stuck.set()
    failed = [trial for trial in result.trials if trial.status == "failed"]
    assert [(trial.config, trial.failure) for trial in failed] == [(SPACE.configs[5], "timeout")]
    assert result.best is not None and result.best.config.params["BLOCK"] == 1


def test_a_measure_that_always_hangs_ends_the_search_with_a_typed_error_soon_after_its_budget(monkeypatch) -> None:
    monkeypatch.setattr(measuring, "GRACE_S", 0.3)
    stuck, began = threading.Event(), time.monotonic()
    with pytest.raises(SearchError, match="hangs: no answer within"):
        search(SPACE, lambda config: stuck.wait(60), budget_s=0.3)
    stuck.set()
    assert time.monotonic() - began < 5


def test_three_hangs_in_a_row_give_the_device_up_with_the_best_so_far() -> None:
    stuck, calls = threading.Event(), []

    def measure(config: KernelConfig) -> float:
        calls.append(config)
        if len(calls) > 2:
            stuck.wait(60)
        return float(len(calls))

    result = search(SPACE, measure, sampler="exhaustive", max_trials=12, trial_timeout_s=0.1)
    stuck.set()
    assert result.stopped_because == "hanging" and len(result.trials) == 5
    assert result.best is not None and result.best.config == SPACE.configs[0]


def test_a_measure_that_always_fails_is_a_typed_error_and_its_ledger_is_whole(tmp_path) -> None:
    path = tmp_path / "ledger.jsonl"

    def measure(config: KernelConfig) -> float:
        raise RuntimeError("no ptxas")

    for _ in range(2):
        with pytest.raises(SearchError, match=r"All 12 trials failed.*no ptxas"):
            search(SPACE, measure, max_trials=50, ledger=path)
    assert path.read_bytes().count(b'"failure":"compile"') == 12


@pytest.mark.parametrize("value", ["fast", None, object(), [1.0], {"latency_ms": 1.0}])
def test_a_measure_that_returns_no_number_is_a_failed_trial(value: object) -> None:
    with pytest.raises(SearchError, match="All 12 trials failed"):
        search(SPACE, lambda config: value, max_trials=50)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("triton.compiler.errors.CompilationError: at 1:1"), "compile"),
        (RuntimeError("OutOfResources: out of resource: shared memory, Required: 300000"), "oom"),
        (MemoryError(), "oom"),
        (TimeoutError("x"), "timeout"),
        (SearchError("timeout: no answer within 20 s"), "timeout"),
        (SearchError("rms_norm gives another result than the reference"), "wrong"),
        (SearchError("crash: the process ended with SIGSEGV"), "crash"),
        (TemplateError("BLOCK_N is too wide"), "constraint"),
        (ValueError("odd"), "launch"),
    ],
)
def test_a_failure_has_a_class(error: Exception, expected: str) -> None:
    assert failure_class(f"{type(error).__name__}: {error}", error) == expected


def test_a_key_in_an_error_does_not_reach_the_trial() -> None:
    def measure(config: KernelConfig) -> float:
        raise RuntimeError("Authorization: Bearer sk-abcdefghijklmnopqrstuvwxyz123456")

    found = Meter(measure, 5.0).take(CONFIG, Bound(), 0.0)
    assert found.detail is not None and "abcdefghij" not in found.detail


def test_a_measure_that_takes_a_bound_is_given_the_samples_of_the_best() -> None:
    given_bounds: list[Bound] = []

    def measure(config: KernelConfig, *, bound: Bound) -> Measurement:
        given_bounds.append(bound)
        ms = float(config.params["BLOCK"])
        median_ms, samples, is_aborted = sampled(lambda: ms, bound, num_samples=10)
        return Measurement(latency_ms=median_ms, samples_ms=samples, is_aborted=is_aborted)

    result = search(SPACE, measure, sampler="exhaustive", max_trials=12)
    assert given_bounds[0] == Bound() and given_bounds[1].samples_ms == (1.0,) * 10
    slow = [trial for trial in result.trials if trial.config.params["BLOCK"] == 8]
    assert all(trial.is_aborted and len(trial.samples_ms) < 10 for trial in slow)
    assert result.best is not None and result.best.config.params["BLOCK"] == 1


def test_a_config_as_fast_as_the_best_is_never_ended_early() -> None:
    assert not Bound((1.0, 1.01, 0.99, 1.0)).is_hopeless([1.0, 1.02, 1.01])
    assert not Bound().is_hopeless([9.0] * 5)
    assert not Bound((1.0,)).is_hopeless([1.5, 1.5, 1.5])
    assert Bound((1.0,)).is_hopeless([2.1, 2.2, 2.3])


@given(st.lists(st.floats(0.01, 100.0), min_size=20, max_size=20), st.integers(1, 19), st.floats(0.5, 1.0))
@settings(max_examples=100, deadline=None)
def test_samples_that_the_best_itself_had_are_never_hopeless(best: list[float], num: int, factor: float) -> None:
    assert not Bound(tuple(best)).is_hopeless([ms * factor for ms in sorted(best)[-num:]])


@given(st.integers(1, 5), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_the_rank_sum_chances_are_those_of_all_orders(num_left: int, num_right: int) -> None:
    total = num_left + num_right
    wins = [
        sum(place - sum(other < place for other in places) for place in places)
        for places in itertools.combinations(range(total), num_left)
    ]
    for least in (0, 1, num_left * num_right // 2, num_left * num_right):
        expected = sum(count >= least for count in wins) / len(wins)
        assert rank_sum_p(least, num_left, num_right) == pytest.approx(expected)
