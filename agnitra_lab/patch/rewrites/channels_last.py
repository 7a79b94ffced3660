"""Convolutions run with the channels innermost where that measures faster, with weights laid out once.

Trigger: conv1d, conv2d, conv3d and their transposed forms over batches, not yet in that layout, weights given to the
graph.
Algebra: none; only strides change, and conv1d becomes a conv2d over one line, the only form in which torch lets cuDNN
read it so. Inductor lays out conv2d by a rule of thumb, copies the weights at each call, and leaves conv1d and conv3d
as they are.
Guard: each distinct convolution is measured in both layouts, all of one rank move together, and only when the sum with
the copies at the borders and at kernels of ours is more than 3% faster; laid-out weights follow updates of their
sources; results that leave the graph keep their strides. Convolutions that `depthwise_conv` is to take, in either
layout, follow the others.
Source: PyTorch's channels-last memory format; cuDNN's NHWC kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, infer
from agnitra_lab.patch.convolutions import (
    RANKS,
    LayoutTimes,
    find_convolutions,
    is_channels_last,
    layout_times,
    widened,
)
from agnitra_lab.patch.emit import emit
from agnitra_lab.patch.layouts import CHANNELS_LAST, LayoutFlow
from agnitra_lab.patch.measured import LEAST_GAIN
from agnitra_lab.patch.ops import argument, fake_of, mutated_roots, op_name
from agnitra_lab.patch.rewrites import depthwise_conv
from agnitra_lab.patch.weights import why_not_derivable

ACTION = "channels_last"


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Change the layout of the convolutions of each rank for which it pays.

    Returns:
        One descriptor per convolution.
    """
    convolutions = find_convolutions(graph_module.graph)
    if not convolutions:
        context.refuse(ACTION, "the graph has no convolution over a batch")
    times = layout_times(graph_module.graph)
    chosen: dict[fx.Node, dict[str, JsonValue]] = {}
    for rank in sorted(set(RANKS.values())):
        fitting = []
        for node in convolutions:
            x = fake_of(argument(node, 0, "input"))
            if x is None or x.dim() != rank:
                continue
            problem = _why_not(node, context)
            if problem:
                context.refuse(ACTION, problem)
            else:
                fitting.append(node)
        chosen |= _choose(fitting, rank, times, context)
    return _convert(chosen, context) if chosen else []


def _why_not(node: fx.Node, context: RewriteContext) -> str | None:
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    if depthwise_conv.ACTION in context.actions and depthwise_conv.is_takeable(node):
        return "a convolution is depthwise, and its own kernel takes either layout"
    if not _is_line(node) and is_channels_last(fake_of(x)) and is_channels_last(fake_of(weight)):
        return "the convolution has its channels innermost already"
    problem = why_not_derivable([context.real_tensor(weight)])
    if problem:
        return problem
    return "the graph writes to a weight" if weight in mutated_roots(context.graph_module.graph) else None


def _is_line(node: fx.Node) -> bool:
    return _fake(argument(node, 0, "input")).dim() == 3


def _choose(
    nodes: Sequence[fx.Node], rank: int, times: LayoutTimes, context: RewriteContext
) -> dict[fx.Node, dict[str, JsonValue]]:
    measured = times.of_all(nodes)
    if not measured:
        return {}
    before, after = times.together(measured, rank)
    if before / after <= LEAST_GAIN:
        context.refuse(
            ACTION,
            f"the {rank - 2}-d convolutions take {before:.4f} ms as they are and {after:.4f} ms with the channels "
            "innermost",
        )
        return {}
    return {
        node: {"channels_first_ms": round(first, 6), "channels_last_ms": round(last, 6)}
        for node, (first, last) in measured.items()
    }


def _convert(chosen: dict[fx.Node, dict[str, JsonValue]], context: RewriteContext) -> list[PatchDescriptor]:
    flow = LayoutFlow(context)
    descriptors = []
    for node in list(context.graph_module.graph.nodes):
        if node not in chosen:
            flow.carry_over(node)
            continue
        descriptors.append(context.describe(ACTION, node, [node], f"{op_name(node)}(channels_last)", chosen[node]))
        old = node.meta.get("example_value")
        if _is_line(node):
            flow.changed(_widen(node, context), old)
            continue
        x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
        memory_format = CHANNELS_LAST[_fake(x).dim()]
        node.replace_input_with(x, _laid_out(x, node, memory_format, context))
        node.replace_input_with(weight, _laid_out_weight(weight, node, memory_format, context))
        infer(node)
        flow.changed(node, old)
    return descriptors


def _widen(node: fx.Node, context: RewriteContext) -> fx.Node:
    """Put a 2-d convolution over one line in the place of a 1-d one."""
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    target, numbers = widened(node)
    lines = emit(context, node, torch.unsqueeze, x, 2)
    if not is_channels_last(_fake(x)):
        lines = emit(context, node, "contiguous", lines, memory_format=torch.channels_last)
    taps = _laid_out_weight(weight, node, torch.channels_last, context)
    out = emit(context, node, target, lines, taps, argument(node, 2, "bias"), *numbers)
    out = emit(context, node, torch.squeeze, out, 2)
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)
    return out


def _laid_out(x: fx.Node, before: fx.Node, memory_format: torch.memory_format, context: RewriteContext) -> fx.Node:
    if is_channels_last(_fake(x)):
        return x
    return emit(context, before, "contiguous", x, memory_format=memory_format)


def _laid_out_weight(
    weight: fx.Node, before: fx.Node, memory_format: torch.memory_format, context: RewriteContext
) -> fx.Node:
    def build(source: Tensor) -> Tensor:
        wide = source.unsqueeze(2) if source.dim() == 3 else source
        return wide.contiguous(memory_format=memory_format)

    return context.derive(ACTION, [weight], build, before, (str(memory_format),))


def _fake(node: Any) -> Tensor:
    fake = fake_of(node)
    assert fake is not None
    return fake
