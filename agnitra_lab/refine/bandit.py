"""A contextual bandit: Bayesian ridge regression on log latency, with Thompson sampling over the valid configs.

The arms are the enumerated valid configs, the context of an arm is its encoding, the reward is minus the logarithm of
its latency. One draw of the posterior is optimised exactly, because the arms can be listed. That is reinforcement
learning with one step an episode, and no more is claimed.

Source: Agrawal and Goyal, "Thompson Sampling for Contextual Bandits with Linear Payoffs", ICML 2013, algorithm 1; the
evidence that sets the two variances: Bishop, "Pattern Recognition and Machine Learning", section 3.5.1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.refine.sampler import valid_seeds
from agnitra_lab.refine.space import Encoding

NUM_FIRST_POINTS = 4
"""Observations before the model is asked: fewer leave the quadratic terms to the prior alone."""
FAILURE_PENALTY = math.log(2.0)
"""A failure is taught as twice the worst latency seen: bad, but not so far out that it bends the whole fit."""
PRIOR_VARIANCES = (0.1, 0.3, 1.0, 3.0)
NOISE_VARIANCES = (0.003, 0.01, 0.03, 0.1, 0.3)


class Bandit:
    """A sampler that learns a quadratic response surface of log latency."""

    def __init__(self, space: SearchSpace, *, seed: int, seeds: Sequence[KernelConfig] = ()) -> None:
        self._encoding = Encoding(space)
        self._features = quadratic_features(self._encoding.points)
        self._rng = np.random.default_rng(seed)
        self._seeds = valid_seeds(seeds, space)[::-1]
        self._is_open = np.ones(len(self._encoding.configs), dtype=bool)
        self._observed: dict[int, float | None] = {}

    def ask(self) -> KernelConfig | None:
        """Return the next config, or None when every valid config was proposed."""
        while self._seeds:
            seed = self._seeds.pop()
            if self._is_open[self._encoding.index(seed)]:
                return self._take(self._encoding.index(seed))
        open_arms = np.flatnonzero(self._is_open)
        if not open_arms.size:
            return None
        if len(self._observed) < NUM_FIRST_POINTS or all(value is None for value in self._observed.values()):
            return self._take(self._farthest(open_arms))
        sampled = self._features[open_arms] @ self._draw_weights()
        return self._take(int(open_arms[np.argmin(sampled)]))

    def tell(self, config: KernelConfig, latency_ms: float | None) -> None:
        """Learn the latency of a config; None teaches a failure.

        Raises:
            SearchError: for a config that is not in the space.
        """
        arm = self._encoding.index(config)
        self._is_open[arm] = False
        self._observed[arm] = None if latency_ms is None else math.log(latency_ms)

    def _take(self, arm: int) -> KernelConfig:
        self._is_open[arm] = False
        return self._encoding.configs[arm]

    def _farthest(self, open_arms: NDArray[np.intp]) -> int:
        """Spread the first points: a random one, then always the one farthest from all that were taken."""
        taken = self._encoding.points[~self._is_open]
        order = self._rng.permutation(open_arms)
        if not len(taken):
            return int(order[0])
        gaps = self._encoding.points[order][:, None, :] - taken[None, :, :]
        return int(order[np.argmax((gaps**2).sum(axis=2).min(axis=1))])

    def _draw_weights(self) -> NDArray[np.float64]:
        """Draw the weights of one plausible response surface from the posterior."""
        arms = np.array(list(self._observed))
        known = [value for value in self._observed.values() if value is not None]
        worst = max(known) + FAILURE_PENALTY
        targets = np.array([worst if value is None else value for value in self._observed.values()])
        centred = targets - targets.mean()
        scale = float(centred.std()) or 1.0
        mean, root = posterior(self._features[arms], centred / scale)
        return mean + root @ self._rng.standard_normal(len(mean))


def quadratic_features(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1, z, z^2 and the products z_i z_j of centred coordinates; constant coordinates are left out.

    Args:
        points: [configs, parameters] float64 in 0..1.

    Returns:
        [configs, features] float64.
    """
    is_varied = np.ptp(points, axis=0) > 0 if len(points) else np.zeros(points.shape[1], dtype=bool)
    z = 2 * points[:, is_varied] - 1
    columns = [np.ones(len(z)), *z.T, *(z**2).T]
    columns += [z[:, i] * z[:, j] for i, j in itertools.combinations(range(z.shape[1]), 2)]
    return np.stack(columns, axis=1)


def posterior(
    features: NDArray[np.float64], targets: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit Bayesian ridge regression, with the prior and noise variance of the highest evidence on a small grid.

    Args:
        features: [observations, features] float64.
        targets: [observations] float64, centred and of unit scale.

    Returns:
        The posterior mean [features] of the weights, and a root [features, features] of their covariance.
    """
    # In the eigenbasis of the features every choice of the two variances costs one pass over the eigenvalues.
    values, vectors = np.linalg.eigh(features.T @ features)
    values = np.maximum(values, 0.0)
    projected = vectors.T @ (features.T @ targets)
    num_observations, num_features = features.shape
    energy = float(targets @ targets)

    def log_evidence(pair: tuple[float, float]) -> float:
        prior, noise = pair
        total = prior * values + noise
        fitted = float((prior * projected**2 / total).sum())
        log_det = float(np.log(total).sum()) + (num_observations - num_features) * math.log(noise)
        return -0.5 * ((energy - fitted) / noise + log_det)

    prior, noise = max(itertools.product(PRIOR_VARIANCES, NOISE_VARIANCES), key=log_evidence)
    precision = values / noise + 1 / prior
    # The symmetric root does not depend on the signs that the linear algebra library gives its eigenvectors, so the
    # same seed draws the same weights on every machine.
    return vectors @ (projected / noise / precision), (vectors / np.sqrt(precision)) @ vectors.T


def build(space: SearchSpace, *, seed: int, seeds: Sequence[KernelConfig] = ()) -> Bandit:
    """Build the sampler of the name "rl"."""
    return Bandit(space, seed=seed, seeds=seeds)
