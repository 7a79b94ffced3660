"""Place what runs inside a compiled region: each kernel of Inductor's at the set of graph nodes that it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from agnitra_lab.contracts import GraphNode
from agnitra_lab.contracts.telemetry import Method
from agnitra_lab.graph.compiled import meant_by
from agnitra_lab.profiler.alignment import NodeAligner
from agnitra_lab.profiler.event_table import EventTable, Int64, Kind
from agnitra_lab.profiler.inductor import Launch, Program, best_program, match_ops
from agnitra_lab.profiler.places import Label, Places, RootGraph, common_path
from agnitra_lab.profiler.sweep import Nesting

REGION = "Torch-Compiled Region"
PROGRAM_CALL = "## Call CompiledFxGraph"
_COMPILING = " (dynamo_timed)"
COMPILING_LABEL = "torch.compile compiling"
_BY_NAME_ALONE = 0.8


class NodeSets:
    """Turns an Inductor kernel's source nodes into the label of a set of graph nodes.

    Args:
        places: takes the labels.
        graphs: marker index of a root call -> its graph.
    """

    def __init__(self, places: Places, graphs: Mapping[int, RootGraph]) -> None:
        self._places = places
        self._graphs = graphs
        self._nodes = {root: {node.name: node for node in graph.nodes} for root, graph in graphs.items()}

    def root_of(self, program: Program, given: int) -> int:
        """Return the root call whose graph knows most of a program's nodes; `given` where it is a compiled one."""
        if given in self._graphs and self._graphs[given].is_compiled:
            return given
        names = {name for launch in program.launches for name in launch.computed_nodes}
        shares = {
            root: sum(self._resolve(root, name, program.is_backward) is not None for name in names)
            for root, graph in self._graphs.items()
            if graph.is_compiled
        }
        best = max(shares, key=lambda root: shares[root], default=-1)
        return best if shares.get(best) else -1

    def label(self, launches: Sequence[Launch], root: int, *, is_backward: bool) -> tuple[int, int, float]:
        """Return label id, path id and confidence of what some launches compute together."""
        names = tuple(dict.fromkeys(name for launch in launches for name in launch.computed_nodes))
        found = {node.name: node for name in names if (node := self._resolve(root, name, is_backward)) is not None}
        nodes, confidence = tuple(found.values()), 1.0
        if not nodes:
            op = next((launch.aten_ops[0] for launch in launches if launch.aten_ops), "")
            nodes = tuple(GraphNode(name=name, op=op.replace("aten.", "aten::")) for name in names)
            confidence = _BY_NAME_ALONE
        prefix = self._graphs[root].prefix if root in self._graphs else ""
        text = " + ".join(prefix + node.name for node in nodes) or launches[0].name
        label = Label(text, nodes, root, op=launches[0].name)
        path = common_path(nodes)
        key = ("set", root, text)
        return self._places.label_id(key, label), self._places.path_id(path), confidence

    def region(self, name: str, root: int) -> int:
        """Return the label id of a region as a whole."""
        graph = self._graphs.get(root)
        nodes = graph.nodes if graph is not None and graph.is_compiled else ()
        text = name.replace(REGION, "compiled region").replace(":", "")
        return self._places.label_id(("region", name), Label(text, nodes, root, op=REGION))

    def align(self, rows: Int64, names: Sequence[str], root: int) -> Int64:
        """Place ops that run one by one as the graph of a compiled root has them; return the rows that were."""
        graph = self._graphs.get(root)
        if graph is None or not graph.is_compiled:
            return np.zeros(0, np.int64)
        # One function without calls of modules: all nodes stand in the root.
        matches = NodeAligner(graph.nodes).align_call([("", name) for name in names])
        placed = []
        for row, match in zip(rows.tolist(), matches, strict=True):
            if match is not None:
                node = graph.nodes[match.index]
                label = self._places.node_id(root, graph, match.index)
                method: Method = "order" if match.confidence == 1.0 else "partial_order"
                path = self._places.path_id(node.module_path)
                self._places.put(row, "fx_node", method, confidence=match.confidence, label=label, path=path)
                placed.append(row)
        return np.array(placed, np.int64)

    def _resolve(self, root: int, name: str, is_backward: bool) -> GraphNode | None:
        """Find a node by Inductor's name for it."""
        if root not in self._graphs:
            return None
        nodes = self._nodes[root]
        return nodes.get(meant_by(name, nodes, self._graphs[root].origin_of, is_backward=is_backward))


