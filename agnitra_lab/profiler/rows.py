"""Sum attributed events into the rows of the op and kernel tables; the rows sum to the total."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from agnitra_lab.contracts import Bottleneck, KernelEvent, OpEvent
from agnitra_lab.profiler.attribution import Attribution, Method, Place
from agnitra_lab.profiler.event_table import Kind

RowKey = tuple[str, tuple[Method, int, str | None, str | None]]
NodeLabel = Callable[[Place], str | None]


@dataclass
class _Sum:
    op: str
    place: Place
    cpu_ns: int = 0
    device_ns: int = 0
    num_calls: int = 0


@dataclass(frozen=True)
class OpTables:
    """The summed tables of one profile, each sorted by time, largest first.

    Attributes:
        ops: one row per op at a node (or in a module).
        kernels: one row per GPU kernel, launching op and node.
        total_self_ms: what the rows of `ops` sum to; of one call of the target.
        attributed_share: of it, what is tied to graph nodes.
        bottleneck: the largest row, None when nothing ran.
    """

    ops: tuple[OpEvent, ...]
    kernels: tuple[KernelEvent, ...]
    total_self_ms: float
    attributed_share: float | None
    bottleneck: Bottleneck | None


def first_shapes(attribution: Attribution) -> dict[RowKey, tuple[int, ...]]:
    """Return the first recorded input shape of every row of a profile that recorded shapes."""
    shapes: dict[RowKey, tuple[int, ...]] = {}
    table = attribution.table
    for row in np.flatnonzero(table.kind == Kind.OP).tolist():
        if table.shape[row]:
            shapes.setdefault((table.name[row], attribution.places[row].key), table.shape[row])
    return shapes


def sum_rows(
    attribution: Attribution,
    *,
    has_device: bool,
    num_calls: int,
    shapes: Mapping[RowKey, tuple[int, ...]] | None = None,
    label: NodeLabel | None = None,
) -> OpTables:
    """Sum the events of a profile.

    Args:
        attribution: events with their places.
        has_device: whether latency is the time of the kernels (else CPU self time).
        num_calls: how many calls of the target the events stand for; times and counts are per call.
        shapes: a row's shape, from `first_shapes`; without one a row has its node's output shape.
        label: place -> node name to print; the node's own name when left out.

    Returns:
        The tables.
    """
    name_node = label or (lambda place: place.node)
    entries = sorted(_sum_ops(attribution), key=lambda entry: -_latency_ns(entry, has_device))
    total_ns = sum(_latency_ns(entry, has_device) for entry in entries)
    rows = [
        OpEvent(
            op=entry.op,
            latency_ms=_latency_ns(entry, has_device) / num_calls / 1e6,
            cpu_ms=entry.cpu_ns / num_calls / 1e6,
            device_ms=entry.device_ns / num_calls / 1e6 if has_device else None,
            num_calls=max(1, round(entry.num_calls / num_calls)),
            share=_share(_latency_ns(entry, has_device), total_ns),
            shape=_shape(entry, shapes),
            node=name_node(entry.place),
            module_path=entry.place.module_path,
            method=entry.place.method,
        )
        for entry in entries
    ]
    tied_ns = sum(_latency_ns(entry, has_device) for entry in entries if entry.place.method == "fx_node")
    return OpTables(
        ops=tuple(rows),
        kernels=_sum_kernels(attribution, num_calls, name_node),
        total_self_ms=total_ns / num_calls / 1e6,
        attributed_share=_share(tied_ns, total_ns) if total_ns else None,
        bottleneck=_bottleneck(rows[0], entries[0].place) if rows and total_ns else None,
    )


def _sum_ops(attribution: Attribution) -> list[_Sum]:
    table, nesting, places = attribution.table, attribution.nesting, attribution.places
    sums: dict[RowKey, _Sum] = {}

    def entry_of(op: str, place: Place) -> _Sum:
        return sums.setdefault((op, place.key), _Sum(op, place))

    for row in np.flatnonzero(table.kind == Kind.OP).tolist():
        entry = entry_of(table.name[row], places[row])
        entry.cpu_ns += int(nesting.self_ns[row])
        entry.num_calls += 1
    for row in np.flatnonzero(table.kind == Kind.KERNEL).tolist():
        launcher = int(nesting.launcher[row])
        is_op = launcher >= 0 and table.kind[launcher] == Kind.OP
        # A kernel without a launching op (a Triton kernel under a marker, a replayed graph) is a row of its own.
        entry = entry_of(table.name[launcher if is_op else row], places[row])
        entry.device_ns += int(table.duration_ns[row])
        entry.num_calls += 0 if is_op else 1
    return list(sums.values())


def _sum_kernels(attribution: Attribution, num_calls: int, name_node: NodeLabel) -> tuple[KernelEvent, ...]:
    table, nesting, places = attribution.table, attribution.nesting, attribution.places
    sums: dict[tuple[str, str | None, str | None], list[int]] = {}
    for row in np.flatnonzero(table.kind == Kind.KERNEL).tolist():
        launcher = int(nesting.launcher[row])
        op = table.name[launcher] if launcher >= 0 and table.kind[launcher] == Kind.OP else None
        spent = sums.setdefault((table.name[row], op, name_node(places[row])), [0, 0])
        spent[0] += int(table.duration_ns[row])
        spent[1] += 1
    return tuple(
        KernelEvent(
            kernel=kernel,
            device_ms=device_ns / num_calls / 1e6,
            num_launches=max(1, round(num_launches / num_calls)),
            op=op,
            node=node,
        )
        for (kernel, op, node), (device_ns, num_launches) in sorted(sums.items(), key=lambda pair: -pair[1][0])
    )


def _latency_ns(entry: _Sum, has_device: bool) -> int:
    return entry.device_ns if has_device else entry.cpu_ns


def _share(part_ns: int, total_ns: int) -> float:
    return min(1.0, part_ns / total_ns) if total_ns else 0.0


def _shape(entry: _Sum, shapes: Mapping[RowKey, tuple[int, ...]] | None) -> tuple[int, ...]:
    if shapes is not None:
        return shapes.get((entry.op, entry.place.key), ())
    return entry.place.match.node.shape if entry.place.match else ()


def _bottleneck(row: OpEvent, place: Place) -> Bottleneck:
    match = place.match
    return Bottleneck(
        op=row.op,
        latency_ms=row.latency_ms,
        shape=row.shape,
        node=row.node,
        module_path=row.module_path,
        source=match.node.source if match else None,
        share=row.share,
        num_calls=row.num_calls,
        confidence=match.confidence if match else None,
    )
