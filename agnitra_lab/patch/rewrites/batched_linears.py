"""Small products of one shape with weights and inputs of their own become one batched product.

Trigger: linears (in any spelling) of the same sizes and dtype, all with or all without bias, none of which depends on
another, as the towers of recommenders and the heads of multi-task models have them; each too small to fill the device.
Algebra: none; product i of a batched product is x_i W_i^T + b_i.
Guard: weights are Parameters with version counters, not written in the graph; the stacked copies follow their sources.
The graph is put into an order in which every input is there: nothing moves across a write of what it reads.
Source: horizontal fusion, as in HFTA (Wang et al., arXiv 2102.02344) and cuBLAS's batched GEMM.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.emit import emit
from agnitra_lab.patch.matmuls import MatMul, find_products
from agnitra_lab.patch.ops import escaping_roots, fake_of, is_written_between, memory_root, mutated_roots, written_nodes
from agnitra_lab.patch.weights import why_not_derivable

ACTION = "batched_linears"
_LARGEST_RESULT = 132 // 2 * 128 * 128
"""Elements of a result whose tiles fill half the multiprocessors of an H200."""
_LARGEST_INPUT_SHARE = 4
"""Stacking copies the inputs: not more of them than this many times the weights and results."""


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Batch each group of independent products of one shape.

    Returns:
        One descriptor per group.
    """
    descriptors = []
    for group in _groups(context):
        problem = _why_not(group, context)
        if problem:
            context.refuse(ACTION, problem)
        else:
            descriptors.append(_batch(group, context))
    if not descriptors and not context.refusals:
        context.refuse(ACTION, "no two independent products have one shape")
    return descriptors


def _groups(context: RewriteContext) -> list[list[MatMul]]:
    """Return products of one shape and one depth, counted in products: none depends on another. The deepest first."""
    products = {product.node: product for product in find_products(context.graph_module.graph)}
    depth: dict[fx.Node, int] = {}
    # What is read may also have come by a write.
    written: dict[fx.Node, int] = {}
    groups: dict[Any, list[MatMul]] = {}
    for node in context.graph_module.graph.nodes:
        sources = [(depth[source], written.get(memory_root(source), 0)) for source in node.all_input_nodes]
        depth[node] = max((max(pair) for pair in sources), default=0) + (node in products)
        for target in written_nodes(node):
            written[memory_root(target)] = max(depth[node], written.get(memory_root(target), 0))
        product = products.get(node)
        x, weight = (fake_of(product.a), fake_of(product.b)) if product is not None else (None, None)
        if product is None or x is None or weight is None or weight.dim() != 2 or not context.is_weight(product.b):
            continue
        key = (depth[node], product.shape, x.dtype, x.device, product.bias is None, product.is_b_transposed)
        groups.setdefault(key, []).append(product)
    # The deepest first: results of a batch lie in one tensor, where their writes could not be told apart.
    ordered = sorted(groups.items(), key=lambda item: -item[0][0])
    return [group for _, group in ordered if len(group) > 1]


def _why_not(group: Sequence[MatMul], context: RewriteContext) -> str | None:
    first = group[0]
    weights = [product.b for product in group]
    biases = [product.bias for product in group if product.bias is not None]
    if len({product.a for product in group}) < len(group) or len(set(weights)) < len(group):
        return "some products share their input or their weight"
    if first.num_m * first.num_n > _LARGEST_RESULT:
        return f"a product of {first.shape} fills the device by itself"
    if first.num_m * first.num_k > _LARGEST_INPUT_SHARE * (first.num_n * first.num_k + first.num_m * first.num_n):
        return f"stacking the inputs of products of {first.shape} costs more than their launches"
    if any(not context.is_weight(bias) for bias in biases):
        return "a bias is computed in the graph"
    problem = why_not_derivable([context.real_tensor(node) for node in (*weights, *biases)])
    if problem:
        return problem
    dtypes = {fake.dtype for node in (*weights, *biases) if (fake := fake_of(node)) is not None}
    if dtypes != {_fake(first.a).dtype}:
        return "inputs, weights and biases differ in dtype"
    graph = context.graph_module.graph
    written = mutated_roots(graph)
    if any(memory_root(node) in written for node in (*weights, *biases)):
        return "the graph writes to a weight"
    last = next(iter(reversed(graph.nodes)))
    if any(is_written_between(memory_root(product.a), product.node, last) for product in group):
        return "the graph writes to an input after its product"
    return None


