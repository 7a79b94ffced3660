"""Convolution calls in a graph, and how long one takes in each memory layout on this device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from agnitra_lab.device.call_time import time_ms
from agnitra_lab.patch.layouts import CHANNELS_LAST, takes_any_strides
from agnitra_lab.patch.measured import LEAST_GAIN
from agnitra_lab.patch.neighbours import is_pointwise
from agnitra_lab.patch.ops import argument, fake_of, op_name

_TF32_SHARE = 5e-5
"""Of the result's norm: TF32 leaves 3e-4, fp32 1e-7 to 1e-6."""
RANKS = {
    "conv1d": 3, "conv_transpose1d": 3, "conv2d": 4, "conv_transpose2d": 4, "conv3d": 5, "conv_transpose3d": 5,
}  # fmt: skip
"""Operation -> rank of its input with a batch dimension."""
_WIDER: dict[str, Callable[..., Tensor]] = {"conv1d": torch.conv2d, "conv_transpose1d": torch.conv_transpose2d}
# Place, name and neutral value of what a convolution is told beside its tensors; groups have none.
_NUMBERS: dict[bool, tuple[tuple[int, str, int | None], ...]] = {
    False: ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", None)),
    True: ((3, "stride", 1), (4, "padding", 0), (5, "output_padding", 0), (6, "groups", None), (7, "dilation", 1)),
}


def find_convolutions(graph: fx.Graph) -> list[fx.Node]:
    """Return the convolutions over batches with weights of known shape, in graph order."""
    found = []
    for node in graph.nodes:
        x, weight = fake_of(argument(node, 0, "input")), fake_of(argument(node, 1, "weight"))
        if op_name(node) in RANKS and x is not None and weight is not None and x.dim() == RANKS[str(op_name(node))]:
            found.append(node)
    return found


def widened(node: fx.Node) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """Return the 2-d form of a 1-d convolution: the function, and what follows input, weight and bias.

    Input and weight get a dimension of size 1 before the last. torch makes the input of a 1-d convolution contiguous
    before it calls cuDNN ("avoid accidentally going through NHWC for permuted 3d input"), so that only a 2-d one can
    read channels that lie innermost.
    """
    name = str(op_name(node))

    def wide(place: int, key: str, neutral: int | None) -> Any:
        value = argument(node, place, key, 1 if neutral is None else neutral)
        if neutral is None or isinstance(value, str):
            return value
        return (neutral, value[0] if isinstance(value, (tuple, list)) else value)

    return _WIDER[name], tuple(wide(*number) for number in _NUMBERS[name.startswith("conv_transpose")])


def why_turned(graph: fx.Graph, rank: int) -> str | None:
    """Say why values of a rank have their channels innermost where they leave and reach convolutions, None if not.

    Inductor lays out 2-d convolutions so by a rule of its own, and `channels_last` where that measures faster: a kernel
    that takes contiguous tensors alone then costs a copy of each. Those around the group norms of a decoder of latents
    took half of its time (0.42 of 0.83 ms on an H200).
    """
    convolutions = [node for node in find_convolutions(graph) if RANKS[str(op_name(node))] == rank]
    times = layout_times(graph)
    measured = [found for node in convolutions if (found := times.of(node)) is not None]
    first, last = sum(before for before, _ in measured), sum(after for _, after in measured)
    if first <= LEAST_GAIN * last:
        return None
    return f"the {rank - 2}-d convolutions around it take {first:.4f} ms, and {last:.4f} with the channels innermost"


def is_channels_last(fake: Tensor | None) -> bool:
    """Whether a value has its channels innermost, and not only because it has one channel or one position."""
    if fake is None or fake.dim() not in RANKS.values():
        return False
    return fake.movedim(1, -1).is_contiguous() and not fake.is_contiguous()


@contextmanager
def searched_algorithms() -> Iterator[None]:
    """Let cuDNN try its algorithms for shapes and layouts that it has not seen, and keep the best of each.

    cuDNN's plans stay with the thread, so calls that run later, outside, take the plan found here.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


_times: weakref.WeakKeyDictionary[fx.Graph, LayoutTimes] = weakref.WeakKeyDictionary()


def layout_times(graph: fx.Graph) -> LayoutTimes:
    """Return the times of a graph's convolutions: several rewrites ask for them, and each is measured once."""
    return _times.setdefault(graph, LayoutTimes())


