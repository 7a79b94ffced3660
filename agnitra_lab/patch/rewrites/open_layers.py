"""torch's attention modules, each one call in a graph, become the steps that they consist of, for others to see.

Trigger: `F.multi_head_attention_forward` (nn.MultiheadAttention) and `torch._transformer_encoder_layer_fwd`, which
nn.TransformerEncoderLayer calls in eval mode.
Algebra: the documented formulas. Queries, keys and values of one input come from one product. Inputs that were only
turned to have the sequence first are read as they lie. With `need_weights` the scores are written as steps, and
`attention_by_hand` fuses them where nobody reads the weights; without, attention is the SDPA call that torch makes.
Guard: eval mode, packed projections, no extra key, value or zero attention; encoder layers without a mask, which their
call takes for a boolean one. Results that leave the graph keep their strides.
Source: torch.nn.functional.multi_head_attention_forward; Vaswani et al., arXiv 1706.03762, section 3.2.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.emit import emit
from agnitra_lab.patch.layouts import LayoutFlow
from agnitra_lab.patch.ops import argument, fake_of, op_name

ACTION = "open_layers"
_ATTENTION = functional.multi_head_attention_forward
_LAYER = torch._transformer_encoder_layer_fwd
_LAYER_NAMES = (
    "src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first",
    "eps", "norm_weight_1", "norm_bias_1", "norm_weight_2", "norm_bias_2", "ffn_weight_1", "ffn_bias_1", "ffn_weight_2",
    "ffn_bias_2", "mask", "mask_type",
)  # fmt: skip


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Open each call.

    Returns:
        One descriptor per call.
    """
    descriptors, flow = [], LayoutFlow(context)
    for node in list(graph_module.graph.nodes):
        made = None
        if node.op == "call_function" and node.target is _ATTENTION:
            made = _open_attention(node, context, flow)
        elif node.op == "call_function" and node.target is _LAYER:
            made = _open_layer(node, context)
        if made is not None:
            descriptors.append(made)
        else:
            flow.carry_over(node)
    if not descriptors and not context.refusals:
        context.refuse(ACTION, "the graph has no call of torch's attention modules")
    return descriptors


# --- nn.TransformerEncoderLayer --------------------------------------------------------------------------------------


def _open_layer(node: fx.Node, context: RewriteContext) -> PatchDescriptor | None:
    given = {name: argument(node, index, name) for index, name in enumerate(_LAYER_NAMES)}
    src, expected = fake_of(given["src"]), fake_of(node)
    if given["mask"] is not None or src is None or expected is None or src.dim() != 3 or src.is_nested:
        context.refuse(ACTION, "an encoder layer has a mask, or no input of three dimensions")
        return None
    descriptor = context.describe(ACTION, node, [node], "the steps of an encoder layer", {"shape": list(src.shape)})

    def norm(value: fx.Node, number: int) -> fx.Node:
        weight, bias = given[f"norm_weight_{number}"], given[f"norm_bias_{number}"]
        return emit(context, node, functional.layer_norm, value, (given["embed_dim"],), weight, bias, given["eps"])

    x = norm(given["src"], 1) if given["norm_first"] else given["src"]
    projected = emit(context, node, torch._C._nn.linear, x, given["qkv_weight"], given["qkv_bias"])
    parts = [_heads(part, given["num_heads"], True, node, context) for part in _thirds(projected, node, context)]
    out = emit(context, node, functional.scaled_dot_product_attention, *parts)
    out = _merged(out, True, node, context)
    out = emit(context, node, torch._C._nn.linear, out, given["proj_weight"], given["proj_bias"])
    x = emit(context, node, operator.add, out, given["src"])
    x = x if given["norm_first"] else norm(x, 1)
    hidden = norm(x, 2) if given["norm_first"] else x
    hidden = emit(context, node, torch._C._nn.linear, hidden, given["ffn_weight_1"], given["ffn_bias_1"])
    hidden = _activated(hidden, bool(given["use_gelu"]), node, context)
    hidden = emit(context, node, torch._C._nn.linear, hidden, given["ffn_weight_2"], given["ffn_bias_2"])
    x = emit(context, node, operator.add, hidden, x)
    node.replace_all_uses_with(x if given["norm_first"] else norm(x, 2))
    node.graph.erase_node(node)
    return descriptor


