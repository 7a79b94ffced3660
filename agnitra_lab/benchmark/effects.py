"""What calls leave behind: inputs and module state after the candidate's call against what the baseline leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agnitra_lab.benchmark.elements import match, rtol_of
from agnitra_lab.benchmark.state import difference_mask, same_values

_LEAST_UNIT = 1e-30


@dataclass(frozen=True)
class Written:
    """The elements of one state tensor that either side writes: the candidate's, the baseline's, the fp64 oracle's."""

    name: str
    after: torch.Tensor
    wanted: torch.Tensor
    truth: torch.Tensor | None


def effect_differs(before: torch.Tensor, after: torch.Tensor, wanted: torch.Tensor, least_rtol: float) -> bool:
    """Say whether an input is left different: bit for bit where neither side writes, else by the tolerance."""
    entry = written_part("", before, after, wanted, None)
    if entry is None:
        return True
    return state_problem([entry], least_rtol=least_rtol, required_share=0.999) is not None


def written_part(
    name: str, before: torch.Tensor, after: torch.Tensor, wanted: torch.Tensor, truth: torch.Tensor | None
) -> Written | None:
    """Return the elements that calls write; None when a shape differs."""
    if after.shape != before.shape or wanted.shape != before.shape:
        return None
    # Either side's writes: a written value equals the one before it now and then (in bf16 in about one of 300 elements
    # of a KV cache slot), and always where the state already holds what these inputs give.
    is_written = difference_mask(wanted, before) | difference_mask(after, before)
    has_truth = truth is not None and truth.shape == is_written.shape
    return Written(
        name, after[is_written], wanted[is_written], truth[is_written] if truth is not None and has_truth else None
    )


def state_problem(written: Sequence[Written], *, least_rtol: float, required_share: float) -> str | None:
    """Hold everything that a call wrote against the baseline, by the rule of the outputs (`elements.match`).

    All floating state is one sample, each tensor in units of its own RMS: one slot of a KV cache has a few hundred
    elements, too few for a share of 99.9%. Integers and booleans must be equal.

    Returns:
        The problem in words, or None.
    """
    for entry in written:
        if not entry.wanted.is_floating_point() and not same_values(entry.after, entry.wanted):
            return f"state {entry.name} is left different from what the baseline leaves"
    floats = [entry for entry in written if entry.wanted.is_floating_point() and entry.wanted.numel()]
    if not floats:
        return None
    units = [1.0 / max(float(entry.wanted.double().square().mean().sqrt()), _LEAST_UNIT) for entry in floats]
    after = torch.cat([entry.after.double() * unit for entry, unit in zip(floats, units, strict=True)])
    wanted = torch.cat([entry.wanted.double() * unit for entry, unit in zip(floats, units, strict=True)])
    truths = [entry.truth.double() * unit for entry, unit in zip(floats, units, strict=True) if entry.truth is not None]
    truth = torch.cat(truths) if len(truths) == len(floats) else None
    rtol = max(least_rtol, *(rtol_of(entry.wanted.dtype) for entry in floats))
    leaf = match(after, wanted, truth, rtol=rtol, required_share=required_share)
    if leaf.problem is None and leaf.share >= leaf.required_share:
        return None
    names = ", ".join(entry.name for entry in floats[:3]) + (", ..." if len(floats) > 3 else "")
    share = f"{leaf.share:.4%} of elements match, {leaf.required_share:.4%} must"
    return f"state {names} is left different from what the baseline leaves: {leaf.problem or share}"
