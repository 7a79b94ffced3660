"""The tree-structured Parzen estimator, through Optuna: multivariate, over the ranks of the parameters.

A point that Optuna draws is answered by the nearest valid config that is still open, and Optuna is told of that one.

Source: Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS 2011.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.optional import require
from agnitra_lab.refine.sampler import Observation, Problem


class Parzen:
    """A sampler that asks an Optuna study."""

    def __init__(self, problem: Problem) -> None:
        self._optuna: Any = require("optuna", extra="search", purpose='for the sampler "tpe"')
        self._encoding = problem.encoding
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = self._optuna.samplers.TPESampler(seed=problem.seed, multivariate=True)
        self._study = self._optuna.create_study(sampler=sampler)
        widths = {name: len(values) for name, values in problem.encoding.space.params.items()}
        distribution = self._optuna.distributions.IntDistribution
        self._distributions = {name: distribution(0, width - 1) for name, width in widths.items()}

    def propose(self, num: int, is_open: NDArray[np.bool_]) -> Sequence[int]:
        """Return the open configs nearest to the points that Optuna asks for."""
        is_free, chosen = is_open.copy(), []
        for _ in range(min(num, int(is_open.sum()))):
            trial = self._study.ask(self._distributions)
            scale = [max(1, self._distributions[name].high) for name in self._encoding.names]
            point = np.array([trial.params[name] for name in self._encoding.names]) / scale
            # The trial of the point is pruned from memory by failing it: the valid config is told in its place.
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            arm = self._encoding.nearest(point, is_free)
            is_free[arm] = False
            chosen.append(arm)
        return chosen

    def learn(self, seen: Observation) -> None:
        """Add the config to the study; a failure counts as one that broke a constraint."""
        state = self._optuna.trial.TrialState
        ranks = self._encoding.ranks[seen.arm]
        params = {name: int(rank) for name, rank in zip(self._encoding.names, ranks, strict=True)}
        is_failed = seen.log_ms is None
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params=params,
                distributions=self._distributions,
                value=None if is_failed else seen.log_ms,
                state=state.PRUNED if is_failed else state.COMPLETE,
            )
        )


def build(problem: Problem) -> Parzen:
    """Build the sampler of the name "tpe"."""
    return Parzen(problem)