def place_regions(
    table: EventTable,
    nesting: Nesting,
    places: Places,
    graphs: Mapping[int, RootGraph],
    programs: Sequence[Program],
) -> Int64:
    """Place compiled regions, and the launches inside them.

    Returns:
        Rows that have a place of their own, whatever op is around them.
    """
    sets = NodeSets(places, graphs)
    is_op = table.kind == Kind.OP
    compiling = _place_compiling(table, places)
    regions = np.flatnonzero(is_op & table.named(REGION))
    for row in regions.tolist():
        places.put(row, "fx_node", "region", label=sets.region(table.name_of(row), _root(nesting, row)))
    calls = np.flatnonzero(is_op & table.named(PROGRAM_CALL))
    if not len(calls):
        return np.concatenate([compiling, regions, _place_uncompiled(table, nesting, regions, sets)])
    is_child = is_op & np.isin(nesting.parent, calls)
    children = np.flatnonzero(is_child)
    children = children[np.lexsort((table.start_ns[children], nesting.parent[children]))]
    own = [compiling, regions]
    known: dict[bytes, tuple[Program, list[int | None]] | None] = {}
    for rows in np.split(children, np.flatnonzero(np.diff(nesting.parent[children])) + 1):
        key = table.name[rows].tobytes()
        if key not in known:
            known[key] = _match([table.name_of(row) for row in rows.tolist()], programs)
        match = known[key]
        if match is not None:
            own.append(_place_launches(rows, match, nesting, places, sets))
    return np.concatenate(own)


def _place_uncompiled(table: EventTable, nesting: Nesting, regions: Int64, sets: NodeSets) -> Int64:
    """Place the ops of regions that a backend runs as Dynamo captured them (backend="eager"), by their order."""
    # Dynamo's own ranges ("Pregraph bytecode") have no namespace.
    is_torch_op = np.array(["::" in name for name in table.names], np.bool_)
    is_child = (table.kind == Kind.OP) & np.isin(nesting.parent, regions) & is_torch_op[table.name]
    children = np.flatnonzero(is_child)
    children = children[np.lexsort((table.start_ns[children], nesting.parent[children]))]
    placed = []
    for rows in np.split(children, np.flatnonzero(np.diff(nesting.parent[children])) + 1):
        if len(rows):
            placed.append(sets.align(rows, [table.name_of(row) for row in rows.tolist()], _root(nesting, int(rows[0]))))
    return np.concatenate(placed) if placed else np.zeros(0, np.int64)


def _place_compiling(table: EventTable, places: Places) -> Int64:
    """Place what torch.compile itself did during the capture: it is no part of any graph."""
    names = np.array([i for i, name in enumerate(table.names) if name.endswith(_COMPILING)], np.int32)
    rows = np.flatnonzero(np.isin(table.name, names) & (table.kind == Kind.OP))
    if len(rows):
        label = places.label_id(COMPILING_LABEL, Label(COMPILING_LABEL, op=COMPILING_LABEL))
        places.put(rows, "outside_graph", "range", label=label, path=-1)
    return rows


def _match(names: list[str], programs: Sequence[Program]) -> tuple[Program, list[int | None]] | None:
    found = best_program(names, programs, is_replay=False)
    return (found[0], match_ops(names, found[0])) if found is not None else None


def _place_launches(
    rows: Int64, match: tuple[Program, list[int | None]], nesting: Nesting, places: Places, sets: NodeSets
) -> Int64:
    program, launches = match
    root = sets.root_of(program, _root(nesting, int(rows[0])))
    placed = []
    for row, launch in zip(rows.tolist(), launches, strict=True):
        if launch is None:
            continue
        label, path, confidence = sets.label([program.launches[launch]], root, is_backward=program.is_backward)
        places.put(row, "fx_node", "provenance", confidence=confidence, label=label, path=path)
        placed.append(row)
    return np.array(placed, np.int64)


def _root(nesting: Nesting, row: int) -> int:
    event = int(nesting.root_event[row])
    return int(nesting.module[event]) if event >= 0 else -1
