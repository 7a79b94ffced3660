"""Convolutions with one tap become matrix products on the memory that they read anyway, where that measures faster.

Trigger: conv1d, conv2d or conv3d over a batch with taps of size one, stride one, no padding and no groups, whose input
is contiguous, or has its channels innermost (`channels_last` runs before, and conv1d often reads a turned linear).
Algebra: y[n, :, p] = W x[n, :, p] + b. With the channels innermost a linear over the last dimension of a view; in
planes W @ x[n] for each image, of a view too. No value is moved.
Guard: both are measured on random tensors with the layout of the graph, each distinct one once; the product must be
more than 3% faster. Results that leave the graph keep their strides.
Source: im2col with one tap is the identity; Inductor's option `conv_1x1_as_mm` does the same to all, unmeasured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.device.call_time import time_ms
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.convolutions import random_like, real_tensors, searched_algorithms
from agnitra_lab.patch.emit import emit
from agnitra_lab.patch.layouts import LayoutFlow
from agnitra_lab.patch.measured import Measured, Times, layouts_of
from agnitra_lab.patch.ops import argument, fake_of, op_name

ACTION = "pointwise_conv"
_HALF = (torch.bfloat16, torch.float16)
_RANKS = {"conv1d": 3, "conv2d": 4, "conv3d": 5}


@dataclass(frozen=True)
class _Pointwise:
    """One convolution with a single tap."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    is_innermost: bool
    """x has its channels innermost; else each channel is a plane."""


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each convolution for which the product measures faster.

    Returns:
        One descriptor per convolution.
    """
    descriptors, flow = [], LayoutFlow(context)
    measured = Measured(ACTION, context)
    num_found = 0
    for node in list(graph_module.graph.nodes):
        found = _match(node)
        num_found += found is not None
        times = _judge(found, measured) if isinstance(found, _Pointwise) else None
        if isinstance(found, str):
            context.refuse(ACTION, found)
        if isinstance(found, _Pointwise) and times is not None:
            descriptors.append(_replace(found, times, context, flow))
        else:
            flow.carry_over(node)
    if not num_found:
        context.refuse(ACTION, "the graph has no convolution with a single tap")
    return descriptors


def _match(node: fx.Node) -> _Pointwise | str | None:
    rank = _RANKS.get(str(op_name(node)))
    x, weight = fake_of(argument(node, 0, "input")), fake_of(argument(node, 1, "weight"))
    if rank is None or x is None or weight is None or fake_of(node) is None or x.dim() != rank:
        return None
    if any(size != 1 for size in weight.shape[2:]) or argument(node, 6, "groups", 1) != 1:
        return None
    if not _is_all(argument(node, 3, "stride", 1), 1) or not _is_all(argument(node, 4, "padding", 0), 0):
        return "a convolution with a single tap has a stride or padding"
    is_innermost = x.movedim(1, -1).is_contiguous() and (not x.is_contiguous() or math.prod(x.shape[2:]) == 1)
    if not is_innermost and not x.is_contiguous():
        return "the input of a convolution is neither contiguous nor has its channels innermost"
    bias = argument(node, 2, "bias")
    return _Pointwise(node, argument(node, 0, "input"), argument(node, 1, "weight"), bias, is_innermost)


def _is_all(value: Any, wanted: int) -> bool:
    if isinstance(value, str):
        # One tap needs no padding to keep the size.
        return True
    return all(item == wanted for item in (value if isinstance(value, (tuple, list)) else (value,)))


def _judge(found: _Pointwise, measured: Measured) -> Times | None:
    """Return the times in ms of the convolution and of the product where the product is faster."""
    fakes = [fake_of(source) for source in (found.x, found.weight, found.bias)]
    return measured.faster(
        (found.is_innermost, layouts_of(*fakes)), lambda: measure(found.node, fakes, found.is_innermost),
        "a convolution with a single tap", "its product",
    )  # fmt: skip


def measure(node: fx.Node, fakes: Sequence[Tensor | None], is_innermost: bool) -> Times | None:
    """Time a convolution and its product on random tensors of the given layout."""
    target: Any = node.target
    with real_tensors(), searched_algorithms():
        x, weight, bias = (None if fake is None else random_like(fake) for fake in fakes)
        assert x is not None and weight is not None
        conv = time_ms(lambda: target(x, weight, bias), x.device)
        product = time_ms(lambda: _product(x, weight, bias, is_innermost), x.device)
    return None if conv is None or product is None else (conv, product)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, is_innermost: bool) -> Tensor:
    matrix = weight.flatten(1)
    if is_innermost:
        return torch.nn.functional.linear(x.movedim(1, -1), matrix, bias)
    if bias is not None and x.dtype in _HALF:
        return torch.baddbmm(bias[:, None], matrix.expand(x.shape[0], -1, -1), x.flatten(2))
    out = torch.matmul(matrix, x.flatten(2))
    return out if bias is None else out + bias[:, None]


def _replace(found: _Pointwise, times: Times, context: RewriteContext, flow: LayoutFlow) -> PatchDescriptor:
    node, old = found.node, fake_of(found.node)
    assert old is not None
    config: dict[str, JsonValue] = {"conv_ms": round(times[0], 6), "product_ms": round(times[1], 6)}
    form = "linear over the channels" if found.is_innermost else "product of each image"
    descriptor = context.describe(ACTION, node, [node], form, config)
    matrix = emit(context, node, torch.flatten, found.weight, 1)
    if found.is_innermost:
        turned = emit(context, node, torch.movedim, found.x, 1, -1)
        out = emit(context, node, torch._C._nn.linear, turned, matrix, found.bias)
        out = emit(context, node, torch.movedim, out, -1, 1)
    else:
        planes = emit(context, node, torch.flatten, found.x, 2)
        column = None if found.bias is None else emit(context, node, torch.unsqueeze, found.bias, -1)
        if column is not None and old.dtype in _HALF:
            # One rounding, as the convolution has: the sum of a rounded product and a bias is rounded twice.
            matrix = emit(context, node, "expand", matrix, int(old.shape[0]), -1, -1)
            out = emit(context, node, torch.baddbmm, column, matrix, planes)
        else:
            out = emit(context, node, torch.matmul, matrix, planes)
            out = out if column is None else emit(context, node, torch.add, out, column)
        out = emit(context, node, torch.reshape, out, tuple(int(size) for size in old.shape))
    node.replace_all_uses_with(out)
    if out.meta["example_value"].stride() != old.stride():
        flow.changed(out, old)
    node.graph.erase_node(node)
    return descriptor
