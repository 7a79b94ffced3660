"""Two run summaries side by side: which figures got worse by more than they may."""

from __future__ import annotations

from agnitra_lab.contracts.regressions import FigureRule, MetricChange, MetricVerdict, Regressions
from agnitra_lab.contracts.run import Results, RunSummary

__all__ = ["FigureRule", "MetricChange", "MetricVerdict", "Regressions", "compare_runs", "device_name", "figure_rules",
           "figures_of"]  # fmt: skip


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
    rules = figure_rules(
        latency_rel=latency_rel, throughput_rel=throughput_rel, tflops_rel=tflops_rel, memory_rel=memory_rel,
        loss_abs=loss_abs, loss_rel=loss_rel,
    )  # fmt: skip
    before, after = figures_of(baseline.results), figures_of(candidate.results)
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


def figure_rules(
    *,
    latency_rel: float = 0.05,
    throughput_rel: float = 0.05,
    tflops_rel: float = 0.05,
    memory_rel: float = 0.05,
    loss_abs: float | None = None,
    loss_rel: float = 0.05,
) -> tuple[FigureRule, ...]:
    """Which figures are compared, by the end of their name, and how much worse they may get. The first that fits holds.

    Args: see `compare_runs`.
    """
    loss = loss_rel if loss_abs is None else loss_abs
    return (
        FigureRule(suffixes=("tflops_per_second_est",), tolerance=tflops_rel, is_lower_better=False),
        FigureRule(suffixes=("_per_second", "_per_sec"), tolerance=throughput_rel, is_lower_better=False),
        FigureRule(suffixes=("latency_ms_p50", "latency_ms"), tolerance=latency_rel, is_lower_better=True),
        FigureRule(
            suffixes=("peak_memory_allocated_gb", "peak_memory_bytes"), tolerance=memory_rel, is_lower_better=True
        ),
        FigureRule(
            suffixes=("final_loss",), tolerance=loss, is_lower_better=True, is_absolute=loss_abs is not None,
            depends_on_device=False,
        ),
    )  # fmt: skip


def device_name(summary: RunSummary) -> str:
    """Name of the device that a run was made on."""
    device = summary.meta.device
    return device if isinstance(device, str) else device.name


def figures_of(results: Results) -> dict[str, float]:
    """The figures of a run that are numbers, by name; the last of its losses as `final_loss`."""
    values = results.model_dump()
    if results.final_loss is None and results.losses:
        values["final_loss"] = results.losses[-1]
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _change(
    name: str, rule: FigureRule, before: float | None, after: float | None, is_comparable: bool
) -> MetricChange:
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


def _judge(
    rule: FigureRule, before: float | None, after: float | None, is_comparable: bool
) -> tuple[MetricVerdict, str]:
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
