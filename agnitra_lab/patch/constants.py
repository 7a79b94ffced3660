"""What a graph computes from constants and buffers alone, as real tensors: masks, position grids, scales."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.graph.tree import ADDRESS_MARK
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.ops import fake_of, is_in_place, memory_root, written_nodes

MAX_ELEMENTS = 1 << 26
"""Larger values are not evaluated: a boolean mask of 8192 x 8192 still is, in 64 MB."""

# Functions and methods whose result depends on their arguments alone.
_PURE = {
    "arange", "ones", "zeros", "full", "eye", "tensor", "scalar_tensor", "linspace", "ones_like", "zeros_like",
    "full_like", "new_ones", "new_zeros", "new_full", "new_tensor", "tril", "triu", "add", "sub", "mul", "truediv",
    "div", "floordiv", "floor_divide", "neg", "pow", "sqrt", "rsqrt", "abs", "exp", "log", "eq", "ne", "lt", "le", "gt",
    "ge", "and", "or", "xor", "invert", "not", "logical_and", "logical_or", "logical_not", "logical_xor",
    "bitwise_and", "bitwise_or", "bitwise_not", "masked_fill", "where", "cat", "concat", "stack", "cumsum", "outer",
    "meshgrid", "min", "max", "minimum", "maximum", "clamp", "all", "any", "sum", "view", "reshape", "transpose",
    "permute", "unsqueeze", "squeeze", "flatten", "expand", "expand_as", "repeat", "contiguous", "clone", "detach", "t",
    "getitem", "getattr", "narrow", "select", "chunk", "split", "unbind", "to", "float", "bool", "long", "int", "half",
    "bfloat16", "double", "type", "type_as", "fill", "zero", "fliplr", "flip", "roll", "remainder", "mod", "diff",
    "broadcast_to", "view_as", "swapaxes", "movedim", "unflatten", "size", "isneginf", "isinf",
}  # fmt: skip
_ATTRIBUTES = {"T", "mT", "H", "mH", "shape", "dtype", "device", "ndim"}


@dataclass(frozen=True)
class Constant:
    """A value that no call of the graph changes, as long as its sources stay as they are.

    Attributes:
        value: the real tensor, or the number or tuple that the node stands for.
        sources: the graph inputs (buffers) that it was computed from.
    """

    value: Any
    sources: frozenset[fx.Node]


@dataclass(frozen=True)
class _Known(Constant):
    nodes: frozenset[fx.Node]


class Constants:
    """Evaluates nodes of one graph. Make a new one after the graph was changed.

    Args:
        context: gives the real tensors behind graph inputs.
    """

    def __init__(self, context: RewriteContext) -> None:
        self._context = context
        self._known: dict[fx.Node, _Known | None] = {}
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        for node in context.graph_module.graph.nodes:
            for target in written_nodes(node):
                self._writers.setdefault(memory_root(target), []).append(node)

    def of(self, node: Any) -> Constant | None:
        """Return a node's value, None when it depends on the call's inputs or is not understood."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._known:
            self._known[node] = None  # in case that the evaluation fails
            self._known[node] = self._evaluate(node)
        return self._known[node]

    def number(self, value: Any) -> float | None:
        """Return a Python number, or the number in a constant tensor of no dimensions; None for anything else."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        known = self.of(value)
        # A buffer's number could change between calls; only what the graph itself says is read as a number.
        if known is None or known.sources or not isinstance(known.value, Tensor) or known.value.dim():
            return None
        return float(known.value.item())

    def _evaluate(self, node: fx.Node) -> _Known | None:
        fake = fake_of(node)
        if fake is not None and not (isinstance(fake.numel(), int) and fake.numel() <= MAX_ELEMENTS):
            return None
        if node.op in ("placeholder", "get_attr"):
            tensor = self._context.real_tensor(node)
            is_fixed = tensor is not None and not isinstance(tensor, torch.nn.Parameter) and is_of_the_model(tensor)
            return _Known(tensor, frozenset((node,)), frozenset((node,))) if is_fixed else None
        if not _is_pure(node):
            return None
        inputs: dict[fx.Node, _Known] = {}
        for source in node.all_input_nodes:
            self.of(source)
            known = self._known[source]
            if known is None or not self._is_settled(source, known, node):
                return None
            inputs[source] = known
        sources = frozenset().union(*(known.sources for known in inputs.values()))
        nodes = frozenset((node,)).union(*(known.nodes for known in inputs.values()))
        try:
            return _Known(_run(node, inputs), sources, nodes)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None

    def _is_settled(self, source: fx.Node, known: _Known, user: fx.Node) -> bool:
        """Whether `source` still holds its value where `user` reads it: no write but those that made it."""
        for writer in self._writers.get(memory_root(source), ()):
            if writer not in known.nodes and not (writer is user and user.args[0] is source):
                return False
        return True


def is_of_the_model(tensor: Tensor) -> bool:
    """Whether a graph input belongs to the model rather than to the call."""
    # Dynamo marks parameters, buffers and tensors in attributes; the arguments of a call bear no mark.
    return getattr(tensor, ADDRESS_MARK, None) is not None


def _is_pure(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).strip("_") in _PURE
    if node.op != "call_function" or node.kwargs.get("out") is not None:
        return False
    target = node.target
    if target is getattr:
        return len(node.args) == 2 and node.args[1] in _ATTRIBUTES
    is_ours = isinstance(target, types.BuiltinFunctionType) or str(getattr(target, "__module__", "")).startswith(
        "torch"
    )
    name = getattr(target, "__name__", "").strip("_")
    return is_ours and (name in _PURE or (is_in_place(node) and name.removeprefix("i") in _PURE))


def _run(node: fx.Node, inputs: dict[fx.Node, _Known]) -> Any:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        given: Any = fx.map_arg((node.args, dict(node.kwargs)), lambda source: inputs[source].value)
        args, kwargs = given
        if is_in_place(node):
            # The value before the write may be wanted too.
            args = (args[0].clone(), *args[1:])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
