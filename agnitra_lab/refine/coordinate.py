"""Coordinate descent: change one parameter of the best config at a time, restart at random where nothing is better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.refine.sampler import Observation, Problem


class CoordinateDescent:
    """A sampler that walks downhill along the coordinates, the nearest values first."""

    def __init__(self, problem: Problem) -> None:
        self._encoding = problem.encoding
        self._rng = np.random.default_rng(problem.seed)
        self._base: int | None = None
        self._base_ms = np.inf

    def propose(self, num: int, is_open: NDArray[np.bool_]) -> Sequence[int]:
        """Return open configs on the lines through the base; random ones where the base has no open line left."""
        if self._base is not None:
            lines = self._encoding.on_same_lines(self._base)
            lines = lines[is_open[lines]]
            if lines.size:
                steps = np.abs(self._encoding.ranks[lines] - self._encoding.ranks[self._base]).sum(axis=1)
                order = np.lexsort((self._rng.random(lines.size), steps > 1))
                return [int(arm) for arm in lines[order][:num]]
            self._base, self._base_ms = None, np.inf
        arms = np.flatnonzero(is_open)
        return [int(arm) for arm in self._rng.choice(arms, size=min(num, arms.size), replace=False)]

    def learn(self, seen: Observation) -> None:
        """Move to a better config at once."""
        if seen.log_ms is not None and seen.log_ms < self._base_ms:
            self._base, self._base_ms = seen.arm, seen.log_ms


def build(problem: Problem) -> CoordinateDescent:
    """Build the sampler of the name "coordinate"."""
    return CoordinateDescent(problem)
