"""Planted bugs of attention, matrix products, gates and RoPE (see planted_bugs.py for what a family is)."""

from __future__ import annotations

from typing import Any

import torch
from planted_bugs import Family, Op, randn, tf32, truncated, weight
from torch import Tensor, nn
from torch.nn import functional as F

# Attention ----------------------------------------------------------------------------------------------------------

_INF = float("inf")


def _causal(q: Tensor, keys: int, shift: int = 0) -> Tensor:
    """Return True where a query must not look; shift 1 lets it see one key of the future."""
    return torch.ones(q.shape[-2], keys, dtype=torch.bool).triu(1 + shift)


def _attention(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped-query causal attention as people write it: q (2, 4, S, 16), k and v (2, 2, S, 16)."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.transpose(-1, -2) * 16**-0.5).masked_fill(_causal(q, k.shape[-2]), -_INF)
    return torch.softmax(scores.float(), -1).to(q.dtype) @ v


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float = 0.25, probs: Any = None
) -> Tensor:
    """Compute attention in fp64, with what a bug changes."""
    if k.shape[1] != q.shape[1]:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    scores = scores.masked_fill(_causal(q, k.shape[-2]) if mask is None else mask, -_INF)
    chances = torch.softmax(scores, -1)
    return ((probs(chances) if probs else chances) @ v.double()).to(q.dtype)


def _without_rescale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sum two key blocks, each under its own maximum, as if it were one."""
    k, v = k.repeat_interleave(2, 1).double(), v.repeat_interleave(2, 1).double()
    scores = (q.double() @ k.transpose(-1, -2) * 0.25).masked_fill(_causal(q, k.shape[-2]), -_INF)
    parts = [scores[..., :16], scores[..., 16:]]
    power = torch.cat([(part - part.amax(-1, True).clamp(min=-1e30)).exp() for part in parts], -1)
    return (power / power.sum(-1, True) @ v).to(q.dtype)


def _without_last_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = _causal(q, k.shape[-2])
    mask[-1, (k.shape[-2] - 1) // 16 * 16 :] = True
    return _attend(q, k, v, mask=mask)


ATTENTION = Family(
    lambda dtype: Op(_attention, dtype),
    lambda dtype, size, generator: (
        randn(generator, dtype, 2, 4, size, 16),
        randn(generator, dtype, 2, 2, size, 16),
        randn(generator, dtype, 2, 2, size, 16),
    ),
    lambda m, q, k, v: (
        F.scaled_dot_product_attention(
            q.float(), k.float().repeat_interleave(2, 1), v.float().repeat_interleave(2, 1), is_causal=True
        )
        .to(q.dtype)
        .contiguous()
    ),
    {
        "sees one key of the future": lambda m, q, k, v: _attend(q, k, v, mask=_causal(q, k.shape[-2], 1)),
        "does not see its own key": lambda m, q, k, v: _attend(q, k, v, mask=_causal(q, k.shape[-2], -1)).nan_to_num(
            0.0
        ),
        "gives NaN to the first query": lambda m, q, k, v: _attend(q, k, v, mask=_causal(q, k.shape[-2], -1)),
        "sees all keys": lambda m, q, k, v: _attend(q, k, v, mask=_causal(q, k.shape[-2], k.shape[-2])),
        "forgets the scale": lambda m, q, k, v: _attend(q, k, v, scale=1.0),
        "scales by the head size, not its root": lambda m, q, k, v: _attend(q, k, v, scale=1 / 16),
        "scales by the root of the model width": lambda m, q, k, v: _attend(q, k, v, scale=1 / 8),
        "maps query heads to key heads round robin": lambda m, q, k, v: _attend(
            q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        ),
        "reads the values of the other head": lambda m, q, k, v: _attend(q, k, v.flip(1)),
        "reads the keys of the first batch": lambda m, q, k, v: _attend(q, k[:1].expand_as(k), v),
        "normalises over the queries": lambda m, q, k, v: (
            torch.softmax(q.double() @ k.double().repeat_interleave(2, 1).mT / 4, -2)
            @ v.double().repeat_interleave(2, 1)
        ).to(q.dtype),
        "does not rescale the running sum": lambda m, q, k, v: _without_rescale(q, k, v),
        "skips the last partial block of keys": lambda m, q, k, v: _without_last_keys(q, k, v),
        "drops the window's first key": lambda m, q, k, v: _attend(
            q, k, v, mask=_causal(q, k.shape[-2]) | ~_causal(q, k.shape[-2], -20)
        ),
        "shifts the keys by one position": lambda m, q, k, v: _attend(q, k.roll(1, -2), v),
        "ignores the keys of the tail": lambda m, q, k, v: _attend(
            q, torch.cat([k[..., :-1, :], k[..., :1, :]], -2), v
        ),
        "keeps probabilities in fp8": lambda m, q, k, v: _attend(
            q, k, v, probs=lambda p: p.float().to(torch.float8_e4m3fn).double()
        ),
        "keeps probabilities in bf16": lambda m, q, k, v: _attend(q, k, v, probs=lambda p: p.bfloat16().double()),
        "multiplies queries and keys in bf16": lambda m, q, k, v: _attend(q.bfloat16(), k.bfloat16(), v).to(q.dtype),
        "returns heads before the transpose": lambda m, q, k, v: _attention(m, q, k, v).transpose(1, 2).contiguous(),
    },
    fp32_only=frozenset({"keeps probabilities in bf16", "multiplies queries and keys in bf16"}),
)


# Matrix products ----------------------------------------------------------------------------------------------------


def _linear(m: nn.Module, x: Tensor) -> Tensor:
    return F.relu(F.linear(x, m.weight, m.bias))


def _matmul(m: nn.Module, x: Tensor, w: Tensor | None = None, bias: Any = None) -> Tensor:
    product = x.double() @ (m.weight if w is None else w).double().T
    return F.relu(product + (m.bias.double() if bias is None else bias)).to(x.dtype)


def _rounding_sums(m: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the partial products of five blocks of K in an accumulator of `dtype`."""
    total = torch.zeros(x.shape[0], 56, dtype=dtype)
    for start in range(0, 40, 8):
        part = x[:, start : start + 8].double() @ m.weight[:, start : start + 8].double().T
        total = (total.double() + part).to(dtype)
    return F.relu(total.double() + m.bias.double()).to(x.dtype)


