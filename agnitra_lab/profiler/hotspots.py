"""Sum equal places of numbered layers: a model of 22 layers spends its time in one place 22 times over."""

from __future__ import annotations

import re
from collections.abc import Sequence

from agnitra_lab.contracts import Hotspot, KernelEvent, OpEvent

MAX_HOTSPOTS = 100
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_OWNERS = {"param_grad": "parameter gradients", "outside_graph": "outside the graph", None: "residual"}


def hotspots(ops: Sequence[OpEvent], kernels: Sequence[KernelEvent]) -> tuple[Hotspot, ...]:
    """Sum rows over the numbers in their module paths.

    Args:
        ops: the whole op table.
        kernels: the whole kernel table; empty on a CPU.

    Returns:
        The largest sums by place, op and kernel, of one call. They add up to the self time of the profile, but for
        what lies beyond the first hundred.
    """
    total_ms = sum(row.latency_ms for row in ops)
    rows: list[tuple[str, str, str | None, float, int, str | None]]
    if kernels:
        rows = [(place_of(k), k.op or k.kernel, k.kernel, k.device_ms, k.num_launches, k.module_path) for k in kernels]
    else:
        rows = [(place_of(o), o.op, None, o.latency_ms, o.num_calls, o.module_path) for o in ops if o.latency_ms]
    spent: dict[tuple[str, str, str | None], list[float]] = {}
    members: dict[str, set[str | None]] = {}
    for place, op, kernel, time_ms, num_calls, path in rows:
        entry = spent.setdefault((place, op, kernel), [0.0, 0.0])
        entry[0] += time_ms
        entry[1] += num_calls
        members.setdefault(place, set()).add(path)
    ranked = sorted(spent.items(), key=lambda pair: -pair[1][0])[:MAX_HOTSPOTS]
    return tuple(
        Hotspot(
            place=place,
            op=op,
            kernel=kernel,
            latency_ms=time_ms,
            share=min(1.0, time_ms / total_ms) if total_ms else 0.0,
            num_calls=int(num_calls),
            num_places=len(members[place]),
        )
        for (place, op, kernel), (time_ms, num_calls) in ranked
    )


def place_of(row: OpEvent | KernelEvent) -> str:
    """Return where a row belongs: its module with "*" for numbers, else its optimiser or the name of its owner."""
    if row.owner == "optimizer" and row.node is not None:
        return row.node
    if row.owner != "fx_node":
        return _OWNERS.get(row.owner, "residual")
    if row.module_path is None:
        return "compiled graph"
    return _NUMBER.sub("*", row.module_path) or "the root module"
