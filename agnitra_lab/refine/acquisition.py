"""Which config to try next, given what a model believes: expected improvement, and points far from each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_CANDIDATES = 16
_ROOT_TAU = math.sqrt(2 * math.pi)


def expected_improvement(mean: NDArray[np.float32], deviation: NDArray[np.float32], best: float) -> NDArray[np.float32]:
    """Return how much lower than `best` each config is expected to be, counting only what is lower.

    Args:
        mean: [configs] of the model.
        deviation: [configs], standard deviations, above 0.
        best: the lowest value seen.
    """
    z = (np.float32(best) - mean) / deviation
    density = np.exp(np.float32(-0.5) * z * z) / np.float32(_ROOT_TAU)
    # In the far tail the difference of two nearly equal numbers is noise; its expansion is not.
    tail = density / np.maximum(z * z, np.float32(1))
    near = np.maximum(z * _normal_cdf(z, density) + density, 0)
    return np.asarray(deviation * np.where(z < -3, tail, near))


def spread_out(
    points: NDArray[np.float64],
    is_open: NDArray[np.bool_],
    num: int,
    rng: np.random.Generator,
    taken: NDArray[np.intp] | None = None,
) -> list[int]:
    """Choose open configs far from each other and from all that were taken: the best of some random candidates.

    Args:
        points: [configs, parameters] in 0..1.
        is_open: [configs], which may be chosen.
        num: how many.
        rng: random numbers.
        taken: arms to keep away from; by default all that are not open.

    Source: Mitchell, "Spectrally optimal sampling for distribution ray tracing", SIGGRAPH 1991 (best candidate).
    """
    chosen: list[int] = []
    far_from = np.flatnonzero(~is_open) if taken is None else taken
    for _ in range(num):
        open_arms = np.flatnonzero(is_open)
        open_arms = open_arms[~np.isin(open_arms, chosen)]
        some = rng.choice(open_arms, size=min(NUM_CANDIDATES, open_arms.size), replace=False)
        others = np.concatenate([far_from, np.array(chosen, dtype=np.intp)])
        if not others.size:
            chosen.append(int(some[0]))
            continue
        away = ((points[some][:, None, :] - points[others][None, :, :]) ** 2).sum(axis=2).min(axis=1)
        chosen.append(int(some[np.argmax(away)]))
    return chosen


def normal_cdf(z: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how likely a standard normal number is to be below each z, to 1e-7."""
    return _normal_cdf(z, np.exp(np.float32(-0.5) * z * z) / np.float32(_ROOT_TAU))


def _normal_cdf(z: NDArray[Any], density: NDArray[Any]) -> NDArray[Any]:
    """The normal distribution function, to 1e-7.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.2.17.
    """
    t = np.float32(1) / (np.float32(1) + np.float32(0.2316419) * np.abs(z))
    series = np.zeros_like(t)
    for weight in (1.330274429, -1.821255978, 1.781477937, -0.356563782, 0.319381530):
        series += np.float32(weight)
        series *= t
    upper = density * series
    return np.where(z >= 0, np.float32(1) - upper, upper)
