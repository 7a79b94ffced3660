"""Split a language model's time into prefill and decode, call by call, where the graph tells which is which."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from agnitra_lab.contracts import PhaseTime
from agnitra_lab.graph.semantics import Phase
from agnitra_lab.profiler.event_table import Kind
from agnitra_lab.profiler.markers import RootCall
from agnitra_lab.profiler.places import Attribution


def phase_times(
    attribution: Attribution, roots: Mapping[int, RootCall], phases: Mapping[int, Phase], *, has_device: bool
) -> tuple[PhaseTime, ...]:
    """Sum the calls of each phase over the whole capture.

    Args:
        attribution: the events.
        roots: marker index -> root call.
        phases: marker index of a root call -> its phase.
        has_device: whether self time is the time of the kernels (else CPU self time).

    Returns:
        One row per phase, prefill first. Tokens are those of the first integer input of each call.
    """
    return tuple(
        _phase_time(
            attribution, {index: roots[index] for index in roots if phases.get(index) == phase}, phase, has_device
        )
        for phase in ("prefill", "decode")
        if phase in phases.values()
    )


def _phase_time(attribution: Attribution, calls: Mapping[int, RootCall], phase: Phase, has_device: bool) -> PhaseTime:
    table, nesting = attribution.table, attribution.nesting
    markers = np.flatnonzero((table.kind == Kind.MARKER) & (nesting.root_event == np.arange(len(table))))
    mine = markers[np.isin(nesting.module[markers], list(calls))]
    inside = np.isin(nesting.root_event, mine)
    if has_device:
        latency_ns = int(table.duration_ns[inside & (table.kind == Kind.KERNEL)].sum())
    else:
        latency_ns = int(nesting.self_ns[inside & (table.kind == Kind.OP)].sum())
    wall_ms = int(table.duration_ns[mine].sum()) / 1e6
    counts = np.bincount(nesting.module[mine], minlength=1) if len(mine) else np.zeros(1, np.int64)
    tokens = [_num_tokens(call) for call in calls.values()]
    num_tokens = None
    if all(count is not None for count in tokens):
        num_tokens = sum(
            int(counts[index]) * (count or 0)
            for (index, count) in zip(calls, tokens, strict=True)
            if index < len(counts)
        )
    # On a GPU the host runs ahead of the device; where the device is slower its time is the phase's.
    spent_ms = max(wall_ms, latency_ns / 1e6) if has_device else wall_ms
    return PhaseTime(
        phase=phase,
        num_calls=len(mine),
        wall_ms=wall_ms,
        latency_ms=latency_ns / 1e6,
        num_tokens=num_tokens,
        tokens_per_second=num_tokens / (spent_ms / 1e3) if num_tokens and spent_ms > 0 else None,
    )


def _num_tokens(call: RootCall) -> int | None:
    given = [*call.args, *call.kwargs.values()]
    for value in given:
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and 1 <= value.ndim <= 2:
            return value.numel()
    return None
