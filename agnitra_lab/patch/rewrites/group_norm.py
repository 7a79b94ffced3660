"""GroupNorm and InstanceNorm, with the SiLU after them, become one kernel, or two where groups are long and few.

Trigger: F.group_norm, nn.GroupNorm, or F.instance_norm with statistics of the input, in x's dtype or in float32 between
casts; then silu(y) or y * sigmoid(y) when nobody else reads y.
Algebra: the same formula with centred sums in float32, rounded once; InstanceNorm has one channel a group.
Guard: x and the result are contiguous, and no convolution of the graph will have them otherwise; weight and bias have
x's dtype or float32, nothing writes them in between.
Where it saves a pass: Inductor reads x once for the statistics and once more to normalise, and fuses both with the
pointwise ops around. So the norm stays where its input is a pointwise result that only the norm reads, and where only
pointwise ops other than that SiLU read it.
Source: Wu and He, "Group Normalization", arXiv 1803.08494, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import JsonValue
from torch import fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.convolutions import why_turned
from agnitra_lab.patch.neighbours import is_pointwise, is_read_by_pointwise_alone
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
from agnitra_lab.patch.residuals import why_not_affine

ACTION = "group_norm"


@dataclass(frozen=True)
class _GroupNorm:
    """One norm: what it reads, and the nodes from the op to the value that it gives, in graph order."""

    x: fx.Node
    num_groups: int
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    is_silu: bool
    nodes: tuple[fx.Node, ...]

    @property
    def result(self) -> fx.Node:
        """The node whose value is the norm's, SiLU included."""
        return self.nodes[-1]


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each GroupNorm by the kernel.

    Returns:
        One descriptor per norm.
    """
    norms = [norm for node in graph_module.graph.nodes if (norm := _match(node)) is not None]
    if not norms:
        context.refuse(ACTION, "the graph has no GroupNorm with statistics of its input")
    descriptors = []
    turned: dict[int, str | None] = {}
    for norm in norms:
        problem = _why_not(norm) or _why_turned(norm, turned)
        if problem:
            context.refuse(ACTION, problem)
            continue
        fake = fake_of(norm.x)
        assert fake is not None
        shape = (fake.shape[0] * norm.num_groups, fake.shape[1] // norm.num_groups, math.prod(fake.shape[2:]))
        kernel = context.kernel(ACTION, shape, fake.dtype)
        if kernel is not None:
            descriptors.append(_replace(norm, kernel, context))
    return descriptors


def _match(node: fx.Node) -> _GroupNorm | None:
    name = op_name(node)
    if name not in ("group_norm", "instance_norm"):
        return None
    given = argument(node, 0, "input")
    fake = fake_of(given)
    if fake is None:
        return None
    if name == "group_norm":
        num_groups, first, eps = argument(node, 1, "num_groups"), 2, argument(node, 4, "eps", 1e-5)
    else:
        has_running = argument(node, 1, "running_mean") is not None or argument(node, 2, "running_var") is not None
        if has_running or argument(node, 5, "use_input_stats", True) is not True or fake.dim() < 3:
            return None
        num_groups, first, eps = fake.shape[1], 3, argument(node, 7, "eps", 1e-5)
    if not isinstance(num_groups, int):
        return None
    weight, bias = (without_widening(argument(node, first + place, key)) for place, key in enumerate(_AFFINE))
    for x in dict.fromkeys((without_widening(given), given)):
        norm = _GroupNorm(x, num_groups, weight, bias, float(eps), False, (node,))
        ends = [end for end in _ends(norm) if _dtype(end.result) == _dtype(x)]
        if ends:
            return ends[-1]
    return None


_AFFINE = ("weight", "bias")


def _dtype(node: fx.Node) -> torch.dtype | None:
    fake = fake_of(node)
    return None if fake is None else fake.dtype


def _ends(norm: _GroupNorm) -> list[_GroupNorm]:
    """Return the norm as it could end: at its op, after a cast back, after the SiLU."""
    ends = [norm]
    while True:
        result = norm.result
        users = list(result.users)
        swish = _silu_of(result, users)
        if swish and not norm.is_silu:
            norm = replace(norm, is_silu=True, nodes=(*norm.nodes, *swish))
        elif len(users) == 1 and is_cast(users[0]):
            norm = replace(norm, nodes=(*norm.nodes, users[0]))
        else:
            return ends
        ends.append(norm)


def _silu_of(value: fx.Node, users: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Return the nodes of silu(value) when they are all that reads it: one op, or sigmoid and product."""
    if len(users) == 1 and op_name(users[0]) == "silu" and not users[0].kwargs.get("inplace"):
        return (users[0],)
    for sigmoid in users:
        for product in sigmoid.users if op_name(sigmoid) == "sigmoid" else ():
            operands = binary(product, "mul")
            if operands and {*operands} == {value, sigmoid} and {*users} == {sigmoid, product}:
                return (sigmoid, product) if len(sigmoid.users) == 1 else ()
    return ()


