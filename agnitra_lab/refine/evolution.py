"""CMA-ES on the ranks of the parameters, through the `cmaes` package: integer variables with margins.

A point that the search distribution draws is answered by the nearest valid config that is still open.

Source: Hamano et al., "CMA-ES with margin: lower-bounding marginal probability for mixed-integer black-box
optimization", GECCO 2022; Hamano et al., "CatCMA with margin", GECCO 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.optional import require
from agnitra_lab.refine.sampler import Observation, Problem

FAILURE_LOG_MS = 0.7


class Evolution:
    """A sampler that moves a Gaussian over the ranks, a generation at a time."""

    def __init__(self, problem: Problem) -> None:
        cmaes = require("cmaes", extra="search", purpose='for the sampler "cmaes"')
        self._encoding = problem.encoding
        widths = [len(values) for values in problem.encoding.space.params.values()]
        self._varied = [index for index, width in enumerate(widths) if width > 1]
        self._optimizer: Any = None
        self._rng = np.random.default_rng(problem.seed)
        if self._varied:
            domain = [list(range(widths[index])) for index in self._varied]
            self._optimizer = cmaes.CatCMAwM(z_space=domain, seed=problem.seed)
        self._solution_of: dict[int, Any] = {}
        self._generation: list[tuple[Any, float]] = []
        self._worst: float | None = None

    def propose(self, num: int, is_open: NDArray[np.bool_]) -> Sequence[int]:
        """Return the open configs nearest to the points that the distribution draws."""
        is_free, chosen = is_open.copy(), []
        for _ in range(min(num, int(is_open.sum()))):
            arm = self._next(is_free)
            is_free[arm] = False
            chosen.append(arm)
        return chosen

    def learn(self, seen: Observation) -> None:
        """Add the answer to its generation; a whole generation moves the distribution."""
        if seen.log_ms is not None:
            self._worst = seen.log_ms if self._worst is None else max(self._worst, seen.log_ms)
        solution = self._solution_of.pop(seen.arm, None)
        if solution is None or self._optimizer is None:
            return
        value = seen.log_ms if seen.log_ms is not None else (self._worst or 0.0) + FAILURE_LOG_MS
        self._generation.append((solution, value))
        if len(self._generation) == self._optimizer.population_size:
            self._optimizer.tell(self._generation)
            self._generation = []

    def _next(self, is_free: NDArray[np.bool_]) -> int:
        if self._optimizer is None or self._optimizer.should_stop():
            return int(self._rng.choice(np.flatnonzero(is_free)))
        solution = self._optimizer.ask()
        point = np.zeros(len(self._encoding.names))
        widths = np.array([len(values) for values in self._encoding.space.params.values()])
        point[self._varied] = np.asarray(solution.z, dtype=np.float64) / (widths[self._varied] - 1)
        arm = self._encoding.nearest(point, is_free)
        self._solution_of[arm] = solution
        return arm


def build(problem: Problem) -> Evolution:
    """Build the sampler of the name "cmaes"."""
    return Evolution(problem)
