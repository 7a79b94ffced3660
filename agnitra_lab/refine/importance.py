"""Which parameters of a kernel decide its time, as far as a search's own trials can tell.

The logarithm of the time is fitted as a sum of one effect a parameter (a value's effect is a factor on the time),
shrunk by the ridge that predicts left-out trials best. A parameter's share is its effect's covariance with the fit;
the shares sum to one. How far the sum can be believed is the share of the variance of left-out trials that it predicts;
below `LEAST_EXPLAINED` nothing is claimed.

A search tries what it believes in, so the shares are those of the configs that it tried, not of the whole space.

Source: Allen, "The relationship between variable selection and data augmentation and a method for prediction", 1974
    (errors of left-out trials in closed form); Li, Rabitz et al., "Global sensitivity analysis for systems with
    independent and/or correlated inputs", J. Phys. Chem. A 114, 2010 (covariance shares where inputs are correlated).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.search import Trial
from agnitra_lab.refine.blas_threads import on_one_blas_thread

LEAST_TRIALS = 8
LEAST_EXPLAINED = 0.1
_RIDGES = np.logspace(-2, 2, 13)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """What one parameter does.

    Attributes:
        name: of the parameter.
        share: of the fit's variance, 0 to 1.
        factors: value -> factor on the time beside the mean of all trials; below 1 is faster.
    """

    name: str
    share: float
    factors: Mapping[int, float]

    @property
    def best(self) -> int:
        """The value with the lowest factor."""
        return min(self.factors, key=lambda value: (self.factors[value], value))


@dataclass(frozen=True)
class Importance:
    """The parameters of one search, most important first.

    Attributes:
        effects: one a parameter that took more than one value; empty where nothing can be said.
        explained: share of the variance of the logarithm of the time that is predicted of left-out trials.
        num_trials: successful trials behind it.
    """

    effects: tuple[Effect, ...]
    explained: float
    num_trials: int


@on_one_blas_thread
def importance(trials: Sequence[Trial]) -> Importance:
    """Find which parameters decide the time.

    Args:
        trials: of one search. Failed ones have no time, and say nothing here.

    Returns:
        Without effects when fewer than `LEAST_TRIALS` succeeded, all took the same time, or left-out trials are
        predicted no better than by `LEAST_EXPLAINED`.
    """
    timed = [trial for trial in trials if trial.latency_ms is not None]
    names = sorted({name for trial in timed for name in trial.config.params})
    columns = {name: np.array([trial.config.params.get(name, 0) for trial in timed]) for name in names}
    varying = {name: values for name, values in columns.items() if len(np.unique(values)) > 1}
    times = np.log([trial.latency_ms for trial in timed if trial.latency_ms is not None])
    if len(timed) < LEAST_TRIALS or not varying or np.ptp(times) < 1e-9:
        return Importance((), 0.0, len(timed))
    centred = times - times.mean()
    blocks = {name: _indicators(values) for name, values in varying.items()}
    weights, explained = _fit(np.hstack(list(blocks.values())), centred)
    if explained < LEAST_EXPLAINED:
        return Importance((), max(explained, 0.0), len(timed))
    return Importance(_effects(varying, blocks, weights), explained, len(timed))


def _indicators(values: NDArray[np.int64]) -> Floats:
    """One centred column a value: [trials, values]."""
    columns = (values[:, None] == np.unique(values)).astype(np.float64)
    return columns - columns.mean(axis=0)


def _fit(columns: Floats, target: Floats) -> tuple[Floats, float]:
    """Ridge regression; the ridge is the one with the smallest errors on left-out trials.

    Returns:
        ([columns] weights, share of the variance of left-out trials that is predicted).
    """
    left, values, right = np.linalg.svd(columns, full_matrices=False)
    rotated = left.T @ target
    total = float((_left_out(np.zeros_like(target), 0.0, target) ** 2).sum())
    best_error, best_weights = np.inf, np.zeros(columns.shape[1])
    for ridge in _RIDGES:
        shrunk = values**2 / (values**2 + ridge)
        leverage = (left**2 * shrunk).sum(axis=1)
        error = float((_left_out(left @ (shrunk * rotated), leverage, target) ** 2).sum())
        if error < best_error:
            best_error = error
            best_weights = right.T @ (values / (values**2 + ridge) * rotated)
    return best_weights, 1.0 - best_error / total


def _left_out(fitted: Floats, leverage: Floats | float, target: Floats) -> Floats:
    """Errors on each trial of the fit to all others; the mean is fitted too, which is one n-th more of leverage."""
    return (target - fitted) / np.maximum(1.0 - leverage - 1.0 / len(target), 1e-6)


def _effects(
    varying: Mapping[str, NDArray[np.int64]], blocks: Mapping[str, Floats], weights: Floats
) -> tuple[Effect, ...]:
    parts, start = {}, 0
    for name, block in blocks.items():
        parts[name] = block @ weights[start : start + block.shape[1]]
        start += block.shape[1]
    fitted = np.sum(list(parts.values()), axis=0)
    # Where two parameters move together one share may come out just below zero: it is none.
    pulls = {name: max(0.0, float(part @ fitted)) for name, part in parts.items()}
    total = sum(pulls.values())
    made = [
        Effect(
            name,
            pulls[name] / total,
            {int(value): float(np.exp(part[varying[name] == value][0])) for value in np.unique(varying[name])},
        )
        for name, part in parts.items()
    ]
    return tuple(sorted(made, key=lambda effect: (-effect.share, effect.name)))
