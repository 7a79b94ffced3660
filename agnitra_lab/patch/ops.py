"""One name per operation: Dynamo spells one op as a function, a method, an operator or a builtin, rewrites see one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.utils import _pytree

_FUNCTIONS: dict[Callable[..., Any], str] = {
    torch._C._nn.linear: "linear",
    functional.linear: "linear",
    operator.matmul: "matmul",
    torch.matmul: "matmul",
    torch.mm: "matmul",
    torch.addmm: "addmm",
    functional.relu: "relu",
    torch.relu: "relu",
    functional.dropout: "dropout",
    torch.repeat_interleave: "repeat_interleave",
    operator.add: "add",
    torch.add: "add",
    operator.mul: "mul",
    torch.mul: "mul",
    torch.multiply: "mul",
    operator.sub: "sub",
    torch.sub: "sub",
    torch.subtract: "sub",
    operator.truediv: "div",
    torch.div: "div",
    torch.divide: "div",
    torch.true_divide: "div",
    operator.pow: "pow",
    torch.pow: "pow",
    torch.square: "square",
    torch.mean: "mean",
    torch.sum: "sum",
    torch.var: "var",
    torch.var_mean: "var_mean",
    torch.norm: "norm",
    torch.linalg.norm: "norm",
    torch.linalg.vector_norm: "norm",
    torch.clamp: "clamp",
    torch.clamp_min: "clamp_min",
    torch.sqrt: "sqrt",
    torch.rsqrt: "rsqrt",
    torch.sigmoid: "sigmoid",
    functional.sigmoid: "sigmoid",
    functional.silu: "silu",
    functional.gelu: "gelu",
    torch._C._nn.gelu: "gelu",
    functional.glu: "glu",
    functional.layer_norm: "layer_norm",
    torch.layer_norm: "layer_norm",
    functional.group_norm: "group_norm",
    torch.group_norm: "group_norm",
    functional.instance_norm: "instance_norm",
    functional.normalize: "normalize",
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
    getattr: "getattr",
    functional.softmax: "softmax",
    torch.softmax: "softmax",
    torch.special.softmax: "softmax",
    functional.log_softmax: "log_softmax",
    torch.log_softmax: "log_softmax",
    torch.special.log_softmax: "log_softmax",
    functional.cross_entropy: "cross_entropy",
    functional.nll_loss: "nll_loss",
    torch.cumsum: "cumsum",
    torch.flip: "flip",
    torch.gather: "gather",
    torch.exp: "exp",
    torch.bmm: "matmul",
    torch.baddbmm: "baddbmm",
    torch.functional.einsum: "einsum",
    torch.dropout: "dropout",
    torch.masked_fill: "masked_fill",
    torch.where: "where",
    torch.max: "max",
    torch.amax: "amax",
    torch.logsumexp: "logsumexp",
    torch.special.logsumexp: "logsumexp",
    torch.einsum: "einsum",
    functional.bilinear: "bilinear",
    functional.conv1d: "conv1d",
    torch.conv1d: "conv1d",
    functional.conv3d: "conv3d",
    torch.conv3d: "conv3d",
    functional.conv_transpose1d: "conv_transpose1d",
    torch.conv_transpose1d: "conv_transpose1d",
    functional.conv_transpose2d: "conv_transpose2d",
    torch.conv_transpose2d: "conv_transpose2d",
    functional.conv_transpose3d: "conv_transpose3d",
    torch.conv_transpose3d: "conv_transpose3d",
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
    torch.topk: "topk",
    torch.sort: "sort",
    torch.multinomial: "multinomial",
    torch.diag: "diag",
    torch.diag_embed: "diag_embed",
    torch.linalg.diagonal: "diagonal",
    operator.neg: "neg",
    torch.neg: "neg",
    torch.negative: "neg",
    torch.tanh: "tanh",
    functional.tanh: "tanh",
    functional.adaptive_avg_pool1d: "adaptive_avg_pool",
    torch.adaptive_avg_pool1d: "adaptive_avg_pool",
    functional.adaptive_avg_pool2d: "adaptive_avg_pool",
    functional.adaptive_avg_pool3d: "adaptive_avg_pool",
    torch.t: "t",
    torch.index_select: "index_select",
}

_METHODS = {
    "add", "sub", "mul", "div", "pow", "square", "mean", "sum", "max", "amax", "var", "norm", "clamp", "clamp_min",
    "sqrt", "rsqrt", "exp", "logsumexp", "sigmoid", "relu", "softmax", "log_softmax", "cumsum", "flip", "gather",
    "topk", "sort", "multinomial", "matmul", "baddbmm", "addmm", "masked_fill", "where", "clone", "bool",
    "repeat_interleave", "float", "to", "type", "type_as", "view", "reshape", "transpose", "permute", "unsqueeze",
    "squeeze", "flatten",
    "unflatten", "split", "chunk", "unbind", "select", "narrow", "expand", "expand_as", "contiguous", "detach",
    "view_as", "t", "swapaxes", "movedim", "as_strided", "half", "double", "bfloat16", "cpu", "cuda", "alias",
    "diagonal", "unfold", "tensor_split", "reshape_as", "index_select", "neg", "tanh", "diag", "diag_embed",
}  # fmt: skip

# `x.T` is no call of an op of its own: Dynamo leaves the attribute to the tensor.
_ATTRIBUTES = {"T": "t", "mT": "matrix_transpose"}

_METHOD_NAMES = {
    "bmm": "matmul", "mm": "matmul", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub",
}  # fmt: skip

_IN_PLACE_TWINS = {operator.iadd: "add", operator.isub: "sub", operator.imul: "mul", operator.itruediv: "div"}

_CASTS = {"float", "to", "type", "type_as", "half", "double", "bfloat16", "cpu", "cuda"}

# Results of these may share memory with their first argument.
_VIEWS = _CASTS | {
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "unflatten", "split", "chunk",
    "unbind", "select", "narrow", "expand", "expand_as", "contiguous", "detach", "view_as", "t", "swapaxes",
    "movedim", "as_strided", "getitem", "alias", "diagonal", "unfold", "tensor_split", "reshape_as", "getattr",
    "matrix_transpose",
    "dropout",
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
        if node.target is getattr and len(node.args) == 2 and node.args[1] in _ATTRIBUTES:
            return _ATTRIBUTES[str(node.args[1])]
        return _FUNCTIONS.get(node.target) if callable(node.target) else None
    if node.op == "call_method":
        name = _METHOD_NAMES.get(str(node.target), str(node.target))
        return name if name in _METHODS else None
    return None


def value_name(node: Any) -> str | None:
    """Return `op_name`, with an in-place op under the name of the op whose value it leaves: `x += y` is an add."""
    if isinstance(node, fx.Node) and is_in_place(node):
        if node.op == "call_method":
            name = _METHOD_NAMES.get(str(node.target)[:-1], str(node.target)[:-1])
            return name if name in _METHODS else None
        return _IN_PLACE_TWINS.get(node.target) if callable(node.target) else None
    return op_name(node)


def thread_in_place(graph: fx.Graph) -> None:
    """Let every later use of a tensor that was written in place read the write's own result, which is that tensor.

    The graph computes the same; a pattern is then one chain, whether its author wrote `x.add_(y)` as a statement or
    `x = x + y`.
    """
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        seen.add(node)
        is_chain = value_name(node) is not None and is_in_place(node) and node.kwargs.get("out") is None
        target = node.args[0] if is_chain and node.args else None
        if isinstance(target, fx.Node) and value_name(node) != "setitem":
            target.replace_all_uses_with(node, delete_user_cb=lambda user: user not in seen)


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


def is_widening(node: Any) -> bool:
    """Whether a node is a cast that loses nothing, such as bfloat16 to float32."""
    before, after = (fake_of(node.args[0]), fake_of(node)) if is_cast(node) else (None, None)
    return before is not None and after is not None and torch.promote_types(before.dtype, after.dtype) is after.dtype


def without_widening(node: Any) -> Any:
    """Return the value under a chain of casts that lose nothing."""
    while is_widening(node):
        node = node.args[0]
    return node


def is_view(node: Any) -> bool:
    """Whether a node's result may share memory with its first argument: a view, a cast, a dropout that is off."""
    return op_name(node) in _VIEWS


