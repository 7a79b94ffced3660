"""Which callables compete: eager is the baseline; torch.compile's modes, and our patches on top of them, compete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.kernel import KernelSource
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import UsageError
from agnitra_lab.patch.install import Patch, compile_mode, install

Mode = Literal["default", "reduce-overhead", "max-autotune"]


@dataclass(frozen=True)
class Candidate:
    """One contestant.

    Attributes:
        name: what tables and artifacts call it.
        mode: the torch.compile mode whose Inductor options it starts from.
        actions: what is patched on top; empty for plain torch.compile.
    """

    name: str
    mode: Mode
    actions: tuple[str, ...] = ()


def plan(actions: Sequence[str], device_type: str, *, only: str | None = None) -> list[Candidate]:
    """List the candidates in the order in which they are worth their compile time, cheapest first.

    On a CPU reduce-overhead is torch.compile's default under another name, so it is not a candidate there.

    Args:
        actions: names of the suggested actions, best first.
        device_type: "cpu" or "cuda".
        only: keep the candidate of this name alone.
    """
    is_cuda = device_type == "cuda"
    possible = [name for name in actions if is_cuda or not ACTIONS[name].needs_cuda]
    changes = tuple(name for name in possible if name not in ("max_autotune", "freezing"))
    candidates = [Candidate("torch.compile", "default")]
    if is_cuda:
        candidates.append(Candidate("torch.compile:reduce-overhead", "reduce-overhead"))
    if changes:
        candidates.append(Candidate("agnitra", "default", changes))
    if "freezing" in possible:
        # Apart, because constants let the matrix library reorder sums, which the exact track may refuse.
        candidates.append(Candidate("agnitra:freezing", "default", (*changes, "freezing")))
    candidates.append(Candidate("torch.compile:max-autotune", "max-autotune"))
    if changes:
        candidates.append(Candidate("agnitra:max-autotune", "max-autotune", changes))
    return [candidate for candidate in candidates if only in (None, candidate.name)]


def check_name(name: str | None, device_type: str) -> None:
    """Refuse a candidate name that no plan on this device could hold.

    Raises:
        UsageError: with the names that there are.
    """
    names = [candidate.name for candidate in plan(tuple(ACTIONS), device_type)]
    if name is not None and name not in names:
        raise UsageError(f"No candidate {name!r} here.", hint=f"Candidates: {', '.join(names)}.")


def build(workload: Workload, candidate: Candidate, kernels: KernelSource | None) -> Patch:
    """Compile a candidate by running the workload once.

    Raises:
        PatchError: when it does not compile or its first call fails.
    """
    if not candidate.actions:
        return compile_mode(workload, candidate.mode)
    return install(workload, candidate.actions, name=candidate.name, kernels=kernels, base_mode=candidate.mode)
