"""The contextual bandit: a reward model over everything known of a config, and the choice that it makes.

The arms are the enumerated valid configs, the context of an arm is its coordinates, what the compiler says of it and
what it cost at the siblings; the reward is minus the logarithm of its latency. That is reinforcement learning with one
step an episode, and no more is claimed.

Two reward models run side by side. The warm one begins with the siblings' mean as its own and learns the difference;
the cold one knows the coordinates alone. The evidence of the measurements shifts the choice between them, so that a
sibling that misleads costs measurements and not the search.

A model that is smooth where the landscape has a step is sure of what it never tried. Where nothing better has come for
a while, every other question goes to the best config with one parameter changed, and the model's doubts count double.

Source: expected improvement: Jones, Schonlau and Welch, "Efficient global optimization of expensive black-box
functions", 1998. Thompson sampling: Agrawal and Goyal, "Thompson sampling for contextual bandits", ICML 2013.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.refine.acquisition import expected_improvement, spread_out
from agnitra_lab.refine.failing import Failing
from agnitra_lab.refine.portfolio import Portfolio
from agnitra_lab.refine.reward import CAP, ColdModel, RewardModel, Seen, WarmModel
from agnitra_lab.refine.sampler import Observation, Problem

NUM_SPREAD = 6
"""Configs that the cold model wants to see, far from each other, before it is asked."""
PORTFOLIO_TURNS = (1, 2, 4, 6, 8)
"""Questions that go to the siblings' best; the model, which sees whether those disappoint, has the ones between."""
NUM_DRAWN_ARMS = 384
COLD_TURN = 4
"""Every so many questions the cold model has its turn whatever the evidence says, once the siblings had their say."""
NUM_SIBLING_TURNS = 10
NUM_PATIENT, COLD_TURN_STUCK = 8, 2
"""Questions without anything better after which the cold model has every other turn: the siblings may mislead."""
NUM_SPREAD_BESIDE = 2
NUM_PATIENT_LINES, LINE_TURN, DOUBT_ON_LINES = 12, 2, 2.0
"""Questions without anything better after which every other one changes one parameter of the best config alone."""


class Bandit:
    """A sampler that learns a reward model of the configs."""

    def __init__(self, problem: Problem) -> None:
        self._rng = np.random.default_rng(problem.seed)
        self._encoding = problem.encoding
        self._seen = Seen()
        self._cold = ColdModel(problem, self._seen)
        self._failing = Failing(self._cold.inputs, problem.siblings)
        self._warm = WarmModel(problem, self._seen) if problem.siblings else None
        self._portfolio = Portfolio(problem) if problem.siblings else None
        self._num_asked = self._num_spread = self._num_since_better = 0
        self._best_log_ms = np.inf

    def propose(self, num: int, is_open: NDArray[np.bool_]) -> Sequence[int]:
        """Return the arm of the highest expected improvement, or one Thompson sample's best arm each of several."""
        num = min(num, int(is_open.sum()))
        self._num_asked += 1
        if self._portfolio is not None and self._num_asked in PORTFOLIO_TURNS:
            return self._portfolio.propose(num, is_open)
        model = self._model()
        if model is self._cold and self._num_spread < self._spread_wanted():
            self._num_spread += num
            return spread_out(self._encoding.points, is_open, num, self._rng)
        if num == 1:
            return [self._best(model, is_open)]
        return self._drawn(model, is_open, num)

    def learn(self, seen: Observation) -> None:
        """Take one arm's latency or failure into both models."""
        self._seen.add(seen)
        self._failing.add(seen.arm, is_failed=seen.log_ms is None)
        if self._portfolio is not None:
            self._portfolio.learn(seen)
        self._num_since_better += 1
        if seen.log_ms is not None and seen.log_ms < self._best_log_ms:
            self._best_log_ms, self._num_since_better = seen.log_ms, 0

    def trust(self) -> dict[str, float]:
        """How much of the warm model's mean each sibling has, times the odds of the warm model itself."""
        if self._warm is None:
            return {}
        share = self._warm_share()
        return {name: round(share * weight, 4) for name, weight in self._warm.shares().items()}

    def _model(self) -> RewardModel:
        if self._warm is None:
            return self._cold
        if self._num_asked <= NUM_SIBLING_TURNS // 2:
            return self._warm
        turn = COLD_TURN if self._num_since_better < NUM_PATIENT else COLD_TURN_STUCK
        if self._num_asked > NUM_SIBLING_TURNS and self._num_asked % turn == 0:
            return self._cold
        return self._warm if self._rng.random() < self._warm_share() else self._cold

    def _spread_wanted(self) -> int:
        """How many spread points the cold model is to have: fewer where a warm one has asked for others."""
        if self._warm is None:
            return NUM_SPREAD - min(NUM_SPREAD, self._seen.num_known - self._num_spread)
        return NUM_SPREAD_BESIDE

    def _warm_share(self) -> float:
        """The odds that the warm model, and not the cold one, is right about what was measured."""
        assert self._warm is not None
        if self._seen.num_known < 3:
            return 1.0
        gap = self._warm.log_likelihood() - self._cold.log_likelihood()
        return float(1 / (1 + np.exp(-np.clip(gap, -30, 30))))

    def _best(self, model: RewardModel, is_open: NDArray[np.bool_]) -> int:
        mean, deviation = model.predict()
        odds = self._failing.odds_of_success()
        if not self._seen.num_known:
            return int(np.argmin(np.where(is_open, mean if odds is None else mean - odds, np.inf)))
        lines = self._lines(is_open)
        gain = expected_improvement(mean, deviation if lines is None else deviation * np.float32(DOUBT_ON_LINES), 0.0)
        if odds is not None:
            gain *= odds
        return int(np.argmax(np.where(is_open if lines is None else lines, gain, -np.inf)))

    def _lines(self, is_open: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
        """The open configs that differ from the best one in one parameter, where it is their turn and there are any."""
        if self._num_since_better < NUM_PATIENT_LINES or self._num_asked % LINE_TURN:
            return None
        best = self._seen.arms[int(np.argmin(self._seen.values()))]
        lines = self._encoding.is_on_same_line(best) & is_open
        return lines if lines.any() else None

    def _drawn(self, model: RewardModel, is_open: NDArray[np.bool_], num: int) -> list[int]:
        mean, deviation = model.predict()
        odds = self._failing.odds_of_success()
        if odds is not None:
            mean = mean + np.float32(CAP) * (1 - odds)
        optimistic = np.where(is_open, mean - 2 * deviation, np.inf)
        size = min(int(is_open.sum()), max(NUM_DRAWN_ARMS, 2 * num))
        arms = np.argpartition(optimistic, size - 1)[:size]
        chosen: list[int] = []
        for drawn in model.draw(arms, mean, num, self._rng):
            order = np.argsort(drawn, kind="stable")
            chosen.append(next(int(arm) for arm in arms[order] if int(arm) not in chosen))
        return chosen


def build(problem: Problem) -> Bandit:
    """Build the sampler of the name "rl"."""
    return Bandit(problem)
