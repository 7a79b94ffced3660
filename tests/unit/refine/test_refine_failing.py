"""Where configs fail is learned from those that failed, and nobody goes on asking there."""

import numpy as np

from agnitra_lab.contracts.search import ForeignResult, KernelConfig, SearchSpace
from agnitra_lab.refine.failing import Failing
from agnitra_lab.refine.inputs import inputs_of
from agnitra_lab.refine.sampler import Problem
from agnitra_lab.refine.siblings import aligned, elsewhere_of
from agnitra_lab.refine.space import Encoding
from agnitra_lab.refine.study import Study

EXTENTS = (1, 2, 4, 8, 16, 32)
PARAMS = {"BLOCK_M": EXTENTS, "BLOCK_N": EXTENTS, "stages": (1, 2, 3), "is_padded": (0, 1)}
CONFIGS = tuple(
    KernelConfig(template="tile", params={"BLOCK_M": m, "BLOCK_N": n, "stages": stages, "is_padded": is_padded})
    for m in EXTENTS for n in EXTENTS for stages in PARAMS["stages"] for is_padded in PARAMS["is_padded"]
)  # fmt: skip
SPACE = SearchSpace(template="tile", shape=(64,), dtype="float32", params=PARAMS, configs=CONFIGS)
ENCODING = Encoding(SPACE)


def latency_ms(config: KernelConfig) -> float | None:
    """The larger the tile the faster, until the memory for it runs out."""
    size = config.params["BLOCK_M"] * config.params["BLOCK_N"] * config.params["stages"]
    return None if size > 200 else 1.0 + 10 / size + 0.1 * config.params["is_padded"]


FAILS = np.array([latency_ms(config) is None for config in CONFIGS])


def failing(siblings=()) -> Failing:
    return Failing(inputs_of(Problem("rl", ENCODING, 0)).single(), siblings)


def test_the_odds_of_configs_nobody_tried_follow_the_resource_that_runs_out() -> None:
    model = failing()
    tried = np.random.default_rng(0).permutation(len(CONFIGS))[:50]
    for arm in tried:
        model.add(int(arm), is_failed=bool(FAILS[arm]))
    odds = model.odds_of_success()
    assert odds is not None and ((odds >= 0) & (odds <= 1)).all()
    rest = np.setdiff1d(np.arange(len(CONFIGS)), tried)
    assert ((odds[rest] < 0.5) == FAILS[rest]).mean() > 0.9


def test_nothing_is_worked_out_before_the_first_failure() -> None:
    model = failing()
    model.add(0, is_failed=False)
    assert model.odds_of_success() is None


def test_a_config_that_failed_at_a_sibling_is_doubted_before_any_measurement() -> None:
    there = [
        ForeignResult(config=config, latency_ms=latency_ms(config), failure="oom" if fails else None)
        for config, fails in zip(CONFIGS, FAILS, strict=True)
    ]
    sibling = aligned(elsewhere_of("elsewhere", there, ENCODING), ENCODING)
    assert sibling is not None and (sibling.is_failed == FAILS).all()
    odds = failing((sibling,)).odds_of_success()
    assert odds is not None and odds[FAILS].max() < odds[~FAILS].min()


def test_a_search_does_not_go_on_asking_where_its_model_extrapolates_to_the_lowest_time() -> None:
    study = Study(SPACE, seed=3)
    for _ in range(40):
        (config,) = study.ask()
        study.tell(config, latency_ms(config))
    failed = [trial.latency_ms is None for trial in study.trials]
    assert sum(failed[10:]) < 15
    assert study.best is not None and study.best.latency_ms is not None
    assert study.best.latency_ms < 1.01 * min(ms for ms in map(latency_ms, CONFIGS) if ms is not None)
