"""Sum attributed events into the rows of the op, kernel and node tables; the rows of each sum to the total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts import Bottleneck, KernelEvent, OpEvent, OwnerShares
from agnitra_lab.profiler.event_table import Int64, Kind
from agnitra_lab.profiler.places import METHODS, OWNERS, Attribution, Label
from agnitra_lab.profiler.sweep import replayed

RowKey = tuple[str, str | None, str | None]
"""Op, module path and printed node of a row."""


@dataclass(frozen=True)
class Sum:
    """What one group of events has in common, and what it took in all profiled calls.

    Attributes:
        row: one event of the group, for its place.
        op: op or, for a kernel without one, the kernel.
        cpu_ns, device_ns: self time of ops, and of the kernels that they launched.
        num_calls: of the op.
    """

    row: int
    op: str
    cpu_ns: int
    device_ns: int
    num_calls: int


@dataclass(frozen=True)
class OpTables:
    """The summed tables of one profile, each sorted by time, largest first.

    Attributes:
        ops: one row per op at a node (or in a module).
        kernels: one row per GPU kernel, launching op and node.
        total_self_ms: what the rows of `ops` sum to; of one call of the target.
        owners: shares of it by owner, None when nothing ran.
        bottleneck: the largest row, None when nothing ran.
        sums: what the rows of `ops` come from, in the same order.
    """

    ops: tuple[OpEvent, ...]
    kernels: tuple[KernelEvent, ...]
    total_self_ms: float
    owners: OwnerShares | None
    bottleneck: Bottleneck | None
    sums: tuple[Sum, ...]


def first_shapes(attribution: Attribution) -> dict[RowKey, tuple[int, ...]]:
    """Return the first recorded input shape of every row of a profile that recorded shapes."""
    table, places = attribution.table, attribution.places
    shapes: dict[RowKey, tuple[int, ...]] = {}
    for row in np.flatnonzero(table.kind == Kind.OP).tolist():
        shape = next((shape for shape in table.shapes[row] if shape), ())
        if shape:
            key = table.name_of(row), places.module_path(row), places.node_name(row)
            shapes.setdefault(key, shape)
    return shapes


def sum_rows(
    attribution: Attribution,
    *,
    has_device: bool,
    num_calls: int,
    shapes: Mapping[RowKey, tuple[int, ...]] | None = None,
) -> OpTables:
    """Sum the events of a profile.

    Args:
        attribution: events with their places.
        has_device: whether latency is the time of the kernels (else CPU self time).
        num_calls: how many calls of the target the events stand for; times and counts are per call.
        shapes: a row's shape, from `first_shapes`; without one a row has its node's output shape.

    Returns:
        The tables.
    """
    places = attribution.places
    names = _op_names(attribution)
    sums = sorted(_sum_ops(attribution, names), key=lambda entry: -_latency_ns(entry, has_device))
    total_ns = sum(_latency_ns(entry, has_device) for entry in sums)
    rows = []
    for entry in sums:
        latency_ns = _latency_ns(entry, has_device)
        label = _label(attribution, entry.row)
        key = entry.op, places.module_path(entry.row), places.node_name(entry.row)
        owner = places.owner_name(entry.row)
        rows.append(
            OpEvent(
                op=entry.op,
                latency_ms=latency_ns / num_calls / 1e6,
                cpu_ms=entry.cpu_ns / num_calls / 1e6,
                device_ms=entry.device_ns / num_calls / 1e6 if has_device else None,
                num_calls=max(1, round(entry.num_calls / num_calls)),
                share=_share(latency_ns, total_ns),
                shape=shapes.get(key, ()) if shapes is not None else _node_shape(label),
                node=key[2],
                module_path=key[1],
                owner=owner,
                method=places.method_name(entry.row),
                confidence=float(places.confidence[entry.row]) if owner is not None else None,
            )
        )
    return OpTables(
        ops=tuple(rows),
        kernels=_sum_kernels(attribution, names, num_calls),
        total_self_ms=total_ns / num_calls / 1e6,
        owners=_owner_shares(attribution, sums, has_device, total_ns) if total_ns else None,
        bottleneck=_bottleneck(rows[0], _label(attribution, sums[0].row)) if rows and total_ns else None,
        sums=tuple(sums),
    )


@dataclass(frozen=True)
class _OpNames:
    """The op of every op and kernel: an op its own, a kernel that of its launch.

    Attributes:
        names: of ops, and of the ops of labels after them.
        index: into `names`; -1 for a kernel without an op.
        is_launched: kernels that an op on the time line launched.
    """

    names: list[str]
    index: Int64
    is_launched: NDArray[np.bool_]


def _op_names(attribution: Attribution) -> _OpNames:
    table, nesting, places = attribution.table, attribution.nesting, attribution.places
    is_kernel = table.kind == Kind.KERNEL
    launcher = np.maximum(nesting.launcher, 0)
    is_replayed = is_kernel & replayed(table, nesting)
    is_launched = is_kernel & (nesting.launcher >= 0) & (table.kind[launcher] == Kind.OP) & ~is_replayed
    index = np.where(is_launched, table.name[launcher], np.where(is_kernel, -1, table.name)).astype(np.int64)
    # What a replay runs was launched when its graph was captured: the node's own op says by what.
    known = is_replayed & (places.label >= 0)
    index[known] = len(table.names) + places.label[known]
    return _OpNames([*table.names, *map(_label_op, places.labels)], index, is_launched)


def _sum_ops(attribution: Attribution, ops: _OpNames) -> list[Sum]:
    table, nesting, places = attribution.table, attribution.nesting, attribution.places
    is_op = (table.kind == Kind.OP) & ~nesting.is_own
    is_kernel = (table.kind == Kind.KERNEL) & ~nesting.is_own
    # A kernel without an op (a Triton kernel under a marker, an unknown replay) is a row of its own.
    op_name = np.where(ops.index >= 0, ops.index, table.name)
    group, first = places.groups(np.where(is_op | is_kernel, op_name, -1))
    size = len(first)
    cpu_ns = _total(group, np.where(is_op, nesting.self_ns, 0), size)
    device_ns = _total(group, np.where(is_kernel, table.duration_ns, 0), size)
    num_calls = np.bincount(group[is_op | (is_kernel & ~ops.is_launched)], minlength=size)
    wanted = np.unique(group[is_op | is_kernel])
    return [
        Sum(int(first[g]), ops.names[op_name[first[g]]], int(cpu_ns[g]), int(device_ns[g]), int(num_calls[g]))
        for g in wanted.tolist()
    ]


def _label_op(label: Label) -> str:
    return label.op or (label.nodes[-1].op if label.nodes else label.text)


def _total(group: Int64, values: NDArray[Any], size: int) -> Int64:
    # Sums below 2**53 ns (104 days) are exact in the float64 of bincount.
    return np.bincount(group, weights=values, minlength=size).astype(np.int64)


def _sum_kernels(attribution: Attribution, ops: _OpNames, num_calls: int) -> tuple[KernelEvent, ...]:
    table, nesting, places = attribution.table, attribution.nesting, attribution.places
    kernels = np.flatnonzero((table.kind == Kind.KERNEL) & ~nesting.is_own)
    if not len(kernels):
        return ()
    group, first = places.groups(table.name, ops.index, table.kind)
    device_ns = _total(group[kernels], table.duration_ns[kernels], len(first))
    launches = np.bincount(group[kernels], minlength=len(first))
    order = sorted(np.unique(group[kernels]).tolist(), key=lambda g: -int(device_ns[g]))
    return tuple(
        _kernel_event(attribution, ops, int(first[g]), int(device_ns[g]), int(launches[g]), num_calls) for g in order
    )


def _kernel_event(
    attribution: Attribution, ops: _OpNames, row: int, device_ns: int, num_launches: int, num_calls: int
) -> KernelEvent:
    table, places = attribution.table, attribution.places
    op = int(ops.index[row])
    owner = places.owner_name(row)
    return KernelEvent(
        kernel=table.name_of(row),
        device_ms=device_ns / num_calls / 1e6,
        num_launches=max(1, round(num_launches / num_calls)),
        op=ops.names[op] if op >= 0 else None,
        node=places.node_name(row),
        module_path=places.module_path(row),
        owner=owner,
        method=places.method_name(row),
        confidence=float(places.confidence[row]) if owner is not None else None,
    )


def _owner_shares(attribution: Attribution, sums: Sequence[Sum], has_device: bool, total_ns: int) -> OwnerShares:
    places = attribution.places
    spent = dict.fromkeys(range(-1, len(OWNERS)), 0)
    exact_ns, region = 0, METHODS.index("region")
    for entry in sums:
        owner = int(places.owner[entry.row])
        spent[owner] += _latency_ns(entry, has_device)
        # A region as a whole is no set of nodes that something is known to compute.
        if owner == 0 and places.label[entry.row] >= 0 and places.method[entry.row] != region:
            exact_ns += _latency_ns(entry, has_device)
    shares = {name: _share(spent[index], total_ns) for index, name in enumerate(OWNERS)}
    return OwnerShares(**shares, residual=_share(spent[-1], total_ns), exact_node=_share(exact_ns, total_ns))


def _label(attribution: Attribution, row: int) -> Label | None:
    label = int(attribution.places.label[row])
    return attribution.places.labels[label] if label >= 0 else None


def _latency_ns(entry: Sum, has_device: bool) -> int:
    return entry.device_ns if has_device else entry.cpu_ns


def _share(part_ns: int, total_ns: int) -> float:
    return min(1.0, part_ns / total_ns) if total_ns else 0.0


def _node_shape(label: Label | None) -> tuple[int, ...]:
    return label.nodes[-1].shape if label is not None and label.nodes else ()


def _bottleneck(row: OpEvent, label: Label | None) -> Bottleneck:
    source = next((node.source for node in label.nodes if node.source), None) if label is not None else None
    return Bottleneck(
        op=row.op,
        latency_ms=row.latency_ms,
        shape=row.shape,
        node=row.node,
        module_path=row.module_path,
        source=source,
        share=row.share,
        num_calls=row.num_calls,
        confidence=row.confidence,
    )
