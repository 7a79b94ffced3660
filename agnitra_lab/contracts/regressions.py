"""Two runs side by side, figure by figure, and the rules by which one of them counts as worse."""

from __future__ import annotations

from typing import Literal

from agnitra_lab.contracts.base import Contract, NonNegative

MetricVerdict = Literal["ok", "regressed", "missing", "not_comparable"]


class FigureRule(Contract):
    """Which figures are compared, recognised by the end of their name, and how much worse they may get."""

    suffixes: tuple[str, ...]
    tolerance: NonNegative
    is_lower_better: bool
    is_absolute: bool = False
    """Whether the tolerance is in the figure's unit; else it is a share of the baseline's value."""
    depends_on_device: bool = True
    """Whether values of different devices cannot be compared."""


class MetricChange(Contract):
    """One figure in both runs."""

    metric: str
    baseline: float | None
    candidate: float | None
    relative_change: float | None
    """(candidate - baseline) / |baseline|; null when a value is missing or the baseline is 0."""
    tolerance: float
    is_lower_better: bool
    verdict: MetricVerdict
    reason: str


class Regressions(Contract):
    """The comparison of two runs, and whether a guardrail failed."""

    baseline_run_id: str
    candidate_run_id: str
    metrics: tuple[MetricChange, ...]
    verdict: MetricVerdict
    is_failure: bool
    """Regressed; or missing, where the caller counts that as failure."""
    note: str | None = None
    schema_version: str = "agnitra.regressions.v1"
