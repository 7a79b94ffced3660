"""Planted bugs of a decoding step over caches that the module keeps (see planted_bugs.py for what a family is)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from planted_bugs import Family, Op, randn, weight
from torch import Tensor, nn

_SLOTS, _SIZE = 40, 16


def _build(dtype: torch.dtype) -> nn.Module:
    module = Op(_step, dtype)
    for index, name in enumerate(("k_cache", "v_cache")):
        module.register_buffer(name, weight(2, 2, _SLOTS, _SIZE, seed=index).to(dtype))
    return module


def _inputs(dtype: torch.dtype, tokens: int, generator: torch.Generator) -> tuple[Any, ...]:
    q, k, v = (randn(generator, dtype, 2, heads, tokens, _SIZE) for heads in (4, 2, 2))
    # The last slot stays free for what is written one slot too far.
    return q, k, v, torch.randperm(_SLOTS - 2, generator=generator)[:tokens] + 1


def _angles(positions: Tensor) -> Tensor:
    return positions.double()[:, None] * 1e4 ** (-torch.arange(0, _SIZE, 2).double() / _SIZE)


def _halves(x: Tensor, positions: Tensor, sign: int = 1) -> Tensor:
    left, right = x.chunk(2, -1)
    cos, sin = _angles(positions).cos().to(x.dtype), sign * _angles(positions).sin().to(x.dtype)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def _neighbours(x: Tensor, positions: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = _angles(positions).cos().to(x.dtype), _angles(positions).sin().to(x.dtype)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def _one_half(x: Tensor, positions: Tensor, turned: int) -> Tensor:
    halves = zip(x.chunk(2, -1), _halves(x, positions).chunk(2, -1), strict=True)
    return torch.cat([pair[index == turned] for index, pair in enumerate(halves)], -1)


def _weighed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.transpose(-1, -2) * _SIZE**-0.5).masked_fill(~mask, -float("inf"))
    return torch.softmax(scores, -1) @ v


def _seen(positions: Tensor, shift: int = 0) -> Tensor:
    return torch.arange(_SLOTS) <= positions[:, None] + shift


def _step(m: nn.Module, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Rotate queries and keys, write the caches' slots, attend to the slots up to the token's own."""
    m.k_cache.index_copy_(2, positions, _halves(k, positions))
    m.v_cache.index_copy_(2, positions, v)
    return _weighed(_halves(q, positions), m.k_cache, m.v_cache, _seen(positions))


Turn = Callable[[Tensor, Tensor], Tensor]


def _like(
    *,
    slots: Callable[[Tensor], Tensor] = lambda p: p,
    value_slots: Callable[[Tensor], Tensor] | None = None,
    turn: Turn = _halves,
    turn_keys: Turn | None = None,
    cached: Callable[[Tensor], Tensor] = lambda k: k,
    shift: int = 0,
    read: Callable[..., tuple[Tensor, Tensor]] = lambda old, new: new,
    attend: Callable[..., Tensor] = _weighed,
) -> Callable[..., Tensor]:
    """Make a step in fp64, rounded where it is stored, with what a bug changes.

    Args:
        slots: of keys, and of values where `value_slots` is None, from the positions.
        turn: the rotation; turn_keys: that of keys, where it is another.
        cached: what is written of the rotated keys.
        shift: how many keys after its own a token sees.
        read: (old caches, new caches) -> keys and values to attend to.
        attend: (q, k, v, mask) -> result.
    """

    def candidate(m: nn.Module, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        old = m.k_cache.clone(), m.v_cache.clone()
        keys = (turn_keys or turn)(k.double(), positions).to(k.dtype)
        m.k_cache.index_copy_(2, slots(positions), cached(keys))
        m.v_cache.index_copy_(2, (value_slots or slots)(positions), v)
        k_read, v_read = read(old, (m.k_cache, m.v_cache))
        turned = turn(q.double(), positions).to(q.dtype)
        return attend(turned.double(), k_read.double(), v_read.double(), _seen(positions, shift)).to(q.dtype)

    return candidate


def _in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, are_weighed: bool = True) -> Tensor:
    """Attend to three parts of the cache and add them by their sums, or as if each had the same."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.transpose(-1, -2) * _SIZE**-0.5).masked_fill(~mask, -float("inf"))
    parts = list(zip(scores.split(16, -1), v.split(16, -2), strict=True))
    totals = torch.stack([part.logsumexp(-1) for part, _ in parts])
    shares = torch.softmax(totals, 0) if are_weighed else torch.isfinite(totals) / torch.isfinite(totals).sum(0)
    return sum(
        share[..., None] * (torch.softmax(part, -1).nan_to_num() @ values)
        for share, (part, values) in zip(shares, parts, strict=True)
    )


def _double(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Count the token's own key twice: from the cache and from registers."""
    own = mask & ~torch.roll(mask, -1, -1)
    return _weighed(q, torch.cat([k, k], -2), torch.cat([v, v], -2), torch.cat([mask, own], -1))


