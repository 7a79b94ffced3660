"""The five metric cards: latency, throughput, GPU utilisation, GPU hours saved, cost impact.

Every figure is a value of the report. A value that was not measured says why, and is never shown as 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agnitra_lab.contracts.report import Report
from agnitra_lab.report import numbers

State = Literal["better", "unchanged", "worse", "observed", "absent"]
NO_CHANGE = "no change"
_THROUGHPUT_LABELS = {"tokens": "Tokens/s", "images": "Images/s", "samples": "Samples/s"}


@dataclass(frozen=True)
class Metric:
    """One card.

    Attributes:
        label: what is measured.
        value: the figure that is kept, as text; "not measured" when absent.
        baseline: the figure before, as text; None when absent or the same.
        candidate: the figure after, as text; None when nothing was kept.
        change: the change in words or numbers; None when there is none to speak of.
        unit: unit of the figures.
        note: one short clause of context, or why the value is absent.
        state: how to paint it.
    """

    label: str
    value: str
    baseline: str | None
    candidate: str | None
    change: str | None
    unit: str
    note: str
    state: State


def metric_cards(report: Report) -> tuple[Metric, ...]:
    """Give the five cards in their order."""
    return (
        _latency(report),
        _throughput(report),
        _gpu_utilisation(report),
        _gpu_hours(report),
        _cost(report),
    )


def change_lines(metric: Metric) -> tuple[str, ...]:
    """The change and what it started from, each short enough for a line of its own."""
    before = f"from {metric.baseline}" if metric.baseline and metric.candidate else None
    return tuple(text for text in (metric.change, before) if text)


def is_faster(report: Report) -> bool:
    """Whether a change was kept: then the figures after are the candidate's, else they are the baseline's."""
    return report.comparison.verdict == "faster" and report.winner != report.comparison.baseline


def why_unchanged(report: Report) -> str:
    """Why the baseline was kept, as a clause."""
    comparison = report.comparison
    if comparison.verdict == "not_equivalent":
        return "the candidate computes something else"
    if comparison.verdict == "slower":
        return f"the best candidate took {numbers.milliseconds(comparison.candidate_latency.latency_ms_p50)}"
    paired = f"median of paired ratios {numbers.times(comparison.speedup.median)}"
    if comparison.verdict == "faster":
        return f"the candidate was not kept; {paired}"
    return f"candidate {numbers.milliseconds(comparison.candidate_latency.latency_ms_p50)}, within the noise; {paired}"


def _latency(report: Report) -> Metric:
    comparison = report.comparison
    before = numbers.milliseconds(comparison.baseline_latency.latency_ms_p50)
    if not is_faster(report):
        return Metric("Latency", before, before, None, NO_CHANGE, "ms", why_unchanged(report), "unchanged")
    after = numbers.milliseconds(comparison.candidate_latency.latency_ms_p50)
    speedup = comparison.speedup
    level = numbers.exact_share(speedup.confidence_level)
    note = f"median of paired ratios, {level} interval {numbers.interval(speedup.low, speedup.high)}"
    return Metric("Latency", after, before, after, f"{numbers.times(speedup.median)} as fast", "ms", note, "better")


def _throughput(report: Report) -> Metric:
    comparison = report.comparison
    unit = comparison.item_unit
    label = _THROUGHPUT_LABELS.get(unit, f"{unit.capitalize()}/s")
    before = numbers.rate(comparison.baseline_items_per_second)
    if not is_faster(report):
        return Metric(
            label, before, before, None, NO_CHANGE, f"{unit}/s", f"{comparison.baseline} is kept", "unchanged"
        )
    after = numbers.rate(comparison.candidate_items_per_second)
    change = f"+{report.usage.performance_uplift_pct:.1f}%"
    return Metric(label, after, before, after, change, f"{unit}/s", "one call at a time", "better")


def _gpu_utilisation(report: Report) -> Metric:
    gpu = report.telemetry.gpu
    label = "GPU utilisation"
    if gpu.gpu_utilisation is None:
        reason = gpu.reason or ("no GPU" if report.device.type == "cpu" else "the driver gave no reading")
        return Metric(label, numbers.ABSENT, None, None, None, "%", numbers.plain_text(reason), "absent")
    value = numbers.share(gpu.gpu_utilisation)
    return Metric(label, value, value, None, None, "%", "kernels busy over wall time, in the profile", "observed")


def _gpu_hours(report: Report) -> Metric:
    usage = report.usage
    label = "GPU hours saved"
    before, after = numbers.hours(usage.gpu_hours_before), numbers.hours(usage.gpu_hours_after)
    work = f"for {usage.tokens_processed:,} {report.comparison.item_unit}"
    if report.device.type == "cpu":
        took = f"{before} before, {after} after" if is_faster(report) else before
        return Metric(label, numbers.ABSENT, None, None, None, "h", f"no GPU; CPU time {took}, {work}", "absent")
    if not is_faster(report):
        return Metric(label, numbers.hours(usage.gpu_hours_saved), before, None, NO_CHANGE, "h", work, "unchanged")
    return Metric(label, numbers.hours(usage.gpu_hours_saved), before, after, None, "h", work, "better")


def _cost(report: Report) -> Metric:
    usage = report.usage
    label = "Cost impact"
    before, after = (numbers.money(amount, usage.currency) for amount in (usage.cost_before, usage.cost_after))
    price = f"at {price_per_hour(report)}"
    if report.device.type == "cpu" and not usage.total_billable and not usage.cost_savings:
        note = f"no GPU, so no GPU hour to price {price}"
        return Metric(label, "not priced", None, None, None, usage.currency, note, "absent")
    saved = numbers.money(usage.cost_savings, usage.currency)
    if not is_faster(report):
        return Metric(label, saved, before, None, NO_CHANGE, usage.currency, price, "unchanged")
    return Metric(label, saved, before, after, "saved", usage.currency, price, "better")


def price_per_hour(report: Report) -> str:
    """The price, and what it is a price of: on a CPU the usage event counts CPU hours at the price of a GPU hour."""
    price = f"{report.price_per_gpu_hour:.2f} {report.usage.currency} per GPU hour"
    return f"{price}, applied to CPU hours" if report.device.type == "cpu" else price
