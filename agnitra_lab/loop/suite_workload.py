"""One workload of the suite, in a process of its own: compile the baselines, optimise, check, time all in one loop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from agnitra_lab.benchmark import stats
from agnitra_lab.benchmark.compare import DRAW_SHARE, timed_problems, with_problems
from agnitra_lab.benchmark.equivalence import Verified, verify
from agnitra_lab.benchmark.inputs import FreshInputs, fixed_tensors
from agnitra_lab.benchmark.reference import Reference
from agnitra_lab.benchmark.state import ModuleState, module_of
from agnitra_lab.benchmark.timing import GroupTimings, time_group
from agnitra_lab.contracts.measurement import Ratio
from agnitra_lab.contracts.suite import EAGER, SuiteAssignment, SuiteResult, SuiteSide
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.device import info
from agnitra_lab.device.exclusive import take_turns, waited_s
from agnitra_lab.errors import AgnitraError, TargetError
from agnitra_lab.graph.tree import untouched
from agnitra_lab.loop import suite_baselines as baselines
from agnitra_lab.loop.optimization import Optimization
from agnitra_lab.loop.settings import Settings
from agnitra_lab.loop.suite_baselines import Contestant
from agnitra_lab.loop.suite_table import best_exact
from agnitra_lab.runs import provenance
from agnitra_lab.workloads.suite import SUITE, suite_workload
from agnitra_lab.workloads.target import called, resolve, table_facts

OURS = "agnitra"
# The candidate takes part twice, so that its noise is measured as its speed-up is: by pairs from one round.
_OURS_AGAIN = "agnitra, again"
_SEEDS = (0, 1, 2)
_MIN_ROUNDS = 12
_WATCH_S = 1.0
_CONTROLS_UNTIL = 0.7


def measure(given: SuiteAssignment) -> SuiteResult:
    """Measure one workload. What a side cannot do is recorded with it; only eager has to run.

    Raises:
        AgnitraError: an unknown workload, or one that does not run.
    """
    started_s = time.monotonic()
    _give_up_after(given.timeout_s)
    take_turns(given.turns_file)
    baselines.autotune_in_turns()
    contest = _Contest(given, _workload(given))
    phases_s = {"build": _own_s(started_s)}
    for phase in (contest.compile_baselines, contest.optimise, contest.check, contest.time, contest.check_controls):
        # Controls are worth no result: they come last, and only while there is time for them.
        spent_s = _own_s(started_s)
        if phase == contest.check_controls and spent_s > _CONTROLS_UNTIL * given.timeout_s:
            continue
        phase()
        phases_s[phase.__name__] = _own_s(started_s) - spent_s
        # Filed with a process that fails later on, so that one sees how far it came.
        sys.stderr.write(f"{phase.__name__}: {phases_s[phase.__name__]:.1f} s\n")
    return contest.result(time.monotonic() - started_s, phases_s)


class _Contest:
    """All sides of one workload, and what is known of each so far."""

    def __init__(self, given: SuiteAssignment, workload: Workload) -> None:
        self.given = given
        self.workload = workload
        self.device = info.device_of(workload.model, workload.args, workload.kwargs)
        self.state = ModuleState(module_of(workload.model))
        self.sides: dict[str, Contestant] = {}
        self.facts: dict[str, Any] = {}
        self.verified: dict[str, Verified] = {}
        self.timings: GroupTimings
        self.inputs: FreshInputs
        self.reference = Reference(workload)
        self.num_misses_before = 0

    def compile_baselines(self) -> None:
        for mode in (EAGER, *self.given.modes):
            with baselines.cold_caches(self._cache(mode)):
                side = baselines.compile_baseline(self.workload, mode, self.state, self.device)
                self.sides[mode] = baselines.settle(self.workload, side, self.state, self.device)
            if mode == EAGER and self.sides[mode].call is None:
                raise AgnitraError(f"{self.workload.name} does not run: {self.sides[mode].error}.")
            baselines.release_memory()

    def optimise(self) -> None:
        """Run the loop from cold caches; what it keeps is the candidate. A failure is recorded with its side."""
        given = self.given
        settings = Settings(
            suggest="preset",
            budget_s=given.budget_s,
            artifacts=given.scratch / "loop",
            command=given.command,
            timing_s=given.timing_s / 6,
            tuned_folder=given.scratch / "tuned",
            is_explained=False,
        )
        started_s, waited_before_s = time.monotonic(), waited_s()
        try:
            with baselines.cold_caches(self._cache(OURS)):
                result = Optimization(self.workload, settings).run_all()
        except Exception as error:
            self.sides[OURS] = Contestant(OURS, None, error=baselines.one_line(error))
            return
        finally:
            self.state.restore()
            baselines.release_memory()
        compile_s = time.monotonic() - started_s - (waited_s() - waited_before_s)
        report = result.report
        changes = report.patch.descriptors if report.patch else ()
        self.facts = {
            "winner": report.winner,
            "actions": dict(sorted(Counter(change.action for change in changes).items())),
            "candidates": tuple(row.model_copy(update={"comparison": None}) for row in report.candidates),
            "refusals": (*(report.patch.refusals if report.patch else ()), *report.refusals),
            "floor_ms": report.comparison.floor_ms,
        }
        self.num_misses_before = _guard_misses(result.model)
        ours = Contestant(OURS, result.model, compile_s)
        self.sides[OURS] = baselines.settle(self.workload, ours, self.state, self.device)

    def check(self) -> None:
        self._verify(OURS)

    def check_controls(self) -> None:
        """Check torch.compile's modes against eager: the fastest, others where its values differ, all if asked for.

        TF32 in a convolution that eager computes in fp32 is another contest, and the table is to say so.
        """
        for mode in self._by_speed():
            if self.given.is_controlled or not self._is_settled:
                self._verify(mode)

    @property
    def _is_settled(self) -> bool:
        return best_exact(tuple(self._side(name) for name in (EAGER, *self.given.modes))) is not None

    def _by_speed(self) -> list[str]:
        """Return torch.compile's modes that were timed, the fastest first."""
        timed = [name for name in self.given.modes if name in self.timings.wall_ms]
        return sorted(timed, key=lambda name: median(self.timings.wall_ms[name]))

    def _verify(self, name: str) -> None:
        call = self.sides[name].call
        if call is not None:
            self.verified[name] = verify(self.workload, call, seeds=_SEEDS, reference=self.reference)
            baselines.release_memory()

    def time(self) -> None:
        """Time all sides that run in one loop, ours twice for its own noise."""
        calls = {name: side.call for name, side in self.sides.items() if side.call is not None and self._runs(name)}
        if OURS in calls:
            calls[_OURS_AGAIN] = calls[OURS]
        is_fresh = OURS in self.verified and self.verified[OURS].agrees_by_prints
        self.inputs = FreshInputs(
            self.workload, _SEEDS, draw_budget_s=DRAW_SHARE * self.given.timing_s, is_fresh=is_fresh
        )
        state = self.verified[OURS].baseline_state if OURS in self.verified else self.state
        with untouched(fixed_tensors(self.workload)):
            self.timings = time_group(
                calls, self.inputs, device=self.device, budget_s=self.given.timing_s, min_rounds=_MIN_ROUNDS,
                reset=lambda side: state.restore(),
            )  # fmt: skip
        state.put_back()

    def result(self, wall_s: float, phases_s: dict[str, float]) -> SuiteResult:
        """Put together what is filed of the workload."""
        given, ours = self.given, self._side(OURS)
        rivals = tuple(self._side(name) for name in self.sides if name != OURS)
        timed = [side for side in rivals if side.latency is not None]
        best = min(timed, key=lambda side: side.latency.latency_ms_p50 if side.latency else 0.0).name if timed else None
        p50_ms = ours.latency.latency_ms_p50 if ours.latency else None
        floor_ms = self.facts.get("floor_ms")
        is_done = best is not None and p50_ms is not None
        return SuiteResult(
            **table_facts(given.name, given.scale),
            item_unit=self.workload.item_unit,
            items_per_call=self.workload.items_per_call,
            status="done" if is_done else "failed",
            error=None if is_done else ours.error or "no baseline could be timed",
            baselines=rivals,
            candidate=ours,
            best_baseline=best,
            speedup_vs_eager=self._ratio(EAGER, OURS),
            speedup_vs_best=self._ratio(best, OURS),
            noise=self._ratio(OURS, _OURS_AGAIN),
            num_guard_misses=_guard_misses(self.sides[OURS].call) - self.num_misses_before if p50_ms else None,
            floor_share=floor_ms / p50_ms if floor_ms is not None and p50_ms is not None else None,
            device=info.describe(self.device),
            is_cache_warm=given.is_cache_warm,
            num_jobs=given.num_jobs,
            wall_s=wall_s,
            waited_s=waited_s(),
            phases_s=phases_s,
            seeds=_SEEDS,
            command=given.command,
            generated_at=provenance.utc_now(),
            **self.facts,
        )

    def _runs(self, name: str) -> bool:
        return name not in self.verified or self.verified[name].is_runnable

    def _side(self, name: str) -> SuiteSide:
        side, checked = self.sides[name], self.verified.get(name)
        equivalence, error = None, side.error
        if checked is not None:
            mine = (name, _OURS_AGAIN) if name == OURS else (name,)
            problems = timed_problems(checked, self.timings.prints, self.inputs, mine, EAGER)
            equivalence = with_problems(checked.equivalence, problems)
            error = error if checked.is_runnable else "; ".join(equivalence.problems)
        wall_ms = self.timings.wall_ms.get(name)
        return SuiteSide(
            name=name,
            latency=stats.latency(wall_ms, self.timings.device_ms.get(name)) if wall_ms is not None else None,
            compile_s=side.compile_s,
            equivalence=equivalence,
            error=error,
        )

    def _ratio(self, numerator: str | None, denominator: str) -> Ratio | None:
        above, below = self.timings.wall_ms.get(numerator or ""), self.timings.wall_ms.get(denominator)
        return stats.paired_ratio(above, below) if above is not None and below is not None else None

    def _cache(self, side: str) -> Path | None:
        return None if self.given.is_cache_warm else self.given.scratch / "caches" / side


def _workload(given: SuiteAssignment) -> Workload:
    if given.name in SUITE:
        return suite_workload(given.name, scale=given.scale, device=given.device)
    workload = replace(resolve(given.name), name=called(given.name))
    found = info.device_of(workload.model, workload.args, workload.kwargs).type
    if found != torch.device(given.device).type:
        raise TargetError(
            f"{given.name} is on {found}; this run is on {given.device}.",
            hint=f"Build the model and its inputs on {given.device}, or give --device {found}.",
        )
    return workload


def _guard_misses(model: Any) -> int:
    return int(getattr(model, "num_guard_misses", 0))


def _own_s(started_s: float) -> float:
    return time.monotonic() - started_s - waited_s()


def _give_up_after(limit_s: float) -> None:
    """End this process once it has worked for so long; the parent sees SIGTERM, and the stacks of all threads."""
    started_s = time.monotonic()

    def watch() -> None:
        while _own_s(started_s) < limit_s:
            time.sleep(_WATCH_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-time", daemon=True).start()
