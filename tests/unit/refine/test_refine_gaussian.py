"""The process grows row by row to the posterior that one factorisation gives, and its gradient is the gradient."""

import math

import numpy as np
import pytest

from agnitra_lab.refine import gaussian
from agnitra_lab.refine.acquisition import expected_improvement, spread_out
from agnitra_lab.refine.gaussian import Basis, Fitter, Hyper, HyperPrior, Inputs, Process

RNG = np.random.default_rng(0)
FEATURES = RNG.random((60, 3))
BLOCKS = (RNG.standard_normal((60, 4)), RNG.standard_normal((60, 2)))
INPUTS = Inputs(FEATURES, BLOCKS)
HYPER = Hyper(np.log([0.4, 0.7, 2.0]), math.log(0.5), math.log(0.01), (math.log(0.05), math.log(0.02)))
BASIS = Basis(np.column_stack([np.ones(60), FEATURES[:, 0]]), np.array([0.0, 1.0]), np.array([0.0, 4.0]))
VALUES = np.sin(5 * FEATURES[:, 0]) + FEATURES[:, 1] ** 2


def exact(arms: list[int]) -> tuple[np.ndarray, np.ndarray]:
    scaled = FEATURES / np.exp(HYPER.log_lengths)
    root = np.sqrt(5 * ((scaled[:, None] - scaled[None]) ** 2).sum(-1))
    kernel = 0.5 * (1 + root + root**2 / 3) * np.exp(-root)
    kernel += 0.05 * BLOCKS[0] @ BLOCKS[0].T + 0.02 * BLOCKS[1] @ BLOCKS[1].T
    inner = np.linalg.inv(kernel[np.ix_(arms, arms)] + 0.01 * np.eye(len(arms)))
    columns = BASIS.columns[arms]
    weights = np.linalg.solve(
        columns.T @ inner @ columns + np.diag(BASIS.precision),
        columns.T @ inner @ VALUES[arms] + BASIS.precision * BASIS.mean,
    )
    rest = VALUES[arms] - columns @ weights
    mean = BASIS.columns @ weights + kernel[:, arms] @ inner @ rest
    return mean, np.sqrt(np.diag(kernel) + 0.01 - np.einsum("ij,jk,ik->i", kernel[:, arms], inner, kernel[:, arms]))


@pytest.mark.parametrize("num_begun", [0, 1, 20, 33])
def test_rows_appended_one_by_one_give_the_posterior_of_the_textbook(num_begun: int) -> None:
    arms = [int(arm) for arm in np.random.default_rng(1).permutation(60)[:40]]
    process = Process(INPUTS.single(), HYPER)
    if num_begun:
        process.begin(arms[:num_begun])
        while not process.fill(1):
            pass
    for count, arm in enumerate(arms[num_begun:]):
        process.append(arm)
        if count in (2, 9):
            process.predict(VALUES[process.arms], BASIS)
    mean, deviation, _ = process.predict(VALUES[arms], BASIS)
    expected_mean, expected_deviation = exact(arms)
    assert np.abs(mean - expected_mean).max() < 2e-3
    assert np.abs(deviation - expected_deviation).max() < 2e-3


def test_the_gradient_of_the_density_is_the_slope_of_the_density() -> None:
    prior = HyperPrior(HYPER, np.array([1.0, 1.0, 0.5, 1.0, 1.5, 1.0, 0.7]))
    at = HYPER.vector() + 0.2
    _, slope = gaussian._density(at, INPUTS, VALUES, BASIS, prior)
    for index in range(7):
        step = np.zeros(7)
        step[index] = 1e-5
        up, _ = gaussian._density(at + step, INPUTS, VALUES, BASIS, prior)
        down, _ = gaussian._density(at - step, INPUTS, VALUES, BASIS, prior)
        assert slope[index] == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-4)


def test_a_fit_finds_the_feature_that_matters() -> None:
    prior = HyperPrior(Hyper(np.zeros(3), 0.0, math.log(0.01)), np.array([1.0, 1.0, 1.0, 1.0, 1.5]))
    fitter = Fitter(prior)
    ones = Basis(np.ones((60, 1)), np.zeros(1), np.zeros(1))
    fitter.run(Inputs(FEATURES), np.sin(8 * FEATURES[:, 0]), ones, 40)
    lengths = fitter.best(Inputs(FEATURES), np.sin(8 * FEATURES[:, 0]), ones).log_lengths
    assert lengths[0] < min(lengths[1:]) - 1


def test_equal_observations_at_one_point_do_not_break_the_process() -> None:
    process = Process(Inputs(np.zeros((5, 2), dtype=np.float32)), Hyper(np.zeros(2), 0.0, -20.0))
    for arm in range(5):
        process.append(arm)
    mean, deviation, _ = process.predict(np.ones(5), Basis(np.ones((5, 1)), np.zeros(1), np.zeros(1)))
    assert np.isfinite(mean).all() and np.isfinite(deviation).all()


def test_expected_improvement_is_that_of_its_integral_also_far_away() -> None:
    draws = np.random.default_rng(0).standard_normal(400_000)
    for mean in (-1.0, 0.0, 0.7, 2.0):
        found = expected_improvement(np.array([mean], np.float32), np.array([0.5], np.float32), 0.3)[0]
        assert found == pytest.approx(np.maximum(0.3 - (mean + 0.5 * draws), 0).mean(), rel=0.05, abs=2e-5)
    far = expected_improvement(np.array([3.0, 4.0, 5.0], np.float32), np.full(3, 0.5, np.float32), 0.0)
    assert (np.diff(far) < 0).all() and far[-1] > 0


def test_points_are_spread_out_and_each_is_open() -> None:
    is_open = np.ones(60, dtype=bool)
    is_open[:30] = False
    chosen = spread_out(FEATURES, is_open, 5, np.random.default_rng(0))
    assert len(set(chosen)) == 5 and min(chosen) >= 30
