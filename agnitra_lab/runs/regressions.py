"""Two run summaries side by side: which figures got worse by more than they may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agnitra_lab.contracts.base import Contract
from agnitra_lab.contracts.run import Results, RunSummary

MetricVerdict = Literal["ok", "regressed", "missing", "not_comparable"]


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


@dataclass(frozen=True)
class _Rule:
    suffixes: tuple[str, ...]
    tolerance: float
    is_lower_better: bool
    is_absolute: bool = False
    depends_on_device: bool = True


def compare_runs(
    baseline: RunSummary,
    candidate: RunSummary,
    *,
    latency_rel: float = 0.05,
    throughput_rel: float = 0.05,
    tflops_rel: float = 0.05,
    memory_rel: float = 0.05,
    loss_abs: float | None = None,
    loss_rel: float = 0.05,
    is_missing_failure: bool = False,
) -> Regressions:
    """Compare a run with a known-good one.

    Figures are recognised by the unit in their name. Those that start with `baseline_` describe what a run was compared
    with, not the run, and are left out.

    Args:
        baseline: the known-good run.
        candidate: the run on trial.
        latency_rel: how much larger `*latency_ms_p50` may be, as a share of the baseline's.
        throughput_rel: how much smaller `*_per_second` may be.
        tflops_rel: how much smaller `tflops_per_second_est` may be.
        memory_rel: how much larger peak memory may be.
        loss_abs: how much larger the final loss may be; takes the place of `loss_rel` when given.
        loss_rel: the same as a share of the baseline's.
        is_missing_failure: whether a figure that only the baseline has fails the comparison.
    """
    loss_tolerance = loss_rel if loss_abs is None else loss_abs
    rules = (
        _Rule(("tflops_per_second_est",), tflops_rel, False),
        _Rule(("_per_second", "_per_sec"), throughput_rel, False),
        _Rule(("latency_ms_p50", "latency_ms"), latency_rel, True),
        _Rule(("peak_memory_allocated_gb", "peak_memory_bytes"), memory_rel, True),
        _Rule(("final_loss",), loss_tolerance, True, loss_abs is not None, depends_on_device=False),
    )
    before, after = _figures(baseline.results), _figures(candidate.results)
    devices = device_name(baseline), device_name(candidate)
    is_same_device = devices[0] == devices[1]
    metrics = []
    for name in sorted(before | after):
        rule = next((rule for rule in rules if name.endswith(rule.suffixes)), None)
        if rule is not None and not name.startswith("baseline_"):
            is_comparable = is_same_device or not rule.depends_on_device
            metrics.append(_change(name, rule, before.get(name), after.get(name), is_comparable))
    verdict = _overall(metrics, is_same_device)
    note = None if is_same_device else f"different devices, not comparable: {devices[0]} and {devices[1]}"
    if is_same_device and not metrics:
        note = "neither run has a figure that can be compared"
    return Regressions(
        baseline_run_id=baseline.meta.run_id,
        candidate_run_id=candidate.meta.run_id,
        metrics=tuple(metrics),
        verdict=verdict,
        is_failure=verdict == "regressed" or (is_missing_failure and _is_any_missing(metrics)),
        note=note,
    )


def device_name(summary: RunSummary) -> str:
    """Name of the device that a run was made on."""
    device = summary.meta.device
    return device if isinstance(device, str) else device.name


def _figures(results: Results) -> dict[str, float]:
    values = results.model_dump()
    if results.final_loss is None and results.losses:
        values["final_loss"] = results.losses[-1]
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _change(name: str, rule: _Rule, before: float | None, after: float | None, is_comparable: bool) -> MetricChange:
    relative = None if before is None or after is None or before == 0 else (after - before) / abs(before)
    verdict, reason = _judge(rule, before, after, is_comparable)
    return MetricChange(
        metric=name,
        baseline=before,
        candidate=after,
        relative_change=relative,
        tolerance=rule.tolerance,
        is_lower_better=rule.is_lower_better,
        verdict=verdict,
        reason=reason,
    )


def _judge(rule: _Rule, before: float | None, after: float | None, is_comparable: bool) -> tuple[MetricVerdict, str]:
    if before is None:
        return "ok", "new in the candidate"
    if after is None:
        return "missing", "the candidate does not have it"
    if not is_comparable:
        return "not_comparable", "measured on different devices"
    worsening = after - before if rule.is_lower_better else before - after
    allowed = rule.tolerance if rule.is_absolute else rule.tolerance * abs(before)
    if worsening <= allowed:
        return "ok", "within the tolerance"
    return "regressed", f"worse by {worsening:.6g}, at most {allowed:.6g} is allowed"


def _overall(metrics: list[MetricChange], is_same_device: bool) -> MetricVerdict:
    verdicts = {metric.verdict for metric in metrics}
    if "regressed" in verdicts:
        return "regressed"
    if not is_same_device:
        return "not_comparable"
    if not metrics:
        return "missing"
    return "missing" if "missing" in verdicts else "ok"


def _is_any_missing(metrics: list[MetricChange]) -> bool:
    return not metrics or any(metric.verdict == "missing" for metric in metrics)
