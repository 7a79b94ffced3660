"""A product that is added to a residual stream is added by the product itself, in the stream's own memory.

Trigger: residual + linear(x, W) without a bias, in any spelling of product and sum, of half-precision values; the
residual is a value of the graph's own that nothing reads after the sum.
Algebra: none; the matrix library adds its fp32 sums to C (beta = 1) and rounds once where eager rounds twice.
Guard: the residual shares memory with no input, weight, output or operand of the product; the weight is no value of the
graph's. Both forms are measured on random tensors, each distinct product once; this one must be more than 3% faster.
The norm after it then reads one tensor and writes one, instead of two and two.
Source: the GEMM of BLAS, C = A B + C (Dongarra et al. 1990); CUTLASS's linear-combination epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.library import custom_op

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.device.call_time import time_ms
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.convolutions import random_like, real_tensors
from agnitra_lab.patch.matmuls import MatMul, match_product
from agnitra_lab.patch.measured import Measured, Times, layouts_of
from agnitra_lab.patch.ops import binary, escaping_roots, fake_of, memory_root, mutated_roots
from agnitra_lab.patch.products import is_plain, is_static, under_views

ACTION = "residual_gemm"
_LEAST_ROWS = 17
"""Products of fewer rows are `skinny_gemm`'s, which adds a residual too."""


# Opaque to Inductor, which would take the sum of addmm's first operand into new memory first. That the residual is
# written is in the signature: where somebody still needs the old value, Inductor copies it.
@custom_op("agnitra::residual_gemm_", mutates_args=("residual",))
def add_product_(residual: Tensor, x: Tensor, weight: Tensor, is_transposed: bool) -> None:
    """Add a product to a tensor in place.

    Args:
        residual: [..., N], contiguous.
        x: [..., K].
        weight: [N, K] where it is transposed, as `linear` takes it, else [K, N].
        is_transposed: which of the two.
    """
    rows = residual.view(-1, residual.shape[-1])
    rows.addmm_(x.reshape(-1, x.shape[-1]), weight.t() if is_transposed else weight)


@add_product_.register_fake
def _(residual: Tensor, x: Tensor, weight: Tensor, is_transposed: bool) -> None:
    return None


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Let each product be added where its residual lies, where that measures faster.

    Returns:
        One descriptor per product.
    """
    descriptors = []
    measured = Measured(ACTION, context)
    num_found = 0
    for node in list(graph_module.graph.nodes):
        for residual, product in _matches(node):
            num_found += 1
            problem = _why_not(node, residual, product, context)
            if problem:
                context.refuse(ACTION, problem)
            elif (times := _judge(residual, product, measured)) is not None:
                descriptors.append(_replace(node, residual, product, times, context))
                break
    if not num_found:
        context.refuse(ACTION, "no half-precision product without a bias is added to a residual")
    return descriptors


def _matches(node: fx.Node) -> list[tuple[fx.Node, MatMul]]:
    """Return each way to read a node as a residual plus a product."""
    operands, out = binary(node, "add"), fake_of(node)
    if operands is None or out is None or out.dtype not in (torch.bfloat16, torch.float16):
        return []
    found = []
    for residual, value in (operands, operands[::-1]):
        product = match_product(under_views(value)[0]) if isinstance(value, fx.Node) else None
        fakes = [fake_of(residual), *(map(fake_of, (product.a, product.b)) if product is not None else [])]
        is_alike = all(fake is not None and fake.dtype == out.dtype for fake in fakes)
        if product is None or not is_alike or product.bias is not None or product.num_batches != 1:
            continue
        if product.num_m >= _LEAST_ROWS and fakes[0] is not None and fakes[0].shape == out.shape:
            found.append((residual, product))
    return found


def _why_not(node: fx.Node, residual: fx.Node, product: MatMul, context: RewriteContext) -> str | None:
    graph, root = node.graph, memory_root(residual)
    weight = fake_of(product.b)
    if weight is None or weight.dim() != 2 or not is_static(product.b, context, mutated_roots(graph)):
        return "the right operand of the product is no weight"
    if not (is_plain(residual) and is_plain(node) and is_plain(product.node)):
        return "the residual or the product is not contiguous"
    if _num_uses(product, node) != 1:
        return "the product is read by others too"
    if root.op in ("placeholder", "get_attr") or root in escaping_roots(graph) - {memory_root(node)}:
        return "the residual is an input, a weight or a result of the model"
    if memory_root(product.a) is root:
        return "the residual is an operand of the product itself"
    shared = [other for other in graph.nodes if memory_root(other) is root]
    if any(node < user for other in shared for user in other.users):
        return "the residual is read after the sum"
    return None


def _num_uses(product: MatMul, node: fx.Node) -> int:
    """Count the readers of the product and of its views on the way to the sum."""
    value, num = product.node, len(product.node.users)
    while num == 1 and (user := next(iter(value.users))) is not node:
        value, num = user, len(user.users)
    return num


def _judge(residual: fx.Node, product: MatMul, measured: Measured) -> Times | None:
    """Return the times in ms of product and sum, and of both in one, where that is faster."""
    stream, x, weight = fake_of(residual), fake_of(product.a), fake_of(product.b)
    assert stream is not None and x is not None and weight is not None
    return measured.faster(
        (product.is_b_transposed, layouts_of(stream, x, weight)),
        lambda: measure(stream, x, weight, product.is_b_transposed),
        f"the product of {product.num_n} x {product.num_k} and the sum after it", "in one",
    )  # fmt: skip


def measure(residual: Tensor, x: Tensor, weight: Tensor, is_transposed: bool) -> Times | None:
    """Time both forms on random tensors like these fakes."""
    with real_tensors():
        residual, x, weight = random_like(residual), random_like(x), random_like(weight)
        columns = weight.t() if is_transposed else weight
        apart = time_ms(lambda: residual.add_(torch.matmul(x, columns)), x.device)
        together = time_ms(lambda: add_product_(residual, x, weight, is_transposed), x.device)
    return None if apart is None or together is None else (apart, together)


def _replace(
    node: fx.Node, residual: fx.Node, product: MatMul, times: Times, context: RewriteContext
) -> PatchDescriptor:
    value = next(each for each in binary(node, "add") or () if each is not residual)
    _, views = under_views(value)
    gone = [*product.turns, product.node, *views, node]
    descriptor = context.describe(
        ACTION, node, [product.node, node], f"addmm_ of {product.num_n} x {product.num_k} into the residual",
        {"apart_ms": round(times[0], 6), "together_ms": round(times[1], 6)},
    )  # fmt: skip
    context.call(
        node, torch.ops.agnitra.residual_gemm_.default, residual, product.a, product.b, product.is_b_transposed
    )
    node.replace_all_uses_with(residual)
    erase_unused(gone)
    return descriptor
