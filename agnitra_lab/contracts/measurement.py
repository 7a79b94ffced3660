"""Timings, equivalence and their comparison."""

from __future__ import annotations

from typing import Literal

from agnitra_lab.contracts.base import Contract, Count, NonNegative, Positive, Share

Verdict = Literal["faster", "no_change", "slower", "not_equivalent"]
MAX_ERROR_RATIO = 1.25
"""What the error against fp64 may be of the baseline's own, on the exact track."""


class Latency(Contract):
    """Host wall time of one call, device idle to device idle."""

    latency_ms_p50: Positive
    latency_ms_p20: Positive
    latency_ms_p80: Positive
    num_samples: Count
    latency_ms_quantiles: tuple[Positive, ...] = ()
    """0%, 5%, ... 100% of the samples: their distribution. Empty in records from before it was kept."""
    device_ms_p50: Positive | None = None
    """Device span of one call (first kernel start to last kernel end), on CUDA."""


class Ratio(Contract):
    """A paired ratio with its bootstrap interval."""

    median: Positive
    low: Positive
    high: Positive
    confidence_level: Share = 0.95


class Equivalence(Contract):
    """Whether a candidate computes the same function as the baseline."""

    is_equivalent: bool
    match_share: Share
    """Smallest share over the seeds of elements with |out - ref| <= atol + rtol * |ref|, atol = rtol * RMS(ref)."""
    required_share: Share
    rtol: Positive
    num_seeds: Count
    num_elements: Count
    max_abs_error: NonNegative | None
    error_vs_fp64: NonNegative | None
    """RMS error over RMS(oracle), worst seed."""
    baseline_error_vs_fp64: NonNegative | None
    error_ratio: NonNegative | None
    """error_vs_fp64 over the baseline's own; at most MAX_ERROR_RATIO on the exact track, save for one rounding of few
    values."""
    top1_agreement: Share | None = None
    """Language models: share of positions where the most likely token is the same."""
    are_inputs_unchanged: bool = True
    """The candidate mutates exactly what the baseline mutates."""
    problems: tuple[str, ...] = ()
    """Each reason why it is not equivalent, in words."""
    oracle_note: str | None = None


class Comparison(Contract):
    """Baseline against candidate, interleaved in one process."""

    workload: str
    baseline: str
    candidate: str
    baseline_latency: Latency
    candidate_latency: Latency
    speedup: Ratio
    """baseline / candidate: above 1 is better."""
    noise: Ratio
    """The same ratio of the baseline with itself, interleaved the same way (A/A)."""
    baseline_items_per_second: Positive
    candidate_items_per_second: Positive
    item_unit: str
    equivalence: Equivalence
    verdict: Verdict
    precision_track: Literal["exact", "relaxed"] = "exact"
    floor_ms: NonNegative | None = None
    """Least time that the device's measured peaks allow for this work."""
    floor_reason: str | None = None
    seeds: tuple[int, ...] = ()
    schema_version: str = "agnitra.comparison.v1"


class CandidateResult(Contract):
    """One row of the candidate table."""

    name: str
    status: Literal["kept", "rejected", "failed", "skipped"]
    reason: str
    compile_s: NonNegative | None = None
    comparison: Comparison | None = None
