"""Which candidate is kept: the fastest that is proved faster and equivalent; otherwise the baseline stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agnitra_lab.contracts.measurement import MAX_ERROR_RATIO, CandidateResult, Comparison, Latency, Ratio
from agnitra_lab.errors import AgnitraError

# Two first measurements share no moment in time: what clocks drift in between is left as a margin.
_CLEAR_LEAD = 1.1
_LONGER = 4.0
# A median that is worth a longer look. On two CPU cores two seconds of timing gave 1.11 with an interval from 0.59 to
# 1.28, and torch.compile, 1.11 times as fast in twelve seconds, was not kept.
_WORTH_A_LOOK = 1.03


def judge(name: str, comparison: Comparison, compile_s: float | None) -> CandidateResult:
    """Turn a comparison with the baseline into a row of the candidate table; "kept" here means eligible."""
    speedup, noise = _interval(comparison.speedup), comparison.noise
    if comparison.verdict == "faster":
        return CandidateResult(
            name=name, status="kept", reason=f"faster: {speedup}", compile_s=compile_s, comparison=comparison
        )
    reason = {
        "no_change": f"no change: {speedup}; {comparison.baseline} against itself [{noise.low:.3f}, {noise.high:.3f}]",
        "slower": f"slower than {comparison.baseline}: {speedup}",
        "not_equivalent": "not equivalent: " + "; ".join(comparison.equivalence.problems[:3]),
    }[comparison.verdict]
    return CandidateResult(name=name, status="rejected", reason=reason, compile_s=compile_s, comparison=comparison)


def ranking(results: Sequence[CandidateResult]) -> list[CandidateResult]:
    """Return the eligible results, the best first: by their speed-up, on an accelerator by their own time.

    Where the baseline waits for its host (31 ms of eager decoding for 1.1 ms of work), anything else on that host makes
    it slower for a minute, and every ratio to it larger. A candidate that keeps the device busy hardly notices. On a
    CPU both slow down alike, and the ratio is what stays.
    """
    eligible = [result for result in results if result.status == "kept" and result.comparison is not None]
    if all(_has_device(result) for result in eligible):
        return sorted(eligible, key=lambda result: _latency(result).latency_ms_p50)
    return sorted(eligible, key=speedup_of, reverse=True)


def contenders(results: Sequence[CandidateResult]) -> list[CandidateResult]:
    """Return what is worth a longer measurement, the best first: the eligible, else what a short one could not decide.

    On a busy machine the baseline against itself spreads so far in a second that nothing is proved faster. Equivalent
    candidates whose median is above 1 by more than a little are then asked again, for longer; they win only if that
    proves it. Beside eligible ones that is worth it for those that were faster than all of them by their own times on a
    device: an eager baseline of 12 ms that wavered between half and four times that hid a lead of 13%.
    """
    found = ranking(results)
    undecided = sorted(filter(is_undecided, results), key=speedup_of, reverse=True)
    if not found:
        return undecided
    return [*(result for result in undecided if _is_ahead(result, found[0])), *found]


def is_clear(first: CandidateResult, second: CandidateResult, by: float = _CLEAR_LEAD) -> bool:
    """Say whether one result leads by so much that no other moment in time would turn the order around.

    Args:
        first, second: the one that leads, and the other.
        by: times that their intervals have to lie apart.
    """
    if first.comparison is None or second.comparison is None:
        return False
    if _has_device(first) and _has_device(second):
        return by * _latency(first).latency_ms_p80 < _latency(second).latency_ms_p20
    return first.comparison.speedup.low > by * second.comparison.speedup.high


def lead(first: CandidateResult, second: CandidateResult) -> float:
    """Return how many times the first one's time the second takes, told as `ranking` does; both were compared."""
    if _has_device(first) and _has_device(second):
        return _latency(second).latency_ms_p50 / _latency(first).latency_ms_p50
    return speedup_of(first) / speedup_of(second)


