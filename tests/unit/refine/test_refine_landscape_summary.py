"""The figures of a landscape."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from landscape_samples import about, older, small

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.refine.landscape_file import LandscapeFile
from agnitra_lab.refine.landscape_summary import importance, over_optimum, summarise
from agnitra_lab.refine.replay import Landscape


def test_a_summary_counts_and_places_the_configs() -> None:
    found = summarise(Landscape(small()))
    assert found.measured_on == "recorded on NVIDIA H200"
    assert (found.num_configs, found.num_ok, found.num_early_cut, found.num_samples) == (4, 3, 1, 9)
    assert found.failures == {"oom": 1}
    assert found.optimum == {"BLOCK_N": 16, "num_warps": 1}
    assert (found.best_us, found.best_again_us) == (pytest.approx(3.1), pytest.approx(3.1))
    assert found.within_percent == {2: 0.5, 5: 0.5, 10: 0.5}
    assert found.expected_draws[2] == pytest.approx(5 / 3)
    assert found.worst_over_best == pytest.approx(4.0 / 3.1)
    assert found.compile_s == pytest.approx(1.7) and found.measure_s == pytest.approx(0.06)


def test_what_was_not_recorded_is_none() -> None:
    found = summarise(Landscape(older()))
    assert found.compile_s is None and found.measure_s is None and found.best_again_us is None
    assert found.baselines_us == {}


def landscape_of(latency_us: list[float]) -> Landscape:
    size = len(latency_us)
    params = {"BLOCK_N": tuple(range(2)), "num_warps": tuple(range(size // 2))}
    codes = np.array([[block, warps] for block in range(2) for warps in range(size // 2)], dtype=np.uint8)
    whole = {
        "codes": codes, "failures": np.zeros(size, dtype=np.uint8), "details": np.zeros(size, dtype=np.uint16),
        "num_samples": np.ones(size, dtype=np.uint16), "samples_us": np.array(latency_us, dtype=np.float32),
    }  # fmt: skip
    return Landscape(LandscapeFile(about(params=params), whole))


def test_a_parameter_that_changes_nothing_has_no_importance() -> None:
    assert importance(landscape_of([1.0, 2.0, 4.0, 1.0, 2.0, 4.0])) == {"BLOCK_N": 0.0, "num_warps": 1.0}
    assert importance(landscape_of([3.0] * 6)) == {"BLOCK_N": 0.0, "num_warps": 0.0}


@given(st.lists(st.integers(1, 1000), min_size=3, max_size=8).filter(lambda given: len(set(given)) > 1))
def test_importances_are_shares_of_one(values: list[int]) -> None:
    found = importance(landscape_of([float(value) for value in values + values[::-1]]))
    assert all(share >= 0 for share in found.values())
    assert sum(found.values()) == pytest.approx(1.0)


def test_a_configs_distance_is_known_where_it_ran() -> None:
    landscape = Landscape(small())
    assert over_optimum(landscape, landscape.optimum) == 1.0
    for params in ({"BLOCK_N": 16, "num_warps": 2}, {"BLOCK_N": 99, "num_warps": 2}):
        assert over_optimum(landscape, KernelConfig(template="rms_norm", params=params)) is None