def _split_control(m: nn.Module, x: Tensor) -> Tensor:
    halves = [x[:, part].float() @ m.weight[:, part].float().T for part in (slice(24, 40), slice(0, 24))]
    return F.relu(halves[0] + halves[1] + m.bias.float()).to(x.dtype)


def _weight_without(m: nn.Module, columns: slice) -> Tensor:
    changed = m.weight.clone()
    changed[:, columns] = 0
    return changed


LINEAR = Family(
    lambda dtype: Op(_linear, dtype, weight=weight(56, 40), bias=weight(56, seed=2)),
    lambda dtype, size, generator: (randn(generator, dtype, size, 40),),
    _split_control,
    {
        "drops the last partial block of K": lambda m, x: _matmul(m, x, _weight_without(m, slice(32, 40))),
        "drops the last element of K": lambda m, x: _matmul(m, x, _weight_without(m, slice(39, 40))),
        "loses one split of K": lambda m, x: _matmul(m, x, _weight_without(m, slice(8, 16))),
        "adds one split of K twice": lambda m, x: _matmul(m, x, m.weight + m.weight - _weight_without(m, slice(8, 16))),
        "reads the weight with the wrong stride": lambda m, x: _matmul(m, x, m.weight.view(40, 56).T),
        "reads the weight one row down": lambda m, x: _matmul(m, x, m.weight.roll(1, 0)),
        "drops the bias": lambda m, x: _matmul(m, x, bias=0.0),
        "adds the bias in each split": lambda m, x: _matmul(m, x, bias=2 * m.bias.double()),
        "broadcasts the bias along the rows": lambda m, x: _matmul(
            m, x, bias=m.bias.double().repeat(2)[: x.shape[0], None]
        ),
        "adds the bias after the activation": lambda m, x: (_matmul(m, x, bias=0.0) + m.bias).to(x.dtype),
        "forgets the activation": lambda m, x: F.linear(x, m.weight, m.bias),
        "rounds its operands to bf16": lambda m, x: _matmul(m, x.bfloat16(), m.weight.bfloat16()).to(x.dtype),
        "rounds its operands to TF32": lambda m, x: _matmul(m, tf32(x), tf32(m.weight)),
        "rounds its operands to fp8": lambda m, x: _matmul(m, x.to(torch.float8_e4m3fn).to(x.dtype)),
        "accumulates in bf16": lambda m, x: _rounding_sums(m, x, torch.bfloat16),
        "accumulates in fp16": lambda m, x: _rounding_sums(m, x, torch.float16),
        "stores by truncation": lambda m, x: truncated(_matmul(m, x.float())),
        "reads a stale tile of its input": lambda m, x: _matmul(m, torch.cat([x[:-8], x[:8]])),
        "saturates at the largest int8": lambda m, x: _matmul(m, x).clamp(max=20),
    },
    fp32_only=frozenset({"rounds its operands to bf16", "rounds its operands to TF32", "accumulates in fp16"}),
    bf16_only=frozenset({"stores by truncation"}),
)


