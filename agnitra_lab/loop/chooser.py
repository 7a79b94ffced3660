"""Build candidates one by one within a budget, judge each as it comes, and keep the best so far usable throughout.

Rounds: what is cheap, with convolutions in eager's layout where another costs too many digits; Inductor's own CUDA
graphs, where none of ours holds the call; then all changes less each one (greedy backward elimination, which is how
interactions between changes show, and how one that spoils the whole is found); then what costs more, on top of the
best. Each candidate is verified and timed once; the final A/B is the benchmark's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

from agnitra_lab.benchmark import winner as contest
from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.measurement import CandidateResult
from agnitra_lab.device.exclusive import waited_s
from agnitra_lab.errors import AgnitraError
from agnitra_lab.loop.deadline import OutOfTimeError, given_up_at
from agnitra_lab.loop.earlier import Earlier
from agnitra_lab.loop.rehearsal import Rehearsed
from agnitra_lab.patch.candidates import Candidate, Plan
from agnitra_lab.patch.install import Patch

# Times over the physical limit below which there is nothing left that a compile would pay for. At 1.15 for all, a
# decoder with QK norm was left at 1.10, at 0.98 of torch.compile, with three quarters of its budget unspent.
_NEAR_THE_LIMIT = {"default": 1.03, "reduce-overhead": 1.03, "max-autotune": 1.1}
# Compile times over that of the same graph with Inductor's default options: max-autotune took 4 to 8 times as long for
# 1.1B decoders on an H200.
_MAX_AUTOTUNE_COST = 6.0
# The same of a graph without kernels of ours, where one with them was compiled: they come compiled from their search,
# and leave Inductor less to write. For a 1.1B decoder's step on an H200 torch.compile took 27 s; ours had taken 9 from
# warm caches, and 17 from cold ones with its check and timing.
_WITHOUT_KERNELS_COST = 2.0
# Share of the budget after which a max-autotune that takes longer than was expected is given up: with few cores to
# compile on, one product of 1.5 ms was tuned for a minute, and a VGG's ten convolutions for four.
_OVERRUN = 1.25
_NUM_KEPT = 3


class Chooser:
    """Runs a plan.

    Args:
        plan: the contestants.
        build: candidate -> installed patch.
        screen: (name, patch) -> verdict with a short timing against eager.
        budget_s: no candidate is begun that may not end within it, and max-autotune is given up a little after it.
        limit_ms: least time that the device allows for this work, None where it is not known.
        rehearse: judges a candidate elsewhere first; only one that would lead is then built here.
        earlier: what a finished run of the same knows: its winner is tried first, and clear losers are not tried again
            where that does as well as it did.

    Attributes:
        tried: name -> the candidate, and its seconds from first step to verdict.
        results: every candidate with its verdict, in order.
        patches: the installed candidates that may still win.
        best: name of the fastest equivalent one so far, None while there is none.
    """

    def __init__(
        self,
        plan: Plan,
        build: Callable[[Candidate], Patch],
        screen: Callable[[str, Patch], CandidateResult],
        *,
        budget_s: float,
        limit_ms: float | None = None,
        rehearse: Callable[[Candidate], Rehearsed] | None = None,
        earlier: Earlier | None = None,
    ) -> None:
        self._earlier = earlier
        self._plan = plan
        self._build = build
        self._screen = screen
        self._budget_s = budget_s
        self._limit_ms = limit_ms
        self._rehearse = rehearse
        self._began_s = clock_s()
        self._compile_s: float | None = None
        self._has_kernels = False
        self.tried: dict[str, tuple[Candidate, float]] = {}
        self._candidates: dict[str, Candidate] = {}
        self._found: dict[str, frozenset[str]] = {}
        self._all_changes: Candidate | None = None
        self._is_whole = True
        self.results: list[CandidateResult] = []
        self.patches: dict[str, Patch] = {}

    @property
    def best(self) -> str | None:
        """Name of the fastest equivalent candidate so far."""
        ranked = contest.contenders(self.results)
        return ranked[0].name if ranked else None

    def run(self) -> None:
        """Run all rounds, as far as the budget goes."""
        won = self._earlier.winner() if self._earlier is not None else None
        if won is not None and self._plan.could_hold(won):
            self._try_all([won])
        self._try_all(self._plan.first())
        if self._best_compiled() is None and (inexact := self._inexact()) is not None:
            self._try_all(self._plan.as_laid_out(inexact))
        if not self._is_whole:
            self._try_all(self._plan.graphed_by_inductor(self._best_compiled()))
        while (whole := self._best_changed()) is not None and self._try_all(
            self._plan.without_one(whole, self._found.get(whole.name))
        ):
            if self._best_changed() == whole:
                break
        self._try_all(self._plan.second(self._best_compiled(), is_whole=self._is_whole))

    def _try_all(self, candidates: Iterable[Candidate]) -> bool:
        """Try one after the other; return whether any was built."""
        num_built = len(self._candidates)
        for candidate in candidates:
            if any(result.name == candidate.name for result in self.results):
                continue
            reason = self._why_not(candidate)
            if reason is not None:
                self.results.append(CandidateResult(name=candidate.name, status="skipped", reason=reason))
            else:
                started_s = clock_s()
                self._try(candidate)
                self.tried[candidate.name] = (candidate, clock_s() - started_s)
        return len(self._candidates) > num_built

    def _try(self, candidate: Candidate) -> None:
        started_s = clock_s()
        if candidate.changes and self._all_changes is None:
            self._all_changes = candidate
        if self._rehearse is not None and not self._leads(self._rehearse(candidate), candidate, started_s):
            return
        try:
            patch = self._built(candidate)
        except OutOfTimeError:
            reason = f"given up after {clock_s() - started_s:.0f} s: the budget of {self._budget_s:.0f} s is spent"
            self.results.append(CandidateResult(name=candidate.name, status="skipped", reason=reason))
            return
        except AgnitraError as error:
            reason = str(error)[:500]
            self.results.append(CandidateResult(name=candidate.name, status="failed", reason=reason))
            return
        self._candidates[candidate.name] = candidate
        log = patch.log()
        self._found[candidate.name] = frozenset(descriptor.action for descriptor in log.descriptors)
        if candidate.mode == "default":
            self._note_compile(clock_s() - started_s, self._found[candidate.name])
            self._is_whole = patch.is_whole
        self.results.append(self._screen(candidate.name, patch))
        self.patches[candidate.name] = patch
        self._drop_losers()

    def _built(self, candidate: Candidate) -> Patch:
        if candidate.mode != "max-autotune":
            return self._build(candidate)
        with given_up_at(self._began_s + _OVERRUN * self._budget_s, clock_s):
            return self._build(candidate)

    def _leads(self, rehearsed: Rehearsed, candidate: Candidate, started_s: float) -> bool:
        """File what a rehearsal found, unless it shows a new leader: that one is built, and judged, here."""
        result = rehearsed.result
        if candidate.mode == "default" and result.status != "failed":
            self._note_compile(clock_s() - started_s, candidate.changes)
            self._is_whole = rehearsed.is_whole
        if contest.contenders([*self.results, result])[:1] == [result]:
            return True
        if result.status != "failed":
            self._candidates[candidate.name] = candidate
        self.results.append(
            result.model_copy(update={"status": "rejected", "reason": f"{result.reason}; {self.best} leads"})
            if result.status == "kept"
            else result
        )
        return False

    def _drop_losers(self) -> None:
        """Free what cannot win any more: derived weights, graphs and outputs of many candidates would fill a device."""
        kept = {result.name for result in contest.contenders(self.results)[:_NUM_KEPT]}
        kept |= {name for name in self.patches if name == "agnitra"}
        for name in [name for name in self.patches if name not in kept]:
            self.patches.pop(name).discard()

    def _why_not(self, candidate: Candidate) -> str | None:
        spent_s = clock_s() - self._began_s
        best_ms = self._best_ms()
        known = self._earlier.why_not(candidate, self.results) if self._earlier is not None else None
        if known is not None:
            return known
        if candidate.mode == "eager":
            kernels_ms = self._eager_kernels_ms()
            if best_ms is not None and kernels_ms is not None and best_ms < kernels_ms:
                return f"eager's kernels take {kernels_ms:.3g} ms however they are launched, {self.best} {best_ms:.3g}"
            return None
        if candidate.mode == "default" and self._best_compiled() is None and not self._lacks_one(candidate):
            # Whatever the budget: the answer must not be slower than plain torch.compile for want of a look at it.
            return None
        if candidate.is_raw and candidate.mode == "reduce-overhead":
            # The same of the mode that is faster where nothing of ours spares the launches.
            return None
        expected_s = self._expected_s(candidate)
        if spent_s + expected_s > self._budget_s:
            return f"{spent_s:.0f} s of {self._budget_s:.0f} s are spent, and it may need {expected_s:.0f} s"
        near = _NEAR_THE_LIMIT[candidate.mode]
        if best_ms is not None and self._limit_ms and best_ms <= near * self._limit_ms:
            return (
                f"{self.best} takes {best_ms:.3g} ms, within {near - 1:.0%} of the device's limit of "
                f"{self._limit_ms:.3g} ms"
            )
        return None

    def _lacks_one(self, candidate: Candidate) -> bool:
        """Whether a candidate lacks one of all changes: there may be a dozen such, all refused for one reason."""
        whole = self._all_changes
        return whole is not None and bool(candidate.changes) and "as_laid_out" not in candidate.actions

    def _note_compile(self, seconds: float, changes: Collection[str]) -> None:
        self._compile_s = seconds
        self._has_kernels = any(ACTIONS[name].kind == "template" for name in changes)

    def _expected_s(self, candidate: Candidate) -> float:
        """Return what a candidate may take: what it took before, else by what another has taken."""
        earlier = self._earlier
        known = earlier.cost_s(candidate) if earlier is not None else None
        if known is not None:
            return known
        # What came from Inductor's cache says nothing of a graph that is not in it.
        whole_s = max(self._compile_s or 0.0, earlier.most_s() if earlier is not None else 0.0)
        if candidate.mode == "max-autotune":
            return whole_s * _MAX_AUTOTUNE_COST
        has_kernels = any(ACTIONS[name].kind == "template" for name in candidate.changes)
        return whole_s * (_WITHOUT_KERNELS_COST if self._has_kernels and not has_kernels else 1.0)

    def _best_ms(self) -> float | None:
        ranked = contest.contenders(self.results)
        comparison = ranked[0].comparison if ranked else None
        return comparison.candidate_latency.latency_ms_p50 if comparison else None

    def _eager_kernels_ms(self) -> float | None:
        """Return what eager's kernels take on the device one after the other, None where that was not measured."""
        compared = (result.comparison for result in self.results)
        found = [each.baseline_latency.device_ms_p50 for each in compared if each is not None]
        return next((ms for ms in reversed(found) if ms is not None), None)

    def _best_changed(self) -> Candidate | None:
        """Return the fastest with changes of ours; where none is eligible, the one with all: one may spoil it."""
        return next((candidate for candidate in self._ranked() if candidate.changes), self._all_changes)

    def _best_compiled(self) -> Candidate | None:
        return next((candidate for candidate in self._ranked() if candidate.mode != "eager"), None)

    def _inexact(self) -> Candidate | None:
        """Return a compiled candidate that its error alone stands against, one with changes of ours first."""
        names = [result.name for result in self.results if contest.is_inexact(result)]
        found = [self._candidates[name] for name in names if name in self._candidates]
        return next((each for each in found if each.changes), next(iter(found), None))

    def _ranked(self) -> list[Candidate]:
        return [self._candidates[result.name] for result in contest.contenders(self.results)]


def clock_s() -> float:
    """Seconds of this process's own: waiting for a turn at a shared device is no work."""
    return time.monotonic() - waited_s()
