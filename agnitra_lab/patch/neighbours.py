"""What stands around a node: whether the compiler would fuse it with its neighbours anyway.

Inductor makes one kernel of a norm or a gated product and the pointwise ops before and after it. A kernel of ours is a
border in that chain: where it cuts one, a tensor goes through memory that would have stayed in registers.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from agnitra_lab.patch.ops import display_name, is_view

_POINTWISE = {
    "add", "sub", "mul", "div", "truediv", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal", "abs", "exp", "log",
    "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "mish", "softplus",
    "hardswish", "hardsigmoid", "hardtanh", "clamp", "clamp_min", "clamp_max", "where", "masked_fill", "maximum",
    "minimum", "erf", "glu", "embedding", "iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_", "relu_",
}  # fmt: skip


def without_views(node: Any) -> Any:
    """Return the node under a chain of views, casts and dropouts."""
    while is_view(node):
        node = node.args[0]
    return node


def is_pointwise(node: Any) -> bool:
    """Whether a node's op, under views, is one that Inductor computes inside the kernel of its reader."""
    node = without_views(node)
    return (
        isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and display_name(node) in _POINTWISE
    )


def is_read_by_pointwise_alone(node: fx.Node) -> bool:
    """Whether all readers of a value, through views, are pointwise: then it need not be in memory at all."""
    return bool(node.users) and all(
        is_read_by_pointwise_alone(user) if is_view(user) else is_pointwise(user) for user in node.users
    )