def after(final: Comparison, ranked: Sequence[CandidateResult]) -> list[CandidateResult]:
    """Return the ranking with its two first turned around where the second is faster head to head, by the median.

    No proof is asked for: both are, or may be, faster than the baseline, and one of them is kept.
    """
    first, second, *others = ranked
    return [second, first, *others] if final.speedup.median < 1 else list(ranked)


def confirm(
    results: Sequence[CandidateResult], names: Sequence[str], measure: Callable[[str, float], CandidateResult]
) -> tuple[list[CandidateResult], CandidateResult | None]:
    """Measure candidates again, for longer, until one is proved faster: one that is not makes way for the next.

    Args:
        results: every row.
        names: of the candidates, the best first.
        measure: (name, times the usual time) -> its new row; what the first cannot decide gets four times as long.

    Returns:
        The rows, with the new ones in place; and the one that was proved, None where none was.
    """
    rows = list(results)
    for name in names:
        again = measure(name, 1.0)
        if is_undecided(again):
            again = measure(name, _LONGER)
        rows = [again if row.name == name else row for row in rows]
        if again.status == "kept":
            return rows, again
    return rows, None


def pass_over(
    results: Sequence[CandidateResult], winner: CandidateResult | None, final: Comparison | None
) -> list[CandidateResult]:
    """Keep the winner only, if any: every other eligible row becomes rejected, with the reason that was measured.

    Args:
        results: every row.
        winner: the kept one, None when there is none.
        final: the finalists head to head, None when there was one finalist.
    """
    rows = []
    for result in results:
        if result.status == "kept" and (winner is None or result.name != winner.name):
            why = f"{winner.name} was chosen" if winner is not None else "faster ones were not confirmed"
            reason = f"{result.reason}; {why}"
            if final is not None and result.name in (final.baseline, final.candidate):
                reason += f", head to head {final.candidate} over {final.baseline} {_interval(final.speedup)}"
            result = result.model_copy(update={"status": "rejected", "reason": reason})
        rows.append(result)
    return rows


def _is_ahead(result: CandidateResult, best: CandidateResult) -> bool:
    if not (_has_device(result) and _has_device(best)):
        return False
    return _WORTH_A_LOOK * _latency(result).latency_ms_p50 < _latency(best).latency_ms_p50


def best_attempt(results: Sequence[CandidateResult]) -> Comparison:
    """Return the comparison to show where no candidate is kept: the fastest of the equivalent ones, if any.

    Raises:
        AgnitraError: when none was compared, with every reason.
    """
    compared = [result.comparison for result in results if result.comparison is not None]
    if not compared:
        reasons = "; ".join(f"{result.name}: {result.reason}" for result in results)
        raise AgnitraError(
            f"No candidate could be compared. {reasons}", hint="Raise --budget, or see the reasons above."
        )
    honest = [comparison for comparison in compared if comparison.verdict != "not_equivalent"]
    return max(honest or compared, key=lambda comparison: comparison.speedup.median)


def _interval(ratio: Ratio) -> str:
    return f"{ratio.median:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}]"


def is_undecided(result: CandidateResult) -> bool:
    """Say whether a candidate may be faster, and the noise was too large to tell."""
    compared = result.comparison
    return compared is not None and compared.verdict == "no_change" and compared.speedup.median > _WORTH_A_LOOK


def is_inexact(result: CandidateResult) -> bool:
    """Say whether a candidate does what the baseline does, with too large an error."""
    checked = result.comparison.equivalence if result.comparison else None
    if checked is None or checked.is_equivalent or not checked.are_inputs_unchanged:
        return False
    return checked.error_ratio is not None and checked.error_ratio > MAX_ERROR_RATIO


def speedup_of(result: CandidateResult) -> float:
    """Return the paired speed-up over the baseline, 0 where none was measured."""
    return result.comparison.speedup.median if result.comparison else 0.0


def _latency(result: CandidateResult) -> Latency:
    assert result.comparison is not None
    return result.comparison.candidate_latency


def _has_device(result: CandidateResult) -> bool:
    return _latency(result).device_ms_p50 is not None
