"""Attention written as products and a softmax becomes scaled_dot_product_attention, which keeps no scores in memory.

Trigger: softmax(scale * q k^T + masks) v over the last dimension, as `agnitra_lab.patch.attention` finds it.
Algebra: the same formula. Conditions become an additive mask: -inf stays -inf, and a row that sees no key stays NaN; a
finite value becomes -1e30, so that such a row stays the plain average. A mask that is constant and causal, in a buffer
or made in the graph, becomes `is_causal=True`; a buffer that changes later sends calls to the original graph.
Guard: scores and weights are used nowhere else, no dropout, operands of one dtype and not written in between. Scores
that were rounded between the steps no longer are.
Source: FlashAttention (Dao et al., arXiv 2205.14135); `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import fx
from torch.nn import functional

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.attention import Attention, Operand, UnfitError, find_attentions
from agnitra_lab.patch.constants import Constants
from agnitra_lab.patch.context import RewriteContext, erase_unused, infer
from agnitra_lab.patch.layouts import restrided
from agnitra_lab.patch.ops import fake_of, is_cast, is_written_between, memory_root, op_name, thread_in_place
from agnitra_lab.patch.scores_mask import MaskBuilder

ACTION = "attention_by_hand"
_MAX_HEAD_SIZE = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_VIEWS = ("permute", "unsqueeze", "expand", "reshape", "transpose", "view", "getattr", "t", "matrix_transpose")


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each attention that is written by hand.

    Returns:
        One descriptor per attention.
    """
    thread_in_place(graph_module.graph)
    constants = Constants(context)
    masks = MaskBuilder(context, constants)
    descriptors = []
    is_any = False
    for found in find_attentions(graph_module.graph, constants):
        is_any = True
        problem = found if isinstance(found, str) else _why_not(found)
        if isinstance(found, str) or problem:
            context.refuse(ACTION, str(problem))
            continue
        try:
            descriptors.append(_Replacement(found, context, masks).install())
        except UnfitError as unfit:
            context.refuse(ACTION, str(unfit))
    if not is_any:
        context.refuse(ACTION, "the graph has no softmax(q k^T) v written by hand")
    return descriptors


def _why_not(attention: Attention) -> str | None:
    operands = (attention.query, attention.key, attention.value)
    fakes = [fake_of(operand.node) for operand in operands]
    if any(fake is None for fake in fakes):
        return "shapes are not known"
    query, _, value = (fake for fake in fakes if fake is not None)
    head_size = query.shape[attention.query.permutation[-1]]
    width = value.shape[attention.value.permutation[-1]]
    if value.dtype not in _DTYPES:
        return f"attention in {value.dtype}"
    if value.device.type == "cuda" and (value.dtype is torch.float64 or max(head_size, width) > _MAX_HEAD_SIZE):
        return f"no fused kernel takes head sizes {head_size} and {width} in {value.dtype}"
    if value.device.type != "cuda" and head_size != width:
        return f"the CPU's fused kernel takes no head sizes that differ ({head_size} and {width})"
    if attention.scale <= 0.0 or not math.isfinite(attention.scale):
        return f"the scores are scaled by {attention.scale}"
    product, result = attention.nodes[0], attention.result
    for source in [operand.node for operand in operands] + [mask.node for mask in attention.masks]:
        # A mask may be made, by writes too, after the product: from then on it must stay.
        first = source.next if source > product else product
        if is_written_between(memory_root(source), first, result):
            return "an operand is written between the two products"
    return None


