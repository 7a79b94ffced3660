"""What the suite says of one workload: the optimiser's result against eager and torch.compile's modes, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agnitra_lab.contracts.base import Contract, Count, NonNegative, Share
from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.measurement import CandidateResult, Equivalence, Latency, Ratio
from agnitra_lab.contracts.patch import Refusal

EAGER = "eager"
"""Name of the side that is the model as it was."""


@dataclass(frozen=True)
class SuiteAssignment:
    """What one process of the suite is to do.

    Attributes:
        name, scale, device: of the workload.
        modes: of torch.compile; eager always takes part.
        budget_s: for the optimisation's compiling.
        timing_s: for the loop that times all sides.
        timeout_s: when to give up; waiting for the device does not count.
        turns_file: the file through which processes share the device.
        scratch: folder for caches and the optimisation's own run; the caller removes it.
        is_cache_warm: keep the caches that the environment names, in place of cold ones for each side.
        is_controlled: check all of torch.compile's modes against eager, and not only until the fastest that passes is
            found, while there is time.
        num_jobs: processes at once, for the record.
        command: for the record.
    """

    name: str
    scale: str
    device: str
    modes: tuple[str, ...]
    budget_s: float
    timing_s: float
    timeout_s: float
    turns_file: Path
    scratch: Path
    is_cache_warm: bool = False
    is_controlled: bool = False
    num_jobs: int = 1
    command: str = ""


class SuiteSide(Contract):
    """One contestant, timed in the same loop as the others."""

    name: str
    """"eager", a torch.compile mode ("default", "reduce-overhead", "max-autotune"), or "agnitra"."""
    latency: Latency | None = None
    compile_s: NonNegative | None = None
    """Seconds of the first call, which compiles; of "agnitra" the whole optimisation. Waiting for the device is no
    part of it."""
    equivalence: Equivalence | None = None
    """Against eager; of torch.compile's modes only where they were checked: the fastest, and slower ones where that
    one does not pass, or all as controls."""
    error: str | None = None
    """Why it has no latency."""


class SuiteResult(Contract):
    """One workload of the suite on one device."""

    workload: str
    family: str
    scale: str
    is_algebra: bool = False
    """Most of its work can be derived away, so its ratio says little about others: means cap it."""
    item_unit: str | None = None
    items_per_call: Count | None = None
    status: Literal["done", "failed"]
    """"done" when the candidate and at least one baseline were timed."""
    error: str | None = None
    baselines: tuple[SuiteSide, ...] = ()
    candidate: SuiteSide | None = None
    best_baseline: str | None = None
    """The fastest baseline by its median. One that failed is not in the contest; its `error` says why."""
    speedup_vs_eager: Ratio | None = None
    speedup_vs_best: Ratio | None = None
    """best baseline / candidate, paired by rounds: above 1 is better."""
    noise: Ratio | None = None
    """The candidate over itself, a second time in each round (A/A)."""
    winner: str | None = None
    """Name of the kept candidate; "eager" when nothing was faster."""
    actions: dict[str, Count] = {}
    """Action -> changes that it made in the kept candidate."""
    candidates: tuple[CandidateResult, ...] = ()
    """Every candidate of the optimisation with its verdict, without its own comparison."""
    refusals: tuple[Refusal, ...] = ()
    """What the kept candidate, or all changes together where none of ours was kept, left as it was, and why."""
    num_guard_misses: Count | None = None
    """Calls of the check and of the timed loop in which the drop-in ran the original."""
    floor_ms: NonNegative | None = None
    floor_share: NonNegative | None = None
    """floor_ms over the candidate's median: 1 is at the limit of the device."""
    device: DeviceInfo | None = None
    is_cache_warm: bool = False
    """Compiled code of earlier runs could be reused, so the compile seconds are not cold ones."""
    num_jobs: Count = 1
    """Workloads that compiled at the same time."""
    wall_s: NonNegative = 0.0
    waited_s: NonNegative = 0.0
    """Share of `wall_s` spent waiting for the device."""
    phases_s: dict[str, NonNegative] = {}
    """What the rest of `wall_s` went into."""
    seeds: tuple[int, ...] = ()
    command: str = ""
    generated_at: str = ""
    schema_version: str = "agnitra.suite.v1"

    @property
    def is_equivalent(self) -> bool:
        """Whether the candidate computes what eager computes."""
        checked = self.candidate.equivalence if self.candidate else None
        return checked is not None and checked.is_equivalent


class SuiteFigures(Contract):
    """What a set of results comes to. A workload that failed or is not equivalent is in no ratio, and is counted."""

    num_workloads: Count
    num_done: Count
    num_failed: Count
    num_not_equivalent: Count
    num_failed_baselines: Count
    """Baselines without a time: the best of the others stands for them."""
    speedup_vs_best_worst: NonNegative | None = None
    worst_workload: str | None = None
    num_below_0_98: Count
    """Workloads whose speed-up over the best baseline is below 0.98."""
    num_surely_below_0_98: Count
    """The same of the whole interval."""
    num_at_least_1_15: Count
    share_at_least_1_15: Share | None = None
    """Of all workloads, those that failed included."""
    num_inexact_best: Count = 0
    """Workloads whose best baseline gives other values than eager."""
    speedup_vs_best_exact_worst: NonNegative | None = None
    """Over the best baseline that does not, by medians; over the best of all where none was checked."""
    num_exact_below_0_98: Count = 0
    speedup_vs_best_exact_geomean: NonNegative | None = None
    speedup_vs_best_geomean: NonNegative | None = None
    speedup_vs_eager_geomean: NonNegative | None = None
    speedup_vs_best_geomean_capped: NonNegative | None = None
    """With ratios of workloads tagged algebra capped at 10."""
    speedup_vs_eager_geomean_capped: NonNegative | None = None
