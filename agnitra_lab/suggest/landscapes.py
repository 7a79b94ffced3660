"""Measurements in a few lines: what a prompt says about a landscape instead of listing it.

What helped language models in published work is in it: the best configs with their times, what each parameter's value
reached at best, and the classes of failures with one example each (Helion's LLM-guided search; LLaMEA with Kernel
Tuner, arXiv:2510.17899, where facts about the space raised the result by 15 to 31%).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from agnitra_lab.contracts.search import Trial
from agnitra_lab.redact import redact_text

NUM_BEST = 5
NUM_FAILURES = 4
MAX_DETAIL_CHARS = 120


def summarise(trials: Sequence[Trial], *, has_marginals: bool = True) -> dict[str, Any]:
    """Summarise measurements as a JSON-like value.

    Args:
        trials: in any order; several of one config count by their median.
        has_marginals: whether to say what each value of each parameter reached at best, over the best of all.

    Returns:
        Counts, the best configs, the spread, the marginals and the failures; times in microseconds.
    """
    latencies: dict[str, list[float]] = {}
    params: dict[str, dict[str, int]] = {}
    for trial in trials:
        if trial.latency_ms is not None:
            latencies.setdefault(trial.config.key(), []).append(trial.latency_ms * 1e3)
            params[trial.config.key()] = trial.config.params
    medians = {key: statistics.median(values) for key, values in latencies.items()}
    ranked = sorted(medians, key=lambda key: (medians[key], key))
    facts: dict[str, Any] = {"num_measured": len(ranked), "num_failed": sum(t.latency_ms is None for t in trials)}
    if ranked:
        best_us = medians[ranked[0]]
        facts["best_us"] = _rounded(best_us)
        facts["median_us"] = _rounded(statistics.median(medians.values()))
        facts["worst_us"] = _rounded(medians[ranked[-1]])
        facts["best"] = [{"us": _rounded(medians[key]), **params[key]} for key in ranked[:NUM_BEST]]
        if has_marginals and len(ranked) > 2:
            facts["best_over_best_by_value"] = _marginals(params, medians, best_us)
    failures = _failures(trials)
    if failures:
        facts["failures"] = failures
    return facts


def best_latency_ms(trials: Sequence[Trial]) -> float | None:
    """Return the lowest measured latency, None when nothing was measured."""
    return min((trial.latency_ms for trial in trials if trial.latency_ms is not None), default=None)


def _marginals(
    params: dict[str, dict[str, int]], medians: dict[str, float], best_us: float
) -> dict[str, dict[str, float]]:
    """Return, for each parameter that varies, the best time of each of its values over the best of all."""
    reached: dict[str, dict[int, float]] = {}
    for key, point in params.items():
        for name, value in point.items():
            values = reached.setdefault(name, {})
            values[value] = min(values.get(value, medians[key]), medians[key])
    return {
        name: {str(value): round(values[value] / best_us, 3) for value in sorted(values)}
        for name, values in reached.items()
        if len(values) > 1
    }


def _failures(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    failed = [trial for trial in trials if trial.latency_ms is None]
    counts = Counter(_failure_class(trial) for trial in failed)
    examples = {_failure_class(trial): trial for trial in reversed(failed)}
    return [
        {"class": name, "count": count, "example": examples[name].config.params}
        for name, count in counts.most_common(NUM_FAILURES)
    ]


def _failure_class(trial: Trial) -> str:
    """Return the failure's class where the trial has one, else the first words of its reason."""
    detail = redact_text(trial.detail or "failed")
    line = " ".join("".join(c if c.isprintable() else " " for c in detail).split())
    return line.partition(":")[0][:MAX_DETAIL_CHARS]


def _rounded(latency_us: float) -> float:
    return float(f"{latency_us:.4g}")
