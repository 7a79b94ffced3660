"""Recurrent layers, and convolutions that compile badly, stay one call of their library inside the compiled graph.

Trigger: lstm, gru and rnn calls, which Dynamo hands over because `install` allows it to (`DYNAMO_OPTIONS`): AOTAutograd
would take them apart into single steps; without this rewrite the graph breaks at them. And 2-d convolutions with the
channels outermost, which Inductor would run with the channels innermost.
Algebra: none; the same library call on the same tensors.
Guard: no packed sequences. A depthwise or transposed convolution is kept only where the layout that it has measures
more than 3% faster than the other, other ones where that holds for all of them together (one with a single tap, fp32,
took 0.85 ms on an H200, and compiled 2.5), and any that cuDNN computes in fp32 as it is and in TF32 with its channels
innermost (one of 8 channels, compiled, was 1000 times as far from fp64 as eager). A bias is added outside, where it
fuses.
Source: pytorch #140845 (LSTM), KernelBench's timings of depthwise convolutions under torch.compile.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, infer
from agnitra_lab.patch.convolutions import LayoutTimes, find_convolutions, is_channels_last, layout_times
from agnitra_lab.patch.layouts import restrided
from agnitra_lab.patch.measured import LEAST_GAIN
from agnitra_lab.patch.opaque import RECURRENT
from agnitra_lab.patch.ops import argument, fake_of, op_name

ACTION = "keep_eager"
DYNAMO_OPTIONS = {"allow_rnn": True}
"""What Dynamo must be told for recurrent layers to reach this rewrite."""

_NAMES = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_NAMES = ("stride", "padding", "output_padding", "groups", "dilation")


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Wrap each layer that should stay as it is.

    Returns:
        One descriptor per layer.
    """
    layers = [node for node in graph_module.graph.nodes if op_name(node) in RECURRENT]
    descriptors = [found for node in layers if (found := _keep_recurrent(node, context)) is not None]
    times = layout_times(graph_module.graph)
    turnable = [node for node in find_convolutions(graph_module.graph) if _is_turnable(node)]
    together = _slower_together(turnable, times)
    convolutions = [node for node in turnable if _is_suspect(node, times, together)]
    descriptors += [
        found for node in convolutions if (found := _keep_convolution(node, times, together, context)) is not None
    ]
    if not layers and not convolutions:
        context.refuse(ACTION, "the graph has no recurrent layer and no convolution that must keep its layout")
    return descriptors


# --- recurrent layers ------------------------------------------------------------------------------------------------


def _keep_recurrent(node: fx.Node, context: RewriteContext) -> PatchDescriptor | None:
    arguments: Any = node.args
    x, states, weights, *rest = arguments
    if isinstance(states, fx.Node) and isinstance(weights, fx.Node):
        context.refuse(ACTION, "a recurrent layer runs over a packed sequence")
        return None
    if not isinstance(weights, (list, tuple)) or len(rest) != 6 or node.kwargs:
        context.refuse(ACTION, "a recurrent layer is called in a form that is not known")
        return None
    kind = str(op_name(node))
    given = [states] if isinstance(states, fx.Node) else list(states)
    old = node.meta.get("example_value")
    config: dict[str, JsonValue] = {"num_layers": int(rest[1]), "bidirectional": bool(rest[4])}
    descriptor = context.describe(ACTION, node, [node], f"one opaque {kind} call", config)
    call = context.call(node, torch.ops.agnitra.recurrent.default, x, given, list(weights), kind, *rest)
    infer(call)
    results = []
    for index in range(len(given) + 1):
        piece = context.call(node, operator.getitem, call, index)
        infer(piece)
        old_piece = old[index] if isinstance(old, (list, tuple)) and index < len(old) else None
        results.append(piece if old_piece is None else restrided(piece, old_piece, node, context))
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(user.args[1], int):
            user.replace_all_uses_with(results[user.args[1]])
            node.graph.erase_node(user)
    if node.users:
        whole = context.call(node, _as_tuple, *results)
        node.replace_all_uses_with(whole)
    node.graph.erase_node(node)
    return descriptor


def _as_tuple(*values: Any) -> tuple[Any, ...]:
    return values


# --- convolutions ----------------------------------------------------------------------------------------------------


