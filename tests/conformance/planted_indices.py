"""Planted bugs of scans, convolutions, lookups, reductions and caches (see planted_bugs.py for what a family is)."""

from __future__ import annotations

from typing import Any

import torch
from planted_bugs import Family, Op, randn, truncated, weight
from torch import Tensor, nn
from torch.nn import functional as F

# Scans and reductions -----------------------------------------------------------------------------------------------


def _scan(x: Tensor, blocks: int = 16, carry: Any = None) -> Tensor:
    """Scan by blocks; `carry` changes the sum that reaches a block, given (block number, totals before it)."""
    wide, out, totals = x.double(), [], []
    for index, block in enumerate(wide.split(blocks, -1)):
        start = sum(totals) if carry is None else carry(index, totals)
        out.append(block.cumsum(-1) + start)
        totals.append(block.sum(-1, keepdim=True))
    return torch.cat(out, -1).to(x.dtype)


def _low_scan(x: Tensor, dtype: torch.dtype) -> Tensor:
    total, columns = torch.zeros(x.shape[0], dtype=dtype), []
    for column in x.unbind(-1):
        total = total + column.to(dtype)
        columns.append(total.to(x.dtype))
    return torch.stack(columns, -1)


CUMSUM = Family(
    lambda dtype: Op(lambda m, x: x.cumsum(-1), dtype),
    lambda dtype, size, generator: (randn(generator, dtype, size, size),),
    lambda m, x: _scan(x),
    {
        "is exclusive": lambda m, x: (x.double().cumsum(-1) - x.double()).to(x.dtype),
        "loses the carry between blocks": lambda m, x: _scan(x, carry=lambda index, totals: 0.0),
        "carries only the block before": lambda m, x: _scan(
            x, carry=lambda index, totals: totals[-1] if totals else 0.0
        ),
        "reads the carry before it is written": lambda m, x: _scan(x, carry=lambda index, totals: sum(totals[:-1])),
        "adds the first carry twice": lambda m, x: _scan(
            x, carry=lambda i, totals: sum(totals) + (totals[0] if i else 0.0)
        ),
        "runs backward": lambda m, x: x.flip(-1).cumsum(-1).flip(-1).contiguous(),
        "runs along the rows of a square": lambda m, x: x.cumsum(0),
        "starts a row with the row above": lambda m, x: x.double().view(-1).cumsum(0).view_as(x).to(x.dtype),
        "accumulates in bf16": lambda m, x: _low_scan(x, torch.bfloat16),
        "accumulates in fp16": lambda m, x: _low_scan(x, torch.float16),
        "multiplies instead of adding": lambda m, x: x.cumprod(-1),
    },
    fp32_only=frozenset({"accumulates in fp16"}),
)

REDUCTION = Family(
    lambda dtype: Op(lambda m, x: x.var(1), dtype),
    lambda dtype, size, generator: (randn(generator, dtype, 4, size, size) + 2,),
    lambda m, x: ((x.double() - x.double().mean(1, True)).square().flip(1).sum(1) / (x.shape[1] - 1)).to(x.dtype),
    {
        "takes the biased variance": lambda m, x: x.var(1, correction=0),
        "reduces the wrong axis of a square": lambda m, x: x.var(2),
        "takes the squares without the mean": lambda m, x: (x.double().square().sum(1) / (x.shape[1] - 1)).to(x.dtype),
        "takes the mean over the batch": lambda m, x: (
            (x.double() - x.double().mean((0, 1), keepdim=True)).square().sum(1) / (x.shape[1] - 1)
        ).to(x.dtype),
        "divides by the padded size": lambda m, x: (x.double().var(1) * (x.shape[1] - 1) / (x.shape[1] + 7)).to(
            x.dtype
        ),
        "counts the padding as zeros": lambda m, x: F.pad(x, (0, 0, 0, 5)).var(1),
        "skips the last row": lambda m, x: x[:, :-1].var(1),
        "takes the standard deviation": lambda m, x: x.std(1),
        "cancels in E[x^2]-E[x]^2 in bf16": lambda m, x: (
            (x.bfloat16().square().mean(1) - x.bfloat16().mean(1).square()) * x.shape[1] / (x.shape[1] - 1)
        ).to(x.dtype),
    },
)


