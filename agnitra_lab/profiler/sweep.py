"""Sweep the time line once: self time, innermost marker and top-level op of every event, and who launched a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agnitra_lab.profiler.event_table import EventTable, Int64, Kind
from agnitra_lab.profiler.markers import MARKER_PREFIX


@dataclass
class Nesting:
    """Where each event of an `EventTable` stands; -1 means none.

    Attributes:
        self_ns: CPU time of an op or marker that no op or marker inside it has; 0 for other kinds.
        module: index of the innermost module marker (the number in its name).
        module_event: row of that marker.
        root_event: row of the outermost module marker.
        top_op: row of the outermost op inside the innermost module marker; of an op that is its own, its own row.
        launcher: for a kernel, the row of the op or marker that launched it; else the row itself.
    """

    self_ns: Int64
    module: Int64
    module_event: Int64
    root_event: Int64
    top_op: Int64
    launcher: Int64


def sweep(table: EventTable) -> Nesting:
    """Nest the CPU events of each thread by their intervals, and link kernels to their launchers.

    Args:
        table: events of one profile.

    Returns:
        The nesting; the self times of all ops and markers of a thread sum to the time that its outermost ones cover.

    Source: kernels link by correlation id as torch.autograd.profiler does. Ids of ops and of runtime calls share
        numbers, so only ops and markers are looked up (seen on an H200: the first kernel matched a buffer request).
    """
    nesting = _nothing(table)
    host = np.flatnonzero((table.kind == Kind.OP) | (table.kind == Kind.MARKER))
    order = host[np.lexsort((-table.end_ns[host], table.start_ns[host], table.thread[host]))]
    _sweep_threads(table, order.tolist(), nesting)
    _link_kernels(table, host, nesting)
    return nesting


def _nothing(table: EventTable) -> Nesting:
    size = len(table)

    def none() -> Int64:
        return np.full(size, -1, dtype=np.int64)

    return Nesting(
        self_ns=np.zeros(size, dtype=np.int64),
        module=none(),
        module_event=none(),
        root_event=none(),
        top_op=none(),
        launcher=np.arange(size, dtype=np.int64),
    )


def _sweep_threads(table: EventTable, order: list[int], nesting: Nesting) -> None:
    ends, durations = table.end_ns.tolist(), table.duration_ns.tolist()
    threads, names = table.thread.tolist(), table.name
    is_marker = (table.kind == Kind.MARKER).tolist()
    self_ns = list(durations)
    module, module_event = nesting.module.tolist(), nesting.module_event.tolist()
    root_event, top_op = nesting.root_event.tolist(), nesting.top_op.tolist()
    stack: list[int] = []
    thread = None
    for row in order:
        if threads[row] != thread:
            thread = threads[row]
            stack.clear()
        while stack and ends[stack[-1]] < ends[row]:
            stack.pop()
        parent = stack[-1] if stack else -1
        if parent >= 0:
            self_ns[parent] -= durations[row]
            module[row], module_event[row] = module[parent], module_event[parent]
            root_event[row] = root_event[parent]
        if is_marker[row]:
            module[row], module_event[row] = int(names[row][len(MARKER_PREFIX) :]), row
            if root_event[row] < 0:
                root_event[row] = row
        else:
            top_op[row] = row if parent < 0 or is_marker[parent] else top_op[parent]
        stack.append(row)
    nesting.self_ns[order] = np.array(self_ns, dtype=np.int64)[order]
    nesting.module[:], nesting.module_event[:] = module, module_event
    nesting.root_event[:], nesting.top_op[:] = root_event, top_op


def _link_kernels(table: EventTable, host: Int64, nesting: Nesting) -> None:
    row_of = {int(table.correlation[row]): int(row) for row in host if table.correlation[row] > 0}
    for row in np.flatnonzero(table.kind == Kind.KERNEL):
        launcher = row_of.get(int(table.linked[row]), -1)
        nesting.launcher[row] = launcher
        if launcher >= 0:
            nesting.module[row] = nesting.module[launcher]
            nesting.module_event[row] = nesting.module_event[launcher]
            nesting.root_event[row] = nesting.root_event[launcher]
            nesting.top_op[row] = nesting.top_op[launcher]


def busy_ns(table: EventTable) -> int:
    """Return the time in which at least one kernel ran: the union of the kernels' intervals, in nanoseconds."""
    kernels = table.kind == Kind.KERNEL
    starts, ends = table.start_ns[kernels], table.end_ns[kernels]
    if not len(starts):
        return 0
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    # A gap opens where a kernel starts after everything before it has ended.
    reached = np.maximum.accumulate(ends)
    gaps = np.maximum(starts[1:] - reached[:-1], 0)
    return int(reached[-1] - starts[0] - gaps.sum())
