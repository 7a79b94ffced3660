"""The finals: the best few configs are measured again, in turn, until they differ or it does not matter any more.

The lowest of many single measurements is lower than its config is. A second measurement has no such luck in it, so
only second measurements decide. Rounds alternate in direction, so that a drift of the clock favours nobody, and go on
for as long as the noise leaves the order open.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from agnitra_lab.contracts.search import Trial
from agnitra_lab.errors import SearchError
from agnitra_lab.refine.bound import Bound
from agnitra_lab.refine.measuring import Meter
from agnitra_lab.refine.study import Study

MIN_FINALISTS, MAX_FINALISTS = 3, 8
MIN_ROUNDS, MAX_ROUNDS = 2, 10
REACH = 1.10
"""A config more than 10% behind in its first measurement is no finalist, unless there are too few."""
CONFIDENCE = 2.5
"""Standard errors of the difference by which a finalist must lag behind to drop out."""
LATE_SHARE = 0.25
"""Of the budget, that further rounds may take on top of it."""
INDIFFERENCE = 0.001
"""Nobody minds a tenth of a percent: when the standard error is below it, the race is over."""


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
    race = _Race(_finalists(study), study.finals)
    for round_index in range(MAX_ROUNDS):
        runners = race.standing()
        is_late = study.elapsed_s > meter.budget_s * (1 + LATE_SHARE)
        if round_index >= MIN_ROUNDS and (is_late or race.is_decided()):
            break
        for finalist in runners if round_index % 2 == 0 else reversed(runners):
            if race.count(finalist) > round_index:
                continue
            if is_stopped():
                return race.winner(study.elapsed_s)
            again = study.tell_final(finalist.config, meter.take(finalist.config, Bound(), study.elapsed_s))
            race.add(again)
        race.drop_the_slow()
        if not race.standing():
            raise SearchError("Every finalist failed when it was measured again.", hint="Keep the original ops.")
    return race.winner(study.elapsed_s)


def _finalists(study: Study) -> list[Trial]:
    succeeded = sorted(
        (trial for trial in (*study.attached, *study.trials) if trial.latency_ms is not None and not trial.is_aborted),
        key=lambda trial: (trial.latency_ms, trial.index),
    )
    limit_ms = REACH * (succeeded[0].latency_ms or 0.0) if succeeded else 0.0
    near = [trial for trial in succeeded if (trial.latency_ms or 0.0) <= limit_ms]
    return succeeded[: max(MIN_FINALISTS, min(len(near), MAX_FINALISTS))]


class _Race:
    def __init__(self, finalists: Sequence[Trial], earlier: Sequence[Trial]) -> None:
        self._finalists = list(finalists)
        self._ms: dict[str, list[float]] = {trial.config.key(): [] for trial in finalists}
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
        limit = min(centres.values()) + CONFIDENCE * self._error(num_rounds) + INDIFFERENCE
        self._out.update(key for key, centre in centres.items() if centre > limit)

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
        return math.log(statistics.median(self._ms[trial.config.key()]))

    def _error(self, num_rounds: int) -> float:
        """The standard error of the difference of two medians, from the spread of all finalists around their own."""
        logs = [[math.log(value) for value in times] for times in self._ms.values() if len(times) > 1]
        away = [(value - statistics.fmean(row)) ** 2 for row in logs for value in row]
        freedom = len(away) - len(logs)
        # A median of normal samples is 1.25 times as uncertain as their mean.
        return 1.25 * math.sqrt(2 * sum(away) / max(1, freedom) / max(1, num_rounds))
