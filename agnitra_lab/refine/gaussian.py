"""An exact Gaussian process over the enumerated configs: rows of the Cholesky factor are appended, never recomputed.

With V = L^-1 K(observed, all) kept as it grows, the posterior of all configs after one more observation costs one
kernel row and two products of V with a vector: 2 to 4 ms at 20,000 configs and 100 observations on one core. The
evidence needs the observations alone, so a model that is only weighed works out no row.

Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, sections 2.2, 2.7 (explicit basis
functions), 4.2 (Matern) and 5.4 (marginal likelihood and its gradient).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
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
        log_linear: [blocks], of the variance of each block's linear function.
    """

    log_lengths: Floats
    log_amplitude: float
    log_nugget: float
    log_linear: tuple[float, ...] = ()

    def vector(self) -> Floats:
        """Return all of them, the lengths first."""
        return np.concatenate([self.log_lengths, [self.log_amplitude, self.log_nugget], self.log_linear])

    @classmethod
    def of(cls, vector: Floats, num_blocks: int = 0) -> Hyper:
        """Undo `vector`."""
        num = len(vector) - 2 - num_blocks
        return cls(vector[:num].copy(), float(vector[num]), float(vector[num + 1]), tuple(vector[num + 2 :].tolist()))


@dataclass(frozen=True)
class Inputs:
    """What the kernel function compares configs by: the sum of a Matern kernel and of linear ones.

    Attributes:
        features: [configs, features], of the Matern kernel.
        blocks: [configs, functions] each; a block's functions have independent normal weights of one variance.
    """

    features: NDArray[Any]
    blocks: tuple[NDArray[Any], ...] = ()

    def __len__(self) -> int:
        return len(self.features)

    def at(self, arms: NDArray[np.intp] | list[int]) -> Inputs:
        """Return those of some configs."""
        return Inputs(self.features[arms], tuple(block[arms] for block in self.blocks))

    @cached_property
    def stacked(self) -> NDArray[Any]:
        """[configs, functions], all blocks side by side; made once, because it is large."""
        return np.concatenate([np.zeros((len(self), 0), self.features.dtype), *self.blocks], axis=1)

    @cached_property
    def squares(self) -> NDArray[Any]:
        """[blocks, configs], the variance of each block's function under weights of variance 1."""
        return np.array([np.einsum("ij,ij->i", block, block) for block in self.blocks]).reshape(-1, len(self))

    def single(self) -> Inputs:
        """Return them in float32, for all that is done with every config."""
        return Inputs(self.features.astype(np.float32), tuple(block.astype(np.float32) for block in self.blocks))


