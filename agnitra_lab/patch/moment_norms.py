"""Recognising norms by mean, variance or length over given dimensions: as ops, and the spellings by hand.

"layer" is (x - mean) / sqrt(var + eps), "rms" x / sqrt(mean(x^2) + eps), "l2" x / max(norm(x), eps); each with a weight
and a bias that vary along the one normalised dimension, or, as arguments of an op, over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from agnitra_lab.patch.ops import (
    argument,
    binary,
    fake_of,
    is_cast,
    is_written_between,
    memory_root,
    op_name,
    without_widening,
)


@dataclass(frozen=True)
class MomentNorm:
    """One norm in a graph.

    Attributes:
        kind: "layer", "rms" or "l2".
        x: the value that is normed, under any widening cast.
        dims: the dimensions that are normalised together, counted from 0, rising.
        weight: the factor, in the shape in which the graph has it; None without one.
        bias: the summand, as the weight.
        result: the node whose value is the norm's, of x's shape and dtype.
        nodes: all nodes of the pattern, in graph order; `result` last.
    """

    kind: str
    x: fx.Node
    dims: tuple[int, ...]
    eps: float
    weight: fx.Node | None
    bias: fx.Node | None
    result: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def is_last(self) -> bool:
        """Whether the last dimensions are normalised, up to the very last."""
        fake = fake_of(self.x)
        return fake is not None and self.dims == tuple(range(fake.dim() - len(self.dims), fake.dim()))


def find_moment_norms(graph: fx.Graph) -> list[MomentNorm]:
    """Return every norm whose inner values nobody else reads, in graph order of its division."""
    found = []
    for node in graph.nodes:
        core = _match_op(node) or match_ratio(node)
        norm = None if core is None else _close(core)
        if norm is not None:
            found.append(norm)
    return found


def why_not_written(norm: MomentNorm) -> str | None:
    """Say which of the norm's inputs the graph writes between the first and the last node of the pattern."""
    for name, node in (("x", norm.x), ("the weight", norm.weight), ("the bias", norm.bias)):
        if node is not None and is_written_between(memory_root(node), norm.nodes[0], norm.result):
            return f"{name} is written while x is normed"
    return None


def _match_op(node: fx.Node) -> MomentNorm | None:
    name = op_name(node)
    if name not in ("layer_norm", "normalize"):
        return None
    x = argument(node, 0, "input")
    fake = fake_of(x)
    if fake is None:
        return None
    if name == "normalize":
        dims = _dims(argument(node, 2, "dim", 1), fake.dim())
        is_plain = argument(node, 1, "p", 2.0) in (2, 2.0) and node.kwargs.get("out") is None
        eps = argument(node, 3, "eps", 1e-12)
        return MomentNorm("l2", x, dims, float(eps), None, None, node, (node,)) if is_plain and dims else None
    shape = argument(node, 1, "normalized_shape")
    num_dims = 1 if isinstance(shape, int) else len(tuple(shape))
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    dims = tuple(range(fake.dim() - num_dims, fake.dim()))
    eps = float(argument(node, 4, "eps", 1e-5))
    return MomentNorm("layer", x, dims, eps, _tensor(weight), _tensor(bias), node, (node,))


