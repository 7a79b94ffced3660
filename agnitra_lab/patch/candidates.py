"""Which callables compete with eager: torch.compile's graphs, and our patches on top of them, in rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.kernel import KernelSource
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import UsageError
from agnitra_lab.patch.install import Patch, capture_eager, compile_mode, install

Mode = Literal["eager", "default", "reduce-overhead", "max-autotune"]
_COMPILE_OPTIONS = ("max_autotune", "freezing")


@dataclass(frozen=True)
class Candidate:
    """One contestant.

    Attributes:
        name: what tables and artifacts call it.
        mode: the torch.compile mode whose Inductor options it starts from; "eager" compiles nothing.
        actions: what is patched on top; empty for plain torch.compile.
        is_raw: torch.compile as a user calls it, with Dynamo's guards and Inductor's own CUDA graphs.
    """

    name: str
    mode: Mode
    actions: tuple[str, ...] = ()
    is_raw: bool = False

    @property
    def changes(self) -> tuple[str, ...]:
        """The actions that change the graph, or its kernels."""
        return tuple(name for name in self.actions if ACTIONS[name].kind != "options")


class Plan:
    """The contestants for one device and one list of suggested actions.

    Args:
        actions: names of the suggested actions, best first.
        device_type: "cpu" or "cuda".
        only: keep the candidate of this name alone.
    """

    def __init__(self, actions: Sequence[str], device_type: str, *, only: str | None = None) -> None:
        self._is_cuda = device_type == "cuda"
        possible = [name for name in actions if self._is_cuda or not ACTIONS[name].needs_cuda]
        self._possible = possible
        self._only = only
        # Every graph of ours may become a CUDA graph; whether it does is measured when it is installed.
        self._base = ("cuda_graph",) if self._is_cuda else ()
        self._changes = tuple(name for name in possible if ACTIONS[name].kind != "options")

    def first(self) -> list[Candidate]:
        """List the opening round, in the order in which they are worth their compile time.

        torch.compile's own graph runs past its guards here (`patch/paths.py`), so it is never slower than the mode.
        """
        rows = [Candidate("agnitra", "default", (*self._changes, *self._base))] if self._changes else []
        if self._is_cuda:
            rows.append(Candidate("cuda_graph", "eager", ("cuda_graph",)))
        rows.append(Candidate("torch.compile", "default", self._base))
        if "freezing" in self._possible:
            # Apart, because constants let the matrix library reorder sums, which the exact track may refuse.
            rows.append(Candidate("agnitra:freezing", "default", (*self._changes, *self._base, "freezing")))
        return self._allowed(rows)

    def as_laid_out(self, candidate: Candidate) -> list[Candidate]:
        """List a candidate whose error alone stands against it once more, with convolutions in eager's layout."""
        if "as_laid_out" not in self._possible:
            return []
        kept = tuple(name for name in candidate.actions if name not in ("channels_last", "freezing"))
        name = "agnitra:as-laid-out" if candidate.changes else "torch.compile:as-laid-out"
        return self._allowed([Candidate(name, "default", (*kept, "as_laid_out"))])

    def graphed_by_inductor(self, best: Candidate | None) -> list[Candidate]:
        """List what Inductor's own CUDA graphs hold, where none of ours holds the whole call.

        Each of them takes one of the graphs between which Python runs, which no graph of ours spans.

        Args:
            best: the fastest compiled candidate so far, None when there is none.
        """
        if not self._is_cuda:
            return []
        rows = [Candidate("torch.compile:reduce-overhead", "reduce-overhead", is_raw=True)]
        if best is not None and best.changes:
            kept = tuple(name for name in best.actions if name not in ("cuda_graph", "freezing"))
            rows.append(Candidate("agnitra:reduce-overhead", "reduce-overhead", kept))
        return self._allowed(rows)

    def second(self, best: Candidate | None, *, is_whole: bool = True) -> list[Candidate]:
        """List what costs more, on top of the best of the opening round.

        Args:
            best: the fastest compiled candidate so far, None when there is none.
            is_whole: whether one CUDA graph of ours holds the call.
        """
        rows = []
        if "combo_kernels" in self._possible:
            # Apart, because it compiles everything anew, and helps where independent small kernels are the time.
            name = "agnitra:combo-kernels" if best and best.changes else "torch.compile:combo-kernels"
            kept = best.actions if best else self._base
            rows.append(Candidate(name, "default", (*kept, "combo_kernels")))
        if "max_autotune" in self._possible or self._only is not None:
            actions = tuple(name for name in best.actions if name != "freezing") if best else self._base
            is_ours = bool(best and best.changes)
            name = "agnitra:max-autotune" if is_ours else "torch.compile:max-autotune"
            rows.append(Candidate(name, "max-autotune", actions))
            if self._is_cuda and not is_whole:
                rows.append(Candidate("torch.compile:max-autotune", "max-autotune", is_raw=True))
        unique = {candidate.name: candidate for candidate in rows}
        return self._allowed(list(unique.values()))

    def without_one(self, whole: Candidate, found: frozenset[str] | None = None) -> Iterator[Candidate]:
        """Yield a candidate less each of its changes: a change may cost its neighbours more than it gains.

        Args:
            whole: the candidate.
            found: those of its changes that found something to change, where that is known.
        """
        if whole.is_raw or whole.name == "agnitra:freezing":
            return
        changes = [name for name in whole.changes if found is None or name in found]
        # Less its only change it is torch.compile, which is in the first round.
        for left_out in changes if len(changes) > 1 else ():
            actions = tuple(name for name in whole.actions if name != left_out)
            yield from self._allowed([Candidate(f"{whole.name}-{left_out}", whole.mode, actions)])

    def could_hold(self, candidate: Candidate) -> bool:
        """Whether a round could list a candidate, such as the winner of an earlier run."""
        possible = {*self._possible, *self._base}
        return set(candidate.actions) <= possible and bool(self._allowed([candidate]))

    def names(self) -> list[str]:
        """Return every name that a plan on this device could hold."""
        ours, plain = Candidate("agnitra", "default", self._changes), Candidate("torch.compile", "default")
        rows = [*self.first(), *self.graphed_by_inductor(ours), *self.second(None, is_whole=False)]
        rows += self.second(ours, is_whole=False)
        rows += [*self.as_laid_out(ours), *self.as_laid_out(plain)]
        return list(dict.fromkeys(row.name for row in rows))

    def _allowed(self, rows: list[Candidate]) -> list[Candidate]:
        return [candidate for candidate in rows if self._only in (None, candidate.name)]


def check_name(name: str | None, device_type: str) -> None:
    """Refuse a candidate name that no plan on this device could hold.

    Raises:
        UsageError: with the names that there are.
    """
    names = Plan(tuple(ACTIONS), device_type).names()
    if name is not None and name not in names:
        raise UsageError(f"No candidate {name!r} here.", hint=f"Candidates: {', '.join(names)}.")


def build(workload: Workload, candidate: Candidate, kernels: KernelSource | None) -> Patch:
    """Compile a candidate by running the workload once.

    Raises:
        PatchError: when it does not compile or its first call fails.
    """
    if candidate.mode == "eager":
        return capture_eager(workload, candidate.name)
    if candidate.is_raw:
        return compile_mode(workload, candidate.mode)
    return install(workload, candidate.actions, name=candidate.name, kernels=kernels, base_mode=candidate.mode)
