"""One name per operation: Dynamo spells one op as a function, a method, an operator or a builtin, rewrites see one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

_FUNCTIONS: dict[Callable[..., Any], str] = {
    torch._C._nn.linear: "linear",
    functional.linear: "linear",
    operator.add: "add",
    torch.add: "add",
    operator.mul: "mul",
    torch.mul: "mul",
    torch.multiply: "mul",
    operator.pow: "pow",
    torch.pow: "pow",
    torch.square: "square",
    torch.mean: "mean",
    torch.rsqrt: "rsqrt",
    torch.sigmoid: "sigmoid",
    functional.sigmoid: "sigmoid",
    functional.silu: "silu",
    functional.gelu: "gelu",
    torch._C._nn.gelu: "gelu",
    functional.rms_norm: "rms_norm",
    torch.rms_norm: "rms_norm",
    functional.batch_norm: "batch_norm",
    torch.batch_norm: "batch_norm",
    functional.conv2d: "conv2d",
    torch.conv2d: "conv2d",
    functional.scaled_dot_product_attention: "sdpa",
    torch._C._nn.scaled_dot_product_attention: "sdpa",
    operator.getitem: "getitem",
    torch.narrow: "narrow",
    torch.reshape: "reshape",
    torch.transpose: "transpose",
    torch.permute: "permute",
    torch.unsqueeze: "unsqueeze",
    torch.squeeze: "squeeze",
    torch.flatten: "flatten",
    torch.split: "split",
    torch.chunk: "chunk",
    torch.unbind: "unbind",
    torch.select: "select",
    torch.swapaxes: "swapaxes",
    torch.movedim: "movedim",
    torch.diagonal: "diagonal",
    torch.unflatten: "unflatten",
    torch.tensor_split: "tensor_split",
    operator.setitem: "setitem",
}

_METHODS = {
    "add", "mul", "pow", "square", "mean", "rsqrt", "sigmoid", "float", "to", "type", "type_as", "view", "reshape",
    "transpose", "permute", "unsqueeze", "squeeze", "flatten", "unflatten", "split", "chunk", "unbind", "select",
    "narrow", "expand", "expand_as", "contiguous", "detach", "view_as", "t", "swapaxes", "movedim", "as_strided",
    "half", "double", "bfloat16", "cpu", "cuda", "alias", "diagonal", "unfold", "tensor_split", "reshape_as",
}  # fmt: skip

_CASTS = {"float", "to", "type", "type_as", "half", "double", "bfloat16", "cpu", "cuda"}

# Results of these may share memory with their first argument.
_VIEWS = _CASTS | {
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "unflatten", "split", "chunk",
    "unbind", "select", "narrow", "expand", "expand_as", "contiguous", "detach", "view_as", "t", "swapaxes",
    "movedim", "as_strided", "getitem", "alias", "diagonal", "unfold", "tensor_split", "reshape_as",
}  # fmt: skip

_PYTHON_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imatmul, operator.setitem,
    operator.ifloordiv, operator.imod, operator.iand, operator.ior, operator.ixor,
}  # fmt: skip


def op_name(node: Any) -> str | None:
    """Return the canonical name of a node's operation, None when it is not a call that rewrites know."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target) if callable(node.target) else None
    if node.op == "call_method":
        return str(node.target) if node.target in _METHODS else None
    return None


def display_name(node: fx.Node) -> str:
    """Return the name of a node's operation for descriptors: canonical where known, else the target's own name."""
    return op_name(node) or str(
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "call")
    )


def fake_of(node: Any) -> Tensor | None:
    """Return the fake tensor that Dynamo recorded for a node (shape, dtype, stride, device), None if there is none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def is_cast(node: Any) -> bool:
    """Whether a node only changes the dtype (or nothing) of its first argument."""
    if op_name(node) not in _CASTS:
        return False
    before, after = fake_of(node.args[0]), fake_of(node)
    return before is not None and after is not None and before.shape == after.shape and before.device == after.device


def without_casts(node: Any) -> Any:
    """Return the value under a chain of dtype casts."""
    while is_cast(node):
        node = node.args[0]
    return node


def binary(node: Any, name: str) -> tuple[Any, Any] | None:
    """Return both operands when `node` is the plain two-operand op `name` (no `alpha`, no `out`)."""
    if op_name(node) != name or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[0], node.args[1]


def memory_root(node: fx.Node) -> fx.Node:
    """Return the node whose memory `node` may share, through views and casts that may be no copy."""
    while op_name(node) in _VIEWS or is_in_place(node):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return node
        node = source
    return node


def is_in_place(node: fx.Node) -> bool:
    """Whether a node writes into an argument: `x.add_()`, `x += y`, `x[i] = y`, `out=`, `inplace=True`."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    if node.target in _PYTHON_IN_PLACE or node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None:
        return True
    return _mutates_by_schema_or_name(node.target)


def _mutates_by_schema_or_name(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = getattr(target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def written_nodes(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the values that an in-place node may write: all tensor arguments of an op with a schema, else the first."""
    if not is_in_place(node):
        return
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        yield out
    if getattr(node.target, "_schema", None) is not None:
        yield from node.all_input_nodes
    elif node.args and isinstance(node.args[0], fx.Node):
        yield node.args[0]


def mutated_roots(graph: fx.Graph) -> set[fx.Node]:
    """Return the memory roots that anything in the graph writes to."""
    return {memory_root(target) for node in graph.nodes for target in written_nodes(node)}


def is_written_between(root: fx.Node, first: fx.Node, last: fx.Node) -> bool:
    """Whether memory of `root` is written by a node from `first` up to `last`, both included."""
    node = first
    while True:
        if any(memory_root(target) is root for target in written_nodes(node)):
            return True
        if node is last or node.op == "output":
            return False
        node = node.next
