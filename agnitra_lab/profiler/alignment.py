"""Tie the ops of a module call to the graph nodes of the same module, by order and name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from agnitra_lab.contracts import GraphNode


@dataclass(frozen=True)
class NodeMatch:
    """A graph node that an op was tied to.

    Attributes:
        node: the node.
        confidence: 1 when the module's ops and nodes agree one by one; else the share that agrees in order.
    """

    node: GraphNode
    confidence: float


class NodeAligner:
    """Aligns one root module's calls with its captured graph; equal calls are aligned once."""

    def __init__(self, nodes: Sequence[GraphNode]) -> None:
        self._nodes_of: dict[str, list[GraphNode]] = defaultdict(list)
        for node in nodes:
            self._nodes_of[node.module_path or ""].append(node)
        self._known: dict[tuple[str, tuple[str, ...]], list[NodeMatch | None]] = {}

    def align_call(self, ops: Sequence[tuple[str, str]]) -> list[NodeMatch | None]:
        """Tie the top-level ops of one call of the root to nodes.

        Args:
            ops: (module path, op name) in the order of execution.

        Returns:
            One match, or None, per op.
        """
        places: dict[str, list[int]] = defaultdict(list)
        for place, (path, _) in enumerate(ops):
            places[path].append(place)
        matches: list[NodeMatch | None] = [None] * len(ops)
        for path, members in places.items():
            names = tuple(ops[place][1] for place in members)
            for place, match in zip(members, self._align_module(path, names), strict=True):
                matches[place] = match
        return matches

    def _align_module(self, path: str, names: tuple[str, ...]) -> list[NodeMatch | None]:
        known = self._known.get((path, names))
        if known is None:
            known = self._known[path, names] = _align(names, self._nodes_of.get(path, []))
        return known


def _align(names: tuple[str, ...], nodes: list[GraphNode]) -> list[NodeMatch | None]:
    targets = [node.op for node in nodes]
    if list(names) == targets:
        return [NodeMatch(node, 1.0) for node in nodes]
    matches: list[NodeMatch | None] = [None] * len(names)
    if not nodes:
        return matches
    matcher = SequenceMatcher(None, names, targets, autojunk=False)
    confidence = matcher.ratio()
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            matches[block.a + offset] = NodeMatch(nodes[block.b + offset], confidence)
    return matches