def _activated(hidden: fx.Node, is_gelu: bool, node: fx.Node, context: RewriteContext) -> fx.Node:
    if not is_gelu:
        return emit(context, node, functional.relu, hidden)
    # The layer's own call asks the matrix library for its GELU, which on a GPU is the tanh approximation whatever the
    # module says (pytorch #104061); on a CPU it is by erf.
    fake = fake_of(hidden)
    approximate = "tanh" if fake is not None and fake.device.type == "cuda" else "none"
    return emit(context, node, functional.gelu, hidden, approximate=approximate)


# --- nn.MultiheadAttention -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Input:
    """One input of an attention: [N, L, E] when its batch comes first, else [L, N, E]."""

    node: fx.Node
    is_batch_first: bool


def _open_attention(node: fx.Node, context: RewriteContext, flow: LayoutFlow) -> PatchDescriptor | None:
    bound = inspect.signature(_ATTENTION).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    problem = _why_not(given, node)
    if problem:
        context.refuse(ACTION, problem)
        return None
    query = fake_of(given["query"])
    assert query is not None
    config = {"shape": [int(size) for size in query.shape], "num_heads": int(given["num_heads"])}
    descriptor = context.describe(ACTION, node, [node], "the steps of multi-head attention", config)  # type: ignore[arg-type]
    sources = [_as_it_lies(given[name]) for name in ("query", "key", "value")]
    q, k, v = (
        _heads(part, given["num_heads"], source.is_batch_first, node, context)
        for part, source in zip(_projected(sources, given, node, context), sources, strict=True)
    )
    mask = _mask(given, query.shape[1], node, context)
    weights = None
    if given["need_weights"]:
        scores = emit(context, node, torch.matmul, q, emit(context, node, torch.transpose, k, -2, -1))
        scores = emit(context, node, operator.mul, scores, 1.0 / math.sqrt(_width(q)))
        scores = scores if mask is None else emit(context, node, operator.add, scores, mask)
        weights = emit(context, node, functional.softmax, scores, dim=-1)
        out = emit(context, node, torch.matmul, weights, v)
    else:
        is_causal = bool(given["is_causal"]) and given["key_padding_mask"] is None
        options = {"attn_mask": None if is_causal else mask, "is_causal": is_causal}
        out = emit(context, node, functional.scaled_dot_product_attention, q, k, v, **options)
    is_batch_first = sources[0].is_batch_first
    out = _merged(out, is_batch_first, node, context)
    out = emit(context, node, torch._C._nn.linear, out, given["out_proj_weight"], given["out_proj_bias"])
    out = emit(context, node, torch.transpose, out, 0, 1) if is_batch_first else out
    _take_over(node, out, weights, given, context, flow)
    return descriptor


