"""Convolutions over patches become one matrix product over gathered windows, where that measures faster.

Trigger: conv1d, conv2d or conv3d over a batch, without groups, padding or dilation, more than one tap, whose windows do
not overlap (a stride as long as the kernel: patch embeddings, stems of hierarchical transformers), or whose windows
have at most 64 values (a sound's first layer).
Algebra: y[n, p, :] = W x[n, window p] + b, the window flattened as the weight is. Windows that do not overlap are a
permutation of the input; others are gathered from a strided view, with zeros up to a multiple of 16 bytes. The result
has its channels innermost; what leaves the graph gets eager's strides.
Guard: both are measured on random tensors in the graph's layout, each distinct one once; the product must be more than
3% faster, and in fp32 not further from the exact result.
Source: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006
(unrolled convolution). On an H200 in bf16 the patches of 16 x 16 of 64 images took cuDNN 515 us and the product 62,
those of 4 x 4 155 and 67, the first layer of wav2vec 2.0 873 and 110.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx
from torch.nn.functional import pad

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.device.call_time import time_ms
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.convolutions import is_less_exact, random_like, real_tensors, searched_algorithms
from agnitra_lab.patch.emit import emit
from agnitra_lab.patch.layouts import LayoutFlow
from agnitra_lab.patch.measured import Measured, Times, layouts_of
from agnitra_lab.patch.ops import argument, fake_of, op_name

ACTION = "patch_conv"
MAX_GATHERED = 64
"""Values of a window that overlaps others: its copies are read once more than the input is."""
_RANKS = {"conv1d": 3, "conv2d": 4, "conv3d": 5}
_ALIGNED_BYTES = 16


@dataclass(frozen=True)
class _Windows:
    """Where the taps of a convolution lie.

    Attributes:
        taps, stride: a number for each dimension behind the channels.
        counts: windows along each of them.
    """

    taps: tuple[int, ...]
    stride: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def are_apart(self) -> bool:
        return all(tap <= step for tap, step in zip(self.taps, self.stride, strict=True))


@dataclass(frozen=True)
class _Patches:
    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    windows: _Windows

    @property
    def fakes(self) -> list[Tensor | None]:
        return [fake_of(source) for source in (self.x, self.weight, self.bias)]


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each convolution for which the product measures faster.

    Returns:
        One descriptor per convolution.
    """
    descriptors, flow = [], LayoutFlow(context)
    measured = Measured(ACTION, context)
    num_found = 0
    for node in list(graph_module.graph.nodes):
        found = _match(node)
        num_found += found is not None
        times = None
        if found is not None:
            key = (found.windows, layouts_of(*found.fakes))
            timed = partial(measure, node, found.fakes, found.windows)
            times = measured.faster(key, timed, "a convolution over patches", "its product")
        if found is not None and times is not None:
            descriptors.append(_replace(found, times, context, flow))
        else:
            flow.carry_over(node)
    if not num_found:
        context.refuse(ACTION, f"no convolution's windows lie apart, or have at most {MAX_GATHERED} values")
    return descriptors


def _match(node: fx.Node) -> _Patches | None:
    rank = _RANKS.get(str(op_name(node)))
    x, weight, out = fake_of(argument(node, 0, "input")), fake_of(argument(node, 1, "weight")), fake_of(node)
    if rank is None or x is None or weight is None or out is None or x.dim() != rank or x.dtype != weight.dtype:
        return None
    taps = tuple(int(size) for size in weight.shape[2:])
    stride = _numbers(argument(node, 3, "stride", 1), len(taps))
    padding, dilation = argument(node, 4, "padding", 0), _numbers(argument(node, 5, "dilation", 1), len(taps))
    if padding != "valid" and (isinstance(padding, str) or any(_numbers(padding, len(taps)))):
        return None
    if argument(node, 6, "groups", 1) != 1 or math.prod(taps) == 1 or any(step != 1 for step in dilation):
        return None
    windows = _Windows(taps, stride, tuple(int(size) for size in out.shape[2:]))
    if not windows.are_apart and weight[0].numel() > MAX_GATHERED:
        return None
    return _Patches(node, argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias"), windows)


def _numbers(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * count if len(values) == 1 else values


def measure(node: fx.Node, fakes: Sequence[Tensor | None], windows: _Windows) -> Times | None:
    """Time a convolution and its product on random tensors of the given layouts, in ms."""
    target: Any = node.target
    with real_tensors(), searched_algorithms():
        x, weight, bias = (None if fake is None else random_like(fake) for fake in fakes)
        assert x is not None and weight is not None
        conv = partial(target, stride=windows.stride)
        product = partial(_product, windows, x, weight, bias)
        if is_less_exact(product, conv, (x, weight, bias)):
            return None
        before, after = time_ms(partial(conv, x, weight, bias), x.device), time_ms(product, x.device)
    return None if before is None or after is None else (before, after)


def _product(windows: _Windows, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x
    for name, arguments in _gathered(windows, x):
        out = getattr(out, name)(*arguments)
    matrix = weight.flatten(1)
    missing = _num_missing(matrix.shape[1], x)
    if missing:
        out, matrix = pad(out, (0, missing)), pad(matrix, (0, missing))
    return torch.nn.functional.linear(out, matrix, bias).unflatten(1, windows.counts).movedim(-1, 1)


def _gathered(windows: _Windows, x: Tensor) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the methods from [N, C, sizes...] to [N, windows, C x taps], the values in the weight's order."""
    rank = len(windows.taps)
    # [N, C, counts..., taps...], a view.
    steps: list[tuple[str, tuple[Any, ...]]] = [
        ("unfold", (2 + dim, tap, step))
        for dim, (tap, step) in enumerate(zip(windows.taps, windows.stride, strict=True))
    ]
    num_values = int(x.shape[1]) * math.prod(windows.taps)
    return [
        *steps, ("permute", (0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))),
        ("reshape", (int(x.shape[0]), math.prod(windows.counts), num_values)),
    ]  # fmt: skip


def _num_missing(num_values: int, x: Tensor) -> int:
    """Return how many zeros bring the rows of a product to a multiple of 16 bytes."""
    return -num_values % (_ALIGNED_BYTES // x.element_size())


def _replace(found: _Patches, times: Times, context: RewriteContext, flow: LayoutFlow) -> PatchDescriptor:
    node, (fake, taps, _), old = found.node, found.fakes, fake_of(found.node)
    assert fake is not None and taps is not None and old is not None
    config: dict[str, JsonValue] = {"conv_ms": round(times[0], 6), "product_ms": round(times[1], 6)}
    descriptor = context.describe(ACTION, node, [node], "product of gathered windows", config)
    out = found.x
    for name, arguments in _gathered(found.windows, fake):
        out = emit(context, node, name, out, *arguments)
    matrix = emit(context, node, torch.flatten, found.weight, 1)
    missing = _num_missing(taps[0].numel(), fake)
    if missing:
        out, matrix = (emit(context, node, pad, each, (0, missing)) for each in (out, matrix))
    out = emit(context, node, torch._C._nn.linear, out, matrix, found.bias)
    out = emit(context, node, "unflatten", out, 1, found.windows.counts)
    out = emit(context, node, torch.movedim, out, -1, 1)
    node.replace_all_uses_with(out)
    if out.meta["example_value"].stride() != old.stride():
        flow.changed(out, old)
    node.graph.erase_node(node)
    return descriptor