def _batch(group: Sequence[MatMul], context: RewriteContext) -> PatchDescriptor:
    graph, first, at = context.graph_module.graph, group[0], group[-1].node
    config = {"num_products": len(group), "shape": list(first.shape)}
    gone = [product.node for product in group]
    descriptor = context.describe(ACTION, first.node, gone, "one batched product", config)  # type: ignore[arg-type]
    # As the graph stands: results that become views of one tensor are still apart.
    before = _separated_by_writes(list(graph.nodes))
    is_turned = first.is_b_transposed

    def stack(*weights: Tensor) -> Tensor:
        return torch.stack([weight.t() if is_turned else weight for weight in weights])

    def stack_biases(*biases: Tensor) -> Tensor:
        return torch.stack(biases)[:, None]

    rows = [emit(context, at, torch.reshape, product.a, (first.num_m, first.num_k)) for product in group]
    for product, row in zip(group, rows, strict=True):
        before[row] = before.get(product.node, set())
    stacked = emit(context, at, torch.stack, rows)
    weight = context.derive(ACTION, [product.b for product in group], stack, at, (is_turned,))
    biases = [product.bias for product in group if product.bias is not None]
    if biases:
        bias = context.derive(f"{ACTION}_bias", biases, stack_biases, at)
        batched = emit(context, at, torch.baddbmm, bias, stacked, weight)
    else:
        batched = emit(context, at, torch.bmm, stacked, weight)
    escaping = escaping_roots(graph)
    for index, product in enumerate(group):
        piece = emit(context, at, torch.select, batched, 0, index)
        piece = emit(context, at, torch.reshape, piece, tuple(int(size) for size in _fake(product.node).shape))
        if product.node in escaping:
            # The caller may write to one result: it gets memory of its own, as the single product gave.
            piece = emit(context, at, torch.clone, piece)
        product.node.replace_all_uses_with(piece)
    for node in gone:
        graph.erase_node(node)
    _put_in_order(graph, before)
    return descriptor


def _separated_by_writes(nodes: Sequence[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """Return for each node those that must stay before it, because one of both writes memory of the other."""
    place = {node: index for index, node in enumerate(nodes)}
    before: dict[fx.Node, set[fx.Node]] = {}
    touching: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        for root in {memory_root(source) for source in (*node.all_input_nodes, node)}:
            touching.setdefault(root, []).append(node)
    for writer in nodes:
        for other in (node for target in written_nodes(writer) for node in touching[memory_root(target)]):
            first, second = sorted((other, writer), key=place.__getitem__)
            if first is not second:
                before.setdefault(second, set()).add(first)
    return before


def _put_in_order(graph: fx.Graph, before: dict[fx.Node, set[fx.Node]]) -> None:
    """Sort the graph so that values are made before they are read; what need not move stays where it is."""
    nodes = list(graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    waiting: dict[fx.Node, int] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        sources = {source for source in (*node.all_input_nodes, *before.get(node, ())) if source in place}
        waiting[node] = len(sources)
        for source in sources:
            readers.setdefault(source, []).append(node)
    ready = [(place[node], node) for node in nodes if not waiting[node]]
    heapq.heapify(ready)
    last = graph._root
    while ready:
        _, node = heapq.heappop(ready)
        last.append(node)
        last = node
        for reader in readers.get(node, ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (place[reader], reader))


def _fake(node: Any) -> Tensor:
    fake = fake_of(node)
    assert fake is not None
    return fake
