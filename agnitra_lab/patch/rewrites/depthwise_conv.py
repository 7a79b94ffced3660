"""Convolutions of each channel by itself become one kernel, with the padding before and the activation after them.

Trigger: conv1d, conv2d or conv3d over a batch with as many groups as input channels; before it a zero `pad`, after it
a slice that keeps the first outputs of the last dimension, as causal convolutions have, and one activation.
Algebra: the same sums in float32 from the bias on, rounded once; the activation reads rounded sums, as its own op does.
Outputs that a slice drops are not computed, and zeros that a pad writes are not read.
Guard: x and weight share a dtype, the weight's rows of taps are at most 64; a weight laid out for channels innermost
follows updates of its source. Where x has its channels innermost the result has too; results that leave the graph keep
their strides.
Source: Inductor has no template for these: it calls the library, in eager's layout or with a copy, and rounds before it
adds the bias.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.epilogues import activation_of
from agnitra_lab.patch.layouts import LayoutFlow
from agnitra_lab.patch.ops import argument, fake_of, is_view, is_written_between, memory_root, mutated_roots, op_name
from agnitra_lab.patch.weights import why_not_derivable

ACTION = "depthwise_conv"
_RANKS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PADS = {torch.nn.functional.pad, torch._C._nn.pad}
_VIEWS = {"transpose", "permute", "swapaxes", "movedim"}
_MOST_COLUMNS = 64


@dataclass
class _Depthwise:
    """One convolution: what it reads, its numbers, and the nodes up to the value that the kernel gives."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    taps: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    size: list[int]
    result: fx.Node
    activation: str = "none"
    after: list[fx.Node] = field(default_factory=list)
    """What the activation consists of, first to last; the views between the result and it stay."""
    passed: list[fx.Node] = field(default_factory=list)
    pad: fx.Node | None = None
    """A pad that only the convolution read."""

    @property
    def nodes(self) -> list[fx.Node]:
        """What goes away, in graph order."""
        first = [] if self.pad is None else [self.pad]
        return [*first, self.node, *([self.result] if self.result is not self.node else []), *self.after]


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each depthwise convolution by the kernel.

    Returns:
        One descriptor per convolution.
    """
    descriptors, flow = [], LayoutFlow(context)
    gone: set[fx.Node] = set()
    nodes = list(graph_module.graph.nodes)
    if not any(_is_depthwise(node) for node in nodes):
        context.refuse(ACTION, "the graph has no convolution with a group for each channel")
        return []
    for node in nodes:
        if node in gone:
            continue
        found = _match(node, context) if _is_depthwise(node) else None
        kernel = None if found is None else context.kernel(ACTION, _site(found), _fake(found.x).dtype)
        if found is None or kernel is None:
            flow.carry_over(node)
            continue
        gone |= set(found.nodes)
        descriptors.append(_replace(found, kernel, context, flow))
    return descriptors


def _is_depthwise(node: fx.Node) -> bool:
    if op_name(node) not in _RANKS:
        return False
    x, weight = fake_of(argument(node, 0, "input")), fake_of(argument(node, 1, "weight"))
    groups = argument(node, 6, "groups", 1)
    if x is None or weight is None or x.dim() != _RANKS[str(op_name(node))] + 2:
        return False
    return isinstance(groups, int) and groups == x.shape[1] and groups > 1


def is_takeable(node: fx.Node) -> bool:
    """Whether a convolution is depthwise and of a form that the kernel takes."""
    return _is_depthwise(node) and _problem(node) is None


def _problem(node: fx.Node) -> str | None:
    x, weight, bias = (fake_of(argument(node, place, key)) for place, key in enumerate(("input", "weight", "bias")))
    assert x is not None and weight is not None
    return _why_not(x, weight, bias, fake_of(node), [int(extent) for extent in weight.shape[2:]])


def _match(node: fx.Node, context: RewriteContext) -> _Depthwise | None:
    x, weight, bias = (argument(node, place, key) for place, key in enumerate(("input", "weight", "bias")))
    problem = _problem(node)
    if problem:
        context.refuse(ACTION, problem)
        return None
    result, taps = _fake(node), [int(extent) for extent in _fake(weight).shape[2:]]
    stride, dilation = _numbers(argument(node, 3, "stride", 1), len(taps)), argument(node, 5, "dilation", 1)
    dilation = _numbers(dilation, len(taps))
    padding = _padding(argument(node, 4, "padding", 0), taps, dilation)
    size = [int(extent) for extent in result.shape[2:]]
    found = _Depthwise(node, x, weight, bias, taps, stride, padding, dilation, size, node)
    _take_pad(found)
    _take_slice(found)
    _take_activation(found)
    return found


def _why_not(x: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor | None, taps: list[int]) -> str | None:
    if x.dtype not in _DTYPES or weight.dtype != x.dtype or result is None or result.dtype != x.dtype:
        return "x, weight and result of a convolution differ in dtype, or are no float32, bfloat16 or float16"
    if bias is not None and (bias.dtype not in (x.dtype, torch.float32) or not bias.is_contiguous()):
        return "the bias of a convolution is not contiguous, or in another dtype"
    if taps[-1] > _MOST_COLUMNS:
        return f"a convolution has more than {_MOST_COLUMNS} taps along a row"
    if x.numel() < 1 or max(x.numel(), result.numel()) >= 2**31 - 2**16 or result[0, 0].numel() * x.shape[0] >= 2**30:
        return "a convolution is empty, or has 2^31 values or more"
    return None


def _numbers(value: Any, count: int) -> list[int]:
    return [int(value)] * count if isinstance(value, int) else [int(item) for item in value] * (count // len(value))


def _padding(value: Any, taps: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return the zeros before the first value; those after the last one follow from the size of the result."""
    if value == "valid":
        return [0] * len(taps)
    if value == "same":
        return [r * (k - 1) // 2 for k, r in zip(taps, dilation, strict=True)]
    return _numbers(value, len(taps))


def _take_pad(found: _Depthwise) -> None:
    """Read x as it was before a pad with zeros, where nothing has written to it since."""
    pad, rank = found.x, len(found.taps)
    if pad.op != "call_function" or pad.target not in _PADS:
        return
    source, amounts = argument(pad, 0, "input"), argument(pad, 1, "pad")
    fake = fake_of(source)
    is_zero = argument(pad, 2, "mode", "constant") == "constant" and argument(pad, 3, "value") in (None, 0, 0.0)
    if not is_zero or fake is None or fake.dtype != _fake(pad).dtype or not isinstance(amounts, (list, tuple)):
        return
    if len(amounts) > 2 * rank or not all(isinstance(amount, int) and amount >= 0 for amount in amounts):
        return
    if is_written_between(memory_root(source), pad, found.node) or is_written_between(pad, pad, found.node):
        return
    before = [*amounts[::2], *(0 for _ in range(rank - len(amounts) // 2))][::-1]
    found.x, found.pad = source, pad if len(pad.users) == 1 else None
    found.padding = [own + more for own, more in zip(found.padding, before, strict=True)]


def _take_slice(found: _Depthwise) -> None:
    """Compute only the first outputs of the last dimension where no others are read."""
    users = list(found.result.users)
    fake = fake_of(users[0]) if len(users) == 1 else None
    whole = _fake(found.result)
    if fake is None or fake.dim() != whole.dim() or fake.shape[:-1] != whole.shape[:-1] or not _is_head(users[0]):
        return
    if _leaves_as_view(users[0]):
        return
    found.size = [*found.size[:-1], int(fake.shape[-1])]
    found.result = users[0]


def _leaves_as_view(node: fx.Node) -> bool:
    """Whether a slice leaves the graph as a view, whose callers see the strides of the whole."""
    return any(user.op == "output" or (is_view(user) and _leaves_as_view(user)) for user in node.users)


def _is_head(node: fx.Node) -> bool:
    """Whether a node takes the first values of the last dimension."""
    if op_name(node) == "narrow":
        fake = fake_of(node)
        return fake is not None and argument(node, 1, "dim") in (-1, fake.dim() - 1) and argument(node, 2, "start") == 0
    if op_name(node) != "getitem" or not isinstance(node.args[1], tuple) or not node.args[1]:
        return False
    *leading, last = node.args[1]
    rank = len(_fake(node).shape)
    is_whole = all(item is Ellipsis or item == slice(None) for item in leading)
    reaches = (Ellipsis in leading and len(leading) <= rank) or len(leading) == rank - 1
    return is_whole and reaches and isinstance(last, slice) and last.start in (None, 0) and last.step in (None, 1)


def _take_activation(found: _Depthwise) -> None:
    """Take an activation along that is all that reads the result, through transposes."""
    value, passed = found.result, []
    while len(value.users) == 1 and op_name(user := next(iter(value.users))) in _VIEWS:
        value = user
        passed.append(user)
    for user in value.users:
        kind, nodes = _activation(user, value)
        if kind and set(value.users) <= set(nodes) and all(set(node.users) <= set(nodes) for node in nodes[:-1]):
            found.activation, found.after, found.passed = kind, nodes, passed
            return


def _activation(node: fx.Node, value: fx.Node) -> tuple[str, list[fx.Node]]:
    # In place or not is one: nobody else sees the value.
    if op_name(node) in ("relu", "silu") and argument(node, 0, "input") is value:
        return str(op_name(node)), [node]
    activation = activation_of(node)
    return ("", []) if activation is None or activation[1] is not value else (activation[0], activation[2])


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()


def _site(found: _Depthwise) -> tuple[int, ...]:
    x = _fake(found.x)
    numbers = (x.shape[2:], found.taps, found.stride, found.dilation)
    filled = itertools.chain(*((1,) * (3 - len(found.taps)) + tuple(values) for values in numbers))
    channels = _fake(found.weight).shape[0]
    return (int(x.shape[0]), int(channels), *(int(value) for value in filled), 2 if _is_channels_last(x) else 1)


def _replace(found: _Depthwise, kernel: Kernel, context: RewriteContext, flow: LayoutFlow) -> PatchDescriptor:
    x, old = _fake(found.x), _fake(found.result)
    is_last = _is_channels_last(x)
    config: dict[str, JsonValue] = {
        "kernel": kernel.config.key(), "shape": [int(size) for size in x.shape], "taps": list(found.taps),
        "stride": list(found.stride), "padding": list(found.padding), "dilation": list(found.dilation),
        "size": list(found.size), "activation": found.activation, "is_channels_last": is_last,
    }  # fmt: skip
    replacement = f"kernel {kernel.name}"
    descriptor = context.describe(ACTION, found.node, found.nodes, replacement, config, kernel.content_hash)
    weight = _laid_out(found, context) if is_last else found.weight
    numbers = (found.taps, found.stride, found.padding, found.dilation, found.size)
    conv = context.call(
        found.node, kernel.call, found.x, weight, found.bias, *numbers, activation=found.activation,
        is_channels_last=is_last,
    )  # fmt: skip
    shape = tuple(old.shape)
    with torch.no_grad():
        new = old.new_empty((shape[0], *shape[2:], shape[1])).movedim(-1, 1) if is_last else old.new_empty(shape)
    conv.meta["example_value"] = new
    found.result.replace_all_uses_with(conv)
    if new.stride() != old.stride():
        flow.changed(conv, old)
    if found.after:
        last = found.passed[-1] if found.passed else conv
        found.after[-1].replace_all_uses_with(last)
    erase_unused(found.nodes)
    return descriptor


def _laid_out(found: _Depthwise, context: RewriteContext) -> fx.Node:
    """Return the weight with its channels innermost, or as it is where it is no weight of the model."""
    weight, channels, num_taps = found.weight, int(_fake(found.weight).shape[0]), math.prod(found.taps)
    real = context.real_tensor(weight)
    if real is None or why_not_derivable([real]) or weight in mutated_roots(context.graph_module.graph):
        return weight

    def build(source: Tensor) -> Tensor:
        return source.reshape(channels, num_taps).t().contiguous()

    return context.derive(ACTION, [weight], build, found.node, ("channels innermost",))


def _fake(node: Any) -> Tensor:
    fake = fake_of(node)
    assert fake is not None
    return fake
