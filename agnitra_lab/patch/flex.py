"""Attention whose scores are capped by a tanh, as one call of torch's flex attention that a compiler can trace.

Shape legend: B batch, H heads, S queries, T keys, D and E head sizes, I and J blocks of queries and of keys.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from agnitra_lab.patch.masks import HIDDEN, Band

BLOCK = 128


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    squash: float,
    scale: float,
    left: int | None = None,
    right: int | None = None,
    tables: Sequence[Tensor] = (),
) -> Tensor:
    """Compute softmax(scale * tanh(squash * q k^T) + bias, inside a band) v.

    Compiled by Inductor it is one kernel; anywhere else torch computes it in single steps.

    Args:
        query: [B, H, S, D].
        key: [B, H, T, D].
        value: [B, H, T, E].
        bias: [B or 1, H or 1, S or 1, T], of any floating dtype; None for none.
        squash: factor of the scores before the tanh.
        scale: factor after it, the cap.
        left, right: query i sees the keys j with -left <= j - i <= right; None: no limit on that side.
        tables: where there is a limit, `blocks_of` it, in memory: what a compiler computes by the way it cannot take.

    Returns:
        [B, H, S, E], of the dtype of `value`, strided as `query` is.

    Source: Dong et al. 2024, "Flex Attention", arXiv 2412.05496; the cap is that of Gemma 2, arXiv 2408.00118.
    """
    from torch._higher_order_ops.flex_attention import flex_attention
    from torch.nn.attention.flex_attention import _apply_kernel_options

    is_half = query.dtype in (torch.bfloat16, torch.float16)
    seen, buffers = (None, ()) if bias is None else _bias_at(bias)

    def score(scores: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor, *given: Tensor) -> Tensor:
        # Said to be of the queries' dtype, they are fp32 in the kernel.
        wide = scores.to(torch.float32)
        # By the sigmoid a tanh is two short instructions and off by 1e-7; fp32 rows would have that error.
        squashed = 2.0 * torch.sigmoid(2.0 * wide) - 1.0 if is_half else torch.tanh(wide)
        capped = squashed * scale
        if seen is None:
            return capped
        return capped + torch.clamp(seen(b, h, m, n, *given).to(torch.float32), min=HIDDEN)

    options = _apply_kernel_options(query, key, value, False, None)
    blocks = _block_mask(tables, Band(left, right), query.shape[-2], key.shape[-2], query.device)
    out: Tensor = flex_attention(query, key, value, score, blocks, squash, dict(options), buffers, ())[0]
    if bias is None:
        return out
    # Softmax makes NaN of a row that sees no key; the kernels make zeros, and the CPU's loses a NaN of the bias.
    is_blind = torch.logical_not((bias > -math.inf).any(-1, keepdim=True))
    return out.masked_fill(is_blind, math.nan)


def _bias_at(bias: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return what reads the bias of one score, and the tensor that it reads."""
    is_kept = [size != 1 for size in bias.shape]
    table = _in_memory(bias.reshape([size for size in bias.shape if size != 1] or [1]))

    def at(b: Tensor, h: Tensor, m: Tensor, n: Tensor, given: Tensor) -> Tensor:
        places = [place for place, kept in zip((b, h, m, n), is_kept, strict=True) if kept]
        return given[tuple(places)] if places else given[0]

    return at, (table,)


def _block_mask(
    tables: Sequence[Tensor], band: Band, num_queries: int, num_keys: int, device: torch.device
) -> tuple[Any, ...]:
    """Return which blocks of keys each block of queries looks at, as the kernel takes it."""
    from torch.nn.attention.flex_attention import BlockMask, _create_empty_block_mask

    if band.is_everything:
        nothing = torch.empty((1, 1, 1, 1), device=device)
        return _create_empty_block_mask(nothing, nothing).as_tuple()

    def is_seen(_b: Tensor, _h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        is_near = n - m <= (num_keys if band.right is None else band.right)
        return is_near if band.left is None else is_near & (m - n <= band.left)

    # Without the tables that a backward pass asks for, where that is a choice.
    is_optional = "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters
    unneeded: dict[str, Any] = {"compute_q_blocks": False} if is_optional else {}
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    listed: dict[str, Any] = dict(zip(names, tables, strict=True))
    made = BlockMask.from_kv_blocks(
        **listed, **unneeded, BLOCK_SIZE=BLOCK, mask_mod=is_seen,
        seq_lengths=(num_queries, num_keys),
    )  # fmt: skip
    return made.as_tuple()


def _in_memory(values: Tensor) -> Tensor:
    """Return the values as a tensor of its own: Inductor's templates do not take what it would compute by the way."""
    dense = values.contiguous()
    return dense.as_strided(dense.shape, dense.stride())


def blocks_of(
    band: Band, num_queries: int, num_keys: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List the blocks of keys that a band reaches, for each block of queries.

    Args:
        band: what is seen.
        num_queries, num_keys: S and T.
        device: of the results.

    Returns:
        Of the blocks that are seen in part, and then of those that are seen as a whole: how many [1, 1, I], and their
        numbers [1, 1, I, J], those first; int32.
    """
    left = num_queries if band.left is None else band.left
    right = num_keys if band.right is None else band.right
    rows = torch.arange(-(-num_queries // BLOCK), device=device) * BLOCK
    last_rows = (rows + BLOCK).clamp(max=num_queries) - 1
    slots = torch.arange(-(-num_keys // BLOCK), device=device)
    first = _divided((rows - left).clamp(min=0))
    last = _divided((last_rows + right).clamp(max=num_keys - 1))
    # A block that the keys end in is no whole one.
    first_whole = _divided((last_rows - left).clamp(min=0) + BLOCK - 1)
    last_whole = _divided((rows + right + 1).clamp(min=0, max=num_keys)) - 1
    num_whole = (last_whole - first_whole + 1).clamp(min=0)
    num_seen = (last - first + 1).clamp(min=0)
    whole = (first_whole[:, None] + slots).clamp(max=len(slots) - 1)
    part = first[:, None] + slots
    is_past = (num_whole > 0)[:, None] & (part >= first_whole[:, None])
    part = torch.where(is_past, part + num_whole[:, None], part).clamp(max=len(slots) - 1)
    listed = (num_seen - num_whole, part, num_whole, whole)
    return tuple(each.to(torch.int32)[None, None].contiguous() for each in listed)  # type: ignore[return-value]


def _divided(places: Tensor) -> Tensor:
    return torch.div(places, BLOCK, rounding_mode="floor")
