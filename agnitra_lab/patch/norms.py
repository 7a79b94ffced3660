"""Recognising RMSNorm by what a graph computes: the spellings of x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from agnitra_lab.patch.moment_norms import match_ratio
from agnitra_lab.patch.ops import argument, binary, fake_of, is_cast, is_widening, op_name, without_widening


@dataclass(frozen=True)
class RMSNorm:
    """One RMSNorm in a graph.

    Attributes:
        x: the value that is normed, under any widening cast.
        weight: the scale, under any widening cast.
        cast_before_weight: the normed value is rounded to the result's dtype before the product with the weight.
        result: the node whose value is the norm's.
        nodes: all nodes of the pattern, in graph order; `result` last.
    """

    x: fx.Node
    weight: fx.Node
    eps: float
    cast_before_weight: bool
    result: fx.Node
    nodes: tuple[fx.Node, ...]


def find_rms_norms(graph: fx.Graph) -> list[RMSNorm]:
    """Return every RMSNorm with a weight, in graph order."""
    found = []
    for node in graph.nodes:
        match = _match_op(node) if op_name(node) == "rms_norm" else _match_chain(node)
        if match is not None:
            found.append(match)
    return found


def _match_op(node: fx.Node) -> RMSNorm | None:
    x, weight, eps = argument(node, 0, "input"), argument(node, 2, "weight"), argument(node, 3, "eps")
    shape = argument(node, 1, "normalized_shape")
    fake = fake_of(x)
    if fake is None or not isinstance(weight, fx.Node) or len(tuple(shape)) != 1:
        return None
    return RMSNorm(x, weight, default_eps(fake.dtype) if eps is None else float(eps), False, node, (node,))


def default_eps(dtype: torch.dtype) -> float:
    """Return the eps that F.rms_norm uses when none is given: torch versions differ for half types, so it is asked."""
    tiny = torch.full((1,), 1e-5, dtype=dtype)
    measured = float(functional.rms_norm(tiny, (1,)).double())
    candidates = (torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    value = float(tiny.double())
    return min(candidates, key=lambda eps: abs(value / (value * value + eps) ** 0.5 - measured))


def _match_chain(node: fx.Node) -> RMSNorm | None:
    """Match from x / root(mean square) outwards, up to the product with the weight."""
    core = match_ratio(node)
    fake = fake_of(core.x) if core is not None and core.kind == "rms" else None
    if core is None or fake is None or core.dims != (fake.dim() - 1,):
        return None
    up = _match_up(node)
    if up is None:
        return None
    x = without_widening(core.x)
    weight, cast_before_weight, outer = up
    read = {source for inner in core.nodes for source in inner.all_input_nodes if without_widening(source) is x}
    members = {*core.nodes, *outer, *(cast for source in read for cast in _widening_casts(source))}
    ordered = tuple(member for member in node.graph.nodes if member in members)
    return RMSNorm(x, weight, core.eps, cast_before_weight, outer[-1], ordered)


def _match_up(product: fx.Node) -> tuple[fx.Node, bool, list[fx.Node]] | None:
    """Follow the normed value through casts to the product with the weight; return weight, rounding order, nodes."""
    outer: list[fx.Node] = []
    value = product
    while (user := _sole_user(value)) is not None and is_cast(user):
        outer.append(user)
        value = user
    scaled = _sole_user(value)
    operands = binary(scaled, "mul")
    if operands is None or scaled is None:
        return None
    weight = operands[1] if operands[0] is value else operands[0]
    if not isinstance(weight, fx.Node) or weight is value:
        return None
    weight_casts = [cast for cast in _widening_casts(weight) if len(cast.users) == 1]
    bare = without_widening(weight)
    fake_weight, normed, fake_product = fake_of(bare), fake_of(product), fake_of(value)
    if fake_weight is None or fake_weight.dim() != 1 or normed is None or fake_product is None:
        return None
    outer += [*weight_casts, scaled]
    is_rounded = fake_product.dtype != normed.dtype
    result = scaled
    while not is_rounded and (user := _sole_user(result)) is not None and _is_narrowing(user):
        outer.append(user)
        result = user
    # Without any rounding step before the weight (all of it in one dtype) both orders are the same.
    low_throughout = normed.dtype in (torch.bfloat16, torch.float16)
    return bare, is_rounded or low_throughout, outer


def _sole_user(node: Any) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_narrowing(node: fx.Node) -> bool:
    if not is_cast(node):
        return False
    before, after = fake_of(node.args[0]), fake_of(node)
    return before is not None and after is not None and after.dtype.itemsize <= before.dtype.itemsize


def _widening_casts(node: Any) -> list[fx.Node]:
    casts = []
    while is_widening(node):
        casts.append(node)
        node = node.args[0]
    return casts
