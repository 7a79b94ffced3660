"""An exact Gaussian process over the enumerated configs: rows of the Cholesky factor are appended, never recomputed.

With V = L^-1 K(observed, all) kept as it grows, the posterior of all configs after one more observation costs one
kernel row and one product of V with a vector: some milliseconds at 20,000 configs and 100 observations on one core.

Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, sections 2.2, 2.7 (explicit basis
functions), 4.2 (Matern) and 5.4 (marginal likelihood and its gradient).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Singles: TypeAlias = NDArray[np.float32]

_FIRST_ROWS = 32
_CHUNK = 1024
"""Configs whose covariances with all observations are worked on at once, so that they stay in the cache."""
_SQRT5 = math.sqrt(5.0)


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters, in natural logarithms.

    Attributes:
        log_lengths: [features], length scales.
        log_amplitude: of the kernel's variance.
        log_nugget: of the variance that belongs to one config alone: noise, and what no neighbour tells.
    """

    log_lengths: Floats
    log_amplitude: float
    log_nugget: float

    def vector(self) -> Floats:
        """Return all of them, the lengths first."""
        return np.concatenate([self.log_lengths, [self.log_amplitude, self.log_nugget]])

    @classmethod
    def of(cls, vector: Floats) -> Hyper:
        """Undo `vector`."""
        return cls(vector[:-2].copy(), float(vector[-2]), float(vector[-1]))


@dataclass(frozen=True)
class HyperPrior:
    """Independent normal priors of the logarithms.

    Attributes:
        mean: where the hyper-parameters begin.
        spread: [features + 2], standard deviations.
    """

    mean: Hyper
    spread: Floats


@dataclass(frozen=True)
class Basis:
    """Explicit basis functions of the mean, with a normal prior of their weights.

    Attributes:
        columns: [configs, functions].
        mean: [functions], prior mean of the weights.
        precision: [functions], prior precision; 0 leaves a weight to the observations.
    """

    columns: Floats
    mean: Floats
    precision: Floats


