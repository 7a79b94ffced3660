"""The finals: the best few configs are measured again, in turn, until they differ or it does not matter any more.

The lowest of many single measurements is lower than its config is. A second measurement has no such luck in it, so
only second measurements decide. Rounds alternate in direction, so that a drift of the clock favours nobody, and go on
for as long as the noise leaves the order open.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from agnitra_lab.contracts.search import Trial
from agnitra_lab.errors import SearchError
from agnitra_lab.refine.bound import Bound
from agnitra_lab.refine.measuring import Meter
from agnitra_lab.refine.study import Study

MIN_FINALISTS, MAX_FINALISTS, MOST_FINALISTS = 3, 10, 24
MIN_ROUNDS, MAX_ROUNDS, MAX_FINALS = 2, 400, 1200
"""Of a kernel of microseconds a round costs nothing, and its noise is large: the time is what ends most races."""
WIDENED_AT = (2, 4, 8)
"""Rounds at which the noise is known better than before, and more who were unlucky at first may be let in."""
REACH = 1.10
"""A config more than 10% behind in its first measurement is no finalist, unless there are too few or noise says so."""
CONFIDENCE = 2.5
"""Standard errors of the difference by which a finalist must lag behind to drop out."""
LATE_SHARE = 0.25
"""Of the budget, that further rounds may take on top of it."""
LEAST_SPREAD = 0.002
"""A timer has steps: two equal times do not mean that there is no noise."""
INDIFFERENCE = 0.0015
"""Nobody minds so small a difference: when the standard error is below it, the race is over."""


def named(study: Study, meter: Meter, is_stopped: Callable[[], bool]) -> Trial:
    """Race the finalists of a study and name the winner.

    Args:
        study: with at least one success; its `finals` of an earlier life count.
        meter: takes the measurements.
        is_stopped: asked before each one; True ends the race.

    Returns:
        The winner with the median of its second measurements; with its first one where the race was stopped before
        every finalist had a second.

    Raises:
        SearchError: when every finalist failed the second time.
    """
    race = _Race(study.ranked, study.finals)
    num_measured = 0
    for round_index in range(MAX_ROUNDS):
        is_late = study.elapsed_s > meter.budget_s * (1 + LATE_SHARE) or num_measured > MAX_FINALS
        if round_index >= MIN_ROUNDS and (is_late or race.is_decided()):
            break
        if round_index in WIDENED_AT:
            race.widen()
        runners = race.standing()
        for finalist in runners if round_index % 2 == 0 else reversed(runners):
            while race.count(finalist) <= round_index and not race.is_out(finalist):
                if is_stopped():
                    return race.winner(study.elapsed_s)
                race.add(study.tell_final(finalist.config, meter.take(finalist.config, Bound(), study.elapsed_s)))
                num_measured += 1
        race.drop_the_slow()
        race.narrow(num_measured / MAX_FINALS)
        if not race.standing():
            raise SearchError("Every finalist failed when it was measured again.", hint="Keep the original ops.")
    return race.winner(study.elapsed_s)


def middle(times_ms: Sequence[float]) -> float:
    """Return the mean of the middle half: a median that steps of the timer do not make jump.

    Kernels of 4 us have times at a few steps, 4% apart, and the median of many of them lies between two, now at one and
    now at the other.
    """
    ordered = sorted(times_ms)
    cut = len(ordered) // 4
    return statistics.fmean(ordered[cut : len(ordered) - cut]) if cut else statistics.median(ordered)


class _Race:
    def __init__(self, ranked: Sequence[Trial], earlier: Sequence[Trial]) -> None:
        limit_ms = REACH * (ranked[0].latency_ms or 0.0) if ranked else 0.0
        num_near = sum((trial.latency_ms or 0.0) <= limit_ms for trial in ranked)
        num = max(MIN_FINALISTS, min(num_near, MAX_FINALISTS))
        self._finalists, self._waiting = list(ranked[:num]), list(ranked[num:])
        self._ms: dict[str, list[float]] = {trial.config.key(): [] for trial in ranked}
        self._out: set[str] = set()
        for trial in earlier:
            self.add(trial)

    def add(self, again: Trial) -> None:
        """Take a second measurement; one that failed ends the finalist's race."""
        key = again.config.key()
        if key not in self._ms:
            return
        if again.latency_ms is None:
            self._out.add(key)
        else:
            self._ms[key].append(again.latency_ms)

    def widen(self) -> None:
        """Let in whoever was unlucky at first, now that the noise is known: one whose first time it explains."""
        # Times stray upwards alone, some of them farther than the spread says.
        strayed = max(max(times) / middle(times) for times in self._ms.values() if times)
        reach = max(math.exp(CONFIDENCE * self._spread()), strayed)
        leader_ms = min(middle(self._ms[trial.config.key()]) for trial in self.standing())
        near = [trial for trial in self._waiting if (trial.latency_ms or 0.0) <= leader_ms * reach]
        let_in = near[: max(MOST_FINALISTS - len(self._finalists), 0)]
        self._finalists += let_in
        self._waiting = self._waiting[len(let_in) :]

    def is_out(self, finalist: Trial) -> bool:
        return finalist.config.key() in self._out

    def count(self, finalist: Trial) -> int:
        return len(self._ms[finalist.config.key()])

    def standing(self) -> list[Trial]:
        return [trial for trial in self._finalists if trial.config.key() not in self._out]

    def drop_the_slow(self) -> None:
        """Take out whoever lags behind the leader by more than the noise explains."""
        centres = {trial.config.key(): self._centre(trial) for trial in self.standing() if self.count(trial)}
        if not centres:
            return
        num_rounds = min(self.count(trial) for trial in self.standing())
        if num_rounds < MIN_ROUNDS:
            return
        # Of three times two may be strays.
        doubt = CONFIDENCE * (1 + 2 / num_rounds)
        limit = min(centres.values()) + doubt * self._error(num_rounds) + INDIFFERENCE
        self._out.update(key for key, centre in centres.items() if centre > limit)

    def narrow(self, share: float) -> None:
        """Leave what remains of the measurements to ever fewer: the last ones decide between the two best."""
        allowed = max(2, math.ceil(MOST_FINALISTS * max(0.0, 1 - share) ** 2))
        standing = self.standing()
        if len(standing) > allowed and all(self.count(trial) >= MIN_ROUNDS for trial in standing):
            ranked = sorted(standing, key=lambda trial: (self._centre(trial), trial.index))
            self._out.update(trial.config.key() for trial in ranked[allowed:])

    def is_decided(self) -> bool:
        standing = self.standing()
        return len(standing) < 2 or self._error(min(self.count(trial) for trial in standing)) < INDIFFERENCE

    def winner(self, elapsed_s: float) -> Trial:
        standing = self.standing()
        if any(not self.count(trial) for trial in standing):
            return standing[0]
        best = min(standing, key=lambda trial: (self._centre(trial), trial.index))
        return best.model_copy(
            update={
                "latency_ms": statistics.median(self._ms[best.config.key()]),
                "detail": f"median of {self.count(best)} further measurements",
                "elapsed_s": elapsed_s,
            }
        )

    def _centre(self, trial: Trial) -> float:
        return math.log(middle(self._ms[trial.config.key()]))

    def _error(self, num_rounds: int) -> float:
        """The standard error of the difference of two medians: each is 1.25 times as uncertain as a mean."""
        return 1.25 * self._spread() * math.sqrt(2 / max(1, num_rounds))

    def _spread(self) -> float:
        """The spread of one measurement, from all finalists around their own; that of few is itself a guess."""
        if self._is_exact():
            return 0.0
        logs = [np.log(times) for times in self._ms.values() if len(times) > 1]
        away = sum(float(((row - row.mean()) ** 2).sum()) for row in logs)
        freedom = max(1, sum(map(len, logs)) - len(logs))
        return max(math.sqrt(away / freedom), LEAST_SPREAD) * (1 + 2.5 / freedom)

    def _is_exact(self) -> bool:
        """Whether every measurement repeats the first one to the digit, as a replay of medians does."""
        return all(time == trial.latency_ms for trial in self._finalists for time in self._ms[trial.config.key()])