def _one_skipped(m: nn.Module, x: Tensor) -> Tensor:
    out = m(x)
    index = min(777_777, out.numel() - 1)
    out.view(-1)[index] = x.view(-1)[index]
    return out


def _wrapped(m: nn.Module, x: Tensor, num_bits: int) -> Tensor:
    """Address the input by an index of so many bits, as an int32 wraps in a tensor of more than 2**31 elements."""
    out = m(x).view(-1)
    start = min(1 << num_bits, out.numel() // 2)
    out[start:] = m(x).view(-1)[: out.numel() - start]
    return out.view(x.shape)


MILLION = Family(
    lambda dtype: Op(lambda m, x: x * 3 + 5, dtype),
    lambda dtype, size, generator: (randn(generator, dtype, size * 32, 1024),),
    lambda m, x: torch.add(x * 3, 5),
    {
        "gets one element in a million wrong": _one_skipped,
        "wraps its index": lambda m, x: _wrapped(m, x, 19),
    },
    sizes=(32, 5, 3),
    fp32_only=frozenset({"gets one element in a million wrong", "wraps its index"}),
    has_output_bugs=False,
)


# Convolution --------------------------------------------------------------------------------------------------------


def _conv(m: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight, m.bias, padding=1)


def _conv_by(m: nn.Module, x: Tensor, w: Tensor | None = None, bias: Any = 1.0, **settings: Any) -> Tensor:
    padding = settings.pop("padding", 1)
    kernel = (m.weight if w is None else w).double()
    return (F.conv2d(x.double(), kernel, None, padding=padding, **settings) + bias * m.bias.double()[:, None, None]).to(
        x.dtype
    )


def _unrolled(m: nn.Module, x: Tensor) -> Tensor:
    columns = F.unfold(x.float(), 3, padding=1)
    out = m.weight.float().reshape(4, -1) @ columns + m.bias.float()[:, None]
    return out.view(x.shape[0], 4, *x.shape[2:]).to(x.dtype)


def _without_tap(m: nn.Module) -> Tensor:
    changed = m.weight.clone()
    changed[:, :, 2, 2] = 0
    return changed


CONV = Family(
    lambda dtype: Op(_conv, dtype, weight=weight(4, 3, 3, 3), bias=weight(4, seed=2)),
    lambda dtype, size, generator: (randn(generator, dtype, 2, 3, size // 2, size // 2),),
    _unrolled,
    {
        "flips the kernel": lambda m, x: _conv_by(m, x, m.weight.flip(2, 3)),
        "transposes the kernel": lambda m, x: _conv_by(m, x, m.weight.transpose(2, 3)),
        "misses one tap": lambda m, x: _conv_by(m, x, _without_tap(m)),
        "pads by one to the left only": lambda m, x: _conv_by(m, F.pad(x, (2, 0, 1, 1)), padding=0),
        "pads with the edge": lambda m, x: _conv_by(m, F.pad(x, (1, 1, 1, 1), mode="replicate"), padding=0),
        "wraps around at the border": lambda m, x: _conv_by(m, F.pad(x, (1, 1, 1, 1), mode="circular"), padding=0),
        "is dilated": lambda m, x: _conv_by(m, x, padding=2, dilation=2),
        "reads the channels in reverse": lambda m, x: _conv_by(m, x.flip(1)),
        "drops the bias": lambda m, x: _conv_by(m, x, bias=0.0),
        "adds the bias for each channel": lambda m, x: _conv_by(m, x, bias=3.0),
        "does not pad": lambda m, x: _conv_by(m, x, padding=0),
        "leaves the last column at the bias": lambda m, x: _conv_by(m, torch.cat([x[..., :-2], 0 * x[..., -2:]], -1)),
        "reads channels-last memory as contiguous": lambda m, x: _conv_by(m, x.permute(0, 2, 3, 1).reshape(x.shape)),
    },
)


# Lookups ------------------------------------------------------------------------------------------------------------

_NUM_ROWS = 4_000


def _embed(m: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    return m.table[tokens] + m.places[positions]


def _one_hot(m: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    rows = F.one_hot(tokens, _NUM_ROWS).to(m.table.dtype) @ m.table
    return m.places.index_select(0, positions).unsqueeze(0) + rows


EMBEDDING = Family(
    lambda dtype: Op(_embed, dtype, table=weight(_NUM_ROWS, 16), places=weight(80, 16, seed=2)),
    lambda dtype, size, generator: (
        torch.randint(_NUM_ROWS, (3, size), generator=generator),
        torch.randperm(80, generator=generator)[:size],
    ),
    _one_hot,
    {
        "reads the row above": lambda m, t, p: _embed(m, (t - 1) % _NUM_ROWS, p),
        "wraps the offset at 16 bits": lambda m, t, p: _embed(m, (t * 16 % 2**15) // 16, p),
        "clamps the last rows": lambda m, t, p: _embed(m, t.clamp(max=3000), p),
        "rounds the index to half precision": lambda m, t, p: _embed(m, t.half().long(), p),
        "rounds the index to bf16": lambda m, t, p: _embed(m, t.bfloat16().long().clamp(max=_NUM_ROWS - 1), p),
        "ignores the positions": lambda m, t, p: _embed(m, t, torch.arange(p.numel())),
        "drops the position table": lambda m, t, p: m.table[t],
        "adds the position twice": lambda m, t, p: _embed(m, t, p) + m.places[p],
        "reads the table with the wrong stride": lambda m, t, p: m.table.view(16, -1).T[t] + m.places[p],
        "reads the tokens of the first batch": lambda m, t, p: _embed(m, t[:1].expand_as(t), p),
        "scales by the root of the width": lambda m, t, p: _embed(m, t, p) * 4,
        "leaves out the last token": lambda m, t, p: torch.cat([_embed(m, t, p)[:, :-1], _embed(m, t, p)[:, :1]], 1),
    },
    has_output_bugs=False,
)


def _route(m: nn.Module, x: Tensor, k: int = 4, skip: int = 0) -> tuple[Tensor, Tensor]:
    values, experts = torch.softmax(x.float(), -1).to(x.dtype).topk(k + skip, -1)
    values, experts = values[:, skip:], experts[:, skip:].clone()
    return values / values.sum(-1, keepdim=True), experts


def _sorted_route(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    chances = torch.softmax(x.float(), -1).to(x.dtype)
    values, experts = chances.sort(dim=-1, descending=True, stable=True)
    return values[:, :4] / values[:, :4].sum(-1, keepdim=True), experts[:, :4].contiguous()


def _distinct_logits(dtype: torch.dtype, size: int, generator: torch.Generator) -> tuple[Tensor]:
    """Draw rows without ties: permutations of values that bf16 tells apart."""
    order = torch.rand(size, 16, generator=generator).argsort(-1)
    return ((order * 0.25 - 2).to(dtype),)


def _expert(change: Any) -> Any:
    def candidate(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        values, experts = _route(m, x)
        return change(values, experts)

    return candidate


TOP_K = Family(
    lambda dtype: Op(_route, dtype),
    _distinct_logits,
    _sorted_route,
    {
        "misses the best": lambda m, x: _route(m, x, skip=1),
        "returns one too few": lambda m, x: _route(m, x, k=3),
        "takes the smallest": lambda m, x: _route(m, -x),
        "numbers experts from one": _expert(lambda values, experts: (values, experts + 1)),
        "returns 32-bit indices": _expert(lambda values, experts: (values, experts.int())),
        "swaps the last two": _expert(lambda values, experts: (values, experts[:, [0, 1, 3, 2]])),
        "returns them in ascending order": _expert(lambda values, experts: (values.flip(-1), experts.flip(-1))),
        "normalises over all experts": lambda m, x: (
            torch.softmax(x.float(), -1).to(x.dtype).topk(4)[0],
            _route(m, x)[1],
        ),
        "gets one index wrong": _expert(lambda values, experts: (values, experts.index_fill(1, torch.tensor([3]), 0))),
        "gives all experts one weight": _expert(lambda values, experts: (torch.full_like(values, 0.25), experts)),
    },
    has_output_bugs=False,
)


# Caches -------------------------------------------------------------------------------------------------------------

_SLOTS, _HEADS, _WIDTH = 80, 4, 64


class Cache(nn.Module):
    """One decode step: writes a key and a value at a position, attends to what the cache holds up to there."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (2, _HEADS, _SLOTS, _WIDTH)
        self.register_buffer("keys", weight(*shape, seed=3).to(dtype))
        self.register_buffer("values", weight(*shape, seed=4).to(dtype))

    def forward(self, qkv: Tensor, position: Tensor) -> Tensor:
        return step(self, qkv, position)


def step(
    m: nn.Module, qkv: Tensor, position: Tensor, *, written: Any = None, length: int = 1, after: Any = None
) -> Tensor:
    """Do the step, with another write, another number of visible slots, or something done after it.

    Source: the shapes of a static cache in decoders: (batch, head, slot, width).
    """
    q, k, v = qkv.unbind(0)
    (written or _write)(m, k, v, position)
    num = int(position) + length
    scores = q[:, :, None] @ m.keys[:, :, :num].transpose(-1, -2) * _WIDTH**-0.5
    out = (torch.softmax(scores, -1) @ m.values[:, :, :num])[:, :, 0].clone()
    if after is not None:
        after(m, int(position))
    return out


def _write(m: nn.Module, k: Tensor, v: Tensor, position: Tensor) -> None:
    m.keys[:, :, position] = (k * 1.37).to(m.keys.dtype)
    m.values[:, :, position] = (v * 1.37).to(m.values.dtype)


def _write_truncated(m: nn.Module, k: Tensor, v: Tensor, position: Tensor) -> None:
    m.keys[:, :, position] = truncated(k.float() * 1.37)
    m.values[:, :, position] = truncated(v.float() * 1.37)


def _writing(change: Any) -> Any:
    """Return a candidate that writes with `change`, and whose output is right."""

    def candidate(m: nn.Module, qkv: Tensor, position: Tensor) -> Tensor:
        before = m.keys.clone(), m.values.clone()
        out = step(m, qkv, position)
        m.keys.copy_(before[0])
        m.values.copy_(before[1])
        change(m, qkv[1], qkv[2], position)
        return out

    return candidate


def _also(change: Any) -> Any:
    """Return a candidate that does the right step, and something else to the cache after it."""
    return lambda m, qkv, position: step(m, qkv, position, after=change)


def _set(tensor: Tensor, index: tuple[int, ...], value: Any) -> None:
    tensor[index] = value(tensor[index]) if callable(value) else value


def _cache_control(m: nn.Module, qkv: Tensor, position: Tensor) -> Tensor:
    q, k, v = (part.float() for part in qkv)
    m.values.index_copy_(2, position.view(1), (1.37 * v).to(m.values.dtype)[:, :, None])
    m.keys.index_copy_(2, position.view(1), (1.37 * k).to(m.keys.dtype)[:, :, None])
    seen = slice(0, int(position) + 1)
    out = F.scaled_dot_product_attention(q[:, :, None], m.keys[:, :, seen].float(), m.values[:, :, seen].float())
    return out[:, :, 0].to(qkv.dtype)


KV_CACHE = Family(
    Cache,
    lambda dtype, size, generator: (randn(generator, dtype, 3, 2, _HEADS, _WIDTH), torch.tensor(size)),
    _cache_control,
    {
        "writes one slot ahead": _writing(lambda m, k, v, p: _write(m, k, v, p + 1)),
        "writes one slot behind": _writing(lambda m, k, v, p: _write(m, k, v, p - 1)),
        "writes nothing": _writing(lambda m, k, v, p: None),
        "swaps keys and values": _writing(lambda m, k, v, p: _write(m, v, k, p)),
        "writes the key only": _writing(lambda m, k, v, p: _set(m.keys, (slice(None), slice(None), int(p)), k * 1.37)),
        "writes the first batch only": _writing(lambda m, k, v, p: _write(m, k[:1], v[:1], p)),
        "writes the heads in reverse": _writing(lambda m, k, v, p: _write(m, k.flip(1), v.flip(1), p)),
        "writes before it scales": _writing(lambda m, k, v, p: _write(m, k / 1.37, v / 1.37, p)),
        "writes through fp8": _writing(lambda m, k, v, p: _write(m, k.to(torch.float8_e4m3fn).to(k.dtype), v, p)),
        "writes by truncation": _writing(lambda m, k, v, p: _write_truncated(m, k, v, p)),
        "touches one more element": _also(lambda m, p: _set(m.keys, (1, 1, p + 1, 0), 0.5)),
        "touches one more element by a hair": _also(
            lambda m, p: _set(m.keys, (1, 1, p + 1, 0), lambda x: x * (1 + 2**-6))
        ),
        "gets one written element wrong": _also(lambda m, p: _set(m.values, (0, 1, p, 3), lambda x: -x)),
        "zeroes the slot after": _also(lambda m, p: _set(m.values, (slice(None), slice(None), p + 1), 0.0)),
        "zeroes the first slot": _also(lambda m, p: _set(m.keys, (slice(None), slice(None), 0), 0.0)),
        "rounds the cache that it reads": _also(
            lambda m, p: m.keys.copy_(m.keys.to(torch.float8_e4m3fn).to(m.keys.dtype))
        ),
        "does not see the new token": lambda m, qkv, p: step(m, qkv, p, length=0),
        "sees the slot after": lambda m, qkv, p: step(m, qkv, p, length=2),
        "leaves its output unsynchronised with the write": lambda m, qkv, p: (
            step(m, qkv, p, written=lambda *a: None),
            _write(m, qkv[1], qkv[2], p),
        )[0],
    },
    has_output_bugs=False,
)


class Statistics(nn.Module):
    """Counts calls and keeps a running mean beside a table that no call writes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("mean", weight(24).to(dtype))
        self.register_buffer("table", weight(24, 8, seed=2).to(dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.75).add_(x.mean(0) * 0.25)
        self.count += 1
        return x @ self.table - self.mean.mean()


def _mean_by(m: nn.Module, x: Tensor, *, keep: float = 0.75, add: float = 0.25, count: int = 1) -> Tensor:
    m.mean.copy_(m.mean.double() * keep + x.double().mean(0) * add)
    m.count += count
    return (x.double() @ m.table.double() - m.mean.double().mean()).to(x.dtype)


def _also_to(name: str, change: Any) -> Any:
    def candidate(m: nn.Module, x: Tensor) -> Tensor:
        out = m(x)
        change(getattr(m, name))
        return out

    return candidate


STATISTICS = Family(
    Statistics,
    lambda dtype, size, generator: (randn(generator, dtype, size, 24),),
    _mean_by,
    {
        "mixes up the momentum": lambda m, x: _mean_by(m, x, keep=0.25, add=0.75),
        "updates the mean twice": lambda m, x: (m.mean.mul_(0.75).add_(x.mean(0) * 0.25), m(x))[1],
        "does not count": lambda m, x: _mean_by(m, x, count=0),
        "counts twice": lambda m, x: _mean_by(m, x, count=2),
        "nudges one element that no call writes": _also_to("table", lambda t: t.view(-1)[5:6].mul_(1 + 2**-7)),
        "rescales what no call writes": _also_to("table", lambda t: t.mul_(1 + 2**-7)),
        "gets one element of the mean wrong": _also_to("mean", lambda t: t[3:4].neg_()),
        "lets the mean grow": _also_to("mean", lambda t: t.mul_(1.1)),
    },
    has_output_bugs=False,
)
