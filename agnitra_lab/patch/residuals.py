"""What a norm's kernel takes besides x: the residual sum before it, and weight and bias in the kernel's own shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.ops import binary, fake_of, is_written_between, memory_root


def residual_sum(x: fx.Node, result: fx.Node, weights: Sequence[fx.Node | None]) -> tuple[fx.Node, fx.Node] | None:
    """Return both summands when x is a plain sum that a kernel can take over where it stands.

    Args:
        x: the value that is normed.
        result: the norm's value; nothing may write x up to there.
        weights: the norm's other inputs, which must exist where the sum stands.
    """
    operands = binary(x, "add")
    if operands is None or any(weight is not None and not _is_input(weight) for weight in weights):
        return None
    left, right = operands
    fakes = (fake_of(left), fake_of(right), fake_of(x))
    if not all(isinstance(fake, Tensor) for fake in fakes):
        return None
    if len({(tuple(fake.shape), fake.dtype, fake.device) for fake in fakes if fake is not None}) != 1:
        return None
    # The kernel runs where the sum stood; a write between there and the norm would come too late for it.
    if is_written_between(memory_root(x), x, result):
        return None
    return left, right


def _is_input(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def input_at(node: fx.Node, before: fx.Node, context: RewriteContext) -> fx.Node:
    """Return a node that reads the same graph input or attribute, and stands before the given one."""
    if node.op == "placeholder":
        return node
    with context.graph_module.graph.inserting_before(before):
        earlier = context.graph_module.graph.get_attr(str(node.target))
    earlier.meta = dict(node.meta)
    return earlier


def why_not_affine(weight: fx.Node | None, bias: fx.Node | None, num_values: int, dtype: torch.dtype) -> str | None:
    """Say why a kernel cannot read weight and bias: it needs `num_values` contiguous values of x's dtype or float32."""
    for name, node in (("weight", weight), ("bias", bias)):
        tensor = fake_of(node)
        if node is None:
            continue
        if tensor is None or tensor.numel() != num_values or not tensor.is_contiguous():
            return f"the {name} is not one contiguous value per normalised element or channel"
        if tensor.dtype not in (dtype, torch.float32):
            return f"x and the {name} differ in dtype ({dtype}, {tensor.dtype})"
    return None


def shaped(node: fx.Node | None, shape: Sequence[int], before: fx.Node, context: RewriteContext) -> fx.Node | None:
    """Return a weight in the kernel's shape: models keep one of channels as [C, 1, 1], or view it so."""
    fake = fake_of(node)
    if node is None or fake is None or tuple(fake.shape) == tuple(shape):
        return node
    view = context.call(before, torch.reshape, node, tuple(shape))
    view.meta["example_value"] = fake.reshape(tuple(shape))
    return view
