"""What the loop gives back: the drop-in model, the evidence, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agnitra_lab.contracts.patch import RollbackProof
from agnitra_lab.contracts.report import Report
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import RollbackError, UsageError
from agnitra_lab.patch.install import Patch
from agnitra_lab.profiler.telemetry import Telemetry
from agnitra_lab.report import card
from agnitra_lab.runs.store import Run


class Result:
    """What `optimize` gives: the drop-in model, the report, and the way back.

    Attributes:
        model: the drop-in; the original itself when nothing was faster.
        report: every number of the run.
        telemetry: the profile, as frames and as JSON.
        artifacts: folder of the runs.
    """

    def __init__(self, report: Report, run: Run, telemetry: Telemetry, workload: Workload, patch: Patch | None) -> None:
        self.report = report
        self.telemetry = telemetry
        self.model: Callable[..., Any] = patch.model if patch else workload.model
        self.artifacts = run.root
        self.card_path = run.directory("reports") / "report.html"
        self.json_path = run.directory("reports") / "report.json"
        self._patch = patch

    @property
    def speedup(self) -> float:
        """Of the kept candidate over eager; 1.0 when the original stays."""
        return self.report.comparison.speedup.median if self._patch else 1.0

    @property
    def has_dropin(self) -> bool:
        """Whether something was installed; else `model` is the original."""
        return self._patch is not None

    def rollback(self) -> RollbackProof:
        """Restore the original and prove it: from now on `model` runs the original path.

        Raises:
            UsageError: when nothing was installed.
            RollbackError: when the original is not as it was, bit for bit.
        """
        if self._patch is None:
            raise UsageError("Nothing to roll back: the original model was kept.")
        proof = self._patch.rollback()
        if not proof.is_restored:
            raise RollbackError(f"The original was not restored: {proof.detail}.")
        return proof

    def __repr__(self) -> str:
        return f"<agnitra_lab.Result {self.report.headline} Card: {self.card_path}>"

    def _repr_html_(self) -> str:
        return card.card_html(self.report)
