"""The sum of a convolution's result over all its positions, from sums of its input over windows.

With y[co, o] = b[co] + sum over ci, k of w[co, ci, k] x[ci, p(o, k)], where x is 0 outside its bounds, the sum over o
is b[co] * #o + sum over ci, k of w[co, ci, k] S[ci, k], where S[ci, k] is the sum of x[ci, p] over the positions
p(o, k) that lie inside. For a convolution of stride 1 these are p = o - padding + k * dilation; for a transposed one,
all p with 0 <= p * stride - padding + k * dilation < #o. Both are one range in each dimension, which is what is summed
here; k's with one range share one sum, and their weights are added up ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.emit import emit
from agnitra_lab.patch.ops import argument, fake_of, op_name

Range = tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """A convolution without groups whose positions in each dimension are ranges of the input's.

    Attributes:
        ranges: for each spatial dimension, for each k of the kernel, the input positions that it meets: [start, stop).
        is_transposed: the weight is [in, out, ...], not [out, in, ...].
        num_positions: positions of the result.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    ranges: tuple[tuple[Range, ...], ...]
    is_transposed: bool
    num_positions: int


def match_convolution(node: Any) -> Convolution | str | None:
    """Return the convolution that a node computes, why no sum can be moved through it, or None for another op."""
    name = op_name(node) or ""
    if name not in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        return None
    is_transposed, rank = "transpose" in name, int(name[-2])
    names = ("stride", "padding", "output_padding", "groups", "dilation") if is_transposed else (
        "stride", "padding", "dilation", "groups",
    )  # fmt: skip
    defaults = {"padding": 0, "output_padding": 0}
    given = {key: argument(node, index + 3, key, defaults.get(key, 1)) for index, key in enumerate(names)}
    x, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    before, kernel, after = fake_of(x), fake_of(weight), fake_of(node)
    if before is None or kernel is None or after is None or before.dim() != rank + 2:
        return "shapes are not known, or the input is no batch"
    if given["groups"] != 1:
        return "the convolution has groups"
    stride, dilation = _each(given["stride"], rank), _each(given["dilation"], rank)
    sizes = [int(size) for size in kernel.shape[2:]]
    padding = _padding(given["padding"], sizes, dilation)
    if not is_transposed and any(step != 1 for step in stride):
        return "the convolution skips positions (stride above 1)"
    outs = [int(size) for size in after.shape[2:]]
    ranges = tuple(
        tuple(
            _met(int(before.shape[2 + dim]), outs[dim], stride[dim], k * dilation[dim] - padding[dim], is_transposed)
            for k in range(sizes[dim])
        )
        for dim in range(rank)
    )
    if any(all(stop <= start for start, stop in found) for found in ranges):
        return "the convolution never meets its input"
    return Convolution(node, x, weight, bias, ranges, is_transposed, int(after[0, 0].numel()))


def _each(given: Any, rank: int) -> list[int]:
    values = [given] if isinstance(given, int) else list(given)
    return [int(value) for value in (values * rank if len(values) == 1 else values)]


def _padding(given: Any, sizes: list[int], dilation: list[int]) -> list[int]:
    if given == "same":
        return [step * (size - 1) // 2 for size, step in zip(sizes, dilation, strict=True)]
    return _each(0 if given == "valid" else given, len(sizes))


def _met(num_in: int, num_out: int, stride: int, offset: int, is_transposed: bool) -> Range:
    """Return the input positions that one k meets: p = o + offset, or o = p * stride + offset when transposed."""
    if is_transposed:
        first, last = -(offset // stride), (num_out - 1 - offset) // stride
        return max(0, first), min(num_in, last + 1)
    return max(0, offset), min(num_in, num_out + offset)


def distinct(ranges: tuple[Range, ...]) -> list[Range]:
    """Return the ranges that hold anything, each once, in order."""
    return list(dict.fromkeys(found for found in ranges if found[0] < found[1]))


def sum_windows(context: RewriteContext, conv: Convolution, before: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Emit the sums of x over every combination of ranges: [batch, channels, number of combinations]."""
    x = emit(context, before, "to", conv.x, dtype)
    found = [distinct(ranges) for ranges in conv.ranges]
    if all(len(ranges) == 1 for ranges in found):
        for dim, ((start, stop),) in enumerate(found):
            x = _narrow(context, before, x, 2 + dim, start, stop)
        return emit(context, before, "sum", x, tuple(range(2, 2 + len(found))), keepdim=True)
    for ranges in found:
        # The dimension at 2 goes, and its ranges come as the last dimension.
        x = emit(context, before, torch.stack, _sums_of_ranges(context, before, x, ranges), -1)
    return x


def _sums_of_ranges(context: RewriteContext, before: fx.Node, x: fx.Node, ranges: list[Range]) -> list[fx.Node]:
    """Emit the sum over dimension 2 for each range: what all share is read once, and only additions are made."""
    low, high = max(start for start, _ in ranges), min(stop for _, stop in ranges)
    if low >= high:
        return [_sum_of(context, before, x, start, stop) for start, stop in ranges]
    shared = _sum_of(context, before, x, low, high)
    sums = []
    for start, stop in ranges:
        total = shared
        for edge in ((start, low), (high, stop)):
            if edge[0] < edge[1]:
                total = emit(context, before, torch.add, total, _sum_of(context, before, x, *edge))
        sums.append(total)
    return sums


def _sum_of(context: RewriteContext, before: fx.Node, x: fx.Node, start: int, stop: int) -> fx.Node:
    return emit(context, before, "sum", _narrow(context, before, x, 2, start, stop), 2)


def _narrow(context: RewriteContext, before: fx.Node, x: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
    fake = fake_of(x)
    if fake is not None and (start, stop) == (0, fake.shape[dim]):
        return x
    return emit(context, before, torch.narrow, x, dim, start, stop - start)


def weight_of_windows(conv: Convolution, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the build of the weight that belongs to the window sums: [channels in * combinations, channels out]."""
    groups = [[found.index(met) if met in found else -1 for met in ranges] for ranges, found in _with_distinct(conv)]
    counts = [len(found) for _, found in _with_distinct(conv)]

    def build(weight: Tensor) -> Tensor:
        folded = weight.to(dtype)
        if not conv.is_transposed:
            folded = folded.transpose(0, 1)
        for dim, (places, count) in enumerate(zip(groups, counts, strict=True)):
            kept = [k for k, place in enumerate(places) if place >= 0]
            index = torch.tensor([places[k] for k in kept], device=weight.device)
            shape = (*folded.shape[: 2 + dim], count, *folded.shape[3 + dim :])
            picked = folded.index_select(2 + dim, torch.tensor(kept, device=weight.device))
            folded = folded.new_zeros(shape).index_add_(2 + dim, index, picked)
        # [in, out, ranges...] -> [in, ranges..., out]
        return folded.movedim(1, -1).reshape(-1, folded.shape[1])

    return build


def _with_distinct(conv: Convolution) -> list[tuple[tuple[Range, ...], list[Range]]]:
    return [(ranges, distinct(ranges)) for ranges in conv.ranges]
