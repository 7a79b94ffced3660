"""act(gate) * up becomes one kernel that reads both and writes once: SwiGLU, GeGLU, ReGLU and GLU.

Trigger: a product of two tensors of one shape and dtype, one of them silu(gate) or gate * sigmoid(gate), gelu(gate),
relu(gate) or sigmoid(gate); or F.glu, which is left half * sigmoid(right half).
Algebra: silu(g) = g * sigmoid(g), elementwise; the activation is rounded before the product, except in F.glu.
Guard: the activation is used nowhere else, and neither operand is written in between. Inductor fuses pointwise ops by
itself, so gelu, relu and sigmoid count only where gate, up and the product's readers are not pointwise: a gated MLP,
and not the gates of an LSTM cell. Both operands are rows that need no copy.
Source: GLU variants (Shazeer, arXiv 2002.05202, section 2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.neighbours import is_pointwise, is_read_by_pointwise_alone
from agnitra_lab.patch.ops import argument, binary, fake_of, is_written_between, memory_root, op_name

ACTION = "swiglu"


@dataclass(frozen=True)
class _Gated:
    """One gated product.

    Attributes:
        inner: the nodes of the activation, in graph order.
        is_rounded: the activation is rounded before the product.
        made: the nodes that the match put into the graph, the halves of an F.glu.
    """

    product: fx.Node
    gate: fx.Node
    up: fx.Node
    activation: str
    inner: tuple[fx.Node, ...]
    is_rounded: bool = True
    made: tuple[fx.Node, ...] = ()


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each gated product by the kernel.

    Returns:
        One descriptor per product.
    """
    descriptors = []
    num_found = 0
    for node in list(graph_module.graph.nodes):
        found = _match_glu(node, context) or _match_product(node)
        if found is None:
            continue
        num_found += 1
        problem = _why_not(found)
        kernel = None
        fake = fake_of(found.gate)
        if problem:
            context.refuse(ACTION, problem)
        elif fake is not None:
            kernel = context.kernel(ACTION, (math.prod(fake.shape[:-1]), fake.shape[-1]), fake.dtype)
        if kernel is not None:
            descriptors.append(_replace(found, kernel, context))
        else:
            erase_unused(found.made)
    if not num_found:
        context.refuse(ACTION, "the graph has no act(gate) * up")
    return descriptors


def _replace(found: _Gated, kernel: Kernel, context: RewriteContext) -> PatchDescriptor:
    product, gone = found.product, [*found.inner, found.product]
    config: dict[str, JsonValue] = {"kernel": kernel.config.key(), "shape": list(_shape(found.gate))}
    # silu is the template's default; a config without the word is the one that it always was.
    options: dict[str, Any] = {} if found.activation == "silu" else {"activation": found.activation}
    descriptor = context.describe(ACTION, product, gone, f"kernel {kernel.name}", config | options, kernel.content_hash)
    if not found.is_rounded:
        options["round_silu"] = False
    call = context.call(product, kernel.call, found.gate, found.up, **options)
    whole = fake_of(product)
    assert whole is not None
    if whole.dim() != len(_shape(found.gate)):
        call = context.call(product, torch.reshape, call, tuple(whole.shape))
    call.meta["example_value"] = whole
    product.replace_all_uses_with(call)
    erase_unused(gone)
    return descriptor


def _match_product(product: fx.Node) -> _Gated | None:
    operands = binary(product, "mul")
    if operands is None:
        return None
    for activated, up in (operands, operands[::-1]):
        if not isinstance(up, fx.Node) or fake_of(up) is None:
            continue
        gated = _gate_of(activated)
        # x * sigmoid(x) is no gated product but silu itself.
        if gated is not None and (gated[0] is not up or gated[1] == "silu"):
            return _Gated(product, gated[0], up, gated[1], gated[2])
    return None


def _gate_of(node: Any) -> tuple[fx.Node, str, tuple[fx.Node, ...]] | None:
    """Return gate, the activation's name and its nodes, in graph order."""
    name = op_name(node)
    if name in ("silu", "gelu", "relu", "sigmoid") and isinstance(node.args[0], fx.Node):
        is_tanh = name == "gelu" and argument(node, 1, "approximate", "none") == "tanh"
        return node.args[0], "gelu_tanh" if is_tanh else name, (node,)
    operands = binary(node, "mul")
    for own, other in (operands, operands[::-1]) if operands else ():
        if isinstance(own, fx.Node) and op_name(other) == "sigmoid" and other.args[:1] == (own,):
            return own, "silu", (other, node)
    return None


def _match_glu(node: fx.Node, context: RewriteContext) -> _Gated | None:
    """Match F.glu over contiguous memory, and give its halves nodes of their own: rows from its dimension on."""
    whole = node.args[0] if op_name(node) == "glu" and node.args else None
    fake = fake_of(whole)
    if fake is None or not fake.is_contiguous():
        return None
    flat = context.call(node, torch.flatten, whole, argument(node, 1, "dim", -1) % fake.dim(), -1)
    rows = fake.flatten(argument(node, 1, "dim", -1) % fake.dim(), -1)
    flat.meta["example_value"] = rows
    half = rows.shape[-1] // 2
    up, gate = (context.call(node, torch.narrow, flat, -1, first, half) for first in (0, half))
    up.meta["example_value"], gate.meta["example_value"] = rows.narrow(-1, 0, half), rows.narrow(-1, half, half)
    return _Gated(node, gate, up, "sigmoid", (), is_rounded=False, made=(flat, up, gate))


def _is_rows(fake: Tensor) -> bool:
    """Whether a tensor can be viewed as rows with one stride and contiguous columns."""
    sizes = [(size, step) for size, step in zip(fake.shape[:-1], fake.stride()[:-1], strict=True) if size != 1]
    follows = all(step == inner * count for (_, step), (count, inner) in itertools.pairwise(sizes))
    return follows and (fake.stride(-1) == 1 or fake.shape[-1] == 1)


def _why_not(found: _Gated) -> str | None:
    product, gate, up, inner = found.product, found.gate, found.up, found.inner
    gate_fake, up_fake = fake_of(gate), fake_of(up)
    if gate_fake is None or up_fake is None:
        return "shapes are not known"
    if gate_fake.shape != up_fake.shape or gate_fake.dtype != up_fake.dtype:
        return "gate and up differ in shape or dtype"
    if not (_is_rows(gate_fake) and _is_rows(up_fake)):
        return "gate or up is no tensor of rows"
    if any(set(node.users) - {*inner, product} for node in inner):
        return "the activated gate is used elsewhere too"
    if any(node.kwargs.get("inplace") for node in inner):
        return "the activation writes in place"
    first = inner[0] if inner else product
    if any(is_written_between(memory_root(node), first, product) for node in (gate, up, *inner[-1:])):
        return "gate or up is written between the activation and the product"
    is_chain = any(is_pointwise(node) for node in (gate, up)) or is_read_by_pointwise_alone(product)
    if found.activation != "silu" and is_chain:
        return "the product stands in a chain of pointwise ops, which the compiler fuses"
    return None


def _shape(node: fx.Node) -> tuple[int, ...]:
    fake = fake_of(node)
    return tuple(int(size) for size in fake.shape) if fake is not None else ()
