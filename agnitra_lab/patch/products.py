"""Products of an activation with a weight, in every spelling: linear, x @ W.t(), mm, addmm, with views around them."""

from __future__ import annotations

import builtins
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.ops import argument, fake_of, memory_root, op_name
from agnitra_lab.patch.weights import why_not_derivable

_TURNED = ((-2, -1), (-1, -2), (0, 1), (1, 0))


@dataclass(frozen=True)
class Product:
    """One product x W^T + bias.

    Attributes:
        node: the call.
        x: [..., K].
        weight: [N, K], or [K, N] when `is_turned`.
        is_turned: the weight lies the other way round than nn.Linear's.
        bias: [N] or None.
        inner: views of the weight that only the product reads, in graph order.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    is_turned: bool
    bias: fx.Node | None
    inner: tuple[fx.Node, ...] = ()

    def shape(self) -> tuple[int, int, int]:
        """(M, N, K): rows of x, columns of the result, columns of x. Both fakes must be known."""
        x, weight = fake_of(self.x), fake_of(self.weight)
        assert x is not None and weight is not None
        out, num_cols = weight.shape[::-1] if self.is_turned else weight.shape
        return math.prod(int(size) for size in x.shape[:-1]), int(out), int(num_cols)


def find_product(node: fx.Node) -> Product | None:
    """Return the product that a node computes, None when it is another operation or not with a 2-dimensional weight."""
    name = op_name(node)
    is_turned = False
    inner: tuple[fx.Node, ...] = ()
    x: Any
    weight: Any
    if name == "linear":
        x, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    elif name in ("matmul", "addmm") and len(node.args) == (2 if name == "matmul" else 3) and not node.kwargs:
        bias = None if name == "matmul" else node.args[0]
        x, weight = node.args[-2:]
        weight, is_turned, inner = _as_it_lies(weight)
    else:
        return None
    if not isinstance(x, fx.Node) or not (bias is None or isinstance(bias, fx.Node)) or weight is x:
        return None
    fakes = fake_of(x), fake_of(weight), fake_of(node)
    if fakes[0] is None or fakes[1] is None or fakes[2] is None or fakes[0].dim() < 1 or fakes[1].dim() != 2:
        return None
    return Product(node, x, weight, is_turned, bias, inner)


def _as_it_lies(weight: Any) -> tuple[Any, bool, tuple[fx.Node, ...]]:
    """Return the right operand of a matmul under its transpositions, whether it lies [K, N], and the transpositions."""
    nodes: list[fx.Node] = []
    while (source := _turned_source(weight)) is not None:
        nodes.insert(0, weight)
        weight = source
    return weight, len(nodes) % 2 == 0, tuple(nodes)


def _turned_source(node: Any) -> fx.Node | None:
    """Return what a node is the transpose of, None when it is no transposition of a matrix."""
    fake = fake_of(node)
    if fake is None or fake.dim() != 2 or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source: fx.Node = node.args[0]
    name = op_name(node)
    if node.op == "call_function" and node.target is builtins.getattr:
        return source if node.args[1] in ("T", "mT") else None
    if name == "t":
        return source
    if name in ("transpose", "swapaxes") and tuple(node.args[1:]) in _TURNED and not node.kwargs:
        return source
    if name == "permute" and not node.kwargs:
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return source if tuple(order) in ((1, 0), (-1, -2)) else None
    return None


def is_static(node: Any, context: RewriteContext, written: set[fx.Node]) -> bool:
    """Whether a node is a weight: given to the graph or held by it, real, and none of the `written` memory roots."""
    tensor = context.real_tensor(node)
    return type(tensor) in (Tensor, torch.nn.Parameter) and memory_root(node) not in written


def why_not_skinny(product: Product, context: RewriteContext, written: set[fx.Node], max_rows: int) -> str | None:
    """Return why a kernel for few rows cannot compute this product, None when it can.

    Args:
        written: memory roots that the graph writes.
        max_rows: the most rows of x that the kernel takes.
    """
    x, weight, out = fake_of(product.x), fake_of(product.weight), fake_of(product.node)
    assert x is not None and weight is not None and out is not None
    num_rows, num_out, num_cols = product.shape()
    if not 1 <= num_rows <= max_rows:
        return f"the product has more than {max_rows} rows"
    if not x.dtype == weight.dtype == out.dtype or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x, weight and result are not of one floating dtype ({x.dtype}, {weight.dtype}, {out.dtype})"
    if int(x.shape[-1]) != num_cols or min(num_out, num_cols) < 1 or not is_plain(product.node):
        return "x and the weight do not fit, or the result is not contiguous"
    if not is_static(product.weight, context, written):
        return "the weight is computed or written in the graph, or is a tensor subclass"
    if product.is_turned:
        problem = why_not_derivable([context.real_tensor(product.weight)])
        if problem or not isinstance(context.real_tensor(product.weight), torch.nn.Parameter):
            return problem or "the weight lies [K, N] and is not a Parameter, so no turned copy can be kept"
    elif weight.stride(1) != 1:
        return "the weight's rows are not contiguous"
    return _why_not_bias(product, context, written, num_out)


def _why_not_bias(product: Product, context: RewriteContext, written: set[fx.Node], num_out: int) -> str | None:
    if product.bias is None:
        return None
    bias, x = fake_of(product.bias), fake_of(product.x)
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
