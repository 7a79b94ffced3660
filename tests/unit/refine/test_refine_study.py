"""The ask/tell core: batches, results in any order, failures, foreign results, and no question twice."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.contracts.search import ForeignResult, KernelConfig, Measurement, SearchSpace
from agnitra_lab.errors import SearchError, UsageError
from agnitra_lab.refine.siblings import aligned, elsewhere_of, facts_of, foreign_of, hints_of
from agnitra_lab.refine.space import Encoding
from agnitra_lab.refine.study import Knowledge, Study

POINTS = [{"BLOCK": block, "warps": warps} for block, warps in itertools.product((1, 2, 4, 8), (1, 2, 4))]


def space_of(points: list[dict[str, int]]) -> SearchSpace:
    return SearchSpace(
        template="any", shape=(8, 8), dtype="float32", params={"BLOCK": (1, 2, 4, 8), "warps": (1, 2, 4)},
        configs=tuple(KernelConfig(template="any", params=point) for point in points),
    )  # fmt: skip


SPACE = space_of(POINTS)


def bowl(config: KernelConfig) -> float:
    return 1.0 + abs(config.params["BLOCK"] - 4) + abs(config.params["warps"] - 2)


def result(config: KernelConfig, latency_ms: float | None) -> ForeignResult:
    return ForeignResult(config=config, latency_ms=latency_ms, failure=None if latency_ms else "compile")


def test_a_batch_holds_different_valid_configs_and_they_are_pending() -> None:
    study = Study(SPACE)
    asked = study.ask(5)
    assert len({config.key() for config in asked}) == 5
    assert study.pending == tuple(asked)
    assert all(config in SPACE.configs for config in asked)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_results_in_any_order_lead_to_every_config_once(batches: list[int], seed: int) -> None:
    rng = random.Random(seed)
    study, waiting, seen = Study(SPACE, sampler="rl"), [], []
    for num in itertools.chain(batches, itertools.repeat(4)):
        asked = study.ask(num)
        seen += [config.key() for config in asked]
        waiting += asked
        rng.shuffle(waiting)
        for _ in range(rng.randint(0, len(waiting))):
            config = waiting.pop()
            study.tell(config, None if rng.random() < 0.2 else bowl(config))
        if not asked and not waiting:
            break
    assert sorted(seen) == sorted(config.key() for config in SPACE.configs)
    assert len(study.trials) == len(SPACE.configs)


def test_a_config_is_told_once() -> None:
    study = Study(SPACE)
    (config,) = study.ask()
    study.tell(config, 1.0)
    with pytest.raises(SearchError, match="told before"):
        study.tell(config, 1.0)
    assert len(study.trials) == 1


def test_a_config_from_outside_the_space_is_refused_and_nothing_is_lost() -> None:
    study = Study(SPACE)
    with pytest.raises(SearchError, match="not one of the 12 valid configs"):
        study.tell(KernelConfig(template="any", params={"BLOCK": 3, "warps": 1}), 1.0)
    assert study.trials == [] and len(study.ask(20)) == 12


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), None])
def test_what_is_no_latency_is_a_failure(value: float | None) -> None:
    study = Study(SPACE)
    trial = study.tell(study.ask()[0], value)
    assert (trial.status, trial.latency_ms) == ("failed", None)
    assert trial.failure is not None and study.best is None


def test_a_measurement_keeps_its_samples_compile_time_and_clock() -> None:
    study = Study(SPACE)
    trial = study.tell(study.ask()[0], Measurement(latency_ms=2.0, samples_ms=(2.0, 2.1), compile_s=1.5, clock_s=1.7))
    assert (trial.samples_ms, trial.compile_s, trial.clock_s) == ((2.0, 2.1), 1.5, 1.7)
    assert study.bound.samples_ms == (2.0, 2.1)


def test_a_measurement_has_a_latency_or_a_reason() -> None:
    with pytest.raises(ValueError, match="latency or a failure"):
        Measurement(latency_ms=None)
    with pytest.raises(ValueError, match="latency or a failure"):
        Measurement(latency_ms=1.0, failure="compile")


def test_an_attached_result_is_the_incumbent_and_is_not_asked_for_again() -> None:
    study = Study(SPACE)
    foreign = KernelConfig(template="any", params={"BLOCK": 64, "warps": 1})
    taken = study.attach([result(SPACE.configs[3], 0.5), result(foreign, 0.1)], provenance="llm")
    assert [trial.provenance for trial in taken] == ["llm"]
    assert study.best == taken[0]
    assert study.attach([result(SPACE.configs[3], 0.4)]) == []
    assert SPACE.configs[3] not in study.ask(12)
    assert len(study.attached) == 1 and study.trials == []


def test_seeds_come_first_and_hints_need_not() -> None:
    seeds = [SPACE.configs[7], SPACE.configs[2]]
    study = Study(SPACE, knowledge=Knowledge(seeds=seeds, hints=[SPACE.configs[0]]))
    assert study.ask(2) == seeds
    assert "hints" in study.trust


def test_a_polish_asks_for_configs_that_differ_from_the_best_in_one_parameter() -> None:
    study = Study(SPACE)
    best = SPACE.configs[4]
    study.attach([result(best, 0.1)])
    for _ in range(5):
        (config,) = study.ask(is_polish=True)
        assert sum(config.params[name] != best.params[name] for name in best.params) == 1
        study.tell(config, 1.0)
    (config,) = study.ask(is_polish=True)
    assert sum(config.params[name] != best.params[name] for name in best.params) == 2


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(SearchError, match="no valid config"):
        Study(space_of([]))


def test_a_space_with_dead_parameters_and_one_config_is_searched() -> None:
    space = SearchSpace(
        template="any", shape=(1,), dtype="float32", params={"BLOCK": (4,), "unused": (0,)},
        configs=(KernelConfig(template="any", params={"BLOCK": 4, "unused": 0}),),
    )  # fmt: skip
    study = Study(space)
    assert study.ask(3) == list(space.configs)
    study.tell(space.configs[0], 1.0)
    assert study.ask() == []


def test_a_sibling_is_aligned_by_values_and_filled_where_it_says_nothing() -> None:
    encoding = Encoding(SPACE)
    there = elsewhere_of("half", [result(config, bowl(config)) for config in SPACE.configs[::2]], encoding)
    assert there is not None
    sibling = aligned(there, encoding)
    assert sibling.is_known.tolist() == [index % 2 == 0 for index in range(12)]
    assert min(sibling.log_ms[::2]) <= min(sibling.log_ms[1::2]) and max(sibling.log_ms) < 3


def test_a_failure_at_a_sibling_is_worse_than_all_that_ran_there() -> None:
    there = elsewhere_of("x", [result(config, None if config == SPACE.configs[0] else bowl(config))
                               for config in SPACE.configs], Encoding(SPACE))  # fmt: skip
    assert there is not None and aligned(there, Encoding(SPACE)).log_ms.argmax() == 0


@pytest.mark.parametrize(
    "results",
    [
        [],
        [result(SPACE.configs[0], 1.0)],
        [result(KernelConfig(template="x", params={"other": n}), 1.0) for n in (1, 2)],
    ],
)
def test_a_sibling_that_says_nothing_is_none(results: list[ForeignResult]) -> None:
    assert elsewhere_of("empty", results, Encoding(SPACE)) is None


def test_latencies_become_results_and_nan_a_failure() -> None:
    found = foreign_of(SPACE, [float("nan"), *[1.0] * 11])
    assert [row.latency_ms for row in found[:2]] == [None, 1.0]
    with pytest.raises(UsageError, match="2 latencies for 12 configs"):
        foreign_of(SPACE, [1.0, 2.0])


def test_facts_become_columns_where_every_config_has_them_and_they_vary() -> None:
    facts = {config.key(): {"registers": 16.0 * index, "same": 1.0} for index, config in enumerate(SPACE.configs)}
    facts[SPACE.configs[0].key()]["rare"] = 3.0
    columns = facts_of(facts, Encoding(SPACE))
    assert columns.shape == (12, 1)
    assert (columns.min(), columns.max()) == (0.0, 1.0)
    assert facts_of(None, Encoding(SPACE)).shape == (12, 0)


def test_hints_fall_towards_the_first_hint() -> None:
    sibling = hints_of([SPACE.configs[5], SPACE.configs[0]], Encoding(SPACE))
    assert sibling is not None and sibling.log_ms.argmin() == 5
    assert hints_of([], Encoding(SPACE)) is None
