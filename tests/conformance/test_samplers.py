"""Every sampler keeps the ask/tell rules, and the learning one beats random search where it can learn something."""

import hashlib
import itertools
import math

import pytest

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.refine import replay
from agnitra_lab.refine import sampler as samplers
from agnitra_lab.refine.search import search

NUM_SEEDS = 20
NUM_TRIALS = 12


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
        for seed in range(NUM_SEEDS)
    ]
    wins = sum(learned < drawn for learned, drawn in pairs)
    losses = sum(learned > drawn for learned, drawn in pairs)
    # One-sided sign test at 1%: a surplus of 2.33 standard deviations of a fair coin.
    assert wins - losses > 2.33 * math.sqrt(wins + losses), f"{wins} wins, {losses} losses"


@pytest.mark.skipif(not replay._recordings(), reason="no recorded landscape in this checkout")
def test_the_learning_sampler_is_no_worse_than_random_search_on_recordings_at_the_default_budget() -> None:
    # Half of the recorded spaces are flat: most configs lie within 1% of the optimum, and there is little to learn.
    wins = losses = 0
    for path in replay._recordings()[::3]:  # one shape of each family: the complete ones are large
        landscape = replay.load(path)
        for seed in range(NUM_SEEDS):
            found = {}
            for name in ("rl", "random"):
                result = search(landscape.space, landscape.measure, sampler=name, seed=seed)
                assert result.best is not None and result.best.latency_ms is not None
                found[name] = result.best.latency_ms
            wins += found["rl"] < found["random"]
            losses += found["rl"] > found["random"]
    assert wins >= losses, f"{wins} wins, {losses} losses"


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_a_sampler_proposes_every_valid_config_once_and_then_ends(name: str) -> None:
    space = grid_space(2048)
    sampler = samplers.make(name, space, seed=3)
    asked = []
    while (config := sampler.ask()) is not None:
        asked.append(config.key())
        sampler.tell(config, roofline_us(config, 2048))
    assert sorted(asked) == sorted(config.key() for config in space.configs)
    assert sampler.ask() is None


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_a_sampler_gives_the_same_proposals_for_the_same_seed(name: str) -> None:
    def first(seed: int) -> list[str]:
        sampler, keys = samplers.make(name, grid_space(2048), seed=seed), []
        for _ in range(10):
            config = sampler.ask()
            assert config is not None
            keys.append(config.key())
            sampler.tell(config, roofline_us(config, 2048))
        return keys

    assert first(5) == first(5)
    assert first(5) != first(6)


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_a_sampler_proposes_valid_seeds_first_and_leaves_out_the_others(name: str) -> None:
    space = grid_space(2048)
    foreign = KernelConfig(template="synthetic", params={"BLOCK_N": 3, "ROWS_PER_PROGRAM": 1})
    wanted = [space.configs[20], foreign, space.configs[7], space.configs[20]]
    sampler = samplers.make(name, space, seed=0, seeds=wanted)
    assert [sampler.ask(), sampler.ask()] == [space.configs[20], space.configs[7]]


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_a_sampler_goes_on_when_everything_fails(name: str) -> None:
    space = grid_space(1024)
    sampler = samplers.make(name, space, seed=0)
    for _ in range(len(space.configs)):
        config = sampler.ask()
        assert config is not None
        sampler.tell(config, None)
    assert sampler.ask() is None


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_a_sampler_never_proposes_a_config_that_it_was_told_unasked(name: str) -> None:
    space = grid_space(1024)
    sampler = samplers.make(name, space, seed=0)
    sampler.tell(space.configs[0], 1.0)
    asked = set()
    while (config := sampler.ask()) is not None:
        asked.add(config.key())
        sampler.tell(config, 1.0)
    assert space.configs[0].key() not in asked
    assert len(asked) == len(space.configs) - 1
