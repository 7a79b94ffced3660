"""Weights of widths that no tensor core takes get zeros up to the next multiple of 8, where that measures faster.

Trigger: a product of half-precision values with a weight [N, K] (in any spelling) where N or K is no multiple of 8:
heads over 50,257 words, class counts, odd feature widths.
Algebra: rows of zeros give columns that nobody reads; columns of zeros meet zeros of x.
Guard: the weight and the bias are Parameters with version counters that the graph does not write; the padded copies
follow updates. Both forms are measured on random tensors, each distinct product once; the padded one must be more than
3% faster. Results that leave the graph get their strides back from the drop-in.
Source: NVIDIA, "Deep Learning Performance: Matrix Multiplication", section on tensor core requirements (16 bytes).
Inductor's `pad_mm` pads too, but its copy of the weight is made at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import linear as call_linear
from torch.nn.functional import pad

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.device.call_time import time_ms
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.convolutions import random_like, real_tensors
from agnitra_lab.patch.emit import emit
from agnitra_lab.patch.layouts import LayoutFlow
from agnitra_lab.patch.matmuls import MatMul, match_half_product
from agnitra_lab.patch.measured import Measured, Times, layouts_of
from agnitra_lab.patch.ops import fake_of, memory_root, mutated_roots
from agnitra_lab.patch.weights import why_not_derivable

ACTION = "padded_linear"
_MULTIPLE = 8
_LEAST_ROWS = 16
"""Products of fewer rows are reads of their weight, at any width."""


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Pad each weight for which that measures faster.

    Returns:
        One descriptor per product.
    """
    descriptors, flow = [], LayoutFlow(context)
    measured = Measured(ACTION, context)
    written = mutated_roots(graph_module.graph)
    num_found = 0
    for node in list(graph_module.graph.nodes):
        product = _match(node)
        if product is None:
            if node.op != "output":
                flow.carry_over(node)
            continue
        num_found += 1
        problem = _why_not(product, written, context)
        times = None if problem else _judge(product, measured)
        if problem:
            context.refuse(ACTION, problem)
        if times is None:
            flow.carry_over(node)
        else:
            descriptors.append(_replace(product, times, context, flow))
    if not num_found:
        context.refuse(ACTION, "no product of half-precision values has a weight of an odd width")
    return descriptors


def _match(node: fx.Node) -> MatMul | None:
    product = match_half_product(node, _LEAST_ROWS)
    if product is None:
        return None
    is_odd = product.num_n % _MULTIPLE or product.num_k % _MULTIPLE
    weight = fake_of(product.b)
    return product if is_odd and weight is not None and weight.dim() == 2 else None


def _why_not(product: MatMul, written: set[fx.Node], context: RewriteContext) -> str | None:
    given = [each for each in (product.b, product.bias) if each is not None]
    if not all(context.is_weight(each) for each in given):
        return "a weight of an odd width is computed in the graph"
    if any(memory_root(each) in written for each in given):
        return "the graph itself writes to a weight"
    known = [tensor for tensor in map(context.real_tensor, given) if tensor is not None]
    return why_not_derivable(known)


def _judge(product: MatMul, measured: Measured) -> Times | None:
    """Return the times in ms of the product as it is and of the padded one, where that is faster."""
    x, weight, bias = fake_of(product.a), fake_of(product.b), fake_of(product.bias)
    assert x is not None and weight is not None
    return measured.faster(
        (product.is_b_transposed, layouts_of(x, weight, bias)),
        lambda: measure(x, weight, bias, product.is_b_transposed),
        f"the product of {product.num_n} x {product.num_k}", "padded",
    )  # fmt: skip


def measure(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Times | None:
    """Time both forms of a product on random tensors like these fakes."""
    with real_tensors():
        x, weight = random_like(x), random_like(weight)
        bias = None if bias is None else random_like(bias)
        rows = weight if is_transposed else weight.t()
        wide, shift = _padded_rows(rows), None if bias is None else _padded_values(bias)
        plain = time_ms(lambda: call_linear(x, rows, bias), x.device)
        padded = time_ms(lambda: call_linear(pad(x, (0, wide.shape[1] - x.shape[-1])), wide, shift), x.device)
    return None if plain is None or padded is None else (plain, padded)


def _missing(size: int) -> int:
    return -size % _MULTIPLE


def _padded_rows(weight: Tensor) -> Tensor:
    return pad(weight, (0, _missing(weight.shape[1]), 0, _missing(weight.shape[0]))).contiguous()


def _padded_columns(weight: Tensor) -> Tensor:
    return _padded_rows(weight.t())


def _padded_values(bias: Tensor) -> Tensor:
    return pad(bias, (0, _missing(bias.shape[0])))


def _replace(product: MatMul, times: Times, context: RewriteContext, flow: LayoutFlow) -> PatchDescriptor:
    node, old = product.node, fake_of(product.node)
    num_n, num_k = (size + _missing(size) for size in (product.num_n, product.num_k))
    descriptor = context.describe(
        ACTION, node, [node], f"linear with a weight of {num_n} x {num_k}",
        {"num_n": product.num_n, "num_k": product.num_k, "plain_ms": round(times[0], 6),
         "padded_ms": round(times[1], 6)},
    )  # fmt: skip
    build = _padded_rows if product.is_b_transposed else _padded_columns
    weight = context.derive(ACTION, [product.b], build, node, (product.is_b_transposed,))
    bias = None
    if product.bias is not None:
        bias = context.derive(f"{ACTION}_bias", [product.bias], _padded_values, node)
    x = product.a
    if num_k != product.num_k:
        x = emit(context, node, pad, x, (0, num_k - product.num_k))
    out = emit(context, node, torch._C._nn.linear, x, weight, bias)
    if num_n != product.num_n:
        out = emit(context, node, torch.narrow, out, -1, 0, product.num_n)
    node.replace_all_uses_with(out)
    flow.changed(out, old)
    node.graph.erase_node(node)
    erase_unused(product.turns)
    return descriptor