# Gates --------------------------------------------------------------------------------------------------------------


def _swiglu(m: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gated(gate: Tensor, up: Tensor, activation: Any = F.silu) -> Tensor:
    return (activation(gate.double()) * up.double()).to(gate.dtype)


def _odd_column_lost(gate: Tensor, up: Tensor) -> Tensor:
    out = _gated(gate, up)
    out[:, -1] = 0
    return out


SWIGLU = Family(
    lambda dtype: Op(_swiglu, dtype),
    lambda dtype, size, generator: (randn(generator, dtype, size, 51) * 3, randn(generator, dtype, size, 51)),
    lambda m, gate, up: (up.float() * (gate.float() * torch.sigmoid(gate.float()))).to(gate.dtype),
    {
        "swaps gate and up": lambda m, gate, up: _gated(up, gate),
        "forgets to multiply by the gate": lambda m, gate, up: _gated(gate, up, torch.sigmoid),
        "takes GELU for SiLU": lambda m, gate, up: _gated(gate, up, F.gelu),
        "takes hard SiLU for SiLU": lambda m, gate, up: _gated(gate, up, F.hardswish),
        "takes the exponential's wrong sign": lambda m, gate, up: _gated(gate, up, lambda x: x * torch.sigmoid(-x)),
        "activates both halves": lambda m, gate, up: _gated(gate, F.silu(up)),
        "ignores up": lambda m, gate, up: _gated(gate, gate),
        "loses the last column of an odd width": lambda m, gate, up: _odd_column_lost(gate, up),
        "reads up one column to the right": lambda m, gate, up: _gated(gate, up.roll(-1, -1)),
        "reads up one row down": lambda m, gate, up: _gated(gate, up.roll(-1, 0)),
        "takes the sigmoid in bf16": lambda m, gate, up: _gated(
            gate, up, lambda x: x * torch.sigmoid(x.bfloat16()).double()
        ),
        "clamps the gate": lambda m, gate, up: _gated(gate.clamp(-4, 4), up),
        "writes over the gate": lambda m, gate, up: gate.copy_(_gated(gate, up)).clone(),
        "returns the gate's memory": lambda m, gate, up: gate.copy_(_gated(gate, up)),
    },
    fp32_only=frozenset({"takes the sigmoid in bf16"}),
)


def _geglu(m: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


GEGLU = Family(
    lambda dtype: Op(_geglu, dtype),
    SWIGLU.inputs,
    lambda m, gate, up: (gate.float() * up.float() * 0.5 * torch.special.erfc(-gate.float() * 0.5**0.5)).to(gate.dtype),
    {
        "takes the tanh formula for erf": lambda m, gate, up: _gated(gate, up, lambda x: F.gelu(x, approximate="tanh")),
        "takes the sigmoid formula for erf": lambda m, gate, up: _gated(
            gate, up, lambda x: x * torch.sigmoid(1.702 * x)
        ),
        "takes erf without the root of two": lambda m, gate, up: _gated(
            gate, up, lambda x: x * 0.5 * (1 + torch.erf(x))
        ),
        "forgets the half": lambda m, gate, up: _gated(gate, up, lambda x: x * (1 + torch.erf(x * 0.5**0.5))),
        "takes ReLU for GELU": lambda m, gate, up: _gated(gate, up, F.relu),
        "swaps gate and up": lambda m, gate, up: _gated(up, gate, F.gelu),
    },
    fp32_only=frozenset({"takes the tanh formula for erf"}),
    has_output_bugs=False,
)


# RoPE ---------------------------------------------------------------------------------------------------------------


def _angles(positions: Tensor, base: float = 1e4, dim: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    inverse = base ** (-torch.arange(0, 16, 2, dtype=dtype) / dim)
    return positions.to(dtype)[:, None] * inverse


def _rope(m: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    angles = _angles(positions)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def _turned(x: Tensor, angles: Tensor, signs: tuple[int, int] = (-1, 1)) -> Tensor:
    left, right = x.double().chunk(2, -1)
    cos, sin = angles.double().cos(), angles.double().sin()
    return torch.cat([left * cos + signs[0] * right * sin, right * cos + signs[1] * left * sin], -1).to(x.dtype)


def _interleaved(x: Tensor, angles: Tensor) -> Tensor:
    even, odd = x.double()[..., ::2], x.double()[..., 1::2]
    turned = torch.stack([even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], -1)
    return turned.flatten(-2).to(x.dtype)


def _half_turned(x: Tensor, angles: Tensor) -> Tensor:
    return torch.cat([_turned(x, angles)[..., :8], x[..., 8:]], -1)


ROPE = Family(
    lambda dtype: Op(_rope, dtype),
    lambda dtype, size, generator: (randn(generator, dtype, 2, 3, size, 16), torch.arange(size) + 1000),
    lambda m, x, p: _turned(x, _angles(p)),
    {
        "swaps the halves": lambda m, x, p: _turned(x, _angles(p)).roll(8, -1),
        "turns the other way": lambda m, x, p: _turned(x, _angles(p), (1, -1)),
        "forgets the minus sign": lambda m, x, p: _turned(x, _angles(p), (1, 1)),
        "pairs neighbours instead of halves": lambda m, x, p: _interleaved(x, _angles(p)),
        "is one position ahead": lambda m, x, p: _turned(x, _angles(p + 1)),
        "counts positions from zero": lambda m, x, p: _turned(x, _angles(p - 1000)),
        "gives all tokens the first position": lambda m, x, p: _turned(x, _angles(p[:1].expand_as(p))),
        "reads positions along the heads": lambda m, x, p: _turned(x, _angles(p[:3])[:, None]),
        "takes another base": lambda m, x, p: _turned(x, _angles(p, base=5e5)),
        "divides the exponent by half the width": lambda m, x, p: _turned(x, _angles(p, dim=8)),
        "swaps sine and cosine": lambda m, x, p: _turned(x, torch.pi / 2 - _angles(p)),
        "turns the left half only": lambda m, x, p: _half_turned(x, _angles(p)),
        "keeps angles in half precision": lambda m, x, p: _turned(x, _angles(p, dtype=torch.float16)),
        "keeps positions in bf16": lambda m, x, p: _turned(x, _angles(p.bfloat16())),
        "turns twice": lambda m, x, p: _turned(_turned(x, _angles(p)), _angles(p)),
    },
)