def _why_not(norm: _GroupNorm) -> str | None:
    fake, result = fake_of(norm.x), fake_of(norm.result)
    assert fake is not None and result is not None
    allowed = (fake.dtype, torch.float32)
    for value in map(fake_of, norm.nodes):
        if value is None or value.dtype not in allowed or value.shape != fake.shape:
            return "the norm is computed in another dtype than x's or float32"
    if fake.dim() < 2 or fake.numel() < 1 or fake.shape[1] % norm.num_groups:
        return f"{norm.num_groups} groups do not divide the channels of {tuple(fake.shape)}"
    if not fake.is_contiguous() or not result.is_contiguous():
        return "x is not contiguous"
    if math.prod(fake.shape[1:]) // norm.num_groups >= 2**30:
        return "a group has 2^30 values or more"
    problem = why_not_affine(norm.weight, norm.bias, int(fake.shape[1]), fake.dtype)
    return problem or _why_not_written(norm) or _why_not_worth_it(norm)


def _why_turned(norm: _GroupNorm, known: dict[int, str | None]) -> str | None:
    fake = fake_of(norm.x)
    assert fake is not None
    rank = fake.dim()
    if rank not in known:
        # Measured where a norm of this rank would be taken, and once.
        known[rank] = why_turned(norm.x.graph, rank)
    return known[rank]


def _why_not_written(norm: _GroupNorm) -> str | None:
    sources = [node for node in (norm.x, norm.weight, norm.bias) if node is not None]
    if any(is_written_between(memory_root(node), norm.nodes[0], norm.result) for node in sources):
        return "x or a weight is written while x is normed"
    return None


def _why_not_worth_it(norm: _GroupNorm) -> str | None:
    if is_pointwise(norm.x) and len(norm.x.users) == 1:
        return "x comes from pointwise ops, which the compiler fuses with the norm"
    if is_read_by_pointwise_alone(norm.result):
        return "only pointwise ops read the norm, and the compiler fuses them with it"
    return None


def _replace(norm: _GroupNorm, kernel: Kernel, context: RewriteContext) -> PatchDescriptor:
    fake = fake_of(norm.x)
    assert fake is not None
    config: dict[str, JsonValue] = {
        "kernel": kernel.config.key(),
        "shape": [int(size) for size in fake.shape],
        "num_groups": int(norm.num_groups),
        "eps": norm.eps,
        "is_silu": norm.is_silu,
    }
    replacement = f"kernel {kernel.name}"
    descriptor = context.describe(ACTION, norm.result, norm.nodes, replacement, config, kernel.content_hash)
    normed = context.call(
        norm.result, kernel.call, norm.x, norm.num_groups, norm.weight, norm.bias, norm.eps, is_silu=norm.is_silu
    )
    normed.meta["example_value"] = fake_of(norm.result)
    norm.result.replace_all_uses_with(normed)
    erase_unused(norm.nodes)
    return descriptor
