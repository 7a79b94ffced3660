"""Attention inside a band (sliding window) that never touches the keys outside it.

Shape legend: B batch, H query heads, G key/value heads, S steps, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from agnitra_lab.patch.masks import Band

Attention = Callable[..., Tensor]
_LEAST_BLOCK = 64


def windowed_attentions(band: Band, num_queries: int, num_keys: int) -> dict[str, Attention]:
    """Return implementations of SDPA for calls whose mask is this very band, by name. They ignore `attn_mask`."""
    attentions: dict[str, Attention] = {}
    if num_queries == num_keys:
        attentions["flash_window"] = _flash_window(band)
    reach = (band.left or 0) + (band.right or 0) + 1
    if band.left is None or band.right is None:
        # Open on one side: blocks save at most half, and causal kernels save that already.
        return attentions
    block = max(1 << (reach - 1).bit_length(), _LEAST_BLOCK)
    for size in (block, block // 2):
        if size >= _LEAST_BLOCK and 2 * size <= num_queries:
            attentions[f"blocks_of_{size}"] = _in_blocks(band, size)
    return attentions


def repeated(attention: Attention) -> Attention:
    """Return the attention with each key and value head copied for its group of query heads."""

    def ungrouped(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        if arguments["enable_gqa"] and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return attention(query=query, key=key, value=value, **{**arguments, "enable_gqa": False})

    return ungrouped


def _flash_window(band: Band) -> Attention:
    """FlashAttention's own sliding window, which SDPA has no argument for."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        if query.shape[-1] % 8 or query.shape[-1] != value.shape[-1] or query.dim() != 4:
            raise RuntimeError("FlashAttention takes one head size for all, a multiple of 8")
        num_steps = query.shape[-2]
        result = torch.ops.aten._flash_attention_forward(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, None, num_steps, num_steps,
            0.0, False, False, scale=arguments["scale"],
            window_size_left=-1 if band.left is None else band.left,
            window_size_right=-1 if band.right is None else band.right,
        )  # fmt: skip
        return result[0].transpose(1, 2)

    return attention


def _in_blocks(band: Band, size: int) -> Attention:
    """Each block of queries attends to the keys that one of its queries sees; the rest of the band is its mask."""
    left, right = band.left or 0, band.right or 0

    def attention(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        """Attend block by block, and put the results in a row."""
        num_queries, num_keys = query.shape[-2], key.shape[-2]
        blocks = []
        for first in range(0, num_queries, size):
            last = min(first + size, num_queries)
            low, high = max(first - left, 0), min(last + right, num_keys)
            is_causal = low == first == 0 and right == 0 and high == last and last - first <= left + 1
            distance = torch.arange(low, high, device=query.device) - torch.arange(
                first, last, device=query.device
            ).unsqueeze(-1)
            blocks.append(
                functional.scaled_dot_product_attention(
                    query[:, :, first:last],
                    key[:, :, low:high],
                    value[:, :, low:high],
                    attn_mask=None if is_causal else (distance >= -left) & (distance <= right),
                    is_causal=is_causal,
                    scale=arguments["scale"],
                ).transpose(1, 2)
            )
        return torch.cat(blocks, dim=1).transpose(1, 2)

    # With a mask only the math backend groups heads by itself.
    return repeated(attention)