def _is_suspect(node: fx.Node, times: LayoutTimes, together: Collection[fx.Node]) -> bool:
    return node in together or _is_awkward(node) or (_is_on_cuda(node) and times.loses_digits(node))


def _is_turnable(node: fx.Node) -> bool:
    """Whether Inductor may run it with the channels innermost, which they are not yet."""
    x, weight = fake_of(argument(node, 0, "input")), fake_of(argument(node, 1, "weight"))
    return x is not None and x.dim() == 4 and not is_channels_last(x) and not is_channels_last(weight)


def _is_awkward(node: fx.Node) -> bool:
    """Whether it is of a kind that is to be looked at for itself."""
    weight = fake_of(argument(node, 1, "weight"))
    is_depthwise = weight is not None and _groups(node) > 1 and weight.shape[1] == 1
    return is_depthwise or op_name(node) == "conv_transpose2d"


def _slower_together(turnable: Collection[fx.Node], times: LayoutTimes) -> Collection[fx.Node]:
    """Return those of no such kind where all of them, with the copies at the borders, are slower turned."""
    measured = times.of_all(node for node in turnable if _is_on_cuda(node) and not _is_awkward(node))
    if not measured:
        return ()
    first, last = times.together(measured, 4, is_least=True)
    return measured.keys() if last / first > LEAST_GAIN else ()


def _is_on_cuda(node: fx.Node) -> bool:
    fake = fake_of(argument(node, 0, "input"))
    return fake is not None and fake.device.type == "cuda"


def _groups(node: fx.Node) -> int:
    groups = argument(node, 6, "groups", 1)
    return groups if isinstance(groups, int) else 1


def _keep_convolution(
    node: fx.Node, times: LayoutTimes, together: Collection[fx.Node], context: RewriteContext
) -> PatchDescriptor | None:
    arguments = _aten_arguments(node)
    if not _is_on_cuda(node):
        context.refuse(ACTION, "a convolution does not run on a CUDA device; elsewhere it compiles to the same call")
        return None
    if arguments is None:
        context.refuse(ACTION, "a convolution pads by name")
        return None
    measured = times.of(node)
    config: dict[str, JsonValue]
    if times.loses_digits(node):
        config = {"is_tf32_with_channels_last": True}
    elif measured is not None and (node in together or measured[1] / measured[0] > LEAST_GAIN):
        config = {"channels_first_ms": round(measured[0], 6), "channels_last_ms": round(measured[1], 6)}
    else:
        context.refuse(ACTION, "a convolution is no slower with the channels innermost")
        return None
    return _install(node, arguments, config, context)


def _install(
    node: fx.Node, arguments: tuple[Any, ...], config: dict[str, JsonValue], context: RewriteContext
) -> PatchDescriptor:
    descriptor = context.describe(ACTION, node, [node], f"opaque {op_name(node)}, channels outermost", config)
    x = context.call(node, "contiguous", argument(node, 0, "input"))
    weight = context.call(node, "contiguous", argument(node, 1, "weight"))
    call = context.call(node, torch.ops.agnitra.conv_as_is.default, x, weight, *arguments)
    bias = argument(node, 2, "bias")
    if bias is not None:
        call = context.call(node, torch.add, call, context.call(node, "reshape", bias, (1, -1, 1, 1)))
    call.meta["example_value"] = fake_of(node)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)
    return descriptor


def _aten_arguments(node: fx.Node) -> tuple[Any, ...] | None:
    """Return stride, padding, dilation, transposed, output_padding and groups as aten takes them."""
    is_transposed = op_name(node) == "conv_transpose2d"
    names = _TRANSPOSED_NAMES if is_transposed else _NAMES
    given = {name: argument(node, index + 3, name) for index, name in enumerate(names)}
    if isinstance(given["padding"], str):
        return None
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    pairs = {name: _pair(default if given.get(name) is None else given[name]) for name, default in defaults.items()}
    return (
        pairs["stride"], pairs["padding"], pairs["dilation"], is_transposed, pairs["output_padding"], _groups(node),
    )  # fmt: skip


def _pair(value: Any) -> list[int]:
    return [int(value)] * 2 if isinstance(value, int) else [int(item) for item in value] * (2 if len(value) == 1 else 1)
