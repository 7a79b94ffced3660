"""The search loop: ask a study, measure what it proposes, tell it, and measure the finalists again.

The device stays outside: `measure` is handed in, so the same loop runs on a GPU, on a recording and in a test.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agnitra_lab.contracts.search import ForeignResult, KernelConfig, SearchResult, SearchSpace, Trial
from agnitra_lab.errors import SearchError, UsageError
from agnitra_lab.refine import sampler as samplers
from agnitra_lab.refine.finals import MAX_FINALISTS, named
from agnitra_lab.refine.measuring import Measure, Meter
from agnitra_lab.refine.study import NOTHING_KNOWN, Knowledge, LedgerKey, StopReason, Study

MAX_HANGS = 3
"""Measurements in a row that hang before the device is given up."""
POLISH_SHARE, MAX_POLISH = 0.15, 8

__all__ = ["MAX_FINALISTS", "Ahead", "Measure", "search"]


@dataclass(frozen=True)
class Ahead:
    """What is done for configs before their turn comes, for a measure whose slow part can be done beside others'.

    Attributes:
        prepare: called with configs that will be measured next, in their order.
        num_configs: how many are asked for before the first of them is measured. Above 1 a question does not know the
            answers to those before it: worth it where preparing takes far longer than measuring.
    """

    prepare: Callable[[Sequence[KernelConfig]], None] | None = None
    num_configs: int = 1

    def __post_init__(self) -> None:
        if self.num_configs < 1:
            raise UsageError(f"A search asks for at least one config at a time, not {self.num_configs}.")


def search(
    space: SearchSpace,
    measure: Measure,
    *,
    sampler: str = "rl",
    max_trials: int = 24,
    budget_s: float = 30.0,
    trial_timeout_s: float | None = None,
    seed: int = 0,
    seeds: Sequence[KernelConfig] = (),
    knowledge: Knowledge = NOTHING_KNOWN,
    attached: Iterable[ForeignResult] = (),
    ledger: str | Path | None = None,
    ledger_key: LedgerKey | None = None,
    measured_on: str = "",
    on_trial: Callable[[Trial], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    ahead: Ahead | None = None,
) -> SearchResult:
    """Find a fast config by measuring few of them.

    Args:
        space: the valid configs.
        measure: returns a config's latency in ms, or a `Measurement`; what it raises makes the trial a failed one. One
            that takes a keyword `bound` may compare its samples with it.
        sampler: a key of `sampler.SAMPLERS`.
        max_trials: number of configs to measure at most, those of a resumed ledger included.
        budget_s: seconds after which no further config is begun; one is always measured.
        trial_timeout_s: seconds after which one measurement counts as hanging; by default the end of the budget.
        seed: of the sampler's random numbers.
        seeds: configs to measure first; those that are not in the space are left out.
        knowledge: siblings, hints and compiler facts that the sampler begins with.
        attached: measurements that others made of this very space on this very device.
        ledger: file that every step is written to; a search that was killed goes on from it.
        ledger_key: kernel, device and versions that the ledger's measurements depend on.
        measured_on: device name, or "recorded: <device>" for a replay.
        on_trial: called with each trial.
        should_stop: asked before each measurement; True ends the search.
        ahead: how configs are prepared whose turn comes next; by default nothing is asked for ahead.

    Returns:
        All trials as first measured, and the best one as measured again (`finals`); none of a search that is cancelled
        before anything succeeded.

    Raises:
        SearchError: when the space is empty, every trial failed, or the measurements hang.
        UsageError: for an unknown sampler or a limit that allows no trial.
        LedgerError: for a ledger that is corrupt, belongs to another search, or is in use.
    """
    if max_trials < 1 or not budget_s > 0:
        raise UsageError(f"A search needs max_trials >= 1 and budget_s > 0, not {max_trials} and {budget_s}.")
    known, key = replace(knowledge, seeds=(*seeds, *knowledge.seeds)), ledger_key or LedgerKey(device=measured_on)
    study = Study(space, sampler=sampler, seed=seed, knowledge=known, ledger=ledger, ledger_key=key)
    meter, is_stopped = Meter(measure, budget_s, trial_timeout_s), should_stop or (lambda: False)
    try:
        study.attach(attached)
        reason = _run(study, meter, _Turns(study, max_trials, ahead or Ahead(), sampler), is_stopped, on_trial)
        return _result(study, sampler, seed, measured_on, _best(study, meter, is_stopped, reason), reason, ledger)
    finally:
        study.close()


def _result(
    study: Study, sampler: str, seed: int, measured_on: str, best: Trial | None, reason: StopReason,
    ledger: str | Path | None,
) -> SearchResult:  # fmt: skip
    return SearchResult(
        space_template=study.space.template,
        shape=study.space.shape,
        dtype=study.space.dtype,
        sampler=sampler,
        seed=seed,
        measured_on=measured_on,
        trials=tuple(study.trials),
        best=best,
        num_configs=len(study.space.configs),
        stopped_because=reason,
        attached=tuple(study.attached),
        finals=tuple(study.finals),
        trust=study.trust,
        ledger=None if ledger is None else Path(ledger).name,
    )


class _Turns:
    """Asks for the configs; those that wait for their turn are being prepared."""

    def __init__(self, study: Study, max_trials: int, ahead: Ahead, sampler: str) -> None:
        self._study, self.max_trials, self._ahead = study, max_trials, ahead
        is_polished = samplers.info(sampler).is_polished
        self._num_polish = min(MAX_POLISH, int(POLISH_SHARE * max_trials)) if is_polished else 0
        self._waiting: deque[KernelConfig] = deque()

    def next(self) -> KernelConfig | None:
        """Return the config to measure, once as many as are wanted wait behind it; None when all are known."""
        num_asked = len(self._study.trials) + len(self._waiting)
        num = min(self._ahead.num_configs - len(self._waiting), self.max_trials - num_asked)
        if num > 0:
            fresh = self._study.ask(num, is_polish=num_asked >= self.max_trials - self._num_polish)
            if fresh and self._ahead.prepare is not None:
                self._ahead.prepare(fresh)
            self._waiting.extend(fresh)
        return self._waiting.popleft() if self._waiting else None


def _run(
    study: Study,
    meter: Meter,
    turns: _Turns,
    is_stopped: Callable[[], bool],
    on_trial: Callable[[Trial], None] | None,
) -> StopReason:
    """Ask, measure and tell until something ends it."""
    num_hangs = 0
    while len(study.trials) < turns.max_trials:
        if is_stopped():
            return "cancelled"
        if study.trials and study.elapsed_s >= meter.budget_s:
            return "time"
        config = turns.next()
        if config is None:
            return "exhausted"
        measured = meter.take(config, study.bound, study.elapsed_s)
        trial = study.tell(config, measured)
        if on_trial is not None:
            on_trial(trial)
        num_hangs = num_hangs + 1 if measured.failure == "timeout" else 0
        if num_hangs == MAX_HANGS:
            return "hanging"
    return "budget"


def _best(study: Study, meter: Meter, is_stopped: Callable[[], bool], reason: StopReason) -> Trial | None:
    """Measure the best trials again, in turn, and return the one with the lowest median."""
    best = study.best
    if best is None and reason != "cancelled":
        first = study.trials[0] if study.trials else None
        said = f"; the first said: {first.detail}" if first is not None else ""
        raise SearchError(
            f"All {len(study.trials)} trials failed{said}",
            hint="The kernel cannot run here as it is: keep the original ops.",
        )
    if best is None or reason in ("cancelled", "hanging"):
        return best
    if len(study.ranked) == 1:
        return best  # nothing is to be decided
    return named(study, meter, is_stopped)
