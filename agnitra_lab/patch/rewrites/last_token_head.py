"""A linear whose result is only read at some rows computes those rows alone: the head of a prefill, read at the end.

Trigger: a linear (or `x @ W`, or einsum) whose value is only read through an index of its leading dimensions
(`logits[:, -1]`, `logits[:, -1:, :]`, `select`, `narrow`, `index_select`), directly or behind elementwise operations
(casts, scaling, tanh), where the rows that are read are at most half of all.
Algebra: row i of x @ W.T + b is x[i] @ W.T + b, and an elementwise function of it depends on that row alone.
Guard: nothing writes into the value or into x on the way, no index touches the last dimension. Where the value leaves
the graph it gets the strides that it had as a view of the whole.
Source: "only compute necessary logits" (`num_logits_to_keep`, Hugging Face transformers #31292).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.emit import emit, emit_copy
from agnitra_lab.patch.matmuls import MatMul, find_products
from agnitra_lab.patch.ops import argument, escaping_roots, fake_of, is_cast, memory_root, mutated_roots, op_name

ACTION = "last_token_head"
_LEAST_SAVING = 2
_ELEMENTWISE = ("relu", "sigmoid", "silu", "gelu", "tanh", "neg")
_ARITHMETIC = ("add", "sub", "mul", "div")


@dataclass(frozen=True)
class _Reading:
    """One way from a product to the rows that are read: elementwise nodes in graph order, then the index."""

    chain: tuple[fx.Node, ...]
    index: fx.Node


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Move each index that is all a product is read through in front of it.

    Returns:
        One descriptor per index.
    """
    descriptors: list[PatchDescriptor] = []
    for product in find_products(graph_module.graph):
        readings = _readings(product)
        if not readings:
            continue
        problem = _why_not(product, readings, context)
        if problem:
            context.refuse(ACTION, problem)
            continue
        nodes = sorted({product.node, *(node for reading in readings for node in (*reading.chain, reading.index))})
        for reading in readings:
            descriptors.append(_move(product, reading, context))
        erase_unused(nodes)
    if not descriptors and not context.refusals:
        context.refuse(ACTION, "no linear's result is read at some of its rows alone")
    return descriptors


def _readings(product: MatMul) -> list[_Reading]:
    """Return every way in which the product's value is read; empty when one is no index of leading dimensions."""
    found = []
    pending: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(product.node, ())]
    while pending:
        value, chain = pending.pop()
        for user in value.users:
            if is_row_index(user, value):
                found.append(_Reading(chain, user))
            elif _is_elementwise(user, value):
                pending.append((user, (*chain, user)))
            else:
                return []
    return found


def is_row_index(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node only picks among the leading dimensions of `value`."""
    fake, name = fake_of(value), op_name(node)
    if fake is None or node.args[:1] != (value,) or sum(used is value for used in node.all_input_nodes) != 1:
        return False
    if name == "getitem":
        return _spares_last(node.args[1], fake.dim())
    if name in ("select", "narrow", "index_select"):
        dim = argument(node, 1, "dim")
        return isinstance(dim, int) and dim % fake.dim() != fake.dim() - 1
    return False


def _spares_last(index: Any, rank: int) -> bool:
    entries = index if isinstance(index, tuple) else (index,)
    picks = [entry for entry in entries if entry is not None]
    if any(not _is_pick(entry) for entry in picks) or sum(entry is Ellipsis for entry in picks) > 1:
        return False
    reaches_last = len(picks) >= rank if Ellipsis not in picks else picks[-1] is not Ellipsis or len(picks) > rank
    return not reaches_last or picks[-1] == slice(None)


def _is_pick(entry: Any) -> bool:
    if isinstance(entry, fx.Node):
        fake = fake_of(entry)
        # A mask takes as many dimensions as it has.
        return fake is not None and fake.dtype not in (torch.bool, torch.uint8)
    if isinstance(entry, list):
        return all(type(number) is int for number in entry)
    return entry is Ellipsis or isinstance(entry, slice) or type(entry) is int


def _is_elementwise(node: fx.Node, value: fx.Node) -> bool:
    """Whether each element of a node depends on that element of `value` and its column alone."""
    before, after, name = fake_of(value), fake_of(node), op_name(node)
    if before is None or after is None or before.shape != after.shape:
        return False
    if is_cast(node) or name in _ELEMENTWISE:
        return node.args[:1] == (value,) and not node.kwargs.get("inplace")
    if name not in _ARITHMETIC or node.kwargs or len(node.args) != 2:
        return False
    others = [operand for operand in node.args if operand is not value]
    if len(others) != 1:
        return False
    fake = fake_of(others[0])
    return isinstance(others[0], (int, float)) if fake is None else fake.dim() <= 1


def _why_not(product: MatMul, readings: Sequence[_Reading], context: RewriteContext) -> str | None:
    weight, result = fake_of(product.b), fake_of(product.node)
    if weight is None or result is None or weight.dim() != 2 or product.a is product.b:
        return "the right operand is no plain matrix"
    rows = sum(fake.numel() // product.num_n for reading in readings if (fake := fake_of(reading.index)) is not None)
    if rows * _LEAST_SAVING > product.num_m:
        return f"{rows} of the {product.num_m} rows of the product are read"
    inputs = {product.a, product.b, product.bias, product.node}
    for reading in readings:
        inputs |= {node for step in (*reading.chain, reading.index) for node in (step, *step.all_input_nodes)}
    written = mutated_roots(context.graph_module.graph)
    if any(memory_root(node) in written for node in inputs if node is not None):
        return "the graph writes to the product, or to what it is made of"
    return None


def _move(product: MatMul, reading: _Reading, context: RewriteContext) -> PatchDescriptor:
    index = reading.index
    gone = [product.node, *reading.chain, index]
    fake = fake_of(index)
    assert fake is not None
    rows = fake.numel() // product.num_n
    descriptor = context.describe(
        ACTION, product.node, gone, "index before linear", {"num_rows": product.num_m, "num_rows_kept": rows}
    )
    escapes = memory_root(index) in escaping_roots(index.graph)
    picked = emit_copy(index, {reading.chain[-1] if reading.chain else product.node: product.a}, index)
    weight = product.b
    if not product.is_b_transposed:
        weight = emit(context, index, torch.transpose, product.b, -2, -1)
    value = emit(context, index, torch._C._nn.linear, picked, weight, product.bias)
    before = product.node
    for step in reading.chain:
        value = emit_copy(step, {before: value}, index)
        before = step
    made = fake_of(value)
    if escapes and made is not None and _used_strides(made) != _used_strides(fake):
        value = _with_strides(value, fake, index, context)
    index.replace_all_uses_with(value)
    return descriptor


def _used_strides(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _with_strides(value: fx.Node, like: Tensor, before: fx.Node, context: RewriteContext) -> fx.Node:
    """Copy a value into memory laid out as the view of the whole product was; what lies between is never touched."""
    room = emit(context, before, "new_empty_strided", value, tuple(like.shape), like.stride())
    return emit(context, before, "copy_", room, value)
