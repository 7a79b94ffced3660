"""silu(gate) * up becomes one kernel that reads both and writes once.

Trigger: a product of two tensors of one shape and dtype, one of them silu(gate) or gate * sigmoid(gate).
Algebra: silu(g) = g * sigmoid(g), elementwise.
Guard: the activation is used nowhere else, and neither operand is written in between.
Source: SwiGLU (Shazeer, arXiv 2002.05202, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue
from torch import fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.ops import binary, fake_of, is_written_between, memory_root, op_name

ACTION = "swiglu"


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each gated product by the kernel.

    Returns:
        One descriptor per product.
    """
    descriptors = []
    num_found = 0
    for product in list(graph_module.graph.nodes):
        found = _match(product)
        if found is None:
            continue
        num_found += 1
        gate, up, inner = found
        problem = _why_not(product, gate, up, inner)
        if problem:
            context.refuse(ACTION, problem)
            continue
        fake = fake_of(gate)
        assert fake is not None
        kernel = context.kernel(ACTION, (math.prod(fake.shape[:-1]), fake.shape[-1]), fake.dtype)
        if kernel is None:
            continue
        gone = [*inner, product]
        config: dict[str, JsonValue] = {"kernel": kernel.config.key(), "shape": list(_shape(gate))}
        descriptors.append(
            context.describe(ACTION, product, gone, f"kernel {kernel.name}", config, kernel.content_hash)
        )
        call = context.call(product, kernel.call, gate, up)
        call.meta["example_value"] = fake_of(product)
        product.replace_all_uses_with(call)
        erase_unused(gone)
    if not num_found:
        context.refuse(ACTION, "the graph has no silu(gate) * up")
    return descriptors


def _match(product: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    operands = binary(product, "mul")
    if operands is None:
        return None
    for activated, up in (operands, operands[::-1]):
        if not isinstance(up, fx.Node) or fake_of(up) is None:
            continue
        gated = _gate_of(activated)
        if gated is not None:
            return gated[0], up, gated[1]
    return None


def _gate_of(node: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    """Return gate and the nodes of its activation, in graph order."""
    if op_name(node) == "silu" and isinstance(node.args[0], fx.Node):
        return node.args[0], [node]
    operands = binary(node, "mul")
    for own, other in (operands, operands[::-1]) if operands else ():
        if isinstance(own, fx.Node) and op_name(other) == "sigmoid" and other.args[:1] == (own,):
            return own, [other, node]
    return None


def _why_not(product: fx.Node, gate: fx.Node, up: fx.Node, inner: Sequence[fx.Node]) -> str | None:
    gate_fake, up_fake = fake_of(gate), fake_of(up)
    if gate_fake is None or up_fake is None:
        return "shapes are not known"
    if gate_fake.shape != up_fake.shape or gate_fake.dtype != up_fake.dtype:
        return "gate and up differ in shape or dtype"
    if any(set(node.users) - {*inner, product} for node in inner):
        return "the activated gate is used elsewhere too"
    if any(node.kwargs.get("inplace") for node in inner):
        return "the activation writes in place"
    if any(is_written_between(memory_root(node), inner[0], product) for node in (gate, up, inner[-1])):
        return "gate or up is written between the activation and the product"
    return None


def _shape(node: fx.Node) -> tuple[int, ...]:
    fake = fake_of(node)
    return tuple(int(size) for size in fake.shape) if fake is not None else ()
