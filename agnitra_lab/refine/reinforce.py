"""REINFORCE: a policy with one softmax a parameter, masked to the valid configs, that follows the reward's gradient.

Warm, the policy is first fitted to the siblings, by the exact gradient of the expected reward over all of a sibling's
configs. Cold, it starts uniform, and within a hundred measurements it is hardly better than random search.

Source: Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", Machine
Learning 8, 1992.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.refine.sampler import Observation, Problem

LEARNING_RATE = 0.35
NUM_WARM_STEPS = 60
WARM_RATE = 2.0
FAILURE_REWARD = -2.0
REWARD_LIMIT = 2.0


class Reinforce:
    """A policy over the valid configs: the probability of an arm is the softmax of the sum of its values' logits."""

    def __init__(self, problem: Problem) -> None:
        self._rng = np.random.default_rng(problem.seed)
        ranks = problem.encoding.ranks
        widths = [len(values) for values in problem.encoding.space.params.values()]
        starts = np.concatenate([[0], np.cumsum(widths)[:-1]]).astype(np.int64)
        self._slots = ranks + starts  # [configs, parameters], the logit that each value stands on
        self._logits = np.zeros(int(sum(widths)))
        self._rewards: list[float] = []
        if problem.name == "reinforce":
            self._warm_up([sibling.log_ms for sibling in problem.siblings])

    def propose(self, num: int, is_open: NDArray[np.bool_]) -> Sequence[int]:
        """Draw open arms from the policy, without putting any back."""
        score = self._logits[self._slots].sum(axis=1)
        # The largest of the scores plus Gumbel noise are a draw without replacement from their softmax.
        keys = np.where(is_open, score + self._rng.gumbel(size=len(score)), -np.inf)
        num = min(num, int(is_open.sum()))
        return [int(arm) for arm in np.argsort(-keys, kind="stable")[:num]]

    def learn(self, seen: Observation) -> None:
        """Take one step along the gradient of the reward, minus log latency, against the mean reward so far."""
        past = np.array(self._rewards)
        known = past[np.isfinite(past)]
        reward = -np.inf if seen.log_ms is None else -seen.log_ms
        self._rewards.append(reward)
        if not known.size:
            return
        scale = float(known.std()) or 1.0
        advantage = FAILURE_REWARD if seen.log_ms is None else float((reward - known.mean()) / scale)
        advantage = float(np.clip(advantage, -REWARD_LIMIT, REWARD_LIMIT))
        step = -self._expected(self._policy())
        np.add.at(step, self._slots[seen.arm], 1.0)
        self._logits += LEARNING_RATE * advantage * step

    def _policy(self) -> NDArray[np.float64]:
        score = self._logits[self._slots].sum(axis=1)
        weight = np.exp(score - score.max())
        return weight / weight.sum()

    def _expected(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum weights over the values they stand on: with the policy, how often each value is drawn."""
        spread = np.repeat(weights, self._slots.shape[1])
        return np.bincount(self._slots.ravel(), spread, minlength=len(self._logits)).astype(np.float64)

    def _warm_up(self, landscapes: Sequence[NDArray[np.float64]]) -> None:
        if not landscapes:
            return
        scaled = [-(log_ms - log_ms.mean()) / (log_ms.std() or 1.0) for log_ms in landscapes]
        reward = np.mean(scaled, axis=0)
        for _ in range(NUM_WARM_STEPS):
            policy = self._policy()
            self._logits += WARM_RATE * self._expected(policy * (reward - policy @ reward))


def build(problem: Problem) -> Reinforce:
    """Build the samplers of the names "reinforce" and "reinforce-cold"."""
    return Reinforce(problem)
