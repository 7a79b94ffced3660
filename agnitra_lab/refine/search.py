"""The ask/tell loop: ask a sampler, measure what it proposes, tell it, and measure the finalists again.

The device stays outside: `measure` is handed in, so the same loop runs on a GPU, on a recording and in a test.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

from agnitra_lab.contracts.search import KernelConfig, SearchResult, SearchSpace, Trial
from agnitra_lab.errors import AgnitraError, SearchError, UsageError
from agnitra_lab.refine import sampler as samplers

NUM_FINALISTS = 3
NUM_FINALIST_ROUNDS = 3
MAX_DETAIL = 300

Measure = Callable[[KernelConfig], float]
StopReason = Literal["budget", "exhausted", "time", "cancelled"]


def search(
    space: SearchSpace,
    measure: Measure,
    *,
    sampler: str = "rl",
    max_trials: int = 24,
    budget_s: float = 30.0,
    seed: int = 0,
    seeds: Sequence[KernelConfig] = (),
    measured_on: str = "",
    on_trial: Callable[[Trial], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> SearchResult:
    """Find a fast config by measuring few of them.

    Args:
        space: the valid configs.
        measure: returns the latency of a config in milliseconds; what it raises makes the trial a failed one.
        sampler: "rl" or "random".
        max_trials: number of configs to measure at most.
        budget_s: seconds after which no further config is begun; one is always measured.
        seed: of the sampler's random numbers.
        seeds: configs to measure first; those that are not in the space are left out.
        measured_on: device name, or "recorded: <device>" for a replay.
        on_trial: called with each trial as it ends.
        should_stop: asked before each measurement; True ends the search with what it has.

    Returns:
        All trials with their first measurements, and the best one. `best.latency_ms` is the median of the second
        measurements of the finalists: the lowest of many single measurements is lower than its config is (the
        winner's curse), and the three best, measured again in turn, are judged on equal terms. A search that is
        cancelled before anything succeeded has no best.

    Raises:
        SearchError: when the space is empty, or every trial failed.
        UsageError: for an unknown sampler or a limit that allows no trial.
    """
    if not space.configs:
        raise SearchError(f"The search space of {space.template} at {space.shape} {space.dtype} has no valid config.")
    if max_trials < 1 or not budget_s > 0:
        raise UsageError(f"A search needs max_trials >= 1 and budget_s > 0, not {max_trials} and {budget_s}.")
    proposer = samplers.make(sampler, space, seed=seed, seeds=seeds)
    is_stopped = should_stop or (lambda: False)
    began = time.perf_counter()
    trials: list[Trial] = []
    reason = _run(proposer, measure, trials, max_trials, began, budget_s, is_stopped, on_trial)
    return SearchResult(
        space_template=space.template,
        shape=space.shape,
        dtype=space.dtype,
        sampler=sampler,
        seed=seed,
        measured_on=measured_on,
        trials=tuple(trials),
        best=_best(trials, measure, is_stopped, began, is_cancelled=reason == "cancelled"),
        num_configs=len(space.configs),
        stopped_because=reason,
    )


def _run(
    proposer: samplers.Sampler,
    measure: Measure,
    trials: list[Trial],
    max_trials: int,
    began: float,
    budget_s: float,
    is_stopped: Callable[[], bool],
    on_trial: Callable[[Trial], None] | None,
) -> StopReason:
    """Ask, measure and tell until something ends it; each trial is appended as it ends."""
    while len(trials) < max_trials:
        if is_stopped():
            return "cancelled"
        if trials and time.perf_counter() - began >= budget_s:
            return "time"
        config = proposer.ask()
        if config is None:
            return "exhausted"
        trial = _try(config, measure, len(trials), began)
        proposer.tell(config, trial.latency_ms)
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
    return "budget"


def _try(config: KernelConfig, measure: Measure, index: int, began: float) -> Trial:
    latency_ms, detail = _measure(config, measure)
    return Trial(
        index=index,
        config=config,
        latency_ms=latency_ms,
        status="failed" if latency_ms is None else "ok",
        detail=detail,
        elapsed_s=time.perf_counter() - began,
    )


def _measure(config: KernelConfig, measure: Measure) -> tuple[float | None, str | None]:
    """Return the latency, or None and the reason. Compilers raise types of their own, so any Exception is a failure."""
    try:
        latency_ms = float(measure(config))
    except Exception as error:
        text = error.message if isinstance(error, AgnitraError) else f"{type(error).__name__}: {error}"
        return None, text[:MAX_DETAIL]
    if not (math.isfinite(latency_ms) and latency_ms > 0):
        return None, f"measured {latency_ms} ms, which is no latency"
    return latency_ms, None


def _best(
    trials: Sequence[Trial], measure: Measure, is_stopped: Callable[[], bool], began: float, *, is_cancelled: bool
) -> Trial | None:
    """Measure the best trials again, in turn, and return the one with the lowest median."""
    succeeded = sorted((t for t in trials if t.latency_ms is not None), key=lambda t: (t.latency_ms, t.index))
    if is_cancelled:
        return succeeded[0] if succeeded else None
    if not succeeded:
        raise SearchError(
            f"All {len(trials)} trials failed; the first said: {trials[0].detail}",
            hint="The kernel cannot run here as it is: keep the original ops.",
        )
    finalists = succeeded[:NUM_FINALISTS]
    again: dict[int, list[float]] = {finalist.index: [] for finalist in finalists}
    fallen: set[int] = set()
    for round_index in range(NUM_FINALIST_ROUNDS):
        # The direction alternates, so that a drift of the clock favours no finalist.
        for finalist in finalists if round_index % 2 == 0 else reversed(finalists):
            if is_stopped() or finalist.index in fallen:
                continue
            latency_ms, _ = _measure(finalist.config, measure)
            if latency_ms is None:
                fallen.add(finalist.index)
            else:
                again[finalist.index].append(latency_ms)
    return _named(finalists, again, fallen, began)


def _named(finalists: Sequence[Trial], again: dict[int, list[float]], fallen: set[int], began: float) -> Trial:
    standing = [finalist for finalist in finalists if finalist.index not in fallen]
    if not standing:
        raise SearchError("Every finalist failed when it was measured again.", hint="Keep the original ops.")
    measured = [finalist for finalist in standing if len(again[finalist.index]) == NUM_FINALIST_ROUNDS]
    if len(measured) < len(standing):
        # The search was stopped among the finalists: their first measurements are the only ones on equal terms.
        return standing[0]
    best = min(measured, key=lambda finalist: (statistics.median(again[finalist.index]), finalist.index))
    return best.model_copy(
        update={
            "latency_ms": statistics.median(again[best.index]),
            "detail": f"median of {NUM_FINALIST_ROUNDS} further measurements",
            "elapsed_s": time.perf_counter() - began,
        }
    )
