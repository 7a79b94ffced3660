"""Siblings of other shapes are moved to the shape in hand, where they agree that moving helps."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.contracts.search import ForeignResult, KernelConfig, SearchSpace
from agnitra_lab.refine.moved import Chart, learned_powers, moved_siblings
from agnitra_lab.refine.siblings import Elsewhere, elsewhere_of
from agnitra_lab.refine.space import Encoding
from agnitra_lab.refine.study import Knowledge, Study

PARAMS = {"BLOCK": (16, 32, 64, 128), "SPLIT": (1, 2, 4, 8, 16, 32, 64, 128), "warps": (1, 2, 4, 8), "fused": (0, 1)}
CONFIGS = tuple(
    KernelConfig(template="any", params=dict(zip(PARAMS, values, strict=True)))
    for values in itertools.product(*PARAMS.values())
)


def encoding_at(shape: tuple[int, ...]) -> Encoding:
    return Encoding(SearchSpace(template="any", shape=shape, dtype="float32", params=PARAMS, configs=CONFIGS))


def latency_ms(config: KernelConfig, splits: float) -> float:
    """The best number of splits, 32 columns a block and 4 warps are best; the rest is slower the farther away."""
    away = {"SPLIT": splits, "BLOCK": 32, "warps": 4}
    steps = [abs(np.log2(config.params[name] / best)) for name, best in away.items()]
    return float(np.exp(0.3 * steps[0] + 0.2 * steps[1] + 0.1 * steps[2] + 0.05 * config.params["fused"]))


def results(splits: float) -> list[ForeignResult]:
    return [ForeignResult(config=config, latency_ms=latency_ms(config, splits)) for config in CONFIGS]


def elsewhere(shape: tuple[int, ...], splits: float) -> Elsewhere:
    there = elsewhere_of("x".join(map(str, shape)), results(splits), encoding_at(shape), shape)
    assert there is not None
    return there


@given(
    power=st.sampled_from([-1.0, -0.5, 0.5, 1.0]),
    dimension=st.sampled_from([0, 1]),
    steps=st.lists(st.sampled_from([-4, -2, 0, 2, 4]), min_size=3, max_size=3, unique=True),
)
@settings(max_examples=25, deadline=None)
def test_siblings_moved_along_a_learned_power_have_their_best_where_it_is_here(
    power: float, dimension: int, steps: list[int]
) -> None:
    # A whole power moves twice as far: half the steps, so that the best number of splits stays one of the values.
    doublings = [step // 2 if abs(power) == 1.0 else step for step in steps]
    shapes = [tuple(int(64 * 2.0**by) if index == dimension else 4096 for index in range(2)) for by in doublings]
    splits = [2 ** (3 + power * by) for by in doublings]
    known = [elsewhere(shape, best) for shape, best in zip(shapes[:2], splits[:2], strict=True)]
    moved = moved_siblings(known, encoding_at(shapes[2]))
    truth = np.array([latency_ms(config, splits[2]) for config in CONFIGS])
    assert len(moved) == 2
    assert all(truth[sibling.log_ms.argmin()] == truth.min() for sibling in moved)


def test_the_power_is_that_of_the_parameter_that_follows() -> None:
    charts = [Chart(elsewhere((batch, 4096), 128 / batch)) for batch in (2, 8, 32)]
    powers = learned_powers(charts)
    assert powers[1, 0] == -1.0 and np.count_nonzero(powers) == 1


def test_siblings_whose_best_stays_are_not_moved() -> None:
    known = [elsewhere((batch, 4096), 8) for batch in (2, 8)]
    assert moved_siblings(known, encoding_at((32, 4096))) == []


def test_siblings_that_have_nothing_in_common_are_not_moved() -> None:
    rng = np.random.default_rng(0)
    known = [
        Elsewhere("noise", np.array([list(config.params.values()) for config in CONFIGS], dtype=float),
                  rng.standard_normal(len(CONFIGS)), np.zeros(len(CONFIGS), dtype=bool), (batch, 4096))
        for batch in (2, 8, 32)
    ]  # fmt: skip
    assert moved_siblings(known, encoding_at((64, 4096))) == []


@pytest.mark.parametrize(
    "shapes", [[(2, 4096)], [(2, 4096), (2, 4096)], [(), ()], [(2,), (8,)], [(2, 4096), ()], [(0, 4096), (8, 4096)]]
)
def test_siblings_of_one_shape_or_of_none_that_is_known_are_not_moved(shapes: list[tuple[int, ...]]) -> None:
    known = [elsewhere(shape, 2.0 ** (1 + 4 * index)) for index, shape in enumerate(shapes)]
    assert moved_siblings(known, encoding_at((32, 4096))) == []


def test_a_switch_never_follows_a_dimension() -> None:
    charts = [Chart(elsewhere((batch, 4096), 128 / batch)) for batch in (2, 8)]
    assert [charts[0].has_values(index) for index in range(4)] == [True, True, True, False]


def test_a_search_begins_where_the_moved_siblings_have_their_best_and_names_them() -> None:
    siblings = {f"batch {batch}": results(128 / batch) for batch in (2, 8)}
    shapes = {f"batch {batch}": (batch, 4096) for batch in (2, 8)}
    space = encoding_at((32, 4096)).space
    moved = Study(space, knowledge=Knowledge(siblings=siblings, shapes=shapes))
    unmoved = Study(space, knowledge=Knowledge(siblings=siblings))
    assert latency_ms(moved.ask()[0], 4) < latency_ms(unmoved.ask()[0], 4)
    assert set(moved.trust) == {"batch 2", "batch 8", "batch 2, moved", "batch 8, moved"}