def _why_not(given: dict[str, Any], node: fx.Node) -> str | None:
    fakes = [fake_of(given[name]) for name in ("query", "key", "value")]
    if any(fake is None or fake.dim() != 3 for fake in fakes):
        return "multi-head attention without a batch, or of unknown shape"
    if given["training"] and given["dropout_p"] != 0.0:
        return "dropout on the attention weights draws random numbers"
    extras = ("bias_k", "bias_v", "static_k", "static_v", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    if any(given[name] is not None for name in extras) or given["add_zero_attn"] or given["use_separate_proj_weight"]:
        return "multi-head attention with extra keys or separate projections"
    if given["in_proj_weight"] is None or any(op_name(user) != "getitem" for user in node.users):
        return "multi-head attention in a form that is not known"
    return None


def _as_it_lies(value: fx.Node) -> _Input:
    """Look through the turn that nn.MultiheadAttention gives to inputs with the batch first."""
    if op_name(value) == "transpose" and {argument(value, 1, "dim0"), argument(value, 2, "dim1")} == {0, 1}:
        fake = fake_of(value.args[0])
        if isinstance(value.args[0], fx.Node) and fake is not None and fake.is_contiguous():
            return _Input(value.args[0], True)
    return _Input(value, False)


def _projected(
    sources: Sequence[_Input], given: dict[str, Any], node: fx.Node, context: RewriteContext
) -> list[fx.Node]:
    """Emit the projections: one product for each distinct input."""
    weight, bias, width = given["in_proj_weight"], given["in_proj_bias"], int(given["embed_dim_to_check"])
    if sources[0] == sources[1] == sources[2]:
        return _thirds(emit(context, node, torch._C._nn.linear, sources[0].node, weight, bias), node, context)

    def part(tensor: fx.Node | None, first: int, count: int) -> fx.Node | None:
        return None if tensor is None else emit(context, node, torch.narrow, tensor, 0, first * width, count * width)

    def project(source: _Input, first: int, count: int) -> fx.Node:
        rows = part(weight, first, count), part(bias, first, count)
        return emit(context, node, torch._C._nn.linear, source.node, *rows)

    query = project(sources[0], 0, 1)
    if sources[1] == sources[2]:
        both = project(sources[1], 1, 2)
        return [query, *(emit(context, node, torch.narrow, both, -1, index * width, width) for index in (0, 1))]
    return [query, project(sources[1], 1, 1), project(sources[2], 2, 1)]


def _thirds(packed: fx.Node, before: fx.Node, context: RewriteContext) -> list[fx.Node]:
    width = _width(packed) // 3
    return [emit(context, before, torch.narrow, packed, -1, index * width, width) for index in range(3)]


def _heads(value: fx.Node, num_heads: int, is_batch_first: bool, before: fx.Node, context: RewriteContext) -> fx.Node:
    """Emit [N, L, E] or [L, N, E] as [N, heads, L, E / heads]."""
    fake = fake_of(value)
    assert fake is not None
    shape = (*(int(size) for size in fake.shape[:2]), num_heads, int(fake.shape[2]) // num_heads)
    order = (0, 2, 1, 3) if is_batch_first else (1, 2, 0, 3)
    return emit(context, before, torch.permute, emit(context, before, torch.reshape, value, shape), order)


def _merged(value: fx.Node, is_batch_first: bool, before: fx.Node, context: RewriteContext) -> fx.Node:
    """Emit [N, heads, L, D] as [N, L, heads * D] or [L, N, heads * D]."""
    order = (0, 2, 1, 3) if is_batch_first else (2, 0, 1, 3)
    return emit(context, before, torch.flatten, emit(context, before, torch.permute, value, order), 2)


def _mask(given: dict[str, Any], num_batches: int, before: fx.Node, context: RewriteContext) -> fx.Node | None:
    """Emit the sum of both masks, with -inf where a boolean one says no."""
    total = None
    for name in ("attn_mask", "key_padding_mask"):
        mask = given[name]
        fake = fake_of(mask)
        if fake is None:
            continue
        sizes = tuple(int(size) for size in fake.shape)
        if name == "key_padding_mask":
            mask = emit(context, before, torch.reshape, mask, (sizes[0], 1, 1, sizes[1]))
        elif fake.dim() == 3:
            mask = emit(context, before, torch.reshape, mask, (num_batches, -1, *sizes[1:]))
        if fake.dtype is torch.bool:
            like = fake_of(given["query"])
            assert like is not None
            mask = emit(context, before, torch.where, mask, -math.inf, 0.0)
            mask = emit(context, before, "to", mask, like.dtype)
        total = mask if total is None else emit(context, before, operator.add, total, mask)
    return total


def _width(value: fx.Node) -> int:
    fake = fake_of(value)
    assert fake is not None
    return int(fake.shape[-1])


def _take_over(
    node: fx.Node,
    out: fx.Node,
    weights: fx.Node | None,
    given: dict[str, Any],
    context: RewriteContext,
    flow: LayoutFlow,
) -> None:
    old = node.meta.get("example_value")
    for user in list(node.users):
        if user.args[1] in (0, -2):
            user.replace_all_uses_with(out)
            if isinstance(old, (tuple, list)) and old[0].stride() != out.meta["example_value"].stride():
                flow.changed(out, old[0])
        elif weights is not None and given["average_attn_weights"]:
            user.replace_all_uses_with(emit(context, node, "mean", weights, 1))
        elif weights is not None:
            user.replace_all_uses_with(weights)
        node.graph.erase_node(user)
    erase_unused([node])
