"""Attribute every op and kernel to a graph node, a module or neither, and sum them into rows that say which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agnitra_lab.contracts import GraphHandoff
from agnitra_lab.profiler.alignment import NodeAligner, NodeMatch
from agnitra_lab.profiler.event_table import EventTable, Kind
from agnitra_lab.profiler.sweep import Nesting, sweep

Method = Literal["fx_node", "module", "outside_graph"]
_BACKWARD = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Place:
    """Where an event belongs.

    Attributes:
        method: what the place rests on: a graph node, a module marker, or nothing.
        module_path: dotted path below the root module, None outside of modules.
        match: the node and how sure it is, for `fx_node`.
        root: marker index of the root module, -1 outside of modules.
    """

    method: Method
    module_path: str | None = None
    match: NodeMatch | None = None
    root: int = -1

    @property
    def node(self) -> str | None:
        """Name of the node."""
        return self.match.node.name if self.match else None

    @property
    def key(self) -> tuple[Method, int, str | None, str | None]:
        """What tells places apart; cheap to hash, which a whole node is not."""
        return self.method, self.root, self.module_path, self.node


OUTSIDE = Place("outside_graph")


@dataclass
class Attribution:
    """The events of a profile with the place of each.

    Attributes:
        table: the events.
        nesting: their nesting.
        places: one per event.
    """

    table: EventTable
    nesting: Nesting
    places: list[Place]


def attribute(
    table: EventTable, paths: Mapping[int, tuple[int, str]], graphs: Mapping[int, GraphHandoff]
) -> Attribution:
    """Find the place of every event.

    Args:
        table: events of one profile.
        paths: marker index -> (marker index of the root module, path below it), from `markers.module_paths`.
        graphs: marker index of a root module -> its captured graph.

    Returns:
        The attribution. An op nested in another (aten::addmm in aten::linear) has the place of the outermost one;
        a kernel that of the op which launched it; a backward op that of its forward op's module.
    """
    nesting = sweep(table)
    places = [OUTSIDE] * len(table)
    tops = np.flatnonzero((table.kind == Kind.OP) & (nesting.top_op == np.arange(len(table))))
    for row in tops.tolist():
        places[row] = _module_place(paths.get(int(nesting.module[row])))
    for row, match in _node_matches(table, nesting, tops.tolist(), paths, graphs).items():
        own = places[row]
        places[row] = Place("fx_node", own.module_path, match, own.root)
    _place_backward(table, nesting, tops.tolist(), places)
    for row in np.flatnonzero((table.kind != Kind.ANNOTATION) & (table.kind != Kind.RUNTIME)).tolist():
        top = int(nesting.top_op[row]) if table.kind[row] != Kind.MARKER else -1
        # A marker, and a kernel that was launched straight under one, have a module and no op.
        places[row] = places[top] if top >= 0 else _module_place(paths.get(int(nesting.module[row])))
    return Attribution(table, nesting, places)


def _module_place(path: tuple[int, str] | None) -> Place:
    return Place("module", path[1], None, path[0]) if path is not None else OUTSIDE


def _node_matches(
    table: EventTable,
    nesting: Nesting,
    tops: list[int],
    paths: Mapping[int, tuple[int, str]],
    graphs: Mapping[int, GraphHandoff],
) -> dict[int, NodeMatch]:
    calls: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in tops:
        path = paths.get(int(nesting.module[row]))
        if path is not None and path[0] in graphs:
            calls[path[0], int(nesting.root_event[row])].append(row)
    aligners = {root: NodeAligner(handoff.graph.nodes) for root, handoff in graphs.items()}
    matches: dict[int, NodeMatch] = {}
    for (root, _), rows in calls.items():
        rows.sort(key=lambda row: int(table.start_ns[row]))
        ops = [(paths[int(nesting.module[row])][1], table.name[row]) for row in rows]
        for row, match in zip(rows, aligners[root].align_call(ops), strict=True):
            if match is not None:
                matches[row] = match
    return matches


def _place_backward(table: EventTable, nesting: Nesting, tops: list[int], places: list[Place]) -> None:
    """Give backward ops the module of the forward op with the same autograd sequence number."""
    backward = [row for row in tops if table.name[row].startswith(_BACKWARD) and table.sequence[row] >= 0]
    if not backward:
        return
    forward: dict[int, int] = {}
    for row in np.flatnonzero((table.kind == Kind.OP) & (table.sequence >= 0) & (nesting.module >= 0)).tolist():
        forward.setdefault(int(table.sequence[row]), int(nesting.top_op[row]))
    for row in backward:
        source = forward.get(int(table.sequence[row]))
        if source is not None and places[source].method != "outside_graph":
            places[row] = Place("module", places[source].module_path, None, places[source].root)
