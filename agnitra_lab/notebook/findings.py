"""What a workbench knows: contracts and frames of the steps that have ended, and how far the running one is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from agnitra_lab.contracts.kernel import Kernel, Site
from agnitra_lab.contracts.measurement import CandidateResult, Comparison
from agnitra_lab.contracts.patch import PatchLog, RollbackProof
from agnitra_lab.contracts.report import Report, StageName
from agnitra_lab.contracts.search import SearchResult, Trial
from agnitra_lab.contracts.suggestion import Proposal
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.loop.settings import Settings
from agnitra_lab.notebook import tables
from agnitra_lab.notebook.job import Job
from agnitra_lab.notebook.steps import Steps
from agnitra_lab.runs.store import Run

if TYPE_CHECKING:
    import pandas as pd

    from agnitra_lab.loop.optimization import Optimization
    from agnitra_lab.loop.result import Result
    from agnitra_lab.profiler.telemetry import Telemetry

_MAX_PRINTED = 20_000


class Findings:
    """The state of a workbench, to be read.

    Attributes:
        workload: model and inputs.
        settings: of the steps that are still to come.
        steps: how each step stands.
        result: what `agnitra_lab.optimize` would have returned; None until the report.
        proof: of the last rollback, None before it.
        error: what the last step raised, None when it ended well.
        doing: what the running step is at, in a few words.
    """

    def __init__(self, workload: Workload, settings: Settings) -> None:
        self.workload = workload
        self.settings = settings
        self.steps = Steps()
        self.result: Result | None = None
        self.proof: RollbackProof | None = None
        self.error: BaseException | None = None
        self.doing = ""
        self._pass: Optimization | None = None
        self._job: Job | None = None
        self._logs: tuple[PatchLog, ...] = ()
        self._trials: list[tuple[Site, Trial]] = []
        self._printed: list[str] = []
        self._began_s = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a step, or a rollback, is running."""
        job = self._job
        return job is not None and not job.wait(0)

    @property
    def run(self) -> Run | None:
        """Where the files go; None before the first step."""
        return self._pass.run if self._pass else None

    @property
    def device_name(self) -> str | None:
        """Where the model runs; None before the first step."""
        return self._pass.device_info.name if self._pass else None

    @property
    def telemetry(self) -> Telemetry | None:
        """The profile; None until it is taken."""
        return self._of("profile", "telemetry")

    @property
    def proposal(self) -> Proposal | None:
        """The suggestions as their contract."""
        return self._of("suggest", "proposal")

    @property
    def suggestions(self) -> pd.DataFrame:
        """One row per suggestion, best first. Columns: `tables.SUGGESTION_COLUMNS`."""
        accepted = self.settings.accept
        return tables.suggestion_frame(self.proposal.suggestions if self.proposal else (), accepted)

    @property
    def searches(self) -> Sequence[SearchResult]:
        """The kernel searches that have ended."""
        return self._of("refine", "searches") or ()

    @property
    def trials(self) -> pd.DataFrame:
        """One row per kernel config that was measured, live while a search runs. Columns: `tables.TRIAL_COLUMNS`."""
        return tables.trial_frame(self.searches, self.live_trials)

    @property
    def live_trials(self) -> Sequence[tuple[Site, Trial]]:
        """What a search has measured so far."""
        return tuple(self._trials)

    @property
    def is_replayed(self) -> bool:
        """Whether searches play recorded measurements, as they do where there is no GPU."""
        return self._pass is not None and self._pass.lab is None

    @property
    def kernels(self) -> Sequence[Kernel]:
        """The generated kernels: config, Triton source, content hash."""
        book = self._of("generate", "kernels")
        return tuple(book.kernels) if book is not None else ()

    @property
    def patches(self) -> Sequence[PatchLog]:
        """The patch log of each candidate that may still win."""
        return self._logs

    @property
    def results(self) -> Sequence[CandidateResult]:
        """Every candidate with its verdict."""
        return tuple(self._of("patch", "results") or ())

    @property
    def candidates(self) -> pd.DataFrame:
        """One row per candidate. Columns: `tables.CANDIDATE_COLUMNS`."""
        return tables.candidate_frame(self.results)

    @property
    def comparison(self) -> Comparison | None:
        """The verdict's A/B; None until the benchmark has ended."""
        return self._of("benchmark", "comparison")

    @property
    def winner(self) -> str | None:
        """Name of the candidate that is kept, "eager" when there is none; None until the benchmark has ended."""
        return self._of("benchmark", "winner_name")

    @property
    def report(self) -> Report | None:
        """Every number of the finished run."""
        return self.result.report if self.result else None

    @property
    def can_rollback(self) -> bool:
        """Whether something is installed that was not rolled back."""
        return self.result is not None and self.result.has_dropin and self.proof is None

    @property
    def model(self) -> Callable[..., Any]:
        """The drop-in; the original until something faster is kept."""
        return self.result.model if self.result else self.workload.model

    @property
    def printed(self) -> str:
        """What the model, or anything else in a step, printed: the last 20,000 characters."""
        return "".join(self._printed)[-_MAX_PRINTED:]

    @property
    def progress(self) -> tuple[float, str]:
        """Steps that have ended, with the part of the running one, and the line beside the bar."""
        step = self.steps.current
        if step is None:
            return float(self.steps.num_ended), self.doing if self.is_busy else ""
        elapsed_s = time.monotonic() - self._began_s
        share, doing = self._share(step.stage, elapsed_s), self.doing
        return self.steps.num_ended + share, f"{step.stage}: {doing}, {elapsed_s:.0f} s" if doing else step.stage

    def _share(self, stage: StageName, elapsed_s: float) -> float:
        """The part of a running step that is behind it, where that is known."""
        if stage == "refine" and self._trials:
            site = self._trials[-1][0]
            count = sum(other == site for other, _ in self._trials)
            return min(0.95, count / self.settings.max_trials)
        if stage == "patch":
            return min(0.95, elapsed_s / self.settings.budget_s)
        return 0.0

    def _of(self, stage: StageName, attribute: str) -> Any:
        """What the pass holds of a step that has ended; None before that."""
        if self._pass is None or not self.steps[stage].has_ended:
            return None
        return getattr(self._pass, attribute)

    def _note_printed(self, text: str) -> None:
        self._printed.append(text)
        if sum(map(len, self._printed)) > 2 * _MAX_PRINTED:
            self._printed[:] = [self.printed]