def _not_written(m: nn.Module, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    old = m.k_cache.clone(), m.v_cache.clone()
    out = _like()(m, q, k, v, positions)
    m.k_cache.copy_(old[0])
    m.v_cache.copy_(old[1])
    return out


def _first_batch_alone(m: nn.Module, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    old = m.v_cache.clone()
    out = _like()(m, q, k, v, positions)
    m.v_cache[1:] = old[1:]
    return out


def _rest_cleared(m: nn.Module, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    out = _like()(m, q, k, v, positions)
    m.k_cache[:, :, int(positions.max()) + 1 :] = 0
    return out


DECODE_STEP = Family(
    _build,
    _inputs,
    _like(attend=_in_parts),
    {
        "writes the slot after": _like(slots=lambda p: p + 1),
        "writes the slot before": _like(slots=lambda p: p - 1),
        "writes values one slot beside": _like(value_slots=lambda p: p + 1),
        "counts slots from the end": _like(slots=lambda p: _SLOTS - 1 - p),
        "forgets to write the caches": _not_written,
        "writes the first batch element's values alone": _first_batch_alone,
        "clears the slots that are still free": _rest_cleared,
        "attends to what the slots held before": _like(read=lambda old, new: old),
        "attends to keys that the slots held before": _like(read=lambda old, new: (old[0], new[1])),
        "attends to values that the slots held before": _like(read=lambda old, new: (new[0], old[1])),
        "counts the new key twice": _like(attend=_double),
        "sees one key too many": _like(shift=1),
        "does not see its own key": _like(shift=-1),
        "sees all slots": _like(shift=_SLOTS),
        "adds its parts as if they weighed the same": _like(
            attend=lambda *tensors: _in_parts(*tensors, are_weighed=False)
        ),
        "turns the other way": _like(turn=lambda x, p: _halves(x, p, -1)),
        "turns keys the other way": _like(turn_keys=lambda x, p: _halves(x, p, -1)),
        "turns the first half alone": _like(turn=lambda x, p: _one_half(x, p, 0)),
        "turns the second half alone": _like(turn=lambda x, p: _one_half(x, p, 1)),
        "turns the wrong half of keys": _like(turn_keys=lambda x, p: _halves(x, p).roll(_SIZE // 2, -1)),
        "turns neighbours instead of halves": _like(turn=_neighbours),
        "turns keys by the slot before": _like(turn_keys=lambda x, p: _halves(x, p - 1)),
        "caches keys before their rotation": _like(turn_keys=lambda x, p: x),
        "caches keys in fp8": _like(cached=lambda k: k.to(torch.float8_e4m3fn).to(k.dtype)),
        "caches keys in bf16": _like(cached=lambda k: k.bfloat16().to(k.dtype)),
    },
    sizes=(2, 3, 1),
    has_output_bugs=False,
    fp32_only=frozenset({"caches keys in bf16"}),
)
