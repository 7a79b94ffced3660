"""Every sampler keeps the ask/tell rules, and the learning one beats random search where it can learn something."""

import hashlib
import itertools
import math

import pytest

from agnitra_lab.contracts.search import ForeignResult, KernelConfig, Measurement, SearchSpace
from agnitra_lab.errors import UsageError
from agnitra_lab.refine import replay
from agnitra_lab.refine.sampler import SAMPLERS
from agnitra_lab.refine.search import search
from agnitra_lab.refine.siblings import foreign_of
from agnitra_lab.refine.study import Knowledge, Study

NUM_SEEDS = 20
NUM_TRIALS = 12
FIXED_ORDER = ("exhaustive",)
"""Samplers to which the seed makes no difference."""
ALL = sorted(SAMPLERS)


def grid_space(num_cols: int) -> SearchSpace:
    """The shape of a real template's space: powers of two under a limit on the values that a thread holds."""
    params = {
        "BLOCK_N": (256, 512, 1024, 2048, 4096),
        "ROWS_PER_PROGRAM": (1, 2, 4, 8, 16),
        "num_warps": (1, 2, 4, 8, 16),
        "num_stages": (1, 2, 3),
    }
    points = (dict(zip(params, values, strict=True)) for values in itertools.product(*params.values()))
    configs = tuple(
        KernelConfig(template="synthetic", params=point)
        for point in points
        if 4 <= point["BLOCK_N"] * point["ROWS_PER_PROGRAM"] / (32 * point["num_warps"]) <= 64
        and (point["BLOCK_N"] < num_cols or point["num_stages"] == 1)
    )
    return SearchSpace(template="synthetic", shape=(4096, num_cols), dtype="bfloat16", params=params, configs=configs)


def roofline_us(config: KernelConfig, num_cols: int, ruggedness: float = 0.03) -> float:
    """A memory-bound kernel by mechanism: bytes in flight, spilled registers, passes over the row, tail of the grid.

    The ruggedness is a fixed pseudo-random factor a config, as alignment and scheduling add on a real device.
    """
    block, rows = config.params["BLOCK_N"], config.params["ROWS_PER_PROGRAM"]
    warps, stages = config.params["num_warps"], config.params["num_stages"]
    values_per_thread = block * rows / (32 * warps)
    registers = 16 + 2.2 * values_per_thread
    warps_per_sm = min(64.0, 32.0 * warps, 65536 / (32 * registers))
    in_flight_kb = warps_per_sm * 32 * values_per_thread * 2 * (1 + 0.25 * (stages - 1)) / 1024
    bandwidth = 4300 * in_flight_kb / (in_flight_kb + 8)
    passes = 1.0 if block >= num_cols else 1.45
    spill = 1 + 0.04 * max(0.0, values_per_thread - 24)
    # Programs do not run in step: about half a wave is lost at the end of the grid.
    waves = 4096 / rows * warps / (132 * warps_per_sm)
    barrier = 0.04 * math.log2(warps) if warps > 1 else 0.0
    tail = 1 + 0.5 / waves
    noise = int.from_bytes(hashlib.sha256(f"{config.key()}{num_cols}".encode()).digest()[:4], "big") / 2**32
    bytes_moved = 2 * 4096 * num_cols * 2
    base = 2.0 + bytes_moved * passes / bandwidth / 1e3 * spill * tail * (1 + barrier)
    return base * (1 + ruggedness * (2 * noise - 1))


def best_after(sampler: str, num_cols: int, seed: int) -> float:
    """Lowest latency among the first trials, over the optimum of the landscape."""
    space = grid_space(num_cols)
    result = search(
        space,
        lambda config: roofline_us(config, num_cols) / 1000,
        sampler=sampler,
        max_trials=NUM_TRIALS,
        seed=seed,
    )
    optimum = min(roofline_us(config, num_cols) for config in space.configs) / 1000
    assert result.best is not None and result.best.latency_ms is not None
    return result.best.latency_ms / optimum


