"""Attention written as products and a softmax becomes scaled_dot_product_attention, which keeps no scores in memory.

Trigger: softmax(scale * q k^T + masks) v over the last dimension, as `agnitra_lab.patch.attention` finds it.
Algebra: the same formula. Conditions become an additive mask: -inf stays -inf, and a row that sees no key stays NaN; a
finite value becomes -1e30, so that such a row stays the plain average. A mask that is constant and causal, in a buffer
or made in the graph, becomes `is_causal=True`; a buffer that changes later sends calls to the original graph.
Guard: scores and weights are used nowhere else, no dropout, operands of one dtype and not written in between. Scores
that were rounded between the steps no longer are.
Source: FlashAttention (Dao et al., arXiv 2205.14135); `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import fx
from torch.nn import functional

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.attention import Attention, UnfitError, find_attentions
from agnitra_lab.patch.attention_call import AttentionCall, head_sizes, why_not_movable
from agnitra_lab.patch.constants import Constants
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.ops import fake_of, thread_in_place
from agnitra_lab.patch.scores_mask import MaskBuilder

ACTION = "attention_by_hand"
_MAX_HEAD_SIZE = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each attention that is written by hand.

    Returns:
        One descriptor per attention.
    """
    thread_in_place(graph_module.graph)
    constants = Constants(context)
    masks = MaskBuilder(context, constants)
    descriptors = []
    is_any = False
    for found in find_attentions(graph_module.graph, constants):
        is_any = True
        problem = found if isinstance(found, str) else _why_not(found)
        if isinstance(found, str) or problem:
            context.refuse(ACTION, str(problem))
            continue
        try:
            descriptors.append(_replace(found, context, masks))
        except UnfitError as unfit:
            context.refuse(ACTION, str(unfit))
    if not is_any:
        context.refuse(ACTION, "the graph has no softmax(q k^T) v written by hand")
    return descriptors


def _why_not(attention: Attention) -> str | None:
    problem = why_not_movable(attention, _DTYPES)
    if problem:
        return problem
    (head_size, width), value = head_sizes(attention), fake_of(attention.value.node)
    assert value is not None
    if value.device.type == "cuda" and (value.dtype is torch.float64 or max(head_size, width) > _MAX_HEAD_SIZE):
        return f"no fused kernel takes head sizes {head_size} and {width} in {value.dtype}"
    if value.device.type != "cuda" and head_size != width:
        return f"the CPU's fused kernel takes no head sizes that differ ({head_size} and {width})"
    if attention.scale <= 0.0:
        return f"the scores are scaled by {attention.scale}"
    if attention.squash is not None:
        return "the scores are capped by tanh, which scaled_dot_product_attention does not do"
    return None


def _replace(attention: Attention, context: RewriteContext, masks: MaskBuilder) -> PatchDescriptor:
    """Put one `scaled_dot_product_attention` where the single steps stood, and describe the change."""
    call = AttentionCall(attention, context)
    mask, is_causal, kind = masks.build(attention, call.sizes, call.dtype)
    query, key, value = call.operands()
    config: dict[str, JsonValue] = {"mask": kind, "scale": attention.scale, "shape": call.shape(query, key)}
    descriptor = context.describe(ACTION, attention.result, attention.nodes, "scaled_dot_product_attention", config)
    call.take_over(
        call.insert(
            functional.scaled_dot_product_attention, query, key, value, attn_mask=mask, is_causal=is_causal,
            scale=attention.scale,
        )
    )  # fmt: skip
    return descriptor
