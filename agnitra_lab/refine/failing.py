"""How likely each config is to run at all, learned from those that failed.

Failures come in clusters: a resource runs out, and everything beyond fails. A model of latencies alone knows nothing of
them and goes on asking where it extrapolates to the lowest time, for ever.

Source: Gelbart, Snoek and Adams, "Bayesian optimization with unknown constraints", UAI 2014; labels by least squares
as in Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, section 6.5.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.refine.acquisition import normal_cdf
from agnitra_lab.refine.gaussian import Basis, Hyper, Inputs, Process
from agnitra_lab.refine.siblings import Sibling

LENGTH, AMPLITUDE, NUGGET, LINEAR = 0.7, 0.3, 0.05, (0.5, 0.2)
"""Half of the variance of a label is a sum over parameters: the logarithm of what a config needs is one."""
OVERALL, FROM_SIBLINGS, PRECISION = 0.05, 0.6, 4.0
"""Share that fails before anything is known, that of a sibling's failures that fail here, and how sure both are."""


class Failing:
    """A Gaussian process of labels: 0 for a config that runs, 1 for one that fails."""

    def __init__(self, inputs: Inputs, siblings: tuple[Sibling, ...]) -> None:
        """Begin with what failed at the siblings.

        Args:
            inputs: of all configs, in float32, with as many blocks as `LINEAR` has variances.
            siblings: aligned to the configs.
        """
        num = inputs.features.shape[1]
        hyper = Hyper(
            np.full(num, math.log(LENGTH * math.sqrt(num))), math.log(AMPLITUDE), math.log(NUGGET),
            tuple(math.log(variance) for variance in LINEAR),
        )  # fmt: skip
        there = [sibling.is_failed for sibling in siblings if sibling.is_failed.any()]
        share = np.mean(there, axis=0) if there else np.zeros(len(inputs))
        self._basis = Basis(
            np.column_stack([np.ones(len(inputs)), share]), np.array([OVERALL, FROM_SIBLINGS]), np.full(2, PRECISION)
        )
        self._process: Process | None = None
        self._inputs, self._hyper = inputs, hyper
        self._arms: list[int] = []
        self._labels: list[float] = []
        self._is_needed = bool(there)

    def add(self, arm: int, *, is_failed: bool) -> None:
        """Take one arm. Nothing is worked out before the first failure."""
        self._arms.append(arm)
        self._labels.append(float(is_failed))
        self._is_needed = self._is_needed or is_failed

    def odds_of_success(self) -> NDArray[np.float32] | None:
        """Return [configs], how likely each is to run; None while no failure is known of."""
        if not self._is_needed:
            return None
        if self._process is None:
            self._process = Process(self._inputs, self._hyper)
        for arm in self._arms[len(self._process.arms) :]:
            self._process.append(arm)
        mean, deviation, _ = self._process.predict(np.array(self._labels), self._basis)
        return normal_cdf((np.float32(0.5) - mean) / deviation)
