"""One decoding step of attention as model code spells it, over one set of weights and two caches, on small CPU shapes.

The formulas are those of transformers (rotate_half, repeat_kv, static cache), Qwen3 (norms of heads), GPT-NeoX (part of
the head, halves), GPT-J (neighbours, tokens before heads) and gpt-fast (pairs as complex numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH, HEADS, KV_HEADS, SIZE, SLOTS, WIDTH = 2, 4, 2, 16, 24, 32
PART = 8
"""How many values of a head turn where only some do."""
FIRST = 7
"""The first slot where the step knows it as a number."""
Formula = Callable[..., Any]


class Step(nn.Module):
    """Projections, norms of heads, tables of angles and a key and a value cache; `formula` does the rest."""

    def __init__(self, formula: Formula, cache: tuple[int, ...] = (BATCH, KV_HEADS, SLOTS, SIZE)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.formula = formula
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.o = nn.Linear(HEADS * SIZE, WIDTH)
        self.q_norm, self.k_norm = nn.RMSNorm(SIZE, eps=1e-6), nn.RMSNorm(SIZE, eps=1e-5)
        self.register_buffer("k_cache", torch.randn(cache))
        self.register_buffer("v_cache", torch.randn(cache))
        angles = torch.randn(SLOTS, SIZE // 2)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))
        self.register_buffer("pairs", torch.stack([angles.cos(), angles.sin()], -1))
        self.register_buffer("frequencies", torch.rand(SIZE // 2))
        with torch.no_grad():
            self.q_norm.weight.uniform_(0.5, 2)
            self.k_norm.weight.uniform_(0.5, 2)
        self.eval()

    def forward(self, x: Tensor, position: Tensor) -> Any:
        return self.formula(self, x, position)


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return x [B, L, width] and the slots of its tokens, out of order."""
    x = torch.randn(BATCH, tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), torch.tensor([5, 9, 2, 11, 3])[:tokens]


