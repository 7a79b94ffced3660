"""What calls leave behind: inputs and module state after the candidate's call against what the baseline leaves."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agnitra_lab.benchmark.elements import LeafMatch, match, rtol_of
from agnitra_lab.benchmark.state import ModuleState, difference_mask, same_values
from agnitra_lab.contracts.workload import Inputs

_LEAST_UNIT = 1e-30
# Rounding by truncation doubles the error; that of a few correlated elements scatters by less than this.
_MAX_STATE_ERROR_RATIO, _MIN_STATE_ELEMENTS = 1.6, 256
# Misses of one tensor beyond the share, in standard deviations: a cache slot has a few hundred elements, and a decoder
# some hundred of them to judge.
_SHARE_DEVIATIONS = 4.0
# A double-precision copy this far from the baseline computes something else.
_TRUTH_NONSENSE = 0.5

# What the clock, the waits, the random inputs and the comparisons stand on.
_TRUSTED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (time, ("perf_counter", "perf_counter_ns", "time", "monotonic", "monotonic_ns")),
    (gc, ("collect", "disable", "enable")),
    (torch, ("manual_seed", "randn", "randint", "randperm", "isfinite", "where", "cat", "full_like", "as_strided")),
    (torch.random, ("manual_seed", "fork_rng")),
    (torch.Tensor, ("clone", "copy_", "double", "float", "abs", "all", "sum", "eq", "ne", "le", "__eq__", "__ne__",
                    "__le__", "__and__", "__or__", "__invert__", "isnan", "square", "max")),
    (torch.cuda, ("synchronize", "Event", "Stream", "_sleep", "manual_seed_all")),
    (torch.cuda.Event, ("record", "elapsed_time", "synchronize", "query")),
)  # fmt: skip
# Taken at import, before any candidate runs.
_known = {(owner, name): getattr(owner, name) for owner, names in _TRUSTED for name in names if hasattr(owner, name)}
_TORCH_FOLDER = str(Path(torch.__file__).parent)


def put_back_functions() -> list[str]:
    """Put functions back that someone replaced since import and that checks and timings stand on; name them.

    Dynamo wraps some of torch's functions itself when it is first used; what torch's own files define stays.
    """
    replaced = []
    for (owner, name), original in _known.items():
        found = getattr(owner, name, None)
        if found is original:
            continue
        if _is_of_torch(found):
            _known[owner, name] = found
        else:
            setattr(owner, name, original)
            replaced.append(f"{owner.__name__}.{name}")
    return replaced


def _is_of_torch(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_TORCH_FOLDER)


@dataclass(frozen=True)
class Written:
    """The elements of a state tensor or an input that either side writes: as each leaves them, and the fp64 oracle."""

    name: str
    after: torch.Tensor
    wanted: torch.Tensor
    truth: torch.Tensor | None


def written_part(
    name: str, before: torch.Tensor, after: torch.Tensor, wanted: torch.Tensor, truth: torch.Tensor | None
) -> Written | None:
    """Return the elements that calls write, all of them where both sides leave a tensor of another shape (a cache that
    grows); None when their shapes differ."""
    if after.shape != wanted.shape:
        return None
    if wanted.shape != before.shape:
        return Written(name, after, wanted, truth if truth is not None and truth.shape == wanted.shape else None)
    # Either side's writes: a written value equals the one before it now and then (in bf16 in about one of 300 elements
    # of a KV cache slot), and always where the state already holds what these inputs give.
    is_written = difference_mask(wanted, before) | difference_mask(after, before)
    has_truth = truth is not None and truth.shape == is_written.shape
    return Written(
        name, after[is_written], wanted[is_written], truth[is_written] if truth is not None and has_truth else None
    )


def is_untouched(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Say whether a call left a tensor as it was, bit for bit."""
    return before.shape == after.shape and same_values(before, after)