def _tensor(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _dims(given: Any, rank: int) -> tuple[int, ...]:
    """Return dimensions counted from 0, () where they are not whole numbers."""
    dims = (given,) if isinstance(given, int) else tuple(given) if isinstance(given, (list, tuple)) else ()
    if not all(isinstance(dim, int) for dim in dims):
        return ()
    return tuple(sorted(dim % rank for dim in dims)) if rank else ()


def match_ratio(node: fx.Node) -> MomentNorm | None:
    """Match numerator / root(moment), or numerator * its reciprocal root: a norm without weight and bias."""
    operands = binary(node, "div")
    if operands is not None:
        length = _match_length(operands[1])
        if length is not None:
            x, dims, eps, inner = length
            same = without_widening(operands[0]) is without_widening(x)
            return MomentNorm("l2", operands[0], dims, eps, None, None, node, (*inner, node)) if same else None
        return _match_moment(node, operands[0], _under_root(operands[1]))
    operands = binary(node, "mul")
    for numerator, inverse in (operands, operands[::-1]) if operands is not None else ():
        norm = _match_moment(node, numerator, _under_inverse_root(inverse))
        if norm is not None:
            return norm
    return None


def _under_root(node: Any) -> tuple[Any, list[fx.Node]] | None:
    if op_name(node) == "sqrt" or (op_name(node) == "pow" and argument(node, 1, "exponent") == 0.5):
        return node.args[0], [node]
    return None


def _under_inverse_root(node: Any) -> tuple[Any, list[fx.Node]] | None:
    if op_name(node) == "rsqrt" or (op_name(node) == "pow" and argument(node, 1, "exponent") == -0.5):
        return node.args[0], [node]
    operands = binary(node, "div")
    if operands is not None and operands[0] in (1, 1.0):
        under = _under_root(operands[1])
        return None if under is None else (under[0], [*under[1], node])
    return None


def _match_length(node: Any) -> tuple[fx.Node, tuple[int, ...], float, list[fx.Node]] | None:
    """Match norm(x, 2, dims, keepdim) or sqrt(sum(x^2)), at least eps; return x, dims, eps and the nodes."""
    name = op_name(node)
    if name in ("clamp", "clamp_min"):
        least = argument(node, 1, "min")
        length = _match_length(node.args[0])
        has_most = name == "clamp" and argument(node, 2, "max") is not None
        if length is None or has_most or length[2] or not isinstance(least, (int, float)):
            return None
        return length[0], length[1], float(least), [*length[3], node]
    if name == "norm":
        p = argument(node, 1, "p", node.kwargs.get("ord"))
        length = _reduced(node, (node.args[0], []), 2) if p in (None, 2, 2.0, "fro") else None
        # Over two dimensions `linalg.norm` is a norm of matrices.
        return length if length is not None and len(length[1]) == 1 else None
    under = _under_root(node)
    if under is None or op_name(under[0]) != "sum":
        return None
    square = _squared(under[0].args[0])
    length = None if square is None else _reduced(under[0], square, 1)
    return None if length is None else (*length[:3], [*length[3], *under[1]])


def _reduced(
    node: fx.Node, source: tuple[Any, list[fx.Node]], position: int
) -> tuple[fx.Node, tuple[int, ...], float, list[fx.Node]] | None:
    """Return the source of a reduction that keeps its dimensions, with dims, eps 0 and the nodes."""
    fake = fake_of(source[0])
    dims = () if fake is None else _dims(argument(node, position, "dim"), fake.dim())
    if not dims or argument(node, position + 1, "keepdim", False) is not True or node.kwargs.get("dtype") is not None:
        return None
    return source[0], dims, 0.0, [*source[1], node]


def _squared(node: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    if op_name(node) == "square" or (op_name(node) == "pow" and argument(node, 1, "exponent") in (2, 2.0)):
        return (node.args[0], [node]) if isinstance(node.args[0], fx.Node) else None
    operands = binary(node, "mul")
    if operands is not None and operands[0] is operands[1] and isinstance(operands[0], fx.Node):
        return operands[0], [node]
    return None


def _match_moment(node: fx.Node, numerator: Any, under: tuple[Any, list[fx.Node]] | None) -> MomentNorm | None:
    """Match a second moment plus eps under the root, and the numerator that belongs to it."""
    if under is None or not isinstance(numerator, fx.Node):
        return None
    moment, eps, inner = under[0], 0.0, list(under[1])
    operands = binary(moment, "add")
    if operands is not None:
        moment, constant = operands if isinstance(operands[0], fx.Node) else operands[::-1]
        if not isinstance(constant, (int, float)):
            return None
        eps, inner = float(constant), [*inner, under[0]]
    centred = _centred(numerator)
    variance = _variance(moment)
    if variance is not None and centred is not None:
        (x, dims, members), (of, over, more) = centred, variance
        if without_widening(x) is without_widening(of) and dims == over:
            return MomentNorm("layer", x, dims, eps, None, None, node, (*members, *more, *inner, node))
    if op_name(moment) != "mean":
        return None
    square = _squared(moment.args[0])
    mean = None if square is None else _reduced(moment, square, 1)
    if mean is None or without_widening(mean[0]) is not without_widening(numerator):
        return None
    return MomentNorm("rms", numerator, mean[1], eps, None, None, node, (*mean[3], *inner, node))


def _centred(node: Any) -> tuple[fx.Node, tuple[int, ...], list[fx.Node]] | None:
    """Match x - mean(x); return x, the dimensions and the nodes."""
    operands = binary(node, "sub")
    if operands is None or not isinstance(operands[0], fx.Node):
        return None
    x, mean = operands
    found = _reduced(mean, (mean.args[0], []), 1) if op_name(mean) == "mean" else _var_mean(mean, 1)
    if found is None or without_widening(found[0]) is not without_widening(x):
        return None
    return x, found[1], [*found[3], node]


def _variance(node: Any) -> tuple[fx.Node, tuple[int, ...], list[fx.Node]] | None:
    """Match the variance over N: mean(centred^2), var(x) or the first of var_mean(x); return x, dims and the nodes."""
    if op_name(node) == "mean":
        square = _squared(node.args[0])
        centred = None if square is None else _centred(square[0])
        mean = None if square is None else _reduced(node, square, 1)
        if centred is None or mean is None or centred[1] != mean[1]:
            return None
        return centred[0], centred[1], [*centred[2], *mean[3]]
    found = _plain_variance(node) if op_name(node) == "var" else _var_mean(node, 0)
    return None if found is None else (found[0], found[1], found[3])


def _var_mean(node: Any, which: int) -> tuple[fx.Node, tuple[int, ...], float, list[fx.Node]] | None:
    if op_name(node) != "getitem" or node.args[1] != which or op_name(node.args[0]) != "var_mean":
        return None
    found = _plain_variance(node.args[0])
    return None if found is None else (*found[:3], [*found[3], node])


def _plain_variance(node: fx.Node) -> tuple[fx.Node, tuple[int, ...], float, list[fx.Node]] | None:
    """Match var or var_mean over N, in either signature: (x, dim, unbiased, keepdim) or with `correction`."""
    fake = fake_of(node.args[0])
    is_over_n = argument(node, 2, "unbiased", None) is False or (
        len(node.args) < 3 and node.kwargs.get("correction", 1) == 0
    )
    dims = () if fake is None else _dims(argument(node, 1, "dim"), fake.dim())
    if not dims or not is_over_n or argument(node, 3, "keepdim", False) is not True:
        return None
    return node.args[0], dims, 0.0, [node]  # type: ignore[return-value]


def _close(core: MomentNorm) -> MomentNorm | None:
    """Follow the normed value to where it has x's dtype again, through casts, weight and bias; check what is read."""
    bare = without_widening(core.x)
    for x in dict.fromkeys((bare, core.x)):
        fake = fake_of(x)
        ends = [end for end in _ends(core, x) if _is_like(end.result, x)]
        if fake is None or not ends or fake.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            continue
        weight, bias = (
            None if tensor is None else without_widening(tensor) for tensor in (ends[-1].weight, ends[-1].bias)
        )
        norm = replace(ends[-1], weight=weight, bias=bias)
        members = {*norm.nodes, *_casts_between(core.x, x)}
        nodes = tuple(node for node in norm.result.graph.nodes if node in members)
        # A cast that others read too stays; any other inner value that is read elsewhere would be computed twice.
        inner = [node for node in nodes if node is not norm.result and not is_cast(node)]
        if any(set(node.users) - members for node in inner) or any(not _is_rounded_as(node, fake) for node in nodes):
            continue
        return replace(norm, x=x, nodes=nodes)
    return None


def _ends(core: MomentNorm, x: fx.Node) -> Iterator[MomentNorm]:
    """Yield the norm as it could end: at its division, after a cast, after the weight, after the bias."""
    norm = core
    yield norm
    has_affine = op_name(core.result) == "layer_norm"
    while (user := _sole_user(norm.result)) is not None:
        factor = None if has_affine or norm.weight or norm.bias else _affine_operand(user, "mul", norm, x)
        summand = None if has_affine or norm.bias else _affine_operand(user, "add", norm, x)
        if factor is not None:
            norm = replace(norm, weight=factor)
        elif summand is not None:
            norm = replace(norm, bias=summand)
        elif not is_cast(user):
            return
        norm = replace(norm, result=user, nodes=(*norm.nodes, user))
        yield norm


def _affine_operand(user: fx.Node, name: str, norm: MomentNorm, x: fx.Node) -> fx.Node | None:
    """Return the other operand of a product or sum when it varies along the normalised dimension alone."""
    operands = binary(user, name)
    if operands is None or len(norm.dims) != 1:
        return None
    other = operands[1] if operands[0] is norm.result else operands[0]
    fake, like = fake_of(other), fake_of(x)
    if not isinstance(other, fx.Node) or other is norm.result or fake is None or like is None:
        return None
    places = range(like.dim() - fake.dim(), like.dim())
    wanted = [like.shape[place] if place == norm.dims[0] else 1 for place in places]
    is_along = fake.dim() <= like.dim() and list(fake.shape) == wanted and norm.dims[0] in places
    return other if is_along and fake.dtype in (like.dtype, torch.float32) else None


def _is_like(node: fx.Node, x: fx.Node) -> bool:
    fake, like = fake_of(node), fake_of(x)
    return fake is not None and like is not None and (fake.shape, fake.dtype) == (like.shape, like.dtype)


def _is_rounded_as(node: fx.Node, x: torch.Tensor) -> bool:
    """Whether a value is in x's dtype or in fp32: a detour through another one is meant, and stays."""
    fake = fake_of(node)
    return fake is None or fake.dtype in (x.dtype, torch.float32)


def _sole_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _casts_between(node: fx.Node, x: fx.Node) -> list[fx.Node]:
    casts = []
    while node is not x:
        casts.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return casts


def row_length(norm: MomentNorm) -> int:
    """Return how many values are normalised together."""
    fake = fake_of(norm.x)
    assert fake is not None
    return math.prod(int(fake.shape[dim]) for dim in norm.dims)
