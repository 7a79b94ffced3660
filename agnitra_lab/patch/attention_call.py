"""One fused attention call in the place of an attention written by hand: its operands before it, its result after it.

Shape legend: B batch, H heads, S queries, T keys, D and E head sizes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import fx

from agnitra_lab.patch.attention import Attention, Operand, UnfitError
from agnitra_lab.patch.context import RewriteContext, erase_unused, infer
from agnitra_lab.patch.layouts import restrided
from agnitra_lab.patch.ops import fake_of, is_cast, is_written_between, memory_root, op_name

_VIEWS = ("permute", "unsqueeze", "expand", "reshape", "transpose", "view", "getattr", "t", "matrix_transpose")
_STRIDED = ("transpose", "permute", "unsqueeze", "squeeze", "swapaxes", "view", "reshape", "getitem")


def why_not_movable(attention: Attention, dtypes: Collection[torch.dtype]) -> str | None:
    """Say why no call can stand for an attention, whatever its sizes; None where one can.

    Args:
        attention: what was found.
        dtypes: of the values, that the call takes.
    """
    operands = (attention.query, attention.key, attention.value)
    fakes = [fake_of(operand.node) for operand in operands]
    if any(fake is None for fake in fakes):
        return "shapes are not known"
    value = fakes[-1]
    if value is not None and value.dtype not in dtypes:
        return f"attention in {value.dtype}"
    if not math.isfinite(attention.scale):
        return f"the scores are scaled by {attention.scale}"
    product, result = attention.nodes[0], attention.result
    for source in [operand.node for operand in operands] + [mask.node for mask in attention.masks]:
        # A mask may be made, by writes too, after the product: from then on it must stay.
        first = source.next if source > product else product
        if is_written_between(memory_root(source), first, result):
            return "an operand is written between the two products"
    return None


def head_sizes(attention: Attention) -> tuple[int, int]:
    """Return D and E."""
    query, value = fake_of(attention.query.node), fake_of(attention.value.node)
    assert query is not None and value is not None
    return int(query.shape[attention.query.permutation[-1]]), int(value.shape[attention.value.permutation[-1]])


class AttentionCall:
    """The nodes around one call, put in front of the node that it replaces.

    Attributes:
        sizes: B and H of the call; fused kernels take exactly two leading dimensions.
        dtype: of its operands, which is that of the values.
    """

    def __init__(self, attention: Attention, context: RewriteContext) -> None:
        self._attention = attention
        self._context = context
        self._at = attention.result
        value = fake_of(attention.value.node)
        assert value is not None
        self.dtype = value.dtype
        leadings = [attention.leading, *(mask.leading for mask in attention.masks), attention.value_leading]
        shape = next((leading for leading in leadings if len(leading) == 2), attention.leading)
        self.sizes = (math.prod(shape[:-1]), shape[-1] if shape else 1)

    def operands(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Return queries [B, H, S, D], keys [B, H, T, D] and values [B, H, T, E].

        Raises:
            UnfitError: when they are of several dtypes, or scaled by a tensor that does not fit.
        """
        attention = self._attention
        query, key = self._operand(attention.query, attention.leading), self._operand(attention.key, attention.leading)
        for scaling in attention.scalings:
            query = self._scaled(query, scaling)
        value = self._operand(attention.value, attention.value_leading)
        return self._fit(query), self._fit(key), self._fit(value)

    @staticmethod
    def shape(query: fx.Node, key: fx.Node) -> list[JsonValue]:
        """Return [B, H, S, D, T] for a patch log."""
        return [*_shape(query), _shape(key)[-2]]

    def insert(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call, and record what it gives."""
        node = self._context.call(self._at, target, *args, **kwargs)
        infer(node)
        return node

    def take_over(self, call: fx.Node) -> None:
        """Let the call's [B, H, S, E] stand for the attention, and erase what that was made of."""
        attention = self._attention
        result = self._shaped(call, (*attention.value_leading, *_shape(call)[-2:]))
        if attention.result_permutation != tuple(range(len(attention.result_permutation))):
            result = self.insert(torch.permute, result, attention.result_permutation)
        expected = fake_of(self._at)
        if expected is not None and self.dtype != expected.dtype:
            result = self.insert("to", result, expected.dtype)
        output: Any = next(iter(result.graph.find_nodes(op="output")))
        is_seen = any(memory_root(node) is memory_root(self._at) for node in output.all_input_nodes)
        if is_seen and expected is not None:
            # The caller sees these strides.
            result = restrided(result, expected, self._at, self._context)
        self._at.replace_all_uses_with(result)
        if not is_seen:
            allow_strided(result)
        erase_unused([*attention.turns, *attention.nodes])

    def _operand(self, operand: Operand, leading: tuple[int, ...]) -> fx.Node:
        node = operand.node
        if operand.permutation != tuple(range(len(operand.permutation))):
            node = self.insert(torch.permute, node, operand.permutation)
        for axis in operand.new_axes:
            node = self.insert(torch.unsqueeze, node, axis)
        shape = _shape(node)
        if shape[:-2] != leading:
            node = self.insert("expand", node, *leading, *shape[-2:])
        return self._shaped(node, (*self.sizes, *shape[-2:]))

    def _shaped(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        return node if _shape(node) == tuple(shape) else self.insert(torch.reshape, node, tuple(shape))

    def _scaled(self, query: fx.Node, scaling: fx.Node) -> fx.Node:
        fake = fake_of(scaling)
        assert fake is not None
        leading = tuple(fake.shape[:-2]) if fake.dim() >= 2 else ()
        padded = (1,) * (len(self._attention.leading) - len(leading)) + leading
        if len(padded) > 2:
            raise UnfitError("the scores are scaled by a tensor over more than batch and heads")
        scaling = self._shaped(scaling, (*(1,) * (2 - len(padded)), *padded, 1, 1))
        return self.insert(torch.mul, query, scaling)

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
            node = self.insert("contiguous", node)
        return node

    def _under_casts(self, node: fx.Node) -> fx.Node | None:
        """Return the operand in the dtype of the values where it was only widened to the dtype that it has."""
        source = node
        while op_name(source) in _VIEWS:
            source = source.args[0]  # type: ignore[assignment]
        while is_cast(source):
            source = source.args[0]  # type: ignore[assignment]
            fake = fake_of(source)
            if fake is not None and fake.dtype == self.dtype:
                # Rounding back what was widened gives the very values.
                return self.insert("to", node, self.dtype)
        return None


def allow_strided(node: fx.Node) -> None:
    """Let views of a value that now has other strides copy where they must: `view` becomes `reshape`."""
    for user in node.users:
        if op_name(user) in _STRIDED:
            if user.target == "view" and not isinstance(user.args[1], torch.dtype):
                user.target = "reshape"
            infer(user)
            allow_strided(user)


def _shape(node: fx.Node) -> tuple[int, ...]:
    fake = fake_of(node)
    assert fake is not None
    return tuple(int(size) for size in fake.shape)
