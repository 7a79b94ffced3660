"""Recognising sums and means over whole dimensions, and the affine steps that lead from a value to one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.patch.ops import argument, fake_of, is_cast, op_name

_LEAST_SHIFT_RATIO = 8


@dataclass(frozen=True)
class Reduction:
    """A sum or mean of `value` over `dims`.

    Attributes:
        node: the node whose value is the reduction.
        value: what is reduced.
        dims: dimensions of `value`, counted from the front, rising.
        is_mean: a mean; a sum otherwise.
        has_kept_dims: the reduced dimensions stay, with size 1.
        count: how many elements go into one result.
    """

    node: fx.Node
    value: fx.Node
    dims: tuple[int, ...]
    is_mean: bool
    has_kept_dims: bool
    count: int


@dataclass(frozen=True)
class Affine:
    """value = scale * base + sum of factor * shift, by steps that nothing else reads.

    Attributes:
        base: the value at the far end.
        scale: a number.
        shifts: numbers and broadcast tensors, each with its factor.
        steps: the nodes between, the base left out, the value nearest to the reduction first.
    """

    base: fx.Node
    scale: float
    shifts: tuple[tuple[float, fx.Node | float], ...]
    steps: tuple[fx.Node, ...]


def match_reduction(node: Any) -> Reduction | None:
    """Return the sum, mean or average pooling to one element that a node computes, None when it is none."""
    name = op_name(node)
    value = argument(node, 0, "input") if name in ("sum", "mean", "adaptive_avg_pool") else None
    fake, result = fake_of(value), fake_of(node)
    if fake is None or result is None or not isinstance(value, fx.Node) or not fake.is_floating_point():
        return None
    if name == "adaptive_avg_pool":
        rank = int(node.target.__name__[-2])  # type: ignore[union-attr]
        dims = tuple(range(fake.dim() - rank, fake.dim()))
        has_kept_dims = True
        if len(node.args) + len(node.kwargs) != 2 or any(result.shape[dim] != 1 for dim in dims):
            return None
    else:
        given, kept = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
        if set(node.kwargs) - {"input", "dim", "keepdim"} or not isinstance(kept, bool) or len(node.args) > 3:
            return None
        dims, has_kept_dims = _dims(given, fake.dim()), kept
    if not dims or result.dtype != fake.dtype:
        return None
    return Reduction(node, value, dims, name != "sum", has_kept_dims, math.prod(int(fake.shape[dim]) for dim in dims))


def _dims(given: Any, rank: int) -> tuple[int, ...]:
    if given is None or given in ((), []):
        return tuple(range(rank))
    listed = (given,) if isinstance(given, int) else given
    if not isinstance(listed, (tuple, list)) or not all(type(dim) is int for dim in listed):
        return ()
    return tuple(sorted({dim % rank for dim in listed}))


def match_affine(reduction: Reduction) -> Affine:
    """Follow a reduction's value down through scalings, shifts and casts that nothing else reads."""
    scale, shifts, steps = 1.0, [], []
    current, reader = reduction.value, reduction.node
    size = _numel(current)
    while set(current.users) == {reader}:
        found = _step(current, size)
        if found is None:
            break
        inner, factor, shift = found
        if shift is not None:
            shifts.append((scale * shift[0], shift[1]))
        scale *= factor
        steps.append(current)
        current, reader = inner, current
    return Affine(current, scale, tuple(shifts), tuple(steps))


def _step(node: fx.Node, size: int) -> tuple[fx.Node, float, tuple[float, fx.Node | float] | None] | None:
    """Read a node as factor * inner + shift, the shift with a factor of its own."""
    name = op_name(node)
    if is_cast(node):
        before = fake_of(node.args[0])
        return (node.args[0], 1.0, None) if before is not None and before.is_floating_point() else None  # type: ignore[return-value]
    if name == "neg" and isinstance(node.args[0], fx.Node):
        return node.args[0], -1.0, None
    if name not in ("add", "sub", "mul", "div") or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if name in ("mul", "div"):
        if name == "mul" and not isinstance(left, fx.Node):
            left, right = right, left
        if not isinstance(left, fx.Node) or not isinstance(right, (int, float)) or (name == "div" and right == 0):
            return None
        return _inner(left, node, 1.0 / right if name == "div" else float(right), None)
    sign = -1.0 if name == "sub" else 1.0
    if isinstance(left, fx.Node) and _is_shift(right, size):
        return _inner(left, node, 1.0, (sign, right))  # type: ignore[arg-type]
    if isinstance(right, fx.Node) and _is_shift(left, size):
        return _inner(right, node, sign, (1.0, left))  # type: ignore[arg-type]
    return None


def _inner(
    inner: fx.Node, node: fx.Node, factor: float, shift: tuple[float, fx.Node | float] | None
) -> tuple[fx.Node, float, tuple[float, fx.Node | float] | None] | None:
    before, after = fake_of(inner), fake_of(node)
    is_same = before is not None and after is not None and before.shape == after.shape and before.dtype == after.dtype
    return (inner, factor, shift) if is_same else None


def _is_shift(operand: Any, size: int) -> bool:
    if isinstance(operand, fx.Node):
        fake = fake_of(operand)
        return fake is not None and fake.is_floating_point() and fake.numel() * _LEAST_SHIFT_RATIO <= size
    return isinstance(operand, (int, float))


def _numel(node: fx.Node) -> int:
    fake = fake_of(node)
    return int(fake.numel()) if fake is not None else 0


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to sum in, so that moving a sum adds no error: float64 for float32, float32 for half types."""
    return torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else torch.float64
