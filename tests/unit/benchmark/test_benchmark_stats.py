"""Statistics on timings that are drawn, so that the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.benchmark.stats import chained_ratio, latency, paired_ratio, verdict
from agnitra_lab.contracts.measurement import Equivalence, Ratio

positive = st.floats(min_value=1e-3, max_value=1e6)


def _times(seed: int, factor: float = 1.0, num: int = 60, drift: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Right-skewed noise with spikes, and a drift that both sides share."""
    generator = np.random.default_rng(seed)
    base = 5.0 * (1 + drift * np.linspace(0, 1, num))

    def noisy() -> np.ndarray:
        spikes = np.where(generator.random(num) < 0.1, 1 + generator.random(num), 1.0)
        return base * np.exp(generator.gamma(2.0, 0.01, num)) * spikes

    return noisy(), noisy() / factor


def _equivalence(is_equivalent: bool) -> Equivalence:
    return Equivalence(
        is_equivalent=is_equivalent, match_share=1.0, required_share=0.999, rtol=1e-4, num_seeds=3, num_elements=10,
        max_abs_error=0.0, error_vs_fp64=None, baseline_error_vs_fp64=None, error_ratio=None,
    )  # fmt: skip


def _ratio(low: float, median: float, high: float) -> Ratio:
    return Ratio(low=low, median=median, high=high)


def test_a_known_speedup_is_found_through_spikes_and_drift() -> None:
    ratio = paired_ratio(*_times(0, factor=1.25))
    assert ratio.low < 1.25 < ratio.high
    assert ratio.high - ratio.low < 0.05


@pytest.mark.parametrize("seed", range(20))
def test_the_same_callable_is_no_change(seed: int) -> None:
    baseline, candidate = _times(seed)
    found = verdict(paired_ratio(baseline, candidate), chained_ratio(baseline), _equivalence(True))
    assert found == "no_change"


@pytest.mark.parametrize(("factor", "expected"), [(1.15, "faster"), (1 / 1.15, "slower")])
@pytest.mark.parametrize("seed", range(5))
def test_a_clear_difference_is_named(factor: float, expected: str, seed: int) -> None:
    baseline, candidate = _times(seed, factor)
    assert verdict(paired_ratio(baseline, candidate), chained_ratio(baseline), _equivalence(True)) == expected


@pytest.mark.parametrize(
    ("speedup", "noise", "expected"),
    [
        (_ratio(1.05, 1.1, 1.2), _ratio(0.98, 1.0, 1.02), "faster"),
        (_ratio(1.05, 1.1, 1.2), _ratio(0.9, 1.0, 1.06), "no_change"),
        (_ratio(0.99, 1.1, 1.2), _ratio(0.98, 0.99, 0.995), "no_change"),
        (_ratio(1.001, 1.1, 1.2), _ratio(0.9, 0.95, 0.99), "faster"),
        (_ratio(0.8, 0.9, 0.95), _ratio(0.98, 1.0, 1.02), "slower"),
        (_ratio(0.8, 0.9, 0.95), _ratio(0.9, 1.0, 1.02), "no_change"),
    ],
)
def test_the_interval_must_clear_both_one_and_the_noise(speedup: Ratio, noise: Ratio, expected: str) -> None:
    assert verdict(speedup, noise, _equivalence(True)) == expected


def test_what_is_not_equivalent_is_never_faster() -> None:
    assert verdict(_ratio(2, 3, 4), _ratio(1, 1, 1), _equivalence(False)) == "not_equivalent"


@given(pairs=st.lists(st.tuples(positive, positive), min_size=1, max_size=40), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_interval_holds_its_median_and_swapping_sides_inverts_it(
    pairs: list[tuple[float, float]], seed: int
) -> None:
    left, right = zip(*pairs, strict=True)
    ratio, inverse = paired_ratio(left, right, seed=seed), paired_ratio(right, left, seed=seed)
    assert ratio.low <= ratio.median <= ratio.high
    assert inverse.median == pytest.approx(1 / ratio.median)
    assert inverse.low == pytest.approx(1 / ratio.high)


@given(factor=positive)
@settings(max_examples=20, deadline=None)
def test_a_ratio_is_free_of_units(factor: float) -> None:
    left, right = _times(3)
    assert paired_ratio(left * factor, right * factor).median == pytest.approx(paired_ratio(left, right).median)


def test_equal_timings_give_equal_intervals() -> None:
    assert paired_ratio(*_times(5)) == paired_ratio(*_times(5))


def test_latency_gives_the_quantiles_of_its_samples() -> None:
    found = latency(np.arange(1, 102), device_ms=[1.0, 3.0, 2.0])
    assert (found.latency_ms_p20, found.latency_ms_p50, found.latency_ms_p80) == (21.0, 51.0, 81.0)
    assert (found.num_samples, found.device_ms_p50) == (101, 2.0)
