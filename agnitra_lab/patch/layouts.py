"""Changing the memory layout of values inside a graph, and giving back the strides that its callers see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from agnitra_lab.patch.context import RewriteContext, infer
from agnitra_lab.patch.ops import fake_of, is_in_place, is_torchs_own

CHANNELS_LAST: dict[int, torch.memory_format] = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Tensor rank -> the format with the channels innermost."""


def is_dense(tensor: Tensor) -> bool:
    """Whether the strides are those of some order of the dimensions, without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= int(size)
    return True


def restrided(node: fx.Node, like: Tensor, before: fx.Node, context: RewriteContext) -> fx.Node:
    """Return the value of `node` with the strides of `like`, copied where it lacks them."""
    fake = fake_of(node)
    if fake is not None and fake.stride() == like.stride():
        return node
    order = tuple(sorted(range(like.dim()), key=lambda dim: (-like.stride()[dim], dim)))
    inverse = tuple(order.index(dim) for dim in range(len(order)))
    steps: list[tuple[str, tuple[Any, ...]]] = [("permute", (order,)), ("contiguous", ()), ("permute", (inverse,))]
    for target, args in steps:
        node = context.call(before, target, node, *args)
        infer(node)
    return node


class LayoutFlow:
    """Carries new strides through the rest of a graph.

    Values do not depend on strides. What does is handled: `view` becomes `reshape`, results that leave the graph and
    arguments of operations that torch does not know get the strides back that they had.
    """

    def __init__(self, context: RewriteContext) -> None:
        self.context = context
        # Node -> what Dynamo recorded before the layout changed.
        self._before: dict[fx.Node, Any] = {}

    def changed(self, node: fx.Node, old: Any) -> None:
        """Say that a node, whose fake value is already the new one, had `old` before."""
        self._before[node] = old

    def carry_over(self, node: fx.Node) -> None:
        """Adapt one node to the new strides of its arguments. Call it for each node in graph order."""
        moved = [source for source in node.all_input_nodes if source in self._before]
        if not moved:
            return
        if node.op == "output" or not takes_any_strides(node):
            self._restore(node, moved)
            return
        if node.target == "view" and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"
        old = node.meta.get("example_value")
        try:
            infer(node)
        except Exception:
            # An operation that takes these strides amiss gets those back that it was recorded with.
            self._restore(node, moved)
            return
        if _strides(node.meta.get("example_value")) != _strides(old):
            self._before[node] = old

    def _restore(self, node: fx.Node, moved: list[fx.Node]) -> None:
        for source in moved:
            old = self._before[source]
            if isinstance(old, Tensor):
                node.replace_input_with(source, restrided(source, old, node, self.context))


def takes_any_strides(node: fx.Node) -> bool:
    """Whether a node's op is torch's own, and its result does not depend on strides; a kernel of ours wants its own."""
    if node.op == "call_method":
        return node.target not in ("as_strided", "stride", "storage_offset", "data_ptr")
    is_known = node.op == "call_function" and is_torchs_own(node.target)
    return is_known and not (is_in_place(node) and node.kwargs.get("out") is not None)


def _strides(value: Any) -> list[Any]:
    return [leaf.stride() if isinstance(leaf, Tensor) else None for leaf in _pytree.tree_leaves(value)]