def stray_mask(before: torch.Tensor, after: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return where only the candidate changed a state tensor, by more than the rounding of an update.

    A running mean that has converged rounds back to itself in one order of operations and to its neighbour in another.
    Of a tensor that the baseline leaves as it was, every change counts.
    """
    is_stray = difference_mask(after, before) & ~difference_mask(wanted, before)
    if not before.is_floating_point() or is_untouched(before, wanted):
        return is_stray
    step = torch.finfo(before.dtype).eps * before.double().abs()
    return is_stray & ~((after.double() - before.double()).abs() <= step)


def written_elements(
    function: Callable[..., Any], inputs: Inputs, state: ModuleState, asked: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Find which of some state elements a call writes: call it with their lowest bits flipped.

    They are elements that the call leaves as they were before: it either does not write them, and they stay flipped, or
    writes what was there, which the flipped value is not. Only they are flipped, so that a call which writes a cache
    before it reads it computes the same as without.

    Args:
        function: is called once.
        inputs: of that call, which may overwrite them.
        state: of the function's module; restored before, left written after.
        asked: name of a floating state tensor -> which of its elements.

    Returns:
        name -> mask; names whose tensor the call replaced by one of another shape are left out.
    """
    state.restore()
    flipped = state.flip_lowest_bits(asked)
    args, kwargs = inputs
    with torch.no_grad():
        function(*args, **kwargs)
    masks = {}
    for name, before in flipped.items():
        after = state.tensor(name)
        if after is not None and after.shape == before.shape:
            masks[name] = difference_mask(after, before)
    return masks


def state_problem(written: Sequence[Written], *, least_rtol: float, required_share: float) -> str | None:
    """Hold everything that a call wrote against the baseline, by the rule of the outputs (`elements.match`).

    Each floating tensor is judged alone, with the misses that chance gives a small sample (one slot of a KV cache has
    a few hundred elements, too few for a share of 99.9%), and all of them as one sample, each in units of its own RMS,
    by the share itself and by the error against fp64. Integers and booleans must be equal.

    Returns:
        The problem in words, or None.
    """
    for entry in written:
        if not entry.wanted.is_floating_point() and not same_values(entry.after, entry.wanted):
            return f"{entry.name} is left different from what the baseline leaves"
    floats = [entry for entry in written if entry.wanted.is_floating_point() and entry.wanted.numel()]
    if not floats:
        return None
    for entry in floats:
        rtol = max(least_rtol, rtol_of(entry.wanted.dtype))
        leaf = match(entry.after, entry.wanted, entry.truth, rtol=rtol, required_share=required_share)
        if reason := _reason(leaf, _share_by_chance(leaf)):
            return f"{entry.name} is left different from what the baseline leaves: {reason}"
    leaf = _match_together(floats, least_rtol, required_share)
    reason = _reason(leaf, leaf.required_share) or _error_problem(leaf)
    if reason is None:
        return None
    names = ", ".join(entry.name for entry in floats[:3]) + (", ..." if len(floats) > 3 else "")
    return f"{names} is left different from what the baseline leaves: {reason}"


def _match_together(floats: Sequence[Written], least_rtol: float, required_share: float) -> LeafMatch:
    units = [1.0 / max(float(entry.wanted.double().square().mean().sqrt()), _LEAST_UNIT) for entry in floats]
    after = torch.cat([entry.after.double() * unit for entry, unit in zip(floats, units, strict=True)])
    wanted = torch.cat([entry.wanted.double() * unit for entry, unit in zip(floats, units, strict=True)])
    truths = [entry.truth.double() * unit for entry, unit in zip(floats, units, strict=True) if entry.truth is not None]
    truth = torch.cat(truths) if len(truths) == len(floats) else None
    rtol = max(least_rtol, *(rtol_of(entry.wanted.dtype) for entry in floats))
    return match(after, wanted, truth, rtol=rtol, required_share=required_share)


def _reason(leaf: LeafMatch, required_share: float) -> str | None:
    if leaf.problem is None and leaf.share >= required_share:
        return None
    return leaf.problem or f"{leaf.share:.4%} of elements match, {required_share:.4%} must"


def _share_by_chance(leaf: LeafMatch) -> float:
    miss_share = 1.0 - leaf.required_share
    return leaf.required_share - _SHARE_DEVIATIONS * (miss_share / max(leaf.num_elements, 1)) ** 0.5


def _error_problem(leaf: LeafMatch) -> str | None:
    if leaf.error is None or leaf.baseline_error is None or leaf.num_elements < _MIN_STATE_ELEMENTS:
        return None
    # A baseline that writes without any rounding (a plain copy) leaves nothing to take a ratio of.
    if not 0.0 < leaf.baseline_error <= _TRUTH_NONSENSE or leaf.error <= _MAX_STATE_ERROR_RATIO * leaf.baseline_error:
        return None
    return f"its error against fp64 is {leaf.error:.3g}, the baseline's {leaf.baseline_error:.3g}"
