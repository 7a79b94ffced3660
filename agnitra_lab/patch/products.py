"""Products of few rows with a weight: what one kernel can compute, and the views around them that keep rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.matmuls import MatMul
from agnitra_lab.patch.ops import argument, fake_of, memory_root, op_name
from agnitra_lab.patch.weights import why_not_derivable


def is_static(node: Any, context: RewriteContext, written: set[fx.Node]) -> bool:
    """Whether a node is a weight: given to the graph or held by it, real, and none of the `written` memory roots."""
    tensor = context.real_tensor(node)
    return type(tensor) in (Tensor, torch.nn.Parameter) and memory_root(node) not in written


def why_not_skinny(product: MatMul, context: RewriteContext, written: set[fx.Node], max_rows: int) -> str | None:
    """Return why a kernel for few rows cannot compute this product, None when it can.

    Args:
        written: memory roots that the graph writes.
        max_rows: the most rows of x that the kernel takes.
    """
    x, weight, out = fake_of(product.a), fake_of(product.b), fake_of(product.node)
    assert x is not None and weight is not None and out is not None
    num_rows, num_out, num_cols = product.shape
    if weight.dim() != 2 or product.a is product.b:
        return "the right operand is no matrix of its own"
    if not 1 <= num_rows <= max_rows:
        return f"the product has more than {max_rows} rows"
    if not x.dtype == weight.dtype == out.dtype or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x, weight and result are not of one floating dtype ({x.dtype}, {weight.dtype}, {out.dtype})"
    if min(num_out, num_cols) < 1 or not is_plain(product.node):
        return "x and the weight do not fit, or the result is not contiguous"
    if not is_static(product.b, context, written):
        return "the weight is computed or written in the graph, or is a tensor subclass"
    if not product.is_b_transposed:
        problem = why_not_derivable([context.real_tensor(product.b)])
        if problem or not context.is_weight(product.b):
            return problem or "the weight lies [K, N] and is not a Parameter, so no turned copy can be kept"
    elif weight.stride(1) != 1:
        return "the weight's rows are not contiguous"
    return _why_not_bias(product, context, written, num_out)


def _why_not_bias(product: MatMul, context: RewriteContext, written: set[fx.Node], num_out: int) -> str | None:
    if product.bias is None:
        return None
    bias, x = fake_of(product.bias), fake_of(product.a)
    if bias is None or x is None or not is_static(product.bias, context, written):
        return "the bias is computed or written in the graph"
    if tuple(bias.shape) != (num_out,) or bias.dtype != x.dtype or bias.stride(0) != 1:
        return "the bias is not one contiguous value of x's dtype a column"
    return None


def is_plain(node: fx.Node) -> bool:
    """Whether a value has the strides of a new tensor, which is what a kernel gives."""
    fake = fake_of(node)
    return fake is not None and fake.stride() == torch.empty(fake.shape, device="meta").stride()


def under_views(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Return the value under views that keep the last dimension (and dropout that does nothing), and those nodes."""
    nodes: list[fx.Node] = []
    while keeps_rows(node):
        nodes.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    return node, tuple(nodes)


def keeps_rows(node: Any) -> bool:
    """Whether a node holds the rows of its first argument unchanged, whatever their leading dimensions."""
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    name = op_name(node)
    if name == "dropout":
        return argument(node, 2, "training", True) is False and argument(node, 3, "inplace", False) is False
    if name not in ("view", "reshape", "flatten", "contiguous", "unsqueeze", "squeeze", "view_as", "reshape_as"):
        return False
    before, after = fake_of(node.args[0]), fake_of(node)
    if before is None or after is None or before.dtype != after.dtype or not before.is_contiguous():
        return False
    return before.dim() > 0 and after.dim() > 0 and before.shape[-1] == after.shape[-1]


def over_views(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Follow a value over views that keep its rows, as long as each is all that is read of it."""
    passed: list[fx.Node] = []
    for user in _sole_users(node):
        if not keeps_rows(user):
            break
        passed.append(user)
        node = user
    return node, passed


def _sole_users(node: fx.Node) -> Iterator[fx.Node]:
    while len(node.users) == 1:
        node = next(iter(node.users))
        yield node
