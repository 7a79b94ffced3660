"""Attribute every op and kernel to a graph node, a parameter's gradient, the optimiser or code outside of the graph.

modules -> graph nodes -> compiled regions -> optimiser, gradients, backward -> what is nested -> kernels -> replays
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.telemetry import Method
from agnitra_lab.profiler.alignment import NodeAligner
from agnitra_lab.profiler.backward import place_backward, place_gradients, place_optimizers
from agnitra_lab.profiler.event_table import BACKWARD_PREFIX, EventTable, Int64, Kind
from agnitra_lab.profiler.inductor import Program
from agnitra_lab.profiler.places import Attribution, Places, RootGraph
from agnitra_lab.profiler.regions import place_regions
from agnitra_lab.profiler.replays import place_replays
from agnitra_lab.profiler.sweep import Nesting, sweep


@dataclass(frozen=True)
class Context:
    """What is known of a profile beside its events.

    Attributes:
        paths: marker index of a root call -> marker index of a module -> dotted path below the root.
        graphs: marker index of a root call -> its graph.
        gradients: (marker index of the root call, parameter name) of each gradient marker.
        programs: what Inductor has compiled in this process.
        reference: an attribution of the same kernels, for replays of unknown origin.
    """

    paths: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    graphs: Mapping[int, RootGraph] = field(default_factory=dict)
    gradients: Sequence[tuple[int, str]] = ()
    programs: Sequence[Program] = ()
    reference: Attribution | None = None


def attribute(table: EventTable, context: Context, nesting: Nesting | None = None) -> Attribution:
    """Find the place of every event.

    Args:
        table: events of one profile.
        context: modules, graphs and programs.
        nesting: of the table, where the caller has it already.

    Returns:
        The attribution. An op nested in another (aten::addmm in aten::linear) has the place of the outermost one,
        unless it has one of its own (a kernel of a compiled region); a GPU kernel that of the op which launched it.
    """
    nesting = nesting if nesting is not None else sweep(table)
    places = Places.unknown(len(table))
    tops = np.flatnonzero((table.kind == Kind.OP) & (nesting.top_op == np.arange(len(table))) & ~nesting.is_own)
    _place_modules(table, nesting, tops, places, context)
    _place_nodes(table, nesting, tops, places, context)
    own = place_regions(table, nesting, places, context.graphs, context.programs)
    place_optimizers(table, nesting, tops, places)
    place_gradients(table, nesting, tops, places, context.gradients)
    place_backward(table, nesting, tops, places)
    _hand_down(table, nesting, places, own)
    _place_kernels(table, nesting, places)
    attribution = Attribution(table, nesting, places)
    place_replays(attribution, context.graphs, context.programs, context.reference)
    return attribution


def _place_modules(table: EventTable, nesting: Nesting, tops: Int64, places: Places, context: Context) -> None:
    is_host = (table.kind == Kind.OP) | (table.kind == Kind.MARKER)
    rows = np.flatnonzero(is_host & (nesting.module >= 0))
    places.path[rows] = _path_ids(nesting, rows, places, context)
    in_module = places.path[tops] >= 0
    places.put(tops[in_module], "fx_node", "module")
    places.put(tops[~in_module], "outside_graph", "outside_graph")


def _path_ids(nesting: Nesting, rows: Int64, places: Places, context: Context) -> Int64:
    """Return the path id of each row: its innermost module as seen from the root that was called."""
    roots = nesting.module[nesting.root_event[rows]]
    pairs, inverse = np.unique(np.stack([roots, nesting.module[rows]]), axis=1, return_inverse=True)
    everywhere = {index: path for paths in context.paths.values() for index, path in paths.items()}
    ids = [
        places.path_id(context.paths.get(root, {}).get(module, everywhere.get(module)))
        for root, module in pairs.T.tolist()
    ]
    return np.array(ids, np.int64)[inverse.reshape(-1)] if ids else np.zeros(0, np.int64)


def _place_nodes(table: EventTable, nesting: Nesting, tops: Int64, places: Places, context: Context) -> None:
    eager = {root: graph for root, graph in context.graphs.items() if not graph.is_compiled}
    rows = tops[(nesting.root_event[tops] >= 0) & ~table.named(BACKWARD_PREFIX)[tops]]
    rows = rows[np.lexsort((table.start_ns[rows], nesting.root_event[rows]))]
    bounds = np.flatnonzero(np.diff(nesting.root_event[rows])) + 1
    aligners = {root: NodeAligner(graph.nodes) for root, graph in eager.items()}
    known: dict[tuple[int, bytes], _Matches] = {}
    for call in np.split(rows, bounds):
        root = _graph_of(int(nesting.module[nesting.root_event[call[0]]]), eager, context) if len(call) else None
        if root is None:
            continue
        # Calls that run the same ops in the same modules are aligned once.
        key = root, table.name[call].tobytes() + places.path[call].tobytes()
        if key not in known:
            known[key] = _align(call, table, places, root, eager[root], aligners[root])
        found = known[key]
        exact = found.confidence == 1.0
        kinds: tuple[tuple[Method, NDArray[np.bool_]], ...] = (("order", exact), ("partial_order", ~exact))
        for method, chosen in kinds:
            rows_found = call[found.members[chosen]]
            places.put(
                rows_found,
                "fx_node",
                method,
                confidence=found.confidence[chosen],
                label=found.labels[chosen],
                path=found.paths[chosen],
            )


def _graph_of(module: int, eager: Mapping[int, RootGraph], context: Context) -> int | None:
    """Return the root call whose graph has the nodes of an outermost module call; None where no graph has.

    Checkpointing runs a part of a root again in the backward pass, where nothing is around it.
    """
    if module in eager:
        return module
    return next((root for root, paths in context.paths.items() if module in paths and root in eager), None)


@dataclass(frozen=True)
class _Matches:
    """Which ops of a call have a node, its label and module path, and how sure each is."""

    members: Int64
    labels: Int64
    paths: Int64
    confidence: NDArray[np.float64]


def _align(
    call: Int64, table: EventTable, places: Places, root: int, graph: RootGraph, aligner: NodeAligner
) -> _Matches:
    ops = [(places.module_path(row) or "", table.name_of(row)) for row in call.tolist()]
    found = [(place, match) for place, match in enumerate(aligner.align_call(ops)) if match is not None]
    return _Matches(
        members=np.array([place for place, _ in found], np.int64),
        labels=np.array([places.node_id(root, graph, match.index) for _, match in found], np.int64),
        paths=np.array([places.path_id(graph.nodes[match.index].module_path or "") for _, match in found], np.int64),
        confidence=np.array([match.confidence for _, match in found]),
    )


def _hand_down(table: EventTable, nesting: Nesting, places: Places, own: Int64) -> None:
    """Give nested ops the place of the op around them, level by level; `own` rows keep the place that they have."""
    is_op = table.kind == Kind.OP
    has_own = np.zeros(len(table), np.bool_)
    has_own[own] = True
    for rows in nesting.levels:
        above = nesting.parent[rows]
        is_nested = is_op[rows] & (above >= 0) & is_op[np.maximum(above, 0)] & ~has_own[rows] & ~nesting.is_own[rows]
        places.copy(rows[is_nested], above[is_nested])
    markers = np.flatnonzero((table.kind == Kind.MARKER) & (places.path >= 0))
    places.put(markers, "fx_node", "module")


def _place_kernels(table: EventTable, nesting: Nesting, places: Places) -> None:
    kernels = np.flatnonzero(table.kind == Kind.KERNEL)
    launched = kernels[nesting.launcher[kernels] >= 0]
    places.copy(launched, nesting.launcher[launched])
    # Launched by code that is no torch op, such as a Triton kernel called by hand: the launch call says where.
    orphans = kernels[(nesting.launcher[kernels] < 0) & (nesting.launch[kernels] >= 0)]
    places.put(orphans, "outside_graph", "outside_graph", confidence=0.9)
