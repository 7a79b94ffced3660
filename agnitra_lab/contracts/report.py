"""The report: every number that a report card shows. A figure that is not in here may not be shown."""

from __future__ import annotations

from typing import Literal

from agnitra_lab.contracts.base import Contract, Count, NonNegative, Positive
from agnitra_lab.contracts.device import DeviceInfo, DevicePeaks
from agnitra_lab.contracts.measurement import CandidateResult, Comparison
from agnitra_lab.contracts.patch import PatchLog, Refusal
from agnitra_lab.contracts.search import SearchResult
from agnitra_lab.contracts.suggestion import Proposal
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.contracts.usage import UsageEvent

StageName = Literal["profile", "suggest", "refine", "generate", "patch", "benchmark", "report"]
STAGES: tuple[StageName, ...] = ("profile", "suggest", "refine", "generate", "patch", "benchmark", "report")


class Checkpoint(Contract):
    """One stage of the loop as it went."""

    stage: StageName
    status: Literal["done", "skipped", "fallback", "failed"]
    headline: str
    """One sentence with the stage's key figure."""
    wall_s: NonNegative


class AgentNotes(Contract):
    """What steered the run."""

    is_rl_enabled: bool
    sampler: str | None
    suggestion_source: str
    """"preset" or "llm:<model>"."""
    applied: tuple[str, ...]
    """Actions in the kept candidate."""
    banner: str | None = None
    measured_on: str | None = None


class Payback(Contract):
    """What the run took against what it saves: when it has earned its own time."""

    num_calls: Count
    """Calls after which the saved time is the spent time."""
    spent_s: NonNegative
    """Wall time of all stages."""
    searched_s: NonNegative
    """Of it, kernel searches."""
    saved_ms: Positive
    """A call."""


class Region(Contract):
    """One part of the model, equal parts of numbered layers as one: its time before and after."""

    place: str
    """Module path with "*" for the numbers of layers; else the owner of the time."""
    baseline_ms: NonNegative
    """Self time on the device (on a CPU: of the host), of one call."""
    candidate_ms: NonNegative
    limit_ms: NonNegative | None = None
    """Least time for this work: its FLOPs at the matrix peak, or one read of its weights; None where not known."""
    changes: tuple[str, ...] = ()
    """Actions that changed the graph there."""


class Report(Contract):
    """A finished run, as the report card, the HTML file and the JSON export show it."""

    run_id: str
    title: str
    workload: str
    generated_at: str
    device: DeviceInfo
    peaks: DevicePeaks | None = None
    winner: str
    """Name of the candidate that is kept; "eager" when nothing is faster."""
    headline: str
    """The verdict in one sentence."""
    comparison: Comparison
    candidates: tuple[CandidateResult, ...]
    telemetry: TelemetryRecord
    proposal: Proposal
    searches: tuple[SearchResult, ...] = ()
    patch: PatchLog | None = None
    refusals: tuple[Refusal, ...] = ()
    """What all changes together left as it was, and why, where no candidate of ours was kept; a patch has its own."""
    usage: UsageEvent
    notes: AgentNotes
    checkpoints: tuple[Checkpoint, ...]
    price_per_gpu_hour: NonNegative
    against_best: Comparison | None = None
    """The winner against the best plain torch.compile mode, head to head, when the winner is not one itself."""
    payback: Payback | None = None
    """None when nothing was kept."""
    regions: tuple[Region, ...] = ()
    """Empty when nothing was kept."""
    schema_version: str = "agnitra.report.v1"
