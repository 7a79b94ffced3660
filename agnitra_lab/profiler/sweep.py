"""Sweep the time line once: self time, innermost marker and top-level op of every event, and who launched a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.profiler.event_table import EventTable, Int64, Kind
from agnitra_lab.profiler.markers import GRADIENT_PREFIX, MARKER_PREFIX, OWN_RANGE

GRAPH_LAUNCHES = ("cudaGraphLaunch", "cuGraphLaunch")


@dataclass
class Nesting:
    """Where each event of an `EventTable` stands; -1 means none.

    Attributes:
        parent: row of the innermost op, marker or annotation around an event; only for these three kinds.
        self_ns: CPU time of an op, marker or annotation that none inside it has; 0 for other kinds.
        module: marker index of the innermost module marker.
        root_event: row of the outermost module marker.
        top_op: row of the outermost op inside the innermost marker or annotation; of an op that is its own, its own.
        annotation: row of the innermost annotation.
        gradient: index of the gradient marker around an event or directly inside it.
        is_own: whether an event lies in a range of the profiler's own work.
        levels: rows of CPU events by depth, outermost first.
        launcher: for a kernel, the row of the op or marker that launched it; else the row itself.
        launch: for a kernel, the row of the runtime call that launched it.
    """

    parent: Int64
    self_ns: Int64
    module: Int64
    root_event: Int64
    top_op: Int64
    annotation: Int64
    gradient: Int64
    is_own: NDArray[np.bool_]
    launcher: Int64
    launch: Int64
    levels: list[Int64]


def sweep(table: EventTable) -> Nesting:
    """Nest the CPU events of each thread by their intervals, and link kernels to their launchers.

    Args:
        table: events of one profile.

    Returns:
        The nesting; the self times of all ops, markers and annotations of a thread sum to the time that its outermost
        ones cover.

    Source: kernels link by correlation id as torch.autograd.profiler does. Ids of ops and of runtime calls share
        numbers, so only ops and markers are looked up (seen on an H200: the first kernel matched a buffer request).
    """
    size = len(table)
    host = np.flatnonzero(table.kind <= Kind.ANNOTATION)
    order = host[np.lexsort((-table.end_ns[host], table.start_ns[host], table.thread[host]))]
    parent_place, depth = _nest(table, order)
    nesting = Nesting(
        parent=_none(size),
        self_ns=np.zeros(size, np.int64),
        module=_none(size),
        root_event=_none(size),
        top_op=_none(size),
        annotation=_none(size),
        gradient=_none(size),
        is_own=np.zeros(size, np.bool_),
        launcher=np.arange(size, dtype=np.int64),
        launch=_none(size),
        levels=_levels(order, depth),
    )
    has_parent = parent_place >= 0
    nesting.parent[order[has_parent]] = order[parent_place[has_parent]]
    inside = np.bincount(parent_place[has_parent], weights=table.duration_ns[order[has_parent]], minlength=len(order))
    nesting.self_ns[order] = table.duration_ns[order] - inside.astype(np.int64)
    _inherit(table, nesting)
    _link_kernels(table, nesting)
    return nesting


def _none(size: int) -> Int64:
    return np.full(size, -1, dtype=np.int64)


def _nest(table: EventTable, order: Int64) -> tuple[Int64, Int64]:
    """Return, by place in `order`, the place of the event around each (-1 for none) and how deep it lies."""
    ends, threads = table.end_ns[order].tolist(), table.thread[order]
    starts_thread = np.ones(len(order), np.bool_)
    starts_thread[1:] = threads[1:] != threads[:-1]
    boundaries = set(np.flatnonzero(starts_thread).tolist())
    parents, depths = [0] * len(ends), [0] * len(ends)
    stack: list[int] = []
    open_ends: list[int] = []
    for place, end in enumerate(ends):
        if place in boundaries:
            stack, open_ends = [], []
        while open_ends and open_ends[-1] < end:
            open_ends.pop()
            stack.pop()
        parents[place] = stack[-1] if stack else -1
        depths[place] = len(stack)
        stack.append(place)
        open_ends.append(end)
    return np.array(parents, np.int64), np.array(depths, np.int64)


def _levels(order: Int64, depth: Int64) -> list[Int64]:
    bounds: Any = np.cumsum(np.bincount(depth))[:-1] if len(depth) else []
    return np.split(order[np.argsort(depth, kind="stable")], bounds)


def _inherit(table: EventTable, nesting: Nesting) -> None:
    """Hand down, level by level, what an event takes from the one around it."""
    module_of, gradient_of, own_id = _marker_ids(table)
    is_op = table.kind == Kind.OP
    _mark_accumulations(table, nesting, gradient_of)
    for rows in nesting.levels:
        above = nesting.parent[rows]
        known = above >= 0
        for column in (nesting.module, nesting.root_event, nesting.annotation, nesting.is_own):
            column[rows[known]] = column[above[known]]
        is_unmarked = known & (nesting.gradient[rows] < 0)
        nesting.gradient[rows[is_unmarked]] = nesting.gradient[above[is_unmarked]]
        names = table.name[rows]
        is_module = module_of[names] >= 0
        nesting.module[rows[is_module]] = module_of[names[is_module]]
        new_root = is_module & (nesting.root_event[rows] < 0)
        nesting.root_event[rows[new_root]] = rows[new_root]
        is_range = table.kind[rows] == Kind.ANNOTATION
        nesting.annotation[rows[is_range]] = rows[is_range]
        nesting.is_own[rows[names == own_id]] = True
        op_above = known & is_op[above]
        is_top = is_op[rows] & ~op_above
        nesting.top_op[rows[is_top]] = rows[is_top]
        nesting.top_op[rows[op_above]] = nesting.top_op[above[op_above]]


def _mark_accumulations(table: EventTable, nesting: Nesting, gradient_of: Int64) -> None:
    """Mark the op around each gradient marker: the hook that made it runs inside the op that accumulates."""
    rows = np.flatnonzero((table.kind == Kind.MARKER) & (gradient_of[table.name] >= 0))
    rows = rows[nesting.parent[rows] >= 0]
    nesting.gradient[nesting.parent[rows]] = gradient_of[table.name[rows]]
    # What the op did before the marker was left is the hook: ours, and not the program's time.
    hook_ns = table.end_ns[rows] - table.start_ns[nesting.parent[rows]] - table.duration_ns[rows]
    nesting.self_ns[nesting.parent[rows]] -= np.minimum(hook_ns, nesting.self_ns[nesting.parent[rows]])


def _marker_ids(table: EventTable) -> tuple[Int64, Int64, int]:
    module_of, gradient_of = _none(len(table.names)), _none(len(table.names))
    own_id = -2
    for place, name in enumerate(table.names):
        if name.startswith(GRADIENT_PREFIX):
            gradient_of[place] = int(name[len(GRADIENT_PREFIX) :])
        elif name == OWN_RANGE:
            own_id = place
        elif name.startswith(MARKER_PREFIX) and name[len(MARKER_PREFIX) :].isdigit():
            module_of[place] = int(name[len(MARKER_PREFIX) :])
    return module_of, gradient_of, own_id


def _link_kernels(table: EventTable, nesting: Nesting) -> None:
    kernels = np.flatnonzero(table.kind == Kind.KERNEL)
    if not len(kernels):
        return
    host = np.flatnonzero((table.kind == Kind.OP) | (table.kind == Kind.MARKER))
    nesting.launcher[kernels] = _rows_of(table.correlation[host], host, table.linked[kernels])
    calls = np.flatnonzero(table.kind == Kind.RUNTIME)
    nesting.launch[kernels] = _rows_of(table.correlation[calls], calls, table.correlation[kernels])
    launcher = nesting.launcher[kernels]
    known = launcher >= 0
    for column in (nesting.module, nesting.root_event, nesting.top_op, nesting.annotation, nesting.gradient):
        column[kernels[known]] = column[launcher[known]]
    nesting.is_own[kernels[known]] = nesting.is_own[launcher[known]]


def replayed(table: EventTable, nesting: Nesting) -> NDArray[np.bool_]:
    """Return which kernels a CUDA graph launched: what is around the launch is not the op that they belong to."""
    is_graph = table.named(*GRAPH_LAUNCHES) & (table.kind == Kind.RUNTIME)
    return (nesting.launch >= 0) & is_graph[np.maximum(nesting.launch, 0)]


def _rows_of(ids: Int64, rows: Int64, wanted: Int64) -> Int64:
    """Look up the last row of each wanted id; -1 where there is none, and for the id 0."""
    if not len(ids):
        return _none(len(wanted))
    order = np.argsort(ids, kind="stable")
    place = np.searchsorted(ids[order], wanted, side="right") - 1
    found = order[np.maximum(place, 0)]
    return np.where((place >= 0) & (ids[found] == wanted) & (wanted > 0), rows[found], -1)
