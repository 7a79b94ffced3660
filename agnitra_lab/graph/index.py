"""Look up a captured graph by name, op and module, and walk from producers to consumers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from agnitra_lab.contracts import GraphNode as Node


class GraphIndex:
    """The nodes of one graph, indexed for pattern matching."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = tuple(nodes)
        self._by_name = {node.name: node for node in self.nodes}
        self._position = {node.name: place for place, node in enumerate(self.nodes)}
        self._by_op: dict[str, list[Node]] = defaultdict(list)
        self._by_module: dict[str | None, list[Node]] = defaultdict(list)
        self._consumers: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            self._by_op[node.op].append(node)
            self._by_module[node.module_path].append(node)
            for source in node.inputs:
                self._consumers[source].append(node)

    def node(self, name: str) -> Node | None:
        """Return the node of this name; None for inputs, parameters and buffers."""
        return self._by_name.get(name)

    def position(self, node: Node) -> int:
        """Return the node's place in execution order."""
        return self._position[node.name]

    def with_op(self, *ops: str) -> list[Node]:
        """Return the nodes of these ops, in execution order."""
        found = [node for op in ops for node in self._by_op.get(op, ())]
        return sorted(found, key=self.position) if len(ops) > 1 else found

    def in_module(self, module_path: str | None) -> list[Node]:
        """Return the nodes whose innermost module is this one."""
        return list(self._by_module.get(module_path, ()))

    def inputs(self, node: Node) -> list[Node]:
        """Return the nodes that computed this node's inputs."""
        return [source for name in node.inputs if (source := self._by_name.get(name)) is not None]

    def producer(self, node: Node, *ops: str, depth: int) -> Node | None:
        """Return the nearest node of these ops among the ancestors of `node`, at most `depth` steps up."""
        return self._nearest(node, ops, depth, up=True)

    def consumer(self, node: Node, *ops: str, depth: int) -> Node | None:
        """Return the nearest node of these ops among the descendants of `node`, at most `depth` steps down."""
        return self._nearest(node, ops, depth, up=False)

    def between(self, first: Node, last: Node) -> list[Node]:
        """Return the nodes on the shortest chain strictly between two nodes, at most four of them."""
        trail: list[tuple[Node, list[Node]]] = [(first, [])]
        for _ in range(5):
            longer: list[tuple[Node, list[Node]]] = []
            for node, passed in trail:
                for follower in self._consumers.get(node.name, ()):
                    if follower is last:
                        return passed
                    longer.append((follower, [*passed, follower]))
            trail = longer
        return []

    def _nearest(self, node: Node, ops: Sequence[str], depth: int, *, up: bool) -> Node | None:
        seen = {node.name}
        level = [node]
        if up and node.op in ops:
            return node
        for _ in range(depth):
            reached = [
                other
                for here in level
                for other in (self.inputs(here) if up else self._consumers.get(here.name, ()))
                if other.name not in seen
            ]
            found = next((other for other in reached if other.op in ops), None)
            if found is not None:
                return found
            seen.update(other.name for other in reached)
            level = reached
        return None
