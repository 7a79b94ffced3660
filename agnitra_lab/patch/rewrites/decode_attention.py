"""Attention of a few queries over many keys runs split over the keys, so that it fills the whole device.

Trigger: `scaled_dot_product_attention` with at most 4 queries, without dropout and `is_causal`. Key and value heads
that were repeated for it (expand and reshape, or repeat_interleave) are read where they lie once.
Algebra: softmax over parts, each with its own maximum and sum, added with their weights in fp32, in a fixed order.
Guard: q, k and v share one dtype and have a contiguous last dimension; the mask is boolean or of q's dtype and
broadcasts; the result gets the strides that it had.
Source: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue
from torch import fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.few_queries import arguments_of, shape, site, unrepeated, why_not
from agnitra_lab.patch.ops import fake_of, op_name

ACTION = "decode_attention"


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each attention of few queries.

    Returns:
        One descriptor per call.
    """
    descriptors = []
    calls = [node for node in graph_module.graph.nodes if op_name(node) == "sdpa"]
    if not calls:
        context.refuse(ACTION, "the graph has no scaled_dot_product_attention")
    for node in calls:
        arguments = arguments_of(node)
        problem = why_not(node, arguments)
        if problem:
            context.refuse(ACTION, problem)
            continue
        key, value = unrepeated(arguments["key"], node), unrepeated(arguments["value"], node)
        if shape(key[0]) != shape(value[0]):
            key, value = (arguments["key"], ()), (arguments["value"], ())
        q, k = fake_of(arguments["query"]), fake_of(key[0])
        assert q is not None and k is not None
        kernel = context.kernel(ACTION, site(q, k), q.dtype)
        if kernel is not None:
            gone = tuple(dict.fromkeys([*key[1], *value[1], node]))
            descriptors.append(_replace(node, arguments, key[0], value[0], gone, kernel, context))
    return descriptors


def _replace(
    node: fx.Node,
    arguments: dict[str, Any],
    key: fx.Node,
    value: fx.Node,
    gone: Sequence[fx.Node],
    kernel: Kernel,
    context: RewriteContext,
) -> PatchDescriptor:
    q, k, out = fake_of(arguments["query"]), fake_of(key), fake_of(node)
    assert q is not None and k is not None and out is not None
    config: dict[str, JsonValue] = {
        "kernel": kernel.config.key(),
        "shape": list(site(q, k)),
        "has_mask": arguments["attn_mask"] is not None,
        "is_repetition_dropped": len(gone) > 1,
    }
    descriptor = context.describe(ACTION, node, gone, f"kernel {kernel.name}", config, kernel.content_hash)
    call = context.call(
        node,
        kernel.call,
        arguments["query"],
        key,
        value,
        mask=arguments["attn_mask"],
        scale=arguments["scale"],
        out_stride=tuple(int(stride) for stride in out.stride()),
    )
    call.meta["example_value"] = out
    node.replace_all_uses_with(call)
    erase_unused(gone)
    return descriptor