class Process:
    """The posterior over all configs, given the observations so far.

    Attributes:
        arms: observed so far, in order.
    """

    def __init__(self, features: Singles, hyper: Hyper) -> None:
        """Begin with no observation.

        Args:
            features: [configs, features] float32.
            hyper: the hyper-parameters.
        """
        self.hyper = hyper
        self.arms: list[int] = []
        self._amplitude = math.exp(hyper.log_amplitude)
        self._nugget = math.exp(hyper.log_nugget)
        self._scaled: Singles = (features / np.exp(hyper.log_lengths)).astype(np.float32)
        self._squares = np.einsum("ij,ij->i", self._scaled, self._scaled)
        self._rows: Singles = np.empty((_FIRST_ROWS, len(features)), dtype=np.float32)
        self._factor = np.zeros((_FIRST_ROWS, _FIRST_ROWS))
        self._variance = np.full(len(features), self._amplitude, dtype=np.float32)
        self._inverse: Singles = np.empty((0, 0), dtype=np.float32)
        self._num_filled = len(features)

    @property
    def factor(self) -> Floats:
        """[observations, observations], the lower Cholesky factor of the observations' covariance."""
        return self._factor[: len(self.arms), : len(self.arms)]

    def append(self, arm: int) -> None:
        """Observe one more arm; its value comes later, because the posterior is linear in the values."""
        num = len(self.arms)
        if num == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
            grown = np.zeros((2 * num, 2 * num))
            grown[:num, :num] = self._factor
            self._factor = grown
        row = self.kernel_row(arm)
        left = self._rows[:num, arm].astype(np.float64)
        pivot = math.sqrt(max(self._amplitude + self._nugget - float(left @ left), self._nugget))
        if num:
            row -= left.astype(np.float32) @ self._rows[:num]
        row /= np.float32(pivot)
        self._rows[num] = row
        self._factor[num, :num], self._factor[num, num] = left, pivot
        np.subtract(self._variance, row * row, out=self._variance)
        self.arms.append(arm)

    def begin(self, arms: list[int]) -> None:
        """Observe many arms at once, by one factorisation; only before any other. `fill` does most of the work."""
        num = len(arms)
        size = num + _FIRST_ROWS
        covariance = self._kernel(arms, np.array(arms)).astype(np.float64)
        covariance = (covariance + covariance.T) / 2
        np.fill_diagonal(covariance, self._amplitude + self._nugget)
        self._factor = np.zeros((size, size))
        self._factor[:num, :num] = factor = _cholesky(covariance)
        self._inverse = np.linalg.inv(factor).astype(np.float32)
        self._rows = np.empty((size, len(self._scaled)), dtype=np.float32)
        self._num_filled = 0
        self.arms = list(arms)

    def fill(self, num_elements: int) -> bool:
        """Work out the rows of some more configs after `begin`.

        Args:
            num_elements: of the kernel to work out at most, or one chunk where that is more.

        Returns:
            Whether all configs are done.
        """
        num, begun = len(self.arms), self._num_filled
        while self._num_filled < len(self._scaled):
            part = slice(self._num_filled, self._num_filled + _CHUNK)
            rows = self._inverse @ self._kernel(self.arms, part)
            self._rows[:num, part] = rows
            self._variance[part] -= np.einsum("ij,ij->j", rows, rows)
            self._num_filled += _CHUNK
            if (self._num_filled - begun) * num >= num_elements:
                break
        return self._num_filled >= len(self._scaled)

    def kernel_row(self, arm: int) -> Singles:
        """Return [configs], the prior covariance of one arm with all."""
        away = self._squares + self._squares[arm] - np.float32(2) * (self._scaled @ self._scaled[arm])
        return _matern(away) * np.float32(self._amplitude)

    def _kernel(self, arms: list[int], others: slice | NDArray[np.intp]) -> Singles:
        away = np.float32(-2) * self._scaled[arms] @ self._scaled[others].T
        away += self._squares[arms][:, None]
        away += self._squares[others]
        kernel = _matern(away)
        kernel *= np.float32(self._amplitude)
        return kernel

    def predict(self, values: Floats, basis: Basis) -> tuple[Singles, Singles, Floats]:
        """Return the posterior mean and standard deviation of all configs, and the weights of the basis.

        The deviation holds the nugget too: a config that was not measured has a surprise of its own.

        Args:
            values: [observations], in the order of `arms`.
            basis: of the mean.
        """
        prior = (basis.columns @ basis.mean).astype(np.float32)
        deviation = np.sqrt(np.maximum(self._variance, 0.0) + np.float32(self._nugget))
        if not self.arms:
            return prior, deviation, basis.mean
        weights, whitened = _generalised(self.factor, values, basis, self.arms)
        mean = (basis.columns @ weights).astype(np.float32)
        mean += whitened.astype(np.float32) @ self._rows[: len(self.arms)]
        return mean, deviation, weights

    def log_likelihood(self, values: Floats, basis: Basis) -> float:
        """Return the logarithm of the density of the values, with the weights of the basis at their best."""
        if not self.arms:
            return 0.0
        weights, whitened = _generalised(self.factor, values, basis, self.arms)
        away = weights - basis.mean
        return float(
            -0.5 * (whitened @ whitened)
            - np.log(np.diag(self.factor)).sum()
            - 0.5 * (basis.precision * away**2).sum()
            - 0.5 * len(values) * math.log(2 * math.pi)
        )

    def draw(self, arms: NDArray[np.intp], mean: Singles, num: int, rng: np.random.Generator) -> Floats:
        """Draw functions of the posterior on some arms.

        Args:
            arms: where, a few hundred at most.
            mean: [configs], from `predict`.
            num: functions to draw.
            rng: random numbers.

        Returns:
            [num, arms].
        """
        chosen, rows = self._scaled[arms], self._rows[: len(self.arms), arms].astype(np.float64)
        away = self._squares[arms][:, None] + self._squares[arms] - np.float32(2) * (chosen @ chosen.T)
        covariance = _matern(away).astype(np.float64) * self._amplitude - rows.T @ rows
        covariance = (covariance + covariance.T) / 2
        covariance[np.diag_indices(len(arms))] += self._nugget
        root = _cholesky(covariance)
        drawn: Floats = mean[arms].astype(np.float64) + rng.standard_normal((num, len(arms))) @ root.T
        return drawn


