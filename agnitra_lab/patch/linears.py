"""Merging linears that share one input into one GEMM: the algebra that qkv_concat and gate_up_concat have in common.

[x @ A.T, x @ B.T] = x @ concat(A, B).T, so the input is read once and a small GEMM becomes part of a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.matmuls import find_products
from agnitra_lab.patch.ops import (
    binary,
    escaping_roots,
    fake_of,
    is_written_between,
    memory_root,
    mutated_roots,
    op_name,
)
from agnitra_lab.patch.weights import why_not_derivable


@dataclass(frozen=True)
class Linear:
    """One product of an input and a weight, in any spelling.

    Attributes:
        weight: [out, in], or [in, out] unless `is_transposed`.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    is_transposed: bool


def shared_input_groups(context: RewriteContext) -> list[list[Linear]]:
    """Return the linears of the graph grouped by input node, groups of two or more, in graph order.

    Products with what is no weight are left out of a group that has two others.
    """
    groups: dict[fx.Node, list[Linear]] = {}
    for found in find_products(context.graph_module.graph):
        weight = fake_of(found.b)
        if weight is not None and weight.dim() == 2 and found.a is not found.b:
            linear = Linear(found.node, found.a, found.b, found.bias, found.is_b_transposed)
            groups.setdefault(found.a, []).append(linear)
    fitting = [[linear for linear in group if context.is_weight(linear.weight)] for group in groups.values()]
    chosen = [fit if len(fit) > 1 else group for fit, group in zip(fitting, groups.values(), strict=True)]
    return [group for group in chosen if len(group) > 1]


def find_gated_pair(group: Sequence[Linear]) -> tuple[Linear, Linear] | None:
    """Return (gate, up) when two linears of the group meet in act(gate) * up, act one of silu, gelu, x*sigmoid(x)."""
    by_node = {linear.node: linear for linear in group}
    for gate in group:
        for activated in _activations(gate.node):
            for product in activated.users:
                operands = binary(product, "mul")
                if operands is None:
                    continue
                other = operands[1] if operands[0] is activated else operands[0]
                if other in by_node and other is not gate.node:
                    return gate, by_node[other]
    return None


def _activations(node: fx.Node) -> list[fx.Node]:
    found = []
    for user in node.users:
        if op_name(user) in ("silu", "gelu") and user.args[:1] == (node,):
            found.append(user)
        operands = binary(user, "mul")
        if operands and any(
            op_name(other) == "sigmoid" and other.args[:1] == (node,) and own is node
            for own, other in (operands, operands[::-1])
        ):
            found.append(user)
    return found


def why_not_mergeable(group: Sequence[Linear], context: RewriteContext) -> str | None:
    """Return why these linears cannot become one, None when they can."""
    weights = [context.real_tensor(linear.weight) for linear in group]
    biases = [context.real_tensor(linear.bias) for linear in group if linear.bias is not None]
    if any(not context.is_weight(linear.weight) for linear in group):
        return "a weight is computed in the graph or is not a Parameter"
    if any(bias is None for bias in biases):
        return "a bias is computed in the graph"
    problem = why_not_derivable([*weights, *biases])
    if problem:
        return problem
    if len({(tensor.dtype, tensor.device) for tensor in [*weights, *biases] if tensor is not None}) > 1:
        return "weights differ in dtype or device"
    written = mutated_roots(context.graph_module.graph)
    if any(linear.weight in written or linear.bias in written for linear in group):
        return "the graph itself writes to a weight"
    if is_written_between(memory_root(group[0].x), group[0].node, group[-1].node):
        return "the shared input is written between the linears"
    return None


def merge(action: str, group: Sequence[Linear], context: RewriteContext) -> PatchDescriptor:
    """Replace the linears of a group by one linear and a narrow for each."""
    first, graph = group[0], context.graph_module.graph
    sizes = [_out_features(linear, context) for linear in group]
    descriptor = context.describe(
        action,
        first.node,
        [linear.node for linear in group],
        f"linear(concat of {len(group)} weights)",
        {"num_linears": len(group), "in_features": _in_features(first, context), "out_features": list(sizes)},
    )
    escaping = escaping_roots(graph)
    sides = tuple(linear.is_transposed for linear in group)

    def concat(*weights: Tensor) -> Tensor:
        return torch.cat([weight if side else weight.t() for weight, side in zip(weights, sides, strict=True)])

    weight = context.derive(action, [linear.weight for linear in group], concat, first.node, sides)
    bias = None
    if any(linear.bias is not None for linear in group):
        # One without a bias has zeros of its weight's width.
        sources = [linear.weight if linear.bias is None else linear.bias for linear in group]
        widths = tuple(size if linear.bias is None else 0 for linear, size in zip(group, sizes, strict=True))

        def joined(*tensors: Tensor) -> Tensor:
            return torch.cat([t.new_zeros(width) if width else t for t, width in zip(tensors, widths, strict=True)])

        bias = context.derive(f"{action}_bias", sources, joined, first.node, widths)
    merged = context.call(first.node, torch._C._nn.linear, first.x, weight, bias)
    _record_fake(merged, fake_of(first.node), sum(sizes))
    start = 0
    for linear, size in zip(group, sizes, strict=True):
        piece = context.call(first.node, torch.narrow, merged, -1, start, size)
        _record_fake(piece, fake_of(linear.node), size)
        if linear.node in escaping:
            # The caller sees this value's strides: give it memory of its own, as the single linear did.
            piece = context.call(first.node, torch.clone, piece, memory_format=torch.contiguous_format)
            _record_fake(piece, fake_of(linear.node), size)
        else:
            _allow_strided(linear.node)
        linear.node.replace_all_uses_with(piece)
        start += size
    for linear in group:
        graph.erase_node(linear.node)
    return descriptor


def _out_features(linear: Linear, context: RewriteContext) -> int:
    weight = context.real_tensor(linear.weight)
    assert weight is not None
    return int(weight.shape[0 if linear.is_transposed else 1])


def _in_features(linear: Linear, context: RewriteContext) -> int:
    weight = context.real_tensor(linear.weight)
    assert weight is not None
    return int(weight.shape[1 if linear.is_transposed else 0])


def _record_fake(node: fx.Node, like: Tensor | None, width: int) -> None:
    if like is not None:
        node.meta["example_value"] = like.new_empty((*like.shape[:-1], width))


def _allow_strided(node: fx.Node) -> None:
    # `view` demands a layout that a column slice may lack; `reshape` asks for the same value and copies if it must.
    for user in node.users:
        if user.op == "call_method" and user.target == "view" and not isinstance(user.args[1], torch.dtype):
            user.target = "reshape"
