"""Baseline against candidate on one workload: equivalence first, then interleaved timing, then the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from agnitra_lab.benchmark import stats
from agnitra_lab.benchmark.equivalence import Verified, verify
from agnitra_lab.benchmark.inputs import FreshInputs
from agnitra_lab.benchmark.outputs import fingerprints_match
from agnitra_lab.benchmark.reference import PrecisionTrack, Reference
from agnitra_lab.benchmark.state import ModuleState, module_of
from agnitra_lab.benchmark.timing import PairTimings, Side, time_pair
from agnitra_lab.contracts.device import DevicePeaks
from agnitra_lab.contracts.measurement import Comparison, Equivalence, Latency
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.device.info import device_of
from agnitra_lab.errors import PatchError
from agnitra_lab.graph.tree import untouched

_SHORT_BUDGET_S, _SHORT_PAIRS = 0.5, 4
# Share of the timing's budget that may go into drawing inputs.
DRAW_SHARE = 0.3
# Share of the floor under which a time is a bug. A CPU's caches hold whole models, and its measured copy bandwidth
# depends on who else uses the machine, so there only the absurd is refused.
_FLOOR_SHARE = {"cuda": 0.95, "cpu": 0.2}


def compare(
    workload: Workload,
    candidate: Callable[..., Any],
    *,
    candidate_name: str,
    baseline: Callable[..., Any] | None = None,
    baseline_name: str = "eager",
    budget_s: float = 6.0,
    seeds: tuple[int, ...] = (0, 1, 2),
    peaks: DevicePeaks | None = None,
    floor_ms: float | None = None,
    precision_track: PrecisionTrack = "exact",
    reference: Reference | None = None,
    is_brief: bool = False,
) -> Comparison:
    """Compare a candidate with the baseline.

    Args:
        workload: model, inputs and what one call stands for.
        candidate: takes the workload's inputs.
        candidate_name: for the record.
        baseline: what to compare with; the workload's model by default.
        baseline_name: for the record.
        budget_s: time for the timing loop; the equivalence check comes on top.
        seeds: of the inputs that are checked; the timed calls go on with inputs that no call has seen.
        peaks, floor_ms: measured ceilings, and the least time that the matrix peak allows for this work's FLOPs; not
            believed where the baseline itself is faster.
        precision_track: "exact", or "relaxed" when low precision was asked for by name.
        reference: the baseline's answers from earlier comparisons of this workload, as in `verify`.
        is_brief: end the timing where more of it would change no decision, as in `time_pair`.

    Returns:
        The comparison. A candidate that computes something else is timed in a short loop only, for the record.

    Raises:
        PatchError, UsageError: when the candidate, or the baseline, raises on the workload's inputs.
    """
    known = reference or Reference(workload, baseline, precision_track=precision_track)
    with untouched((workload.args, workload.kwargs)):
        verified = verify(workload, candidate, seeds=seeds, reference=known)
        inputs = FreshInputs(workload, seeds, draw_budget_s=DRAW_SHARE * budget_s, is_fresh=verified.agrees_by_prints)
        timings = _time(workload, candidate, known.baseline, verified, inputs, budget_s, candidate_name, is_brief)
    least_ms = floor_ms * _FLOOR_SHARE[_device_type(workload)] if floor_ms is not None else 0.0
    if stats.latency(timings.baseline_ms).latency_ms_p50 < least_ms:
        floor_ms = None  # the ceiling was measured while others had the machine: every candidate would be too fast
    problems = timed_problems(verified, timings.prints, inputs, "candidate", "baseline")
    problems += _floor_problems(timings, floor_ms, least_ms)
    equivalence = with_problems(verified.equivalence, problems)
    return _comparison(
        workload,
        (candidate_name, baseline_name),
        timings,
        equivalence,
        seeds,
        precision_track=precision_track,
        floor_ms=floor_ms,
        floor_reason=_floor_text(peaks) if floor_ms is not None else None,
    )


def head_to_head(
    workload: Workload,
    candidate: Callable[..., Any],
    baseline: Callable[..., Any],
    *,
    candidate_name: str,
    baseline_name: str,
    equivalence: Equivalence,
    budget_s: float = 6.0,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> Comparison:
    """Time two candidates against each other that were both verified against eager.

    Args:
        workload: model, inputs and what one call stands for.
        candidate, baseline: take the workload's inputs.
        candidate_name, baseline_name: for the record.
        equivalence: the candidate's, against eager: two roundings of one function differ by more than either from the
            truth, so holding them against each other would prove nothing.
        budget_s: time for the timing loop.
        seeds: of the first inputs.
    """
    state = ModuleState(module_of(workload.model))
    with untouched((workload.args, workload.kwargs)):
        timings = time_pair(
            baseline, candidate, FreshInputs(workload, seeds, draw_budget_s=DRAW_SHARE * budget_s),
            device=device_of(module_of(workload.model), workload.args, workload.kwargs), budget_s=budget_s,
            reset=lambda side: state.restore(),
        )  # fmt: skip
    state.restore()
    names = (candidate_name, baseline_name)
    return _comparison(workload, names, timings, equivalence, seeds)


def _comparison(
    workload: Workload,
    names: tuple[str, str],
    timings: PairTimings,
    equivalence: Equivalence,
    seeds: tuple[int, ...],
    **facts: Any,
) -> Comparison:
    speedup = stats.paired_ratio(timings.baseline_ms, timings.candidate_ms)
    noise = stats.chained_ratio(timings.baseline_ms)
    baseline_latency = stats.latency(timings.baseline_ms, timings.baseline_device_ms)
    candidate_latency = stats.latency(timings.candidate_ms, timings.candidate_device_ms)
    return Comparison(
        workload=workload.name,
        candidate=names[0],
        baseline=names[1],
        baseline_latency=baseline_latency,
        candidate_latency=candidate_latency,
        speedup=speedup,
        noise=noise,
        baseline_items_per_second=_items_per_second(workload, baseline_latency),
        candidate_items_per_second=_items_per_second(workload, candidate_latency),
        item_unit=workload.item_unit,
        equivalence=equivalence,
        verdict=stats.verdict(speedup, noise, equivalence),
        seeds=tuple(seeds),
        **facts,
    )


def _time(
    workload: Workload,
    candidate: Callable[..., Any],
    baseline: Callable[..., Any],
    verified: Verified,
    inputs: FreshInputs,
    budget_s: float,
    candidate_name: str,
    is_brief: bool,
) -> PairTimings:
    if not verified.is_runnable:
        raise PatchError(f"Candidate {candidate_name!r} does not run: {verified.equivalence.problems[-1]}.")
    states = {"baseline": verified.baseline_state, "candidate": verified.candidate_state}

    def reset(side: Side) -> None:
        states[side].restore()

    is_equivalent = verified.equivalence.is_equivalent
    try:
        return time_pair(
            baseline,
            candidate,
            inputs,
            device=device_of(module_of(workload.model), workload.args, workload.kwargs),
            budget_s=budget_s if is_equivalent else min(budget_s, _SHORT_BUDGET_S),
            min_pairs=12 if is_equivalent else _SHORT_PAIRS,
            reset=reset,
            is_brief=is_brief,
        )
    except Exception as error:
        raise PatchError(
            f"Candidate {candidate_name!r} passed the check and raised while it was timed ({error})."
        ) from error
    finally:
        for state in states.values():
            state.put_back()


def timed_problems(
    verified: Verified,
    prints: Sequence[tuple[str, int, list[torch.Tensor]]],
    inputs: FreshInputs,
    candidate: str | Sequence[str],
    baseline: str,
) -> list[str]:
    """Hold each timed output of the candidate against its verified one, or the baseline's on the same fresh inputs.

    Args:
        verified: the check of the candidate.
        prints: (side, round, fingerprint) of all timed calls.
        inputs: of the rounds.
        candidate: name of its side, or names where it took part more than once.
        baseline: name of the baseline's side.
    """
    mine = (candidate,) if isinstance(candidate, str) else tuple(candidate)
    wanted = {index: timed for side, index, timed in prints if side == baseline}
    wanted |= {
        index: verified.candidate_prints[inputs.seed(index)]
        for _, index, _ in prints
        if inputs.seed(index) in verified.candidate_prints
    }
    timed = [(index, timed) for side, index, timed in prints if side in mine]
    num_wrong = sum(not fingerprints_match(found, wanted[index], verified.rtols) for index, found in timed)
    return [f"timed outputs differ from the verified ones in {num_wrong} of {len(timed)} calls"] if num_wrong else []


def _items_per_second(workload: Workload, latency: Latency) -> float:
    return workload.items_per_call / latency.latency_ms_p50 * 1e3


def _device_type(workload: Workload) -> str:
    return device_of(module_of(workload.model), workload.args, workload.kwargs).type


def _floor_problems(timings: PairTimings, floor_ms: float | None, least_ms: float) -> list[str]:
    latency_ms = stats.latency(timings.candidate_ms).latency_ms_p50
    if floor_ms is None or latency_ms >= least_ms:
        return []
    figures = f"{latency_ms:.4g} ms, floor {floor_ms:.4g} ms"
    return [f"faster than the device allows: measurement or candidate is wrong ({figures})"]


def with_problems(equivalence: Equivalence, problems: list[str]) -> Equivalence:
    """Return the equivalence with further reasons against it, as it is where there are none."""
    if not problems:
        return equivalence
    return equivalence.model_copy(update={"is_equivalent": False, "problems": equivalence.problems + tuple(problems)})


def _floor_text(peaks: DevicePeaks | None) -> str:
    if peaks is None or peaks.gemm_tflop_per_s is None:
        return "FLOPs over the peak of the matrix product"
    return f"FLOPs over the measured peak of {peaks.gemm_tflop_per_s:.3g} TFLOP/s in {peaks.gemm_dtype}"