class Fitter:
    """Finds hyper-parameters of high posterior density, some steps at a time, while observations come in.

    Resilient propagation: the signs of the gradient, and a step of its own a hyper-parameter.

    Source: Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm",
        1993.
    """

    def __init__(self, prior: HyperPrior) -> None:
        self._prior = prior
        centre = prior.mean.vector()
        # Far tails of a normal prior are no safeguard against a flat likelihood: a box of three deviations is.
        self._low, self._high = centre - 3 * prior.spread, centre + 3 * prior.spread
        self._at = self._best = centre
        self._step, self._before = np.full(len(centre), 0.3), np.zeros(len(centre))

    def run(self, features: Floats, values: Floats, basis: Basis, num_steps: int) -> None:
        """Take some steps on the observations so far.

        Args:
            features: [observations, features].
            values: [observations].
            basis: with columns [observations, functions].
            num_steps: evaluations of the gradient.
        """
        for _ in range(num_steps):
            _, slope = _density(self._at, features, values, basis, self._prior)
            turn = slope * self._before
            grown = np.where(turn > 0, 1.3 * self._step, np.where(turn < 0, 0.5 * self._step, self._step))
            self._step = np.clip(grown, 1e-2, 0.8)
            self._before = np.where(turn < 0, 0.0, slope)
            self._at = np.clip(self._at + np.sign(self._before) * self._step, self._low, self._high)

    def best(self, features: Floats, values: Floats, basis: Basis) -> Hyper:
        """Return the better one of where the steps have led and what was returned before."""
        now, _ = _density(self._at, features, values, basis, self._prior)
        before, _ = _density(self._best, features, values, basis, self._prior)
        if now > before:
            self._best = self._at
        return Hyper.of(self._best)


def _density(at: Floats, features: Floats, values: Floats, basis: Basis, prior: HyperPrior) -> tuple[float, Floats]:
    """The log posterior density of hyper-parameters, and its gradient."""
    amplitude, nugget = math.exp(at[-2]), math.exp(at[-1])
    scaled = features / np.exp(at[:-2])
    squares = (scaled**2).sum(axis=1)
    root = _SQRT5 * np.sqrt(np.maximum(squares[:, None] + squares - 2 * scaled @ scaled.T, 0.0))
    decay = np.exp(-root)
    kernel = amplitude * (1 + root + root**2 / 3) * decay
    diagonal = np.arange(len(values))
    kernel[diagonal, diagonal] = amplitude + nugget
    factor = _cholesky(kernel)
    kernel[diagonal, diagonal] = amplitude
    inverse = np.linalg.inv(factor)
    weights, whitened = _regressed(inverse @ np.column_stack([values, basis.columns]), basis)
    alpha = inverse.T @ whitened
    away = (at - prior.mean.vector()) / prior.spread
    density = float(
        -0.5 * whitened @ whitened
        - np.log(factor[diagonal, diagonal]).sum()
        - 0.5 * (basis.precision * (weights - basis.mean) ** 2).sum()
        - 0.5 * away @ away
    )
    pull = np.outer(alpha, alpha) - inverse.T @ inverse
    # d kernel / d log length_j = amplitude * 5/3 (1 + root) exp(-root) * (distance_j / length_j)^2
    weight = pull * (amplitude * 5 / 3 * (1 + root) * decay)
    by_length = (scaled**2 * weight.sum(axis=1)[:, None]).sum(axis=0) - (scaled * (weight @ scaled)).sum(axis=0)
    slope = np.concatenate([by_length, [0.5 * (pull * kernel).sum(), 0.5 * nugget * pull[diagonal, diagonal].sum()]])
    return density, slope - away / prior.spread


def _generalised(factor: Floats, values: Floats, basis: Basis, arms: list[int]) -> tuple[Floats, Floats]:
    return _regressed(np.linalg.solve(factor, np.column_stack([values, basis.columns[arms]])), basis)


def _regressed(whitened: NDArray[Any], basis: Basis) -> tuple[Floats, Floats]:
    """Generalised least squares with a ridge: the weights of the basis, and the whitened rest of the values."""
    target, inputs = whitened[:, 0], whitened[:, 1:]
    normal = inputs.T @ inputs + np.diag(basis.precision + 1e-9)
    weights: Floats = np.asarray(np.linalg.solve(normal, inputs.T @ target + basis.precision * basis.mean), np.float64)
    return weights, target - inputs @ weights


def _matern(squared: NDArray[Any]) -> Singles:
    root = np.sqrt(np.maximum(squared, 0.0, out=squared), out=squared)
    root *= np.float32(_SQRT5)
    shape = root * root
    shape /= np.float32(3)
    shape += root
    shape += np.float32(1)
    np.negative(root, out=root)
    shape *= np.exp(root, out=root)
    return shape


def _cholesky(covariance: Floats) -> Floats:
    """Factorise; a matrix that rounding has made indefinite gets the least jitter that helps."""
    for jitter in (0.0, 1e-8, 1e-6, 1e-4, 1e-2):
        try:
            lifted = covariance + jitter * np.diag(np.diag(covariance)) if jitter else covariance
            return np.asarray(np.linalg.cholesky(lifted), dtype=np.float64)
        except np.linalg.LinAlgError:
            continue
    return np.diag(np.sqrt(np.maximum(np.diag(covariance), 1e-12)))
