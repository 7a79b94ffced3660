"""Convolutions of a few groups become one convolution, or one product, for each group where that measures faster.

Trigger: conv1d, conv2d or conv3d over a batch with 2 to 64 groups of several channels, weights given to the graph.
Algebra: the groups do not see each other: y[:, g] = W[g] * x[:, g] + b[g]. Split, each is a dense convolution of a
slice of the channels; with a single tap, stride one and no padding, all are one batched product.
Guard: every form is measured on random tensors, as it is and with the channels innermost, each distinct convolution
once; the best has to be more than 3% faster than the convolution in the faster of the two layouts, and in fp32 not
further from the exact result. Laid-out weights follow updates of their sources; results keep their strides.
Source: Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", 2012, section 3.5, where
the groups were dense convolutions on two devices. cuDNN runs some groups without tensor cores: 16 of 48 channels and
128 taps in bf16 took 3.4 ms with its best algorithm on an H200, 13 with the one that it chooses untried, where 16
dense ones are 38 GFLOP in all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.device.call_time import time_ms
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.convolutions import (
    is_less_exact,
    layout_times,
    random_like,
    real_tensors,
    searched_algorithms,
    widened,
)
from agnitra_lab.patch.emit import emit
from agnitra_lab.patch.layouts import CHANNELS_LAST, LayoutFlow
from agnitra_lab.patch.measured import Measured, Times, layouts_of
from agnitra_lab.patch.ops import argument, fake_of, mutated_roots, op_name
from agnitra_lab.patch.weights import why_not_derivable

ACTION = "grouped_conv"
MAX_GROUPS = 64
"""More groups are more launches than a convolution takes."""
_RANKS = {"conv1d": 3, "conv2d": 4, "conv3d": 5}
_OPTIONS = ((3, "stride"), (4, "padding"), (5, "dilation"))
_SPLIT, _INNERMOST, _PRODUCT = "one convolution a group", "one convolution a group, channels innermost", "product"
Form = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class _Grouped:
    """One convolution with groups."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    num_groups: int

    @property
    def fakes(self) -> list[Tensor | None]:
        return [fake_of(source) for source in (self.x, self.weight, self.bias)]


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each convolution for which another form measures faster.

    Returns:
        One descriptor per convolution.
    """
    descriptors, flow = [], LayoutFlow(context)
    measured = Measured(ACTION, context)
    best: dict[Hashable, str] = {}
    num_found = 0
    for node in list(graph_module.graph.nodes):
        found = _match(node, context)
        num_found += found is not None
        if isinstance(found, str):
            context.refuse(ACTION, found)
        times = _judge(found, measured, best) if isinstance(found, _Grouped) else None
        if isinstance(found, _Grouped) and times is not None:
            descriptors.append(_replace(found, best[_key(found)], times, context, flow))
        else:
            flow.carry_over(node)
    if not num_found:
        context.refuse(ACTION, "the graph has no convolution with groups of several channels")
    return descriptors


def _match(node: fx.Node, context: RewriteContext) -> _Grouped | str | None:
    rank = _RANKS.get(str(op_name(node)))
    x, weight = fake_of(argument(node, 0, "input")), fake_of(argument(node, 1, "weight"))
    if rank is None or x is None or weight is None or fake_of(node) is None or x.dim() != rank:
        return None
    num_groups = argument(node, 6, "groups", 1)
    if num_groups == 1 or weight.shape[1] == 1:
        return None
    if num_groups > MAX_GROUPS:
        return f"a convolution has {num_groups} groups (at most {MAX_GROUPS} become convolutions of their own)"
    source = argument(node, 1, "weight")
    problem = why_not_derivable([context.real_tensor(source)])
    if problem is None and source in mutated_roots(context.graph_module.graph):
        problem = "the graph writes to a weight"
    return problem or _Grouped(node, argument(node, 0, "input"), source, argument(node, 2, "bias"), int(num_groups))


def _key(found: _Grouped) -> Hashable:
    options = tuple(str(argument(found.node, place, name, None)) for place, name in _OPTIONS)
    return (op_name(found.node), found.num_groups, options, layouts_of(*found.fakes))


def _judge(found: _Grouped, measured: Measured, best: dict[Hashable, str]) -> Times | None:
    """Return the times in ms of the convolution and of its best form where that is faster."""

    def measure_both() -> Times | None:
        times = measure(found.node, found.fakes, found.num_groups)
        others = {name: time for name, time in times.items() if name != "grouped"}
        if "grouped" not in times or not others:
            return None
        best[_key(found)] = min(others, key=lambda name: others[name])
        return times["grouped"], min(others.values())

    return measured.faster(_key(found), measure_both, "a convolution with groups", "one for each group")


def measure(node: fx.Node, fakes: Sequence[Tensor | None], num_groups: int) -> dict[str, float]:
    """Time a convolution ("grouped", in the faster of its layouts) and its other forms on random tensors, in ms."""
    as_it_is = layout_times(node.graph).of(node)
    forms = _forms(node, num_groups)
    found: dict[str, float] = {}
    with real_tensors(), searched_algorithms():
        x, weight, bias = (None if fake is None else random_like(fake) for fake in fakes)
        assert x is not None and weight is not None
        grouped = time_ms(lambda: forms["grouped"](x, weight, bias), x.device)
        if grouped is None:
            return {}
        found["grouped"] = min(grouped, *(as_it_is or (grouped,)))
        for name, form in forms.items():
            given = (x, _laid_out(weight) if name == _INNERMOST else weight, bias)
            call = partial(form, *given)
            if name == "grouped" or is_less_exact(call, forms["grouped"], (x, weight, bias)):
                continue
            time = time_ms(call, x.device)
            if time is not None:
                found[name] = time
    return found


def _forms(node: fx.Node, num_groups: int) -> dict[str, Form]:
    target: Any = node.target
    options = {name: argument(node, place, name, None) for place, name in _OPTIONS}
    options = {name: value for name, value in options.items() if value is not None}
    forms: dict[str, Form] = {
        "grouped": lambda x, weight, bias: target(x, weight, bias, groups=num_groups, **options),
        _SPLIT: lambda x, weight, bias: torch.cat(
            [target(part.contiguous(), *rest, **options) for part, *rest in _parts(num_groups, x, weight, bias)], 1
        ),
        _INNERMOST: lambda x, weight, bias: _split_innermost(node, num_groups, x, weight, bias),
    }
    weight, x = fake_of(argument(node, 1, "weight")), fake_of(argument(node, 0, "input"))
    assert weight is not None and x is not None
    if all(size == 1 for size in weight.shape[2:]) and _moves_nothing(options) and x.is_contiguous():
        forms[_PRODUCT] = lambda x, weight, bias: _product(num_groups, x, weight, bias)
    return forms


def _moves_nothing(options: dict[str, Any]) -> bool:
    """Whether a single tap reads every position once."""

    def is_all(value: Any, wanted: int) -> bool:
        if isinstance(value, str):
            return True
        return all(item == wanted for item in (value if isinstance(value, (tuple, list)) else (value,)))

    return is_all(options.get("stride", 1), 1) and is_all(options.get("padding", 0), 0)


def _parts(num_groups: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[tuple[Any, ...]]:
    biases = [None] * num_groups if bias is None else bias.chunk(num_groups)
    return list(zip(x.chunk(num_groups, 1), weight.chunk(num_groups), biases, strict=True))


def _laid_out(weight: Tensor) -> Tensor:
    wide = weight.unsqueeze(2) if weight.dim() == 3 else weight
    return wide.contiguous(memory_format=CHANNELS_LAST[wide.dim()])


def _split_innermost(node: fx.Node, num_groups: int, x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    call = _dense_call(node)
    wide = x.unsqueeze(2) if x.dim() == 3 else x
    memory_format = CHANNELS_LAST[wide.dim()]
    out = torch.cat(
        [call(part.contiguous(memory_format=memory_format), *rest)
         for part, *rest in _parts(num_groups, wide, laid_out, bias)], 1,
    )  # fmt: skip
    return out.squeeze(2) if x.dim() == 3 else out


def _dense_call(node: fx.Node) -> Callable[..., Any]:
    """Return the convolution of one group, over a line as one over a plane (see `widened`)."""
    target, numbers = _dense_arguments(node)
    return lambda x, weight, bias: target(x, weight, bias, *numbers)


def _dense_arguments(node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if op_name(node) == "conv1d":
        target, numbers = widened(node)
        return target, numbers[:3]
    neutral = {"stride": 1, "padding": 0, "dilation": 1}
    function: Any = node.target
    return function, tuple(argument(node, place, name, neutral[name]) for place, name in _OPTIONS)


def _product(num_groups: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_images, num_channels = x.shape[:2]
    groups = x.reshape(num_images * num_groups, num_channels // num_groups, -1)
    matrices = weight.flatten(1).unflatten(0, (num_groups, -1)).repeat(num_images, 1, 1)
    if bias is None:
        out = torch.bmm(matrices, groups)
    else:
        out = torch.baddbmm(bias.view(num_groups, -1, 1).repeat(num_images, 1, 1), matrices, groups)
    return out.view(num_images, -1, *x.shape[2:])


def _replace(found: _Grouped, form: str, times: Times, context: RewriteContext, flow: LayoutFlow) -> PatchDescriptor:
    node, old = found.node, fake_of(found.node)
    assert old is not None
    config: dict[str, JsonValue] = {"grouped_ms": round(times[0], 6), "other_ms": round(times[1], 6)}
    descriptor = context.describe(ACTION, node, [node], form, config)
    out = _emit_product(found, context) if form == _PRODUCT else _emit_split(found, form == _INNERMOST, context)
    node.replace_all_uses_with(out)
    if out.meta["example_value"].stride() != old.stride():
        flow.changed(out, old)
    node.graph.erase_node(node)
    return descriptor


def _emit_split(found: _Grouped, is_innermost: bool, context: RewriteContext) -> fx.Node:
    node, x, weight, num_groups = found.node, found.x, found.weight, found.num_groups
    fake, taps = fake_of(x), fake_of(weight)
    assert fake is not None and taps is not None
    target, numbers = _dense_arguments(node)
    is_line = fake.dim() == 3
    memory_format = CHANNELS_LAST[max(4, fake.dim())] if is_innermost else torch.contiguous_format
    if is_innermost:
        weight = context.derive(ACTION, [weight], _laid_out, node, ("channels innermost",))
    if is_line:
        x = emit(context, node, torch.unsqueeze, x, 2)
        weight = weight if is_innermost else emit(context, node, torch.unsqueeze, weight, 2)
    num_in, num_out = int(taps.shape[1]), int(taps.shape[0]) // num_groups
    parts = []
    for group in range(num_groups):
        part = emit(context, node, torch.narrow, x, 1, group * num_in, num_in)
        part = emit(context, node, "contiguous", part, memory_format=memory_format)
        kernel = emit(context, node, torch.narrow, weight, 0, group * num_out, num_out)
        bias = found.bias
        bias = None if bias is None else emit(context, node, torch.narrow, bias, 0, group * num_out, num_out)
        parts.append(emit(context, node, target, part, kernel, bias, *numbers))
    out = emit(context, node, torch.cat, parts, 1)
    return emit(context, node, torch.squeeze, out, 2) if is_line else out


def _emit_product(found: _Grouped, context: RewriteContext) -> fx.Node:
    node, num_groups = found.node, found.num_groups
    fake, old = fake_of(found.x), fake_of(node)
    assert fake is not None and old is not None
    num_images, num_in = int(fake.shape[0]), int(fake.shape[1]) // num_groups
    groups = emit(context, node, torch.reshape, found.x, (num_images * num_groups, num_in, -1))
    matrices = emit(context, node, torch.flatten, found.weight, 1)
    matrices = emit(context, node, "view", matrices, num_groups, -1, num_in)
    matrices = emit(context, node, "repeat", matrices, num_images, 1, 1)
    if found.bias is None:
        out = emit(context, node, torch.bmm, matrices, groups)
    else:
        # One rounding, as the convolution has: the sum of a rounded product and a bias is rounded twice.
        column = emit(context, node, "view", found.bias, num_groups, -1, 1)
        column = emit(context, node, "repeat", column, num_images, 1, 1)
        out = emit(context, node, torch.baddbmm, column, matrices, groups)
    return emit(context, node, torch.reshape, out, tuple(int(size) for size in old.shape))