class LayoutTimes:
    """Measures each distinct convolution of one graph once in both layouts, on random tensors."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[float, float] | None] = {}
        self._lossy: set[Any] = set()

    def of(self, node: fx.Node) -> tuple[float, float] | None:
        """Return the times in ms with channels first and last.

        None when one of them does not run, or cuDNN computes it in TF32 with its channels last and does not with them
        first: torch lets it choose, and the choice differs by layout.
        """
        key = _key(node)
        if key not in self._known:
            self._known[key] = self._measure(node)
        return self._known[key]

    def loses_digits(self, node: fx.Node) -> bool:
        """Whether it is computed in TF32 with the channels last, and in full with them first."""
        self.of(node)
        return _key(node) in self._lossy

    def of_all(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, tuple[float, float]]:
        """Return the times of each, without those that have none."""
        return {node: found for node in nodes if (found := self.of(node)) is not None}

    def together(
        self, measured: Mapping[fx.Node, tuple[float, float]], rank: int, *, is_least: bool = False
    ) -> tuple[float, float]:
        """Return the times in ms of all in one layout and in the other, with the copies that this one costs.

        Args:
            measured: the times of each.
            rank: of their inputs.
            is_least: count only copies that no compiler spares: what a pointwise op gives may leave the graph in the
                layout that it must have.
        """
        before = sum(first for first, _ in measured.values())
        return before, sum(last for _, last in measured.values()) + self._border_ms(measured.keys(), rank, is_least)

    def conversion_ms(self, fake: Tensor) -> float:
        """Return the time of a copy from one layout to the other."""
        key = ("copy", tuple(fake.shape), fake.dtype, fake.device)
        if key not in self._known:
            with real_tensors():
                x = _random(fake, torch.contiguous_format)
                time = time_ms(lambda: x.movedim(1, -1).contiguous(), x.device)
            self._known[key] = (time or 0.0, 0.0)
        known = self._known[key]
        return known[0] if known is not None else 0.0

    def _border_ms(self, nodes: Collection[fx.Node], rank: int, is_least: bool) -> float:
        """Return the time of the copies into the layout and out of it, at kernels of ours that want their own too."""
        reached: set[fx.Node] = set()
        total = 0.0
        for node in next(iter(nodes)).graph.nodes:
            if node.op == "output":
                left = [source for source in node.all_input_nodes if source in reached]
                fakes = [fake_of(source) for source in left if not (is_least and is_pointwise(source))]
                return total + sum(
                    self.conversion_ms(fake) for fake in fakes if fake is not None and fake.dim() == rank
                )
            x = argument(node, 0, "input")
            fake = fake_of(x)
            if node in nodes and x not in reached and fake is not None and not is_channels_last(fake):
                total += self.conversion_ms(fake)
            moved = [source for source in node.all_input_nodes if source in reached]
            if node in nodes or (moved and takes_any_strides(node)):
                reached.add(node)
            else:
                # What a pointwise op gives is written as the kernel wants it.
                copied = [fake_of(source) for source in moved if not is_pointwise(source)]
                total += sum(self.conversion_ms(fake) for fake in copied if fake is not None and fake.dim() == rank)
        return total

    def _measure(self, node: fx.Node) -> tuple[float, float] | None:
        fake = fake_of(argument(node, 0, "input"))
        assert fake is not None
        memory_format = CHANNELS_LAST[max(fake.dim(), 4)]
        first = _time_ms(node, fake.device, torch.contiguous_format)
        last = _time_ms(node, fake.device, memory_format)
        if first is None or last is None:
            return None
        if _loses_digits(node, fake, memory_format):
            self._lossy.add(_key(node))
            return None
        return first, last


def _time_ms(node: fx.Node, device: torch.device, memory_format: torch.memory_format) -> float | None:
    with real_tensors(), searched_algorithms():
        call = _call(node, _random_inputs(node), memory_format)
        return time_ms(call, device)


def _loses_digits(node: fx.Node, fake: Tensor, memory_format: torch.memory_format) -> bool:
    """Whether a layout's result is as far from a full fp32 one as TF32 leaves it, and the other layout's is not.

    A 3 x 3 x 3 convolution of 3 channels on an H200 ran in fp32 as it was, and in TF32 with its channels innermost: a
    third of its results differed from eager's by more than 1e-4.
    """
    cudnn = torch.backends.cudnn
    if fake.dtype is not torch.float32 or fake.device.type != "cuda" or not cudnn.allow_tf32:
        return False
    with real_tensors(), searched_algorithms():
        inputs = _random_inputs(node)
        first, last = (_call(node, inputs, layout)() for layout in (torch.contiguous_format, memory_format))
        with cudnn.flags(enabled=cudnn.enabled, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=False):
            exact = _call(node, inputs, torch.contiguous_format)()
        error, other = (float((result - exact).norm()) for result in (last, first))
        return error > _TF32_SHARE * float(exact.norm()) and error > 2 * other


def is_less_exact(form: Callable[[], Tensor], conv: Callable[..., Tensor], given: Sequence[Tensor | None]) -> bool:
    """Whether another form of a convolution is computed in TF32 where the convolution is not: torch lets cuDNN choose.

    Args:
        form: gives its result for the same values.
        conv: takes input, weight and bias.
        given: these three. Call it within `real_tensors`.
    """
    x = given[0]
    if x is None or x.dtype is not torch.float32 or x.device.type != "cuda":
        return False
    try:
        exact = conv(*(None if value is None else value.double() for value in given))
        error, other = (float((result - exact).norm()) for result in (form(), conv(*given)))
    except RuntimeError:
        return True
    return error > _TF32_SHARE * float(exact.norm()) and error > 2 * other


def _random_inputs(node: fx.Node) -> Any:
    return fx.map_arg((node.args, dict(node.kwargs)), lambda source: _random(fake_of(source), torch.contiguous_format))


def _call(node: fx.Node, inputs: Any, memory_format: torch.memory_format) -> Callable[[], Any]:
    """Return a node's call on inputs that are brought into a layout first."""
    target: Any = node.target
    args, kwargs = inputs
    if op_name(node) in _WIDER and memory_format is not torch.contiguous_format:
        target, numbers = widened(node)
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        x, weight = (_laid_out(given[name].unsqueeze(2), memory_format) for name in ("input", "weight"))
        return lambda: target(x, weight, given.get("bias"), *numbers).squeeze(2)
    args, kwargs = _pytree.tree_map_only(Tensor, lambda real: _laid_out(real, memory_format), inputs)
    return lambda: target(*args, **kwargs)


