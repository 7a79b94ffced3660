"""LayerNorm, as an op or by hand over the last dimension, with the residual add before it, becomes one kernel.

Trigger: F.layer_norm, nn.LayerNorm, or (x - mean) / sqrt(var + eps) * weight + bias (`agnitra_lab.patch.moment_norms`),
in x's dtype or in float32 between casts; when x is the sum of two tensors of one shape, the sum is the kernel's second
output and its other users read that.
Algebra: the same formula with centred sums in float32, rounded once.
Guard: x is contiguous, weight and bias have x's dtype or float32, nothing writes them in between.
Where it saves a pass: Inductor fuses a norm of up to 16384 values with the pointwise ops around it. So such a norm
stays where its input is pointwise and no sum that the kernel takes over, where a summand is a pointwise result that
only the sum reads, and where only pointwise ops read the norm. Longer rows, which Inductor reads two or three times,
are taken always.
Source: Ba, Kiros and Hinton, arXiv 1607.06450, section 3.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue
from torch import fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.moment_norms import MomentNorm, find_moment_norms, row_length, why_not_written
from agnitra_lab.patch.neighbours import is_pointwise, is_read_by_pointwise_alone
from agnitra_lab.patch.ops import fake_of
from agnitra_lab.patch.residuals import input_at, residual_sum, shaped, why_not_affine

ACTION = "layer_norm"
_LONGEST_FUSED_ROW = 16384


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each LayerNorm by the kernel.

    Returns:
        One descriptor per norm.
    """
    norms = [norm for norm in find_moment_norms(graph_module.graph) if norm.kind == "layer" and norm.is_last]
    if not norms:
        context.refuse(ACTION, "the graph has no LayerNorm over its last dimensions")
    descriptors = []
    # A norm is replaced, with the sum that it reads; norms found later must read the new nodes.
    moved: dict[fx.Node, fx.Node] = {}
    for norm in norms:
        x = moved.get(norm.x, norm.x)
        summed = residual_sum(x, norm.result, [norm.weight, norm.bias])
        problem = _why_not(norm, x) or _why_not_worth_it(norm, x, summed)
        if problem:
            context.refuse(ACTION, problem)
            continue
        fake = fake_of(x)
        assert fake is not None
        kernel = context.kernel(ACTION, (fake.numel() // row_length(norm), row_length(norm)), fake.dtype)
        if kernel is not None:
            descriptors.append(_replace(norm, x, summed, kernel, context, moved))
    return descriptors


def _why_not(norm: MomentNorm, x: fx.Node) -> str | None:
    fake, result = fake_of(x), fake_of(norm.result)
    if fake is None or result is None:
        return "shapes are not known"
    if not fake.is_contiguous() or not result.is_contiguous():
        return "x is not contiguous"
    if row_length(norm) >= 2**30:
        return "a row has 2^30 values or more"
    problem = why_not_affine(norm.weight, norm.bias, row_length(norm), fake.dtype)
    return problem or why_not_written(norm)


def _why_not_worth_it(norm: MomentNorm, x: fx.Node, summed: tuple[fx.Node, fx.Node] | None) -> str | None:
    if row_length(norm) > _LONGEST_FUSED_ROW:
        return None
    if summed is None and is_pointwise(x):
        return "x comes from pointwise ops, which the compiler fuses with the norm"
    if any(is_pointwise(summand) and len(summand.users) == 1 for summand in summed or ()):
        return "a summand comes from pointwise ops, which the compiler fuses with the sum and the norm"
    if is_read_by_pointwise_alone(norm.result):
        return "only pointwise ops read the norm, and the compiler fuses them with it"
    return None


def _replace(
    norm: MomentNorm,
    x: fx.Node,
    summed: tuple[fx.Node, fx.Node] | None,
    kernel: Kernel,
    context: RewriteContext,
    moved: dict[fx.Node, fx.Node],
) -> PatchDescriptor:
    gone = [x, *norm.nodes] if summed else list(norm.nodes)
    fake = fake_of(x)
    assert fake is not None
    config: dict[str, JsonValue] = {
        "kernel": kernel.config.key(),
        "shape": [int(size) for size in fake.shape],
        "num_dims": len(norm.dims),
        "eps": norm.eps,
        "is_residual_fused": summed is not None,
    }
    descriptor = context.describe(ACTION, norm.result, gone, f"kernel {kernel.name}", config, kernel.content_hash)
    options = {"num_dims": len(norm.dims)}
    shape = [int(fake.shape[dim]) for dim in norm.dims]
    if summed is None:
        affine = [shaped(node, shape, norm.result, context) for node in (norm.weight, norm.bias)]
        normed = context.call(norm.result, kernel.call, x, *affine, norm.eps, **options)
    else:
        moved_up = [None if node is None else input_at(node, x, context) for node in (norm.weight, norm.bias)]
        affine = [shaped(node, shape, x, context) for node in moved_up]
        pair = context.call(x, kernel.call, summed[0], *affine, norm.eps, residual=summed[1], **options)
        normed = context.call(x, operator.getitem, pair, 0)
        total = context.call(x, operator.getitem, pair, 1)
        total.meta["example_value"] = fake
        x.replace_all_uses_with(total)
        moved[x] = total
    normed.meta["example_value"] = fake_of(norm.result)
    norm.result.replace_all_uses_with(normed)
    moved[norm.result] = normed
    erase_unused(gone)
    return descriptor