def heads(m: Step, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as [B, heads, L, D]."""
    return tuple(part.transpose(1, 2) for part in tokens_first(m, x))  # type: ignore[return-value]


def tokens_first(m: Step, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as [B, L, heads, D]."""
    length = x.shape[1]
    return (
        m.q(x).view(BATCH, length, HEADS, SIZE),
        m.k(x).view(BATCH, length, KV_HEADS, SIZE),
        m.v(x).view(BATCH, length, KV_HEADS, SIZE),
    )


def attend(m: Step, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    out = functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options)
    return m.o(out.transpose(1, 2).reshape(BATCH, -1, HEADS * SIZE))


def seen(position: Tensor) -> Tensor:
    return (torch.arange(SLOTS) <= position[:, None])[None, None]


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def repeat_kv(x: Tensor, times: int) -> Tensor:
    batch, number, slots, size = x.shape
    return x[:, :, None].expand(batch, number, times, slots, size).reshape(batch, number * times, slots, size)


def write(m: Step, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write the slots of both caches as transformers' static cache does."""
    m.k_cache.index_copy_(2, position, k)
    m.v_cache.index_copy_(2, position, v)
    return m.k_cache, m.v_cache


def set_items(m: Step, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    m.k_cache[:, :, position] = k
    m.v_cache[:, :, position] = v
    return m.k_cache, m.v_cache


def hugging_face(m: Step, x: Tensor, position: Tensor, written: Formula = write) -> Tensor:
    q, k, v = heads(m, x)
    frequencies = m.frequencies[None, :, None].float().expand(1, -1, 1)
    angles = (frequencies @ position[None, None, :].float()).transpose(1, 2)
    table = torch.cat((angles, angles), dim=-1)
    cos, sin = (table.cos() * 1.0).to(x.dtype).unsqueeze(1), (table.sin() * 1.0).to(x.dtype).unsqueeze(1)
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    k, v = written(m, position, k, v)
    times = HEADS // KV_HEADS
    return attend(m, q, repeat_kv(k, times).contiguous(), repeat_kv(v, times).contiguous(), seen(position))


def by_hand(m: Step, x: Tensor, position: Tensor) -> Tensor:
    """Attention in single steps over the cache, as transformers' eager attention is."""
    q, k, v = heads(m, x)
    cos, sin = m.cos[position], m.sin[position]
    k, v = write(m, position, rotated(k, cos, sin), v)
    k, v = (repeat_kv(part, HEADS // KV_HEADS) for part in (k, v))
    scores = torch.matmul(rotated(q, cos, sin), k.transpose(2, 3)) * SIZE**-0.5
    scores = scores + torch.where(seen(position), 0.0, torch.finfo(x.dtype).min)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return m.o(torch.matmul(weights, v).transpose(1, 2).contiguous().reshape(BATCH, -1, HEADS * SIZE))


def qwen(m: Step, x: Tensor, position: Tensor) -> Tensor:
    q, k, v = tokens_first(m, x)
    q, k, v = m.q_norm(q).transpose(1, 2), m.k_norm(k).transpose(1, 2), v.transpose(1, 2)
    cos, sin = m.cos[position], m.sin[position]
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    return attend(m, q, m.k_cache.index_copy_(2, position, k), m.v_cache.index_copy_(2, position, v))


def neox(m: Step, x: Tensor, position: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    cos, sin = (torch.cat((table[position][:, : PART // 2],) * 2, -1) for table in (m.cos, m.sin))

    def turned(y: Tensor) -> Tensor:
        return torch.cat((rotated(y[..., :PART], cos, sin), y[..., PART:]), dim=-1)

    k, v = set_items(m, position, turned(k), v)
    return attend(m, turned(q), k, v)


def gpt_fast(m: Step, x: Tensor, position: Tensor) -> Tensor:
    def turned(y: Tensor) -> Tensor:
        pairs = y.float().reshape(*y.shape[:-1], -1, 2)
        angles = m.pairs[position].view(1, pairs.size(1), 1, pairs.size(3), 2)
        real = pairs[..., 0] * angles[..., 0] - pairs[..., 1] * angles[..., 1]
        imaginary = pairs[..., 1] * angles[..., 0] + pairs[..., 0] * angles[..., 1]
        return torch.stack([real, imaginary], -1).flatten(3).type_as(y)

    q, k, v = tokens_first(m, x)
    q, k, v = (part.transpose(1, 2) for part in (turned(q), turned(k), v))
    k, v = set_items(m, position, k, v)
    times = HEADS // KV_HEADS
    return attend(m, q, k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1), seen(position))


def gpt_j(m: Step, x: Tensor, position: Tensor) -> Tensor:
    """The caches are [B, S, G, D]."""

    def turned(y: Tensor) -> Tensor:
        return y * cos + torch.stack((-y[..., 1::2], y[..., ::2]), dim=-1).flatten(-2) * sin

    sin, cos = (
        torch.repeat_interleave(table[position][:, : SIZE // 2], 2, 1)[None, :, None] for table in (m.sin, m.cos)
    )
    q, k, v = tokens_first(m, x)
    m.k_cache.index_copy_(1, position, turned(k))
    m.v_cache.index_copy_(1, position, v)
    return attend(m, turned(q).transpose(1, 2), m.k_cache.transpose(1, 2), m.v_cache.transpose(1, 2))


def static_slices(m: Step, x: Tensor, position: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    end = FIRST + x.shape[1]
    cos, sin = m.cos[FIRST:end], m.sin[FIRST:end]
    m.k_cache[:BATCH, :, FIRST:end] = rotated(k, cos, sin)
    m.v_cache.narrow(2, FIRST, end - FIRST).copy_(v)
    return attend(m, rotated(q, cos, sin), m.k_cache, m.v_cache)


def without_rotation(m: Step, x: Tensor, position: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    return attend(m, q, *write(m, position, k, v))


def halves_apart(m: Step, x: Tensor, position: Tensor) -> Tensor:
    """Halves are rotated apart and joined, and the queries are scaled after it."""
    q, k, v = heads(m, x)
    cos, sin = m.cos[position][:, : SIZE // 2], m.sin[position][:, : SIZE // 2]

    def turned(y: Tensor) -> Tensor:
        left, right = y.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    return attend(m, turned(q) * 0.5, *write(m, position, turned(k), v))