def random_like(fake: Tensor) -> Tensor:
    """Return random values in the layout of a fake tensor. Call it within `real_tensors`."""
    shape = tuple(int(size) for size in fake.shape)
    room = torch.empty_strided(shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    return room.copy_(torch.randn(shape, device=fake.device))


@contextmanager
def real_tensors() -> Iterator[None]:
    """Make tensors with values, in a process that traces."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        yield


def _random(fake: Tensor | None, memory_format: torch.memory_format) -> Tensor:
    assert fake is not None
    shape = tuple(int(size) for size in fake.shape)
    return _laid_out(torch.randn(shape, device=fake.device).to(fake.dtype), memory_format)


def _laid_out(real: Tensor, memory_format: torch.memory_format) -> Tensor:
    return real.contiguous(memory_format=memory_format) if real.dim() in CHANNELS_LAST else real


def _key(node: fx.Node) -> Any:
    return (op_name(node), *_keys(node.args), *_keys(sorted(node.kwargs.items())))


def _keys(values: Any) -> list[Any]:
    keys: list[Any] = []
    for value in values:
        fake = fake_of(value)
        if fake is not None:
            keys.append((tuple(fake.shape), fake.dtype, fake.device))
        elif isinstance(value, (list, tuple)):
            keys.append(tuple(_keys(value)))
        else:
            keys.append(value)
    return keys