class _Replacement:
    """The nodes of one scaled_dot_product_attention call, put in front of the node that it replaces."""

    def __init__(self, attention: Attention, context: RewriteContext, masks: MaskBuilder) -> None:
        self.attention = attention
        self.context = context
        self.at = attention.result
        value = fake_of(attention.value.node)
        assert value is not None
        self.dtype = value.dtype
        leadings = [attention.leading, *(mask.leading for mask in attention.masks), attention.value_leading]
        shape = next((leading for leading in leadings if len(leading) == 2), attention.leading)
        # SDPA's fused kernels take exactly two leading dimensions, batch and heads.
        self.batch, self.heads = math.prod(shape[:-1]), shape[-1] if shape else 1
        self.mask, self.is_causal, self.kind = masks.build(attention, (self.batch, self.heads), self.dtype)

    def install(self) -> PatchDescriptor:
        """Put one `scaled_dot_product_attention` where the single steps stood, and describe the change."""
        attention, context = self.attention, self.context
        query, key = self._operand(attention.query, attention.leading), self._operand(attention.key, attention.leading)
        for scaling in attention.scalings:
            query = self._scaled(query, scaling)
        value = self._operand(attention.value, attention.value_leading)
        query, key, value = (self._fit(node) for node in (query, key, value))
        arguments: dict[str, Any] = {"attn_mask": self.mask, "is_causal": self.is_causal, "scale": attention.scale}
        shape: list[JsonValue] = [self.batch, self.heads, *(int(size) for size in _last(query)), int(_last(key)[0])]
        config: dict[str, JsonValue] = {"mask": self.kind, "scale": attention.scale, "shape": shape}
        descriptor = context.describe(ACTION, self.at, attention.nodes, "scaled_dot_product_attention", config)
        call = self._call(functional.scaled_dot_product_attention, query, key, value, **arguments)
        result = self._shaped(call, (*attention.value_leading, *_last(call)))
        if attention.result_permutation != tuple(range(len(attention.result_permutation))):
            result = self._call(torch.permute, result, attention.result_permutation)
        expected = fake_of(self.at)
        if expected is not None and self.dtype != expected.dtype:
            result = self._call("to", result, expected.dtype)
        self._take_over(result)
        erase_unused(attention.nodes)
        return descriptor

    def _take_over(self, result: fx.Node) -> None:
        output: Any = next(iter(result.graph.find_nodes(op="output")))
        is_seen = any(memory_root(node) is memory_root(self.at) for node in output.all_input_nodes)
        expected = fake_of(self.at)
        if is_seen and expected is not None:
            # The caller sees these strides.
            result = restrided(result, expected, self.at, self.context)
        self.at.replace_all_uses_with(result)
        if not is_seen:
            allow_strided(result)

    def _operand(self, operand: Operand, leading: tuple[int, ...]) -> fx.Node:
        node = operand.node
        if operand.permutation != tuple(range(len(operand.permutation))):
            node = self._call(torch.permute, node, operand.permutation)
        for axis in operand.new_axes:
            node = self._call(torch.unsqueeze, node, axis)
        fake = fake_of(node)
        assert fake is not None
        if tuple(fake.shape[:-2]) != leading:
            node = self._call("expand", node, *leading, *fake.shape[-2:])
        return self._shaped(node, (self.batch, self.heads, *fake.shape[-2:]))

    def _shaped(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        fake = fake_of(node)
        if fake is not None and tuple(fake.shape) == tuple(shape):
            return node
        return self._call(torch.reshape, node, tuple(shape))

    def _scaled(self, query: fx.Node, scaling: fx.Node) -> fx.Node:
        fake = fake_of(scaling)
        assert fake is not None
        leading = tuple(fake.shape[:-2]) if fake.dim() >= 2 else ()
        padded = (1,) * (len(self.attention.leading) - len(leading)) + leading
        if len(padded) > 2:
            raise UnfitError("the scores are scaled by a tensor over more than batch and heads")
        scaling = self._shaped(scaling, (*(1,) * (2 - len(padded)), *padded, 1, 1))
        return self._call(torch.mul, query, scaling)

    def _fit(self, node: fx.Node) -> fx.Node:
        """Return the operand in the dtype of the values, its last dimension dense as the fused kernels need it."""
        fake = fake_of(node)
        assert fake is not None
        if fake.dtype != self.dtype:
            bare = self._under_casts(node)
            if bare is None:
                raise UnfitError(f"queries, keys and values differ in dtype ({fake.dtype} and {self.dtype})")
            node = bare
        if fake.stride(-1) != 1:
            node = self._call("contiguous", node)
        return node

    def _under_casts(self, node: fx.Node) -> fx.Node | None:
        """Return the operand in the dtype of the values where it was only widened to the dtype that it has."""
        source = node
        while op_name(source) in (
            "permute",
            "unsqueeze",
            "expand",
            "reshape",
            "transpose",
            "view",
            "getattr",
            "t",
            "matrix_transpose",
        ):
            source = source.args[0]  # type: ignore[assignment]
        while is_cast(source):
            source = source.args[0]  # type: ignore[assignment]
            fake = fake_of(source)
            if fake is not None and fake.dtype == self.dtype:
                # Rounding back what was widened gives the very values.
                return self._call("to", node, self.dtype)
        return None

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.context.call(self.at, target, *args, **kwargs)
        infer(node)
        return node


def _last(node: fx.Node) -> tuple[int, int]:
    fake = fake_of(node)
    assert fake is not None
    return int(fake.shape[-2]), int(fake.shape[-1])


def allow_strided(node: fx.Node) -> None:
    """Let views of a value that now has other strides copy where they must: `view` becomes `reshape`."""
    for user in node.users:
        if op_name(user) in ("transpose", "permute", "unsqueeze", "squeeze", "swapaxes", "view", "reshape", "getitem"):
            if user.target == "view" and not isinstance(user.args[1], torch.dtype):
                user.target = "reshape"
            infer(user)
            allow_strided(user)
