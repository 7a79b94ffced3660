"""Products with few rows become one kernel each, together with the norm before them and what follows them.

Trigger: linear, addmm, or x @ W (also of a transposed Parameter) where x has at most 16 rows. An RMSNorm whose result
only such products read is computed inside them; act(gate) * up of both halves of the result, or an activation, and then
the addition of a residual of the result's shape are computed where the result still lies in registers.
Algebra: the same sums in fp32; values are rounded to the dtype where the separate ops round them.
Guard: the weight is not written in the graph, x and the residual are not written between the first and the last op, and
each value that disappears is used nowhere else. A weight that lies [K, N] is kept turned, and follows its source.
Source: gpt-fast (PyTorch labs); Hazy Research, "Look Ma, No Bubbles!", 2025.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.epilogues import Epilogue, find_epilogue
from agnitra_lab.patch.matmuls import MatMul, match_product
from agnitra_lab.patch.norms import RMSNorm, find_rms_norms
from agnitra_lab.patch.ops import fake_of, is_written_between, memory_root, mutated_roots
from agnitra_lab.patch.products import is_plain, is_static, keeps_rows, under_views, why_not_skinny

ACTION = "skinny_gemm"
MAX_ROWS = 16
"""As many columns as the narrowest tensor-core tile has; above, a GEMM is no longer bound by its weight."""


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each product of few rows, with its surroundings.

    Returns:
        One descriptor per product.
    """
    written = mutated_roots(graph_module.graph)
    kernels: dict[fx.Node, Kernel] = {}
    for node in graph_module.graph.nodes:
        product = match_product(node)
        if product is None:
            continue
        problem = why_not_skinny(product, context, written, MAX_ROWS)
        fake = fake_of(product.a)
        if problem or fake is None:
            context.refuse(ACTION, problem or "shapes are not known")
            continue
        kernel = context.kernel(ACTION, product.shape, fake.dtype)
        if kernel is not None:
            kernels[node] = kernel
    if not kernels:
        context.refuse(ACTION, "the graph has no product of few rows with a weight")
    normed = {node: kernel for node, kernel in kernels.items() if _has_x_in_registers(kernel)}
    norms = {
        norm.result: norm
        for norm in find_rms_norms(graph_module.graph)
        if _is_read_by(norm.result, normed) and _fits(norm, context, written)
    }
    # A product with its residual takes the place of the sum that later norms were found to read.
    moved: dict[fx.Node, fx.Node] = {}
    return [_replace(node, kernel, norms, moved, context) for node, kernel in kernels.items()]


def _has_x_in_registers(kernel: Kernel) -> bool:
    """Whether a norm costs the kernel nothing. One with stages would norm x anew for each tile of W, on its way through
    shared memory: 8 rows through a gate of 28672 x 4096 took 119 us on an H200, cuBLAS 58 without the norm.
    """
    return kernel.config.params.get("num_stages", 1) == 1


def _is_read_by(value: fx.Node, products: Mapping[fx.Node, Kernel]) -> bool:
    """Whether products read the value, through views that keep its rows, as their x, and nothing else reads it."""
    if not value.users:
        return False
    for user in value.users:
        product = match_product(user) if user in products else None
        is_x = product is not None and product.a is value and value not in (product.bias, product.b)
        if not is_x and not (keeps_rows(user) and _is_read_by(user, products)):
            return False
    return True


def _fits(norm: RMSNorm, context: RewriteContext, written: set[fx.Node]) -> bool:
    x, weight, result = fake_of(norm.x), fake_of(norm.weight), fake_of(norm.result)
    if x is None or weight is None or result is None or not is_static(norm.weight, context, written):
        return False
    return (
        x.dtype == weight.dtype == result.dtype
        and x.shape == result.shape
        and tuple(weight.shape) == tuple(x.shape[-1:])
        and weight.stride(0) == 1
    )


