"""Exhaustive search: every valid config, in the order of the space. It finds the optimum, and takes as long as that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.refine.sampler import Observation, Problem


class Exhaustive:
    """A sampler that leaves nothing out."""

    def propose(self, num: int, is_open: NDArray[np.bool_]) -> Sequence[int]:
        """Return the first open arms."""
        return [int(arm) for arm in np.flatnonzero(is_open)[:num]]

    def learn(self, seen: Observation) -> None:
        """Learn nothing."""


def build(problem: Problem) -> Exhaustive:
    """Build the sampler of the name "exhaustive"."""
    return Exhaustive()
