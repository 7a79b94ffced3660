"""Where each event of a profile belongs: owner, method, confidence, module path and graph node, as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts import GraphNode
from agnitra_lab.contracts.telemetry import Method, Owner
from agnitra_lab.profiler.event_table import EventTable, Int64
from agnitra_lab.profiler.sweep import Nesting

OWNERS: tuple[Owner, ...] = get_args(Owner)
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, eq=False)
class Label:
    """What a place is called: a graph node, a set of nodes that one kernel computes, a parameter, an optimiser.

    Attributes:
        text: as printed; unique among the labels of a profile.
        nodes: the graph nodes; empty for parameters and optimisers.
        root: marker index of the root call whose graph holds them, -1 for none.
        op: of a set, the kernel or library call that computes it.
    """

    text: str
    nodes: tuple[GraphNode, ...] = ()
    root: int = -1
    op: str | None = None


@dataclass(frozen=True)
class RootGraph:
    """The graph of one root call.

    Attributes:
        nodes: in execution order.
        prefix: what the printed names of its nodes start with, where a profile has several graphs.
        origin_of: of a compiled root, names of nodes that its compiler made -> names in `nodes`.
        is_compiled: whether torch.compile runs the root.
    """

    nodes: tuple[GraphNode, ...]
    prefix: str = ""
    origin_of: Mapping[str, str] = field(default_factory=dict)
    is_compiled: bool = False


@dataclass
class Places:
    """The place of every event; -1 means none.

    Attributes:
        owner: index into `OWNERS`; -1 is the residual.
        method: index into `METHODS`.
        confidence: 0 to 1.
        path: index into `paths`.
        label: index into `labels`.
        paths: module paths, "" for a root module.
        labels: nodes, sets of nodes, parameters and optimisers.
    """

    owner: NDArray[np.int8]
    method: NDArray[np.int8]
    confidence: NDArray[np.float32]
    path: NDArray[np.int32]
    label: NDArray[np.int32]
    paths: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    _path_ids: dict[str, int] = field(default_factory=dict)
    _label_ids: dict[Any, int] = field(default_factory=dict)

    @classmethod
    def unknown(cls, size: int) -> Places:
        """Return places that are all unknown."""
        return cls(
            owner=np.full(size, -1, np.int8),
            method=np.full(size, -1, np.int8),
            confidence=np.zeros(size, np.float32),
            path=np.full(size, -1, np.int32),
            label=np.full(size, -1, np.int32),
        )

    def put(
        self,
        rows: Int64 | Sequence[int] | int,
        owner: Owner | None,
        method: Method | None,
        *,
        confidence: Any = 1.0,
        path: Any = None,
        label: Any = None,
    ) -> None:
        """Set the place of rows; `path` and `label` are ids (or arrays of ids), None leaves them as they are."""
        self.owner[rows] = OWNERS.index(owner) if owner is not None else -1
        self.method[rows] = METHODS.index(method) if method is not None else -1
        self.confidence[rows] = confidence
        if path is not None:
            self.path[rows] = path
        if label is not None:
            self.label[rows] = label

    @staticmethod
    def method_id(name: Method) -> int:
        """Return the index of a method."""
        return METHODS.index(name)

    def copy(self, targets: Int64, sources: Int64) -> None:
        """Give each target row the place of its source row."""
        for column in (self.owner, self.method, self.confidence, self.path, self.label):
            column[targets] = column[sources]

    def path_id(self, path: str | None) -> int:
        """Return the id of a module path, -1 for None."""
        if path is None:
            return -1
        if path not in self._path_ids:
            self._path_ids[path] = len(self.paths)
            self.paths.append(path)
        return self._path_ids[path]

    def label_id(self, key: Any, label: Label) -> int:
        """Return the id of the label known as `key`, added when it is new."""
        if key not in self._label_ids:
            self._label_ids[key] = len(self.labels)
            self.labels.append(label)
        return self._label_ids[key]

    def node_id(self, root: int, graph: RootGraph, index: int) -> int:
        """Return the label id of one node of a root's graph."""
        node = graph.nodes[index]
        return self.label_id((root, index), Label(graph.prefix + node.name, (node,), root))

    def groups(self, *others: NDArray[Any]) -> tuple[Int64, Int64]:
        """Group rows of equal place (and of equal values in `others`).

        Returns:
            Group number of each row, and one row of each group.
        """
        key = np.zeros(len(self.owner), np.int64)
        columns: list[NDArray[Any]] = [self.owner, self.method, self.path, self.label, *others]
        for column in columns:
            low = int(column.min()) if len(column) else 0
            span = int(column.max()) - low + 1 if len(column) else 1
            key = key * span + (column.astype(np.int64) - low)
            # Numbered anew after each column, so that the product never leaves 64 bits.
            _, first, key = np.unique(key, return_index=True, return_inverse=True)
        return key, first

    def node_name(self, row: int) -> str | None:
        """Return the printed node of a row."""
        label = int(self.label[row])
        return self.labels[label].text if label >= 0 else None

    def owner_name(self, row: int) -> Owner | None:
        """Return the owner of a row, None for the residual."""
        owner = int(self.owner[row])
        return OWNERS[owner] if owner >= 0 else None

    def method_name(self, row: int) -> Method | None:
        """Return how the place of a row is known."""
        method = int(self.method[row])
        return METHODS[method] if method >= 0 else None

    def module_path(self, row: int) -> str | None:
        """Return the module path of a row."""
        path = int(self.path[row])
        return self.paths[path] if path >= 0 else None


@dataclass
class Attribution:
    """The events of a profile with the place of each.

    Attributes:
        table: the events.
        nesting: their nesting.
        places: their places.
    """

    table: EventTable
    nesting: Nesting
    places: Places


def common_path(nodes: Sequence[GraphNode]) -> str | None:
    """Return the innermost module that holds all nodes; None when none of them has a module."""
    paths = [node.module_path for node in nodes if node.module_path is not None]
    if not paths:
        return None
    parts = [path.split(".") if path else [] for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