@dataclass(frozen=True)
class HyperPrior:
    """Independent normal priors of the logarithms.

    Attributes:
        mean: where the hyper-parameters begin.
        spread: [features + 2 + blocks], standard deviations.
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

    def __init__(self, inputs: Inputs, hyper: Hyper) -> None:
        """Begin with no observation.

        Args:
            inputs: of all configs, in float32.
            hyper: the hyper-parameters.
        """
        self.hyper = hyper
        self.arms: list[int] = []
        self._amplitude = math.exp(hyper.log_amplitude)
        self._nugget = math.exp(hyper.log_nugget)
        self._scaled: Singles = (inputs.features / np.exp(hyper.log_lengths)).astype(np.float32)
        self._squares = np.einsum("ij,ij->i", self._scaled, self._scaled)
        variances = np.exp(np.array(hyper.log_linear, dtype=np.float32))
        self._linear: Singles = inputs.stacked
        self._weights = np.repeat(variances, [block.shape[1] for block in inputs.blocks])
        self._prior = np.float32(self._amplitude) + variances @ inputs.squares
        self._variance = self._prior.copy()
        self._factor, self._inverse = np.zeros((_FIRST_ROWS, _FIRST_ROWS)), np.zeros((_FIRST_ROWS, _FIRST_ROWS))
        self._rows: Singles = np.empty((_FIRST_ROWS, len(inputs)), dtype=np.float32)
        self._num_rows, self._num_filled = 0, len(inputs)

    @property
    def factor(self) -> Floats:
        """[observations, observations], the lower Cholesky factor of the observations' covariance."""
        return self._factor[: len(self.arms), : len(self.arms)]

    @property
    def inverse(self) -> Floats:
        """[observations, observations], the inverse of `factor`."""
        return self._inverse[: len(self.arms), : len(self.arms)]

    def append(self, arm: int) -> None:
        """Observe one more arm; its value comes later, because the posterior is linear in the values.

        That costs next to nothing: what it means for all configs is worked out when they are asked for.
        """
        num = len(self.arms)
        if num == len(self._factor):
            self._factor, self._inverse = _grown(self._factor), _grown(self._inverse)
        left = self.inverse @ self._kernel([arm], np.array(self.arms, dtype=np.intp))[0].astype(np.float64)
        pivot = math.sqrt(max(float(self._prior[arm]) + self._nugget - float(left @ left), self._nugget))
        self._factor[num, :num], self._factor[num, num] = left, pivot
        self._inverse[num, :num], self._inverse[num, num] = left @ self.inverse / -pivot, 1 / pivot
        self.arms.append(arm)

    def begin(self, arms: list[int]) -> None:
        """Observe many arms at once, by one factorisation; only before any other. `fill` does most of the work."""
        num = len(arms)
        size = num + _FIRST_ROWS
        covariance = self._kernel(arms, np.array(arms)).astype(np.float64)
        covariance = (covariance + covariance.T) / 2
        np.fill_diagonal(covariance, self._prior[arms].astype(np.float64) + self._nugget)
        self._factor, self._inverse = np.zeros((size, size)), np.zeros((size, size))
        self._factor[:num, :num] = factor = _cholesky(covariance)
        self._inverse[:num, :num] = np.linalg.inv(factor)
        self._rows = np.empty((size, len(self._scaled)), dtype=np.float32)
        self._num_rows, self._num_filled = num, 0
        self.arms = list(arms)

    def fill(self, num_elements: int) -> bool:
        """Work out the rows of some more configs after `begin`.

        Args:
            num_elements: of the kernel to work out at most, or one chunk where that is more.

        Returns:
            Whether all configs are done.
        """
        num, begun = len(self.arms), self._num_filled
        inverse = self.inverse.astype(np.float32)
        while self._num_filled < len(self._scaled):
            part = slice(self._num_filled, self._num_filled + _CHUNK)
            rows = inverse @ self._kernel(self.arms, part)
            self._rows[:num, part] = rows
            self._variance[part] -= np.einsum("ij,ij->j", rows, rows)
            self._num_filled += _CHUNK
            if (self._num_filled - begun) * num >= num_elements:
                break
        return self._num_filled >= len(self._scaled)

    def _kernel(self, arms: list[int], others: slice | NDArray[np.intp]) -> Singles:
        away = (np.float32(-2) * self._scaled[arms]) @ self._scaled[others].T
        away += self._squares[arms][:, None]
        away += self._squares[others]
        kernel = _matern(away)
        kernel *= np.float32(self._amplitude)
        kernel += (self._linear[arms] * self._weights) @ self._linear[others].T
        return kernel

    def _catch_up(self) -> Singles:
        """Work out the rows of the arms that were appended since the last time, all at once, and return all rows."""
        num, known = len(self.arms), self._num_rows
        if num > len(self._rows):
            more = np.empty((len(self._factor) - len(self._rows), len(self._scaled)), dtype=np.float32)
            self._rows = np.concatenate([self._rows, more])
        if num > known:
            fresh = self._kernel(self.arms[known:], slice(None))
            if known:
                fresh -= self._factor[known:num, :known].astype(np.float32) @ self._rows[:known]
            rows = self._rows[known:num]
            np.matmul(self._inverse[known:num, known:num].astype(np.float32), fresh, out=rows)
            self._variance -= np.einsum("ij,ij->j", rows, rows)
            self._num_rows = num
        return self._rows[:num]

    def predict(self, values: Floats, basis: Basis) -> tuple[Singles, Singles, Floats]:
        """Return the posterior mean and standard deviation of all configs, and the weights of the basis.

        The deviation holds the nugget too: a config that was not measured has a surprise of its own.

        Args:
            values: [observations], in the order of `arms`.
            basis: of the mean.
        """
        rows = self._catch_up()
        deviation = np.sqrt(np.maximum(self._variance, 0.0) + np.float32(self._nugget))
        if not self.arms:
            return (basis.columns @ basis.mean).astype(np.float32), deviation, basis.mean
        weights, whitened = self._regressed(values, basis)
        mean = (basis.columns @ weights).astype(np.float32)
        mean += whitened.astype(np.float32) @ rows
        return mean, deviation, weights

    def _regressed(self, values: Floats, basis: Basis) -> tuple[Floats, Floats]:
        return _regressed(self.inverse @ np.column_stack([values, basis.columns[self.arms]]), basis)

    def log_likelihood(self, values: Floats, basis: Basis) -> float:
        """Return the logarithm of the density of the values, with the weights of the basis at their best."""
        if not self.arms:
            return 0.0
        weights, whitened = self._regressed(values, basis)
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
        chosen, rows = self._scaled[arms], self._catch_up()[:, arms].astype(np.float64)
        away = self._squares[arms][:, None] + self._squares[arms] - np.float32(2) * (chosen @ chosen.T)
        linear = self._linear[arms]
        covariance = _matern(away).astype(np.float64) * self._amplitude - rows.T @ rows
        covariance += (linear * self._weights) @ linear.T
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

    def run(self, inputs: Inputs, values: Floats, basis: Basis, num_steps: int) -> None:
        """Take some steps on the observations so far.

        Args:
            inputs: of the observations.
            values: [observations].
            basis: with columns [observations, functions].
            num_steps: evaluations of the gradient.
        """
        for _ in range(num_steps):
            _, slope = _density(self._at, inputs, values, basis, self._prior)
            turn = slope * self._before
            grown = np.where(turn > 0, 1.3 * self._step, np.where(turn < 0, 0.5 * self._step, self._step))
            self._step = np.clip(grown, 1e-2, 0.8)
            self._before = np.where(turn < 0, 0.0, slope)
            self._at = np.clip(self._at + np.sign(self._before) * self._step, self._low, self._high)

    def best(self, inputs: Inputs, values: Floats, basis: Basis) -> Hyper:
        """Return the better one of where the steps have led and what was returned before."""
        now, _ = _density(self._at, inputs, values, basis, self._prior)
        before, _ = _density(self._best, inputs, values, basis, self._prior)
        if now > before:
            self._best = self._at
        return Hyper.of(self._best, len(inputs.blocks))


