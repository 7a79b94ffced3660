"""Attention whose scores are capped by a tanh becomes one flex-attention call, which keeps no scores in memory.

Trigger: softmax(c * tanh(s * q k^T) + masks) v over the last dimension, as `agnitra_lab.patch.attention` finds it.
Algebra: the same formula. Masks that are constant and a band around the diagonal (causal, a sliding window) become
blocks that are skipped, and a buffer among them that changes later sends calls to the original graph; others are added
up in front of it, as for attention without a cap.
Guard: scores and weights are used nowhere else, no dropout, operands of one dtype and not written in between. Scores
that were rounded between the steps no longer are.
Source: Gemma Team 2024, arXiv 2408.00118, section 2 (logit soft-capping); `torch.nn.attention.flex_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.attention import Attention, UnfitError, find_attentions
from agnitra_lab.patch.attention_call import AttentionCall, head_sizes, why_not_movable
from agnitra_lab.patch.constants import Constants
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.convolutions import real_tensors
from agnitra_lab.patch.flex import blocks_of, capped_attention
from agnitra_lab.patch.masks import Band
from agnitra_lab.patch.ops import fake_of, thread_in_place
from agnitra_lab.patch.scores_mask import MaskBuilder

ACTION = "capped_attention"
# Inductor hands pointwise ops after the call to its template for a CPU, which takes none.
INDUCTOR_OPTIONS = {"epilogue_fusion": False}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_HEAD_SIZE, _LARGEST_HEAD_SIZE = 16, 256
_LEAST_QUERIES = 128
"""Fewer leave few scores to keep out of memory, and flex attention takes another kernel for them."""


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each attention whose scores are capped.

    Returns:
        One descriptor per attention.
    """
    thread_in_place(graph_module.graph)
    constants = Constants(context)
    masks, tables = MaskBuilder(context, constants), _Tables(context)
    descriptors = []
    num_found = 0
    for found in find_attentions(graph_module.graph, constants):
        if isinstance(found, str) or found.squash is None:
            continue
        num_found += 1
        problem = _why_not(found)
        try:
            if problem:
                raise UnfitError(problem)
            descriptors.append(_replace(found, found.squash, context, masks, tables))
        except UnfitError as unfit:
            context.refuse(ACTION, str(unfit))
    if not num_found:
        context.refuse(ACTION, "the graph has no attention whose scores are capped by a tanh")
    return descriptors


def _why_not(attention: Attention) -> str | None:
    problem = why_not_movable(attention, _DTYPES)
    if problem:
        return problem
    sizes, scores = head_sizes(attention), fake_of(attention.nodes[0])
    assert scores is not None
    if min(sizes) < _LEAST_HEAD_SIZE or max(sizes) > _LARGEST_HEAD_SIZE or sizes[0] != sizes[1]:
        return f"flex attention is not asked for head sizes {sizes[0]} and {sizes[1]}"
    if scores.shape[-2] < _LEAST_QUERIES:
        return f"{int(scores.shape[-2])} queries leave few scores to keep out of memory"
    return None


def _replace(
    attention: Attention, squash: float, context: RewriteContext, masks: MaskBuilder, tables: _Tables
) -> PatchDescriptor:
    """Put one call where the single steps stood, and describe the change."""
    call = AttentionCall(attention, context)
    query, key, value = call.operands()
    band = masks.band(attention, call.dtype) if attention.masks else Band(None, None)
    bias = None
    if band is None:
        band, bias = Band(None, None), masks.additive(attention, call.sizes, _dtype_of_sum(attention, call.dtype))
    config: dict[str, JsonValue] = {
        "squash": squash, "scale": attention.scale, "shape": call.shape(query, key), "has_bias": bias is not None,
        "left": band.left, "right": band.right,
    }  # fmt: skip
    descriptor = context.describe(ACTION, attention.result, attention.nodes, "flex_attention", config)
    blocks = [] if band.is_everything else tables.of(band, query, key, attention.result)
    call.take_over(
        call.insert(capped_attention, query, key, value, bias, squash, attention.scale, band.left, band.right, blocks)
    )
    return descriptor


class _Tables:
    """The tables of blocks in one graph: layers with the same band share them."""

    def __init__(self, context: RewriteContext) -> None:
        self._context = context
        self._made: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def of(self, band: Band, query: fx.Node, key: fx.Node, before: fx.Node) -> list[fx.Node]:
        """Return the nodes that read a band's tables, in front of a node."""
        rows, columns = fake_of(query), fake_of(key)
        assert rows is not None and columns is not None
        wanted = (band, int(rows.shape[-2]), int(columns.shape[-2]), rows.device)
        if wanted not in self._made:
            with real_tensors():
                self._made[wanted] = blocks_of(*wanted)
        return [self._context.constant(ACTION, table, before, query) for table in self._made[wanted]]


def _dtype_of_sum(attention: Attention, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that the masks are added up in: scores are fp32 here, whatever the operands are."""
    fakes = [fake_of(mask.node) for mask in attention.masks if mask.fill is None]
    is_wide = any(fake is not None and fake.dtype is torch.float32 for fake in fakes)
    # In fp16 a sum keeps nothing of a hidden score, and the builder refuses where that would show.
    return torch.float32 if is_wide and dtype is torch.bfloat16 else dtype
