"""A gymnasium environment over any search space, for people who bring their own reinforcement learning.

    env = make_environment(space, measure, max_trials=32)
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(action)    # info["action_mask"] says what is open

An action is the position of a valid config; a config that was measured before costs a step and teaches nothing. The
reward is the logarithm of the factor by which the best latency fell, so that the rewards of an episode sum to that of
the whole search.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.errors import SearchError, UsageError
from agnitra_lab.optional import require
from agnitra_lab.refine.bound import Bound
from agnitra_lab.refine.measuring import Measure, Meter
from agnitra_lab.refine.space import Encoding

FAILURE_REWARD = -0.1


def make_environment(space: SearchSpace, measure: Measure, *, max_trials: int = 32, budget_s: float = 3600.0) -> Any:
    """Make a `gymnasium.Env` of one search.

    Args:
        space: the valid configs.
        measure: returns the latency of a config in ms; a replayed recording makes episodes of microseconds.
        max_trials: steps of an episode.
        budget_s: seconds that one measurement may take before it counts as hanging.

    Returns:
        The environment. Its observation is [parameters + 4] float32: the coordinates of the best config, the logarithm
        of its latency over the first one's, whether the last step failed, the last reward, and the share of the budget
        that is left. `info` holds "action_mask" [configs] int8 and "latency_ms".

    Raises:
        SearchError: when the space has no valid config.
        UsageError: for a limit that allows no step.
        MissingError: where gymnasium is not installed.
    """
    gymnasium = require("gymnasium", extra="search", purpose="for a reinforcement learning environment")
    if not space.configs:
        raise SearchError(f"The search space of {space.template} has no valid config.")
    if max_trials < 1:
        raise UsageError(f"An episode needs max_trials >= 1, not {max_trials}.")
    encoding = Encoding(space)
    size = len(encoding.names) + 4
    episode = _Episode(encoding, Meter(measure, budget_s), max_trials)

    class SearchEnvironment(gymnasium.Env):  # type: ignore[misc, name-defined]
        """One search an episode."""

        metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own name)
        action_space = gymnasium.spaces.Discrete(len(encoding))
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[NDArray[np.float32], dict[str, Any]]:
            super().reset(seed=seed, options=options)
            episode.begin()
            return episode.observation(), episode.info()

        def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
            reward = episode.take(int(action))
            return episode.observation(), reward, episode.is_exhausted, episode.is_over, episode.info()

    return SearchEnvironment()


class _Episode:
    def __init__(self, encoding: Encoding, meter: Meter, max_trials: int) -> None:
        self._encoding, self._meter, self._max_trials = encoding, meter, max_trials
        self.begin()

    def begin(self) -> None:
        self._is_open = np.ones(len(self._encoding), dtype=bool)
        self._num_steps = 0
        self._best: tuple[int, float] | None = None
        self._first_ms: float | None = None
        self._last_ms: float | None = None
        self._reward, self._has_failed = 0.0, False

    @property
    def is_exhausted(self) -> bool:
        return not self._is_open.any()

    @property
    def is_over(self) -> bool:
        return self._num_steps >= self._max_trials

    def take(self, action: int) -> float:
        if not 0 <= action < len(self._encoding):
            raise UsageError(f"There is no action {action}: the space has {len(self._encoding)} configs.")
        self._num_steps += 1
        self._reward, self._has_failed = 0.0, False
        if self._is_open[action]:
            self._is_open[action] = False
            self._last_ms = self._meter.take(self._encoding.configs[action], Bound(), 0.0).latency_ms
            self._has_failed = self._last_ms is None
            self._reward = FAILURE_REWARD if self._last_ms is None else self._improve(action, self._last_ms)
        return self._reward

    def _improve(self, action: int, latency_ms: float) -> float:
        if self._best is None or self._first_ms is None:
            self._best, self._first_ms = (action, latency_ms), latency_ms
            return 0.0
        gain = math.log(self._best[1] / latency_ms)
        if gain > 0:
            self._best = (action, latency_ms)
        return max(gain, 0.0)

    def observation(self) -> NDArray[np.float32]:
        point = self._encoding.points[self._best[0]] if self._best else np.zeros(len(self._encoding.names))
        progress = math.log(self._best[1] / self._first_ms) if self._best and self._first_ms else 0.0
        left = 1 - self._num_steps / self._max_trials
        return np.array([*point, progress, float(self._has_failed), self._reward, left], dtype=np.float32)

    def info(self) -> dict[str, Any]:
        return {"action_mask": self._is_open.astype(np.int8), "latency_ms": self._last_ms}
