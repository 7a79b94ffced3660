"""The greedy portfolio: the configs that together come nearest to every sibling's optimum. It learns nothing here.

Each next config is the one that lowers the mean, over the siblings, of the best of the portfolio so far by the most.
That is submodular, so greedy is within 1 - 1/e of the best portfolio of its size. Siblings that were moved to the shape
in hand have the first choices to themselves. Without siblings it is random search.

Source: Nemhauser, Wolsey and Fisher, "An analysis of approximations for maximizing submodular set functions", 1978.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.refine.sampler import Observation, Problem

CAP = 3.0
"""Logarithm of the factor over a sibling's optimum beyond which a config is as bad as any."""
NUM_FOR_MOVED = 2
"""First choices that cover the moved siblings alone, which were moved because they tell of each other."""


class Portfolio:
    """A sampler that proposes what was good elsewhere."""

    def __init__(self, problem: Problem) -> None:
        num_configs = len(problem.encoding)
        over = [sibling.log_ms - sibling.log_ms.min() for sibling in problem.siblings]
        self._over = np.minimum(np.array(over).reshape(-1, num_configs), CAP)
        self._covered = np.full(len(self._over), CAP)
        self._is_moved = np.array([sibling.is_moved for sibling in problem.siblings], dtype=bool)
        self._num_for_moved = NUM_FOR_MOVED if self._is_moved.any() else 0
        self._random = np.random.default_rng(problem.seed).permutation(num_configs)

    def propose(self, num: int, is_open: NDArray[np.bool_]) -> Sequence[int]:
        """Return the next configs of the portfolio that are open."""
        if not len(self._over):
            return [int(arm) for arm in self._random[is_open[self._random]][:num]]
        chosen: list[int] = []
        for _ in range(min(num, int(is_open.sum()))):
            counted = self._is_moved if self._num_for_moved else slice(None)
            self._num_for_moved = max(0, self._num_for_moved - 1)
            over = self._over[counted]
            gain = np.maximum(self._covered[counted, None] - over, 0.0).mean(axis=0)
            # Where nothing covers more, the siblings' mean decides.
            gain = np.where(is_open, gain - 1e-3 * over.mean(axis=0), -np.inf)
            gain[chosen] = -np.inf
            arm = int(np.argmax(gain))
            chosen.append(arm)
            self._covered = np.minimum(self._covered, self._over[:, arm])
        return chosen

    def learn(self, seen: Observation) -> None:
        """Take a config that was measured unasked as part of the portfolio."""
        if len(self._over) and seen.is_foreign:
            self._covered = np.minimum(self._covered, self._over[:, seen.arm])


def build(problem: Problem) -> Portfolio:
    """Build the sampler of the name "portfolio"."""
    return Portfolio(problem)
