"""The finished run in one record, and its verdict in words."""

from __future__ import annotations

from agnitra_lab.contracts.measurement import Comparison
from agnitra_lab.contracts.report import Report

USUAL_SHARE = 0.999
"""Share of elements that must match where the baseline itself is within tolerance of fp64."""


def headline(comparison: Comparison, winner: str) -> str:
    """State the verdict in one sentence, with its interval. Within noise the answer is "no change"."""
    low, high = comparison.speedup.low, comparison.speedup.high
    if winner != comparison.baseline and comparison.verdict == "faster":
        cut = 1.0 - 1.0 / comparison.speedup.median
        # Below the usual bar eager itself misses it: the fp64 oracle decided, and the sentence says so.
        is_usual = comparison.equivalence.required_share >= USUAL_SHARE
        outputs = "outputs equivalent" if is_usual else f"outputs as close to fp64 as {comparison.baseline}'s"
        return (
            f"{winner} is {comparison.speedup.median:.2f}x as fast as {comparison.baseline} "
            f"(95% interval {low:.2f} to {high:.2f}), {cut:.0%} less latency, {outputs}."
        )
    if comparison.verdict == "faster":
        return (
            f"No change: {comparison.candidate} was faster than {comparison.baseline} in one measurement "
            f"({low:.2f}x to {high:.2f}x), but was not kept."
        )
    if comparison.verdict == "slower":
        return f"No change: every candidate is slower than {comparison.baseline}, which stays as it was."
    if comparison.verdict == "not_equivalent":
        return f"No change: no candidate kept the outputs of {comparison.baseline}, which stays as it was."
    return (
        f"No change: {comparison.candidate} is within measurement noise of {comparison.baseline} "
        f"({low:.2f}x to {high:.2f}x)."
    )


def guidance(report: Report) -> str:
    """Say what to do next, in one or two sentences."""
    if report.winner == report.comparison.baseline:
        return "The original model stays in place: nothing was installed, and no saving or success fee is claimed."
    return (
        f"result.model is the drop-in ({report.winner}). To undo it, result.rollback() restores the original and "
        "proves it bit for bit."
    )