def _density(at: Floats, inputs: Inputs, values: Floats, basis: Basis, prior: HyperPrior) -> tuple[float, Floats]:
    """The log posterior density of hyper-parameters, and its gradient."""
    num = inputs.features.shape[1]
    amplitude, nugget = math.exp(at[num]), math.exp(at[num + 1])
    linear = [math.exp(log) * (block @ block.T) for log, block in zip(at[num + 2 :], inputs.blocks, strict=True)]
    scaled = inputs.features / np.exp(at[:num])
    squares = (scaled**2).sum(axis=1)
    root = _SQRT5 * np.sqrt(np.maximum(squares[:, None] + squares - 2 * scaled @ scaled.T, 0.0))
    decay = np.exp(-root)
    kernel = amplitude * (1 + root + root**2 / 3) * decay
    diagonal = np.arange(len(values))
    kernel[diagonal, diagonal] = amplitude
    whole = sum(linear, kernel.copy())
    whole[diagonal, diagonal] += nugget
    factor = _cholesky(whole)
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
    by_amplitude = [0.5 * (pull * kernel).sum(), 0.5 * nugget * pull[diagonal, diagonal].sum()]
    slope = np.concatenate([by_length, by_amplitude, [0.5 * (pull * part).sum() for part in linear]])
    return density, slope - away / prior.spread


def _grown(square: Floats) -> Floats:
    grown = np.zeros((2 * len(square), 2 * len(square)))
    grown[: len(square), : len(square)] = square
    return grown


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
