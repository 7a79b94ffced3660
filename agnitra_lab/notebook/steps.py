"""The seven steps of a workbench as they stand: plain records, which every view shows in the same words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from agnitra_lab.contracts.report import STAGES, Checkpoint, StageName
from agnitra_lab.redact import redact_text
from agnitra_lab.report import numbers

Status = Literal["waiting", "running", "done", "skipped", "fallback", "failed", "cancelled"]
ENDED: frozenset[Status] = frozenset({"done", "skipped", "fallback"})
WORDS: dict[Status, str] = {
    "waiting": "waiting",
    "running": "running",
    "done": "done",
    "skipped": "skipped",
    "fallback": "done, by presets",
    "failed": "failed",
    "cancelled": "cancelled",
}
MARKS: dict[Status, str] = {
    "waiting": "○", "running": "◐", "done": "●", "skipped": "◌", "fallback": "●", "failed": "✕", "cancelled": "■",
}  # fmt: skip
"""Beside the word, never instead of it."""
SAMPLER_CHOICES = (
    "rl", "portfolio", "reinforce", "tpe", "coordinate", "reinforce-cold", "random", "cmaes", "exhaustive", "none",
)  # fmt: skip
"""Written out, as in the shell: loading the extension loads no search."""
_MAX_HEADLINE = 400


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        stage: which one.
        status: how it stands.
        headline: what it found, or why it did not.
        wall_s: how long it took; None until it has ended.
    """

    stage: StageName
    status: Status = "waiting"
    headline: str = ""
    wall_s: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the next step may go on from it."""
        return self.status in ENDED

    @property
    def announcement(self) -> str:
        """What a screen reader hears once when the step has ended."""
        taken = f" in {numbers.seconds(self.wall_s)}" if self.wall_s is not None else ""
        return f"{self.stage} {WORDS[self.status]}{taken}. {self.headline}".strip()


class Steps:
    """The seven in order. Only the steps after the last one that has ended can be waiting."""

    def __init__(self) -> None:
        self._steps = {stage: Step(stage) for stage in STAGES}

    def __iter__(self) -> Iterator[Step]:
        return iter(tuple(self._steps.values()))

    def __getitem__(self, stage: StageName) -> Step:
        return self._steps[stage]

    @property
    def following(self) -> StageName | None:
        """The first step that has not ended; None when all have."""
        return next((stage for stage, step in self._steps.items() if not step.has_ended), None)

    @property
    def num_ended(self) -> int:
        """How many have ended."""
        return sum(step.has_ended for step in self._steps.values())

    @property
    def current(self) -> Step | None:
        """The one that is running."""
        return next((step for step in self._steps.values() if step.status == "running"), None)

    def restart_at(self, stage: StageName) -> None:
        """Forget this step and those after it."""
        for later in STAGES[STAGES.index(stage) :]:
            self._steps[later] = Step(later)

    def begin(self, stage: StageName) -> None:
        """Note that a step runs."""
        self._steps[stage] = Step(stage, "running")

    def end(self, point: Checkpoint) -> Step:
        """Take over what the loop said of a stage."""
        headline = numbers.shortened(numbers.plain_text(redact_text(point.headline)), _MAX_HEADLINE)
        made = Step(point.stage, point.status, headline, point.wall_s)
        self._steps[point.stage] = made
        return made

    def stop(self, stage: StageName, status: Status, reason: str, wall_s: float | None) -> Step:
        """Note that a step failed or was cancelled."""
        headline = numbers.shortened(numbers.plain_text(redact_text(reason)), _MAX_HEADLINE)
        made = replace(self._steps[stage], status=status, headline=headline, wall_s=wall_s)
        self._steps[stage] = made
        return made
