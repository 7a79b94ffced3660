"""Random search: every valid config equally likely. The baseline that a learner must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.refine.sampler import Observation, Problem


class RandomSearch:
    """A sampler that learns nothing."""

    def __init__(self, problem: Problem) -> None:
        self._order = np.random.default_rng(problem.seed).permutation(len(problem.encoding))

    def propose(self, num: int, is_open: NDArray[np.bool_]) -> Sequence[int]:
        """Return the next open arms of a random order."""
        return [int(arm) for arm in self._order[is_open[self._order]][:num]]

    def learn(self, seen: Observation) -> None:
        """Learn nothing."""


def build(problem: Problem) -> RandomSearch:
    """Build the sampler of the name "random"."""
    return RandomSearch(problem)
