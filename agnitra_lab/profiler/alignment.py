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
        index: place of the node in the graph.
        confidence: 1 when the module's ops and nodes agree one by one; else the share that agrees in order.
    """

    index: int
    confidence: float


class NodeAligner:
    """Aligns one root module's calls with its captured graph."""

    def __init__(self, nodes: Sequence[GraphNode]) -> None:
        self._nodes = tuple(nodes)
        self._of_paths: dict[frozenset[str], dict[str, list[tuple[int, str]]]] = {}

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
        of_path = self._by_called_module(frozenset(places))
        matches: list[NodeMatch | None] = [None] * len(ops)
        for path, members in places.items():
            names = tuple(ops[place][1] for place in members)
            for place, match in zip(members, _align(names, of_path.get(path, [])), strict=True):
                matches[place] = match
        return matches

    def _by_called_module(self, called: frozenset[str]) -> dict[str, list[tuple[int, str]]]:
        """Group the nodes by the innermost of their modules that is called as one.

        A traced or exported module is one flat function, whose nodes still tell the modules that they came from.
        """
        if called not in self._of_paths:
            grouped = self._of_paths[called] = defaultdict(list)
            for index, node in enumerate(self._nodes):
                path = node.module_path or ""
                while path and path not in called:
                    path = path.rpartition(".")[0]
                grouped[path].append((index, node.op))
        return self._of_paths[called]


def _align(names: tuple[str, ...], nodes: list[tuple[int, str]]) -> list[NodeMatch | None]:
    targets = [op for _, op in nodes]
    if list(names) == targets:
        return [NodeMatch(index, 1.0) for index, _ in nodes]
    matches: list[NodeMatch | None] = [None] * len(names)
    if not nodes:
        return matches
    matcher = SequenceMatcher(None, names, targets, autojunk=False)
    confidence = matcher.ratio()
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            matches[block.a + offset] = NodeMatch(nodes[block.b + offset][0], confidence)
    return matches
