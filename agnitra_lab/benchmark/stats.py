"""Statistics of paired timings: medians, a bootstrap interval of the paired ratio, and the verdict."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from agnitra_lab.contracts.measurement import Equivalence, Latency, Ratio, Verdict

NUM_RESAMPLES = 2000
_QUANTILES_PERCENT = tuple(range(0, 101, 5))


def latency(samples_ms: ArrayLike, device_ms: ArrayLike | None = None) -> Latency:
    """Summarise the samples of one callable.

    Args:
        samples_ms: host wall times of single calls, in ms, at least one.
        device_ms: device spans of single calls, in ms.
    """
    samples = np.asarray(samples_ms, dtype=np.float64)
    p20, p50, p80 = (float(value) for value in np.percentile(samples, (20, 50, 80)))
    return Latency(
        latency_ms_p50=p50,
        latency_ms_p20=p20,
        latency_ms_p80=p80,
        num_samples=samples.size,
        latency_ms_quantiles=tuple(float(value) for value in np.percentile(samples, _QUANTILES_PERCENT)),
        device_ms_p50=float(np.median(np.asarray(device_ms))) if device_ms is not None else None,
    )


def paired_ratio(
    numerator: ArrayLike, denominator: ArrayLike, *, seed: int = 0, confidence_level: float = 0.95
) -> Ratio:
    """Estimate the median ratio of two paired samples.

    Args:
        numerator: positive values; element i was measured next to element i of `denominator`.
        denominator: positive values, as many.
        seed: of the resampling, so that equal timings give equal intervals.
        confidence_level: of the interval, in (0, 1).

    Returns:
        exp of the median log ratio, and its percentile bootstrap interval from 2000 resamples of the pairs. Pairs
        cancel drift that both calls share; logs make a ratio and its inverse alike.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """
    log_ratios = np.log(np.asarray(numerator, dtype=np.float64)) - np.log(np.asarray(denominator, dtype=np.float64))
    generator = np.random.default_rng(seed)
    picks = generator.integers(log_ratios.size, size=(NUM_RESAMPLES, log_ratios.size))
    medians = np.median(log_ratios[picks], axis=1)
    tail = (1.0 - confidence_level) / 2.0
    low, high = np.quantile(medians, (tail, 1.0 - tail))
    # The interval of few pairs can lie a rounding error to one side of its own median.
    median = float(np.median(log_ratios))
    return Ratio(
        median=float(np.exp(median)),
        low=float(np.exp(min(float(low), median))),
        high=float(np.exp(max(float(high), median))),
        confidence_level=confidence_level,
    )


def verdict(speedup: Ratio, noise: Ratio, equivalence: Equivalence) -> Verdict:
    """Judge a candidate.

    Args:
        speedup: baseline over candidate.
        noise: baseline over itself, measured in the same loop.
        equivalence: a candidate that computes something else is neither faster nor slower.

    Returns:
        "faster" only when the whole interval of the speedup lies above 1 and above the interval that the baseline
        reaches against itself; "slower" is its mirror; "no_change" is everything between.
    """
    if not equivalence.is_equivalent:
        return "not_equivalent"
    if speedup.low > max(1.0, noise.high):
        return "faster"
    if speedup.high < min(1.0, noise.low):
        return "slower"
    return "no_change"


def chained_ratio(samples_ms: ArrayLike, *, seed: int = 0) -> Ratio:
    """Estimate the noise floor: each call of the baseline against its next call in the same loop (A/A).

    Args:
        samples_ms: wall times of the baseline in the order in which they were taken, at least two.
        seed: of the resampling.
    """
    samples = np.asarray(samples_ms, dtype=np.float64)
    return paired_ratio(samples[:-1], samples[1:], seed=seed)
