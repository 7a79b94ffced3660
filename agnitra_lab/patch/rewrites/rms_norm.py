"""RMSNorm, written as an op or by hand, with the residual add before it, becomes one kernel.

Trigger: F.rms_norm, or x / sqrt(mean(x*x, last dim) + eps) * weight with optional casts (`agnitra_lab.patch.norms`);
when x is the sum of two tensors of one shape, the sum is the kernel's second output and its other users read that.
Algebra: the same formula with sums in float32; `cast_before_weight` keeps the place where values are rounded.
Guard: x is contiguous, the result has x's dtype and the weight that or float32, nothing writes x in between.
Source: RMSNorm (Zhang and Sennrich, arXiv 1910.07467, section 4); fused residual add as in Liger Kernel and vLLM.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.norms import RMSNorm, find_rms_norms
from agnitra_lab.patch.ops import fake_of, is_written_between, memory_root
from agnitra_lab.patch.residuals import input_at, residual_sum
from agnitra_lab.patch.rows import has_plain_rows

ACTION = "rms_norm"


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each RMSNorm by the kernel.

    Returns:
        One descriptor per norm.
    """
    norms = find_rms_norms(graph_module.graph)
    if not norms:
        context.refuse(ACTION, "the graph has no RMSNorm with a weight")
    descriptors = []
    # A norm is replaced, with the sum that it reads; norms found later must read the new nodes.
    moved: dict[fx.Node, fx.Node] = {}
    for norm in norms:
        x = moved.get(norm.x, norm.x)
        problem = _why_not(norm, x)
        if problem:
            context.refuse(ACTION, problem)
            continue
        fake = fake_of(x)
        assert fake is not None
        kernel = context.kernel(ACTION, (math.prod(fake.shape[:-1]), fake.shape[-1]), fake.dtype)
        if kernel is not None:
            descriptors.append(_replace(norm, x, kernel, context, moved))
    return descriptors


def _why_not(norm: RMSNorm, x: fx.Node) -> str | None:
    fake, weight, result = fake_of(x), fake_of(norm.weight), fake_of(norm.result)
    if fake is None or weight is None or result is None:
        return "shapes are not known"
    if fake.dtype != result.dtype or weight.dtype not in (fake.dtype, torch.float32):
        return f"x, weight and result differ in dtype ({fake.dtype}, {weight.dtype}, {result.dtype})"
    if tuple(weight.shape) != tuple(fake.shape[-1:]) or result.shape != fake.shape:
        return "the weight is not one value per element of the last dimension"
    if not has_plain_rows(fake) or not result.is_contiguous():
        return "x is no rows of contiguous values, or the result is not contiguous"
    if is_written_between(memory_root(x), norm.nodes[0], norm.result):
        return "x is written while it is normed"
    return None


def _replace(
    norm: RMSNorm, x: fx.Node, kernel: Kernel, context: RewriteContext, moved: dict[fx.Node, fx.Node]
) -> PatchDescriptor:
    summed = residual_sum(x, norm.result, [norm.weight])
    gone = [x, *norm.nodes] if summed else list(norm.nodes)
    fake = fake_of(x)
    assert fake is not None
    config: dict[str, JsonValue] = {
        "kernel": kernel.config.key(),
        "shape": [int(size) for size in fake.shape],
        "eps": norm.eps,
        "cast_before_weight": norm.cast_before_weight,
        "is_residual_fused": summed is not None,
    }
    descriptor = context.describe(ACTION, norm.result, gone, f"kernel {kernel.name}", config, kernel.content_hash)
    order = {"cast_before_weight": norm.cast_before_weight}
    if summed is None:
        normed = context.call(norm.result, kernel.call, x, norm.weight, norm.eps, **order)
    else:
        weight = input_at(norm.weight, x, context)
        pair = context.call(x, kernel.call, summed[0], weight, norm.eps, residual=summed[1], **order)
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