@dataclass(frozen=True)
class _Plan:
    """What one kernel computes: a product, perhaps the norm before it, and what follows."""

    product: MatMul
    x: fx.Node
    norm: RMSNorm | None
    after: Epilogue
    gone: tuple[fx.Node, ...]


def _plan(product: MatMul, norms: Mapping[fx.Node, RMSNorm], moved: Mapping[fx.Node, fx.Node]) -> _Plan:
    """Choose the widest fusion that reads and writes in the graph's own order."""
    base, views = under_views(product.a)
    norm = norms.get(base)
    normed = moved.get(norm.x, norm.x) if norm is not None else base
    after = find_epilogue(product.node)
    for is_normed, is_followed in ((True, True), (False, True), (True, False)):
        if is_normed and norm is None:
            continue
        chain = after if is_followed else Epilogue(product.node)
        before = norm if is_normed else None
        x = normed if before is not None else product.a
        first = before.nodes[0] if before is not None else product.node
        inner = (*before.nodes, *views) if before is not None else ()
        if _is_in_order(x, chain, first) and is_plain(chain.final):
            return _Plan(product, x, before, chain, (*inner, *product.turns, product.node, *chain.nodes))
    return _Plan(product, product.a, None, Epilogue(product.node), (*product.turns, product.node))


def _is_in_order(x: fx.Node, after: Epilogue, first: fx.Node) -> bool:
    read = [x] if after.residual is None else [x, after.residual]
    return not any(is_written_between(memory_root(node), first, after.final) for node in read)


def _replace(
    node: fx.Node,
    kernel: Kernel,
    norms: Mapping[fx.Node, RMSNorm],
    moved: dict[fx.Node, fx.Node],
    context: RewriteContext,
) -> PatchDescriptor:
    product = match_product(node)
    assert product is not None
    plan = _plan(product, norms, moved)
    final, fake = plan.after.final, fake_of(plan.after.final)
    assert fake is not None
    config = _config(plan, kernel)
    descriptor = context.describe(ACTION, final, plan.gone, f"kernel {kernel.name}", config, kernel.content_hash)
    weight = product.b
    if not product.is_b_transposed:
        weight = context.derive(ACTION, [weight], _turn, final)
    x = _with_leading(plan.x, fake, final, context)
    call = context.call(final, kernel.call, x, weight, **_options(plan))
    call.meta["example_value"] = fake
    final.replace_all_uses_with(call)
    moved[final] = call
    erase_unused(plan.gone)
    return descriptor


def _turn(weight: Tensor) -> Tensor:
    return weight.t()


def _with_leading(x: fx.Node, like: Tensor, before: fx.Node, context: RewriteContext) -> fx.Node:
    """Give x the leading dimensions that the result has."""
    fake = fake_of(x)
    assert fake is not None
    shape = (*(int(size) for size in like.shape[:-1]), int(fake.shape[-1]))
    if tuple(fake.shape) == shape:
        return x
    view = context.call(before, torch.reshape, x, shape)
    view.meta["example_value"] = fake.reshape(shape)
    return view


def _options(plan: _Plan) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if plan.product.bias is not None:
        options["bias"] = plan.product.bias
    if plan.after.residual is not None:
        options["residual"] = plan.after.residual
    if plan.norm is not None:
        options["norm_weight"] = plan.norm.weight
        options |= {"eps": plan.norm.eps, "cast_before_weight": plan.norm.cast_before_weight}
    if plan.after.activation != "none":
        options["activation"] = plan.after.activation
    if plan.after.gate != "none":
        options["gate"] = plan.after.gate
    return options


def _config(plan: _Plan, kernel: Kernel) -> dict[str, JsonValue]:
    return {
        "kernel": kernel.config.key(),
        "shape": list(plan.product.shape),
        "is_norm_fused": plan.norm is not None,
        "is_residual_fused": plan.after.residual is not None,
        "activation": plan.after.activation,
        "gate": plan.after.gate,
    }