def test_the_learning_sampler_beats_random_search_in_most_paired_seeds() -> None:
    pairs = [
        (best_after("rl", num_cols, seed), best_after("random", num_cols, seed))
        for num_cols in (1024, 2048, 4096)
        for seed in range(NUM_SEEDS // 2)
    ]
    wins = sum(learned < drawn for learned, drawn in pairs)
    losses = sum(learned > drawn for learned, drawn in pairs)
    # One-sided sign test at 1%: a surplus of 2.33 standard deviations of a fair coin.
    assert wins - losses > 2.33 * math.sqrt(wins + losses), f"{wins} wins, {losses} losses"


@pytest.mark.skipif(not replay._recordings(), reason="no recorded landscape in this checkout")
def test_the_learning_sampler_is_no_worse_than_random_search_on_recordings_at_the_default_budget() -> None:
    # Half of the recorded spaces are flat: most configs lie within 1% of the optimum, and there is little to learn.
    wins = losses = 0
    for template in replay.recorded():
        path = replay.find(template)
        assert path is not None
        landscape = replay.load(path)
        for seed in range(NUM_SEEDS // 4):
            found = {}
            for name in ("rl", "random"):
                result = search(landscape.space, landscape.measure, sampler=name, seed=seed)
                assert result.best is not None and result.best.latency_ms is not None
                found[name] = result.best.latency_ms
            wins += found["rl"] < found["random"]
            losses += found["rl"] > found["random"]
    assert wins >= losses, f"{wins} wins, {losses} losses"


@pytest.fixture(autouse=True)
def _needs_its_package(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    package = {"cmaes": "cmaes", "tpe": "optuna"}.get(name or "")
    if package:
        pytest.importorskip(package)


def study_of(name: str, num_cols: int, seed: int = 0, **given: object) -> Study:
    return Study(grid_space(num_cols), sampler=name, seed=seed, knowledge=Knowledge(**given))


def sibling_results(num_cols: int) -> list[ForeignResult]:
    space = grid_space(num_cols)
    return foreign_of(space, [roofline_us(config, num_cols) for config in space.configs])


def drained(study: Study, num: int = 1, latency_us: float | None = 1.0) -> list[str]:
    keys = []
    while asked := study.ask(num):
        for config in asked:
            keys.append(config.key())
            study.tell(config, latency_us)
    return keys


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("num", [1, 7])
def test_a_sampler_proposes_every_valid_config_once_and_then_ends(name: str, num: int) -> None:
    space = grid_space(512)
    study = study_of(name, 512, seed=3, siblings={"1024": sibling_results(1024)})
    keys = []
    while asked := study.ask(num):
        keys += [config.key() for config in asked]
        for config in asked:
            study.tell(config, roofline_us(config, 512))
    assert sorted(keys) == sorted(config.key() for config in space.configs)
    assert study.ask() == []


@pytest.mark.parametrize("name", ALL)
def test_a_sampler_gives_the_same_proposals_for_the_same_seed(name: str) -> None:
    def first(seed: int) -> list[str]:
        study, keys = study_of(name, 2048, seed), []
        for num in (1, 1, 1, 3, 1, 2, 1, 1):
            for config in study.ask(num):
                keys.append(config.key())
                study.tell(config, roofline_us(config, 2048))
        return keys

    assert first(5) == first(5)
    assert name in FIXED_ORDER or first(5) != first(6)


@pytest.mark.parametrize("name", ALL)
def test_a_sampler_proposes_valid_seeds_first_and_leaves_out_the_others(name: str) -> None:
    space = grid_space(2048)
    foreign = KernelConfig(template="synthetic", params={"BLOCK_N": 3, "ROWS_PER_PROGRAM": 1})
    wanted = [space.configs[20], foreign, space.configs[7], space.configs[20]]
    study = study_of(name, 2048, seeds=wanted)
    assert [*study.ask(), *study.ask()] == [space.configs[20], space.configs[7]]


@pytest.mark.parametrize("name", ALL)
def test_a_sampler_goes_on_when_everything_fails(name: str) -> None:
    assert len(drained(study_of(name, 512), latency_us=None)) == len(grid_space(512).configs)


@pytest.mark.parametrize("name", ALL)
def test_a_sampler_lives_with_equal_latencies(name: str) -> None:
    assert len(drained(study_of(name, 512))) == len(grid_space(512).configs)


@pytest.mark.parametrize("name", ALL)
def test_a_sampler_never_proposes_a_config_that_others_measured(name: str) -> None:
    study = study_of(name, 512)
    configs = grid_space(512).configs
    study.attach([ForeignResult(config=config, latency_ms=1.0 + index) for index, config in enumerate(configs[:5])])
    keys = drained(study)
    assert len(keys) == len(configs) - 5 and not {config.key() for config in configs[:5]} & set(keys)


@pytest.mark.parametrize("name", ALL)
def test_a_sampler_takes_results_in_any_order_failures_and_early_ends(name: str) -> None:
    study = study_of(name, 2048, seed=1)
    waiting = study.ask(4)
    for step in range(20):
        config = waiting.pop((step * 7) % len(waiting))
        is_even = step % 2 == 0
        study.tell(
            config,
            Measurement(latency_ms=None, failure=("compile", "timeout", "oom")[step % 3])
            if step % 5 == 4
            else Measurement(latency_ms=roofline_us(config, 2048), is_aborted=is_even),
        )
        waiting += study.ask()
    assert len(study.trials) == 20 and len(study.pending) == 4


@pytest.mark.parametrize("name", ALL)
def test_a_sampler_resumes_with_the_same_next_question(name: str, tmp_path) -> None:
    path = tmp_path / "ledger.jsonl"

    def begin(ledger) -> Study:
        return Study(grid_space(2048), sampler=name, seed=2, ledger=ledger)

    def go(study: Study, num: int) -> list[str]:
        for _ in range(num):
            for config in study.ask():
                study.tell(config, roofline_us(config, 2048))
        return [trial.config.key() for trial in study.trials]

    whole = go(begin(None), 14)
    study = begin(path)
    go(study, 8)
    study.close()
    resumed = begin(path)
    assert go(resumed, 6) == whole
    resumed.close()


@pytest.mark.parametrize("name", ALL)
def test_a_sampler_lives_with_a_dead_parameter_and_a_space_of_one(name: str) -> None:
    params = {"BLOCK_N": (1, 2, 4), "unused": (7,)}
    points = [{"BLOCK_N": block, "unused": 7} for block in params["BLOCK_N"]]
    for kept in (points, points[:1]):
        configs = tuple(KernelConfig(template="any", params=point) for point in kept)
        space = SearchSpace(template="any", shape=(1,), dtype="float32", params=params, configs=configs)
        assert len(drained(Study(space, sampler=name))) == len(kept)


def test_an_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'ppo'; known are cmaes, coordinate"):
        study_of("ppo", 2048)


@pytest.mark.parametrize("name", ["rl", "portfolio", "reinforce"])
def test_a_sampler_that_knows_a_sibling_beats_random_search_within_its_first_questions(name: str) -> None:
    optimum = min(roofline_us(config, 4096) for config in grid_space(4096).configs)

    def best(sampler: str, seed: int) -> float:
        study = study_of(sampler, 4096, seed, siblings={"2048": sibling_results(2048), "1024": sibling_results(1024)})
        for _ in range(6):
            for config in study.ask():
                study.tell(config, roofline_us(config, 4096))
        assert study.best is not None and study.best.latency_ms is not None
        return study.best.latency_ms / optimum

    learned = [best(name, seed) for seed in range(3)]
    drawn = [best("random", seed) for seed in range(3)]
    assert sum(learned) < sum(drawn)


def test_the_bandit_gives_up_a_sibling_that_says_the_opposite() -> None:
    space = grid_space(4096)
    turned = foreign_of(space, [1e3 / roofline_us(config, 4096) for config in space.configs])
    study = study_of("rl", 4096, siblings={"turned": turned, "2048": sibling_results(2048)})
    for _ in range(16):
        for config in study.ask():
            study.tell(config, roofline_us(config, 4096))
    assert study.trust["turned"] < 0.1 < study.trust["2048"]
