"""The pattern library: one function a known structure, in one ordered table, over the nodes of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pydantic import JsonValue

from agnitra_lab.contracts import GraphHandoff, MatchedPattern
from agnitra_lab.graph.index import GraphIndex, Node

_ATTENTION = "aten::scaled_dot_product_attention"
_PRODUCTS = ("aten::matmul", "aten::bmm")
_GATES = ("aten::silu", "aten::gelu", "aten::sigmoid", "aten::relu")
_CONVOLUTIONS = ("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution")
_NORMS = ("aten::layer_norm", "aten::native_layer_norm")
_CACHE_WRITES = ("aten::index_copy_", "aten::index_copy", "aten::index_put_", "aten::slice_scatter", "aten::copy_")
_CASTS = ("aten::to", "aten::_to_copy", "aten::type_as")


def match_patterns(handoff: GraphHandoff) -> tuple[MatchedPattern, ...]:
    """Find every known structure of a graph.

    Args:
        handoff: what `graph.capture` gave.

    Returns:
        The matches, in the order of the table and then of the graph. A node may belong to several.
    """
    graph = GraphIndex(handoff.graph.nodes)
    return tuple(found for match in PATTERNS.values() for found in match(graph))


def transformer_attention(graph: GraphIndex) -> Iterator[MatchedPattern]:
    """Match softmax(QK^T)V, fused or spelled out, with the projections of its module."""
    for node in graph.with_op(_ATTENTION):
        yield _match(
            "transformer_attention",
            _with_projections(graph, [node]),
            1.0,
            ("sdpa_backend", "qkv_concat"),
            is_fused=True,
        )
    for softmax in graph.with_op("aten::softmax", "aten::_softmax"):
        scores = graph.producer(softmax, *_PRODUCTS, depth=5)
        weighted = graph.consumer(softmax, *_PRODUCTS, depth=3)
        if scores is not None and weighted is not None:
            found = _with_projections(graph, [scores, softmax, weighted])
            yield _match("transformer_attention", found, 0.95, ("qkv_concat",), is_fused=False)


def gated_mlp(graph: GraphIndex) -> Iterator[MatchedPattern]:
    """Match down(activation(gate(x)) * up(x)): SwiGLU, GeGLU and their kin."""
    for product in graph.with_op("aten::mul"):
        gate = next((node for node in graph.inputs(product) if node.op in _GATES), None)
        if gate is None:
            continue
        gate_linear = graph.producer(gate, "aten::linear", depth=2)
        others = [node for node in graph.inputs(product) if node is not gate]
        up_linear = others[0] if others and others[0].op == "aten::linear" else None
        if gate_linear is None or up_linear is None or gate_linear.inputs[0] != up_linear.inputs[0]:
            continue
        down = graph.consumer(product, "aten::linear", depth=2)
        found = [gate_linear, gate, up_linear, product, *([down] if down else [])]
        actions = ("gate_up_concat", "swiglu") if gate.op == "aten::silu" else ("gate_up_concat",)
        yield _match("gated_mlp", found, 1.0 if down else 0.85, actions, activation=gate.op)


def rms_norm(graph: GraphIndex) -> Iterator[MatchedPattern]:
    """Match x * rsqrt(mean(x^2) + eps) * weight, spelled out or as one op."""
    for node in graph.with_op("aten::rms_norm", "aten::_fused_rms_norm"):
        yield _match("rms_norm", [node], 1.0, ("rms_norm",), is_fused=True)
    for root in graph.with_op("aten::rsqrt"):
        mean = graph.producer(root, "aten::mean", depth=2)
        square = graph.producer(mean, "aten::pow", "aten::square", "aten::mul", depth=1) if mean else None
        if mean is None or square is None:
            continue
        chain = [square, mean, *graph.between(mean, root), root]
        scaled = graph.consumer(root, "aten::mul", depth=2)
        if scaled is not None:
            weighted = graph.consumer(scaled, "aten::mul", depth=2)
            is_same_module = weighted is not None and weighted.module_path == root.module_path
            chain += [scaled, *([weighted] if weighted is not None and is_same_module else [])]
        yield _match("rms_norm", chain, 0.95 if scaled else 0.7, ("rms_norm",), is_fused=False)


def layer_norm(graph: GraphIndex) -> Iterator[MatchedPattern]:
    """Match layer normalisation as one op."""
    for node in graph.with_op(*_NORMS):
        yield _match("layer_norm", [node], 1.0, ())


def conv_bn(graph: GraphIndex) -> Iterator[MatchedPattern]:
    """Match a batch norm that follows a convolution directly."""
    for norm in graph.with_op("aten::batch_norm", "aten::_native_batch_norm_legit_no_training"):
        before = next(iter(graph.inputs(norm)), None)
        if before is not None and before.op in _CONVOLUTIONS:
            yield _match("conv_bn", [before, norm], 1.0, ("conv_bn_fold",))


def conv(graph: GraphIndex) -> Iterator[MatchedPattern]:
    """Match every convolution."""
    for node in graph.with_op(*_CONVOLUTIONS):
        yield _match("conv", [node], 1.0, ())


def recsys_interaction(graph: GraphIndex) -> Iterator[MatchedPattern]:
    """Match embedding bags (or several looked-up tables) whose vectors are concatenated or multiplied pairwise."""
    bags = graph.with_op("aten::embedding_bag", "aten::_embedding_bag")
    tables = bags or graph.with_op("aten::embedding")
    if not bags and len({node.inputs[0] for node in tables if node.inputs}) < 3:
        return
    mixes = [mix for table in tables if (mix := graph.consumer(table, "aten::cat", "aten::stack", *_PRODUCTS, depth=3))]
    if bags or mixes:
        confidence = 1.0 if bags and mixes else 0.9 if bags else 0.75
        yield _match("recsys_interaction", [*tables, *mixes], confidence, (), num_tables=len(tables))


def kv_cache(graph: GraphIndex) -> Iterator[MatchedPattern]:
    """Match attention over keys and values that are written into, or appended to, a cache."""
    for attention in [*graph.with_op(_ATTENTION), *graph.with_op("aten::softmax", "aten::_softmax")]:
        writes = [node for node in graph.in_module(attention.module_path) if _is_cache_write(graph, node)]
        if len(writes) >= 2:
            yield _match("kv_cache", [*writes, attention], 0.95, ())


def patch_embedding(graph: GraphIndex) -> Iterator[MatchedPattern]:
    """Match the convolution (or unfold and linear) that turns an image into the tokens of a transformer."""
    if not graph.with_op(_ATTENTION, "aten::softmax", "aten::_softmax"):
        return
    for node in graph.with_op("aten::conv2d", "aten::convolution"):
        flattened = graph.consumer(node, "aten::flatten", "aten::reshape", "aten::view", depth=1)
        if flattened is not None and len(flattened.shape) == 3:
            yield _match("patch_embedding", [node, flattened], 0.95, ())


def lm_head(graph: GraphIndex) -> Iterator[MatchedPattern]:
    """Match the last linear of a model with a token embedding, when it widens to a vocabulary."""
    linears = graph.with_op("aten::linear")
    if not linears or not graph.with_op("aten::embedding"):
        return
    last = linears[-1]
    source = next(iter(graph.inputs(last)), None)
    is_last = graph.consumer(last, "aten::linear", depth=4) is None
    if source is None or not source.shape or not last.shape or not is_last:
        return
    widening = last.shape[-1] / max(1, source.shape[-1])
    is_named = (last.module_path or "").rpartition(".")[2] in {"lm_head", "output", "head", "unembed", "decoder"}
    if widening > 1.0 and (is_named or widening >= 4.0):
        yield _match("lm_head", [last], 0.95 if is_named else 0.8, (), vocabulary=last.shape[-1])


PATTERNS: dict[str, Callable[[GraphIndex], Iterator[MatchedPattern]]] = {
    "transformer_attention": transformer_attention,
    "gated_mlp": gated_mlp,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "conv_bn": conv_bn,
    "conv": conv,
    "recsys_interaction": recsys_interaction,
    "kv_cache": kv_cache,
    "patch_embedding": patch_embedding,
    "lm_head": lm_head,
}
"""Pattern name -> matcher, in the order in which matches are listed."""


def _match(
    name: str, nodes: Iterable[Node], confidence: float, actions: tuple[str, ...], **metadata: JsonValue
) -> MatchedPattern:
    hints: dict[str, JsonValue] = {"actions": list(actions)} if actions else {}
    names = tuple(dict.fromkeys(node.name for node in nodes))
    return MatchedPattern(
        pattern_name=name, confidence=confidence, subgraph=names, optimization_hints=hints, metadata=dict(metadata)
    )


def _with_projections(graph: GraphIndex, core: list[Node]) -> list[Node]:
    projections = [
        linear for source in graph.inputs(core[0]) if (linear := graph.producer(source, "aten::linear", depth=6))
    ]
    if core[0].op != _ATTENTION and core[-1] is not core[0]:
        value = [
            linear for source in graph.inputs(core[-1]) if (linear := graph.producer(source, "aten::linear", depth=6))
        ]
        projections += [linear for linear in value if linear.module_path != core[0].module_path]
    output = graph.consumer(core[-1], "aten::linear", depth=4)
    ordered = [*projections, *core, *([output] if output else [])]
    return sorted({node.name: node for node in ordered}.values(), key=graph.position)


def _is_cache_write(graph: GraphIndex, node: Node) -> bool:
    if node.op in _CACHE_WRITES:
        return not graph.inputs(node) or graph.node(node.inputs[0]) is None
    # Appending: the old part is an input of the model, not something that this graph computed.
    return node.op == "aten::cat" and len(node.inputs) == 2 and graph.node(node.inputs[0]) is None