def binary(node: Any, name: str) -> tuple[Any, Any] | None:
    """Return both operands when `node` is the plain two-operand op `name` (no `alpha`, no `out`)."""
    if op_name(node) != name or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[0], node.args[1]


def memory_root(node: fx.Node) -> fx.Node:
    """Return the node whose memory `node` may share, through views, and casts and dropouts that may be no copy."""
    while is_view(node) or is_in_place(node):
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
    kwargs = node.kwargs
    return _is_writer(node.target) or (
        bool(kwargs) and (kwargs.get("inplace") is True or kwargs.get("out") is not None)
    )


# Rewrites ask this of each node of a graph again and again: 267,000 times for 22 layers.
@lru_cache(maxsize=4096)
def _is_writer(target: Any) -> bool:
    if target in _PYTHON_IN_PLACE:
        return True
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = getattr(target, "__name__", "")
    # Python's own `and_`, `or_` and `not_` are named after keywords.
    is_keyword = getattr(target, "__module__", "") == operator.add.__module__
    return name.endswith("_") and not name.endswith("__") and not is_keyword


def written_nodes(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the values that an in-place node may write: what an op's schema says, else the first argument."""
    if not is_in_place(node):
        return
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        yield out
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        if node.args and isinstance(node.args[0], fx.Node):
            yield node.args[0]
    elif hasattr(schema, "arguments"):
        for index, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
                yield from (value for value in _pytree.tree_leaves(given) if isinstance(value, fx.Node))
    else:
        yield from node.all_input_nodes


def is_torchs_own(target: Any) -> bool:
    """Whether a function comes with torch or Python: an operator with a schema of its own may be anybody's."""
    module = str(getattr(target, "__module__", None) or "torch")
    return module.startswith(("torch", "_operator", "builtins")) and not hasattr(target, "_schema")


def escaping_roots(graph: fx.Graph) -> set[fx.Node]:
    """Return the memory roots that leave the graph as outputs."""
    return {memory_root(node) for output in graph.find_nodes(op="output") for node in output.all_input_nodes}


def mutated_roots(graph: fx.Graph) -> set[fx.Node]:
    """Return the memory roots that anything in the graph writes to."""
    writers = [node for node in graph.nodes if is_in_place(node)]
    return {memory_root(target) for node in writers for target in written_nodes(node)}


def is_written_between(root: fx.Node, first: fx.Node, last: fx.Node) -> bool:
    """Whether memory of `root` is written by a node from `first` up to `last`, both included."""
    node = first
    while True:
        if any(memory_root(target) is root for target in written_nodes(node)):
            return True
        if node is last or node.op == "output":
            return False
        node = node.next
