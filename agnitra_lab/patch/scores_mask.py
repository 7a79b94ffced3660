"""From the masks of an attention by hand to the one mask of scaled_dot_product_attention, keeping what hidden rows do.

Shape legend: B batch, H heads, S queries, T keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.patch.attention import Attention, Mask, UnfitError
from agnitra_lab.patch.constants import Constants, is_of_the_model
from agnitra_lab.patch.context import RewriteContext, infer
from agnitra_lab.patch.masks import HIDDEN, Band, allowed_keys, band_of, has_dense_keys, is_hiding
from agnitra_lab.patch.ops import fake_of, is_cast, memory_root, mutated_roots, value_name

_LEAST_FILL = -1e4


class MaskBuilder:
    """Builds masks in one graph; attentions with the same masks share one."""

    def __init__(self, context: RewriteContext, constants: Constants) -> None:
        self._context = context
        self._constants = constants
        self._built: dict[Any, fx.Node] = {}
        self._written = mutated_roots(context.graph_module.graph)

    def build(
        self, attention: Attention, sizes: tuple[int, int], dtype: torch.dtype
    ) -> tuple[fx.Node | None, bool, str]:
        """Return the mask that SDPA takes, `is_causal`, and what kind of mask it is, in a word.

        Args:
            attention: the new nodes go in front of its result.
            sizes: batch and heads of the SDPA call.
            dtype: of its operands.

        Raises:
            UnfitError: when the masks cannot be one additive mask with the same result.
        """
        if not attention.masks:
            return None, False, "none"
        lengths = _lengths(attention)
        band = self.band(attention, dtype, lambda band: band.is_everything or band.is_causal(*lengths))
        if band is not None:
            return None, not band.is_everything, "none" if band.is_everything else "causal"
        return self.additive(attention, sizes, dtype), False, "additive"

    def band(
        self, attention: Attention, dtype: torch.dtype, is_wanted: Callable[[Band], bool] = lambda _: True
    ) -> Band | None:
        """Return the band that the masks are together: the graph then rests on their values of now.

        Args:
            attention: with masks.
            dtype: of the operands.
            is_wanted: whether a band is of use.

        Returns:
            The band; None where the masks are not all known, or are none that is wanted.
        """
        band, sources = self._band(attention.masks, dtype, *_lengths(attention))
        if band is None or not is_wanted(band):
            return None
        self._context.assume(sources)
        return band

    def additive(self, attention: Attention, sizes: tuple[int, int], dtype: torch.dtype) -> fx.Node:
        """Return one additive mask [B or 1, H or 1, S or 1, T] that does what the masks do.

        Raises:
            UnfitError: when there is none.
        """
        key = (tuple(attention.masks), sizes, dtype)
        if key not in self._built or any(memory_root(mask.node) in self._written for mask in attention.masks):
            builder = _Additive(self._context, self._constants, attention.result, sizes, dtype, _lengths(attention)[1])
            self._built[key] = builder.build(attention.masks)
        return self._built[key]

    def _band(
        self, masks: list[Mask], dtype: torch.dtype, num_queries: int, num_keys: int
    ) -> tuple[Band | None, set[fx.Node]]:
        sources: set[fx.Node] = set()
        together: Tensor | None = None
        for mask in masks:
            known = self._constants.of(mask.node)
            seen = None if known is None else _seen(mask, known.value, dtype)
            if known is None or seen is None:
                return None, sources
            sources |= known.sources
            flat = seen.reshape(-1, *seen.shape[-2:]) if seen.dim() > 2 else seen[None] if seen.dim() == 2 else None
            if flat is None or not bool((flat == flat[:1]).all()):
                return None, sources
            together = flat[0] if together is None else together & flat[0]
        assert together is not None
        return band_of(together, num_queries, num_keys), sources


def _lengths(attention: Attention) -> tuple[int, int]:
    """Return S and T."""
    scores = fake_of(attention.nodes[0])
    assert scores is not None
    return int(scores.shape[-2]), int(scores.shape[-1])


def _seen(mask: Mask, value: Any, dtype: torch.dtype) -> Tensor | None:
    """Return the boolean mask (True: seen) that a constant mask amounts to, None when it is more than that."""
    if not isinstance(value, Tensor):
        return None
    if mask.fill is None:
        return allowed_keys(value * mask.factor) if value.is_floating_point() else None
    if value.dtype is not torch.bool or not is_hiding(mask.fill, dtype):
        return None
    return value if mask.is_inverted else ~value


class _Additive:
    """The nodes of one additive mask [B or 1, H or 1, S or 1, T]."""

    def __init__(
        self,
        context: RewriteContext,
        constants: Constants,
        at: fx.Node,
        sizes: tuple[int, int],
        dtype: torch.dtype,
        num_keys: int,
    ) -> None:
        self.context, self.constants, self.at = context, constants, at
        self.sizes, self.dtype, self.num_keys = sizes, dtype, num_keys

    def build(self, masks: list[Mask]) -> fx.Node:
        """Add up what all masks put onto the scores; return the node of the sum."""
        total: fx.Node | None = None
        can_be_blind = False
        for mask in masks:
            if mask.fill is None:
                total = self._add(total, mask)
                continue
            has_keys = self._always_sees(mask)
            value = self._fill_value(mask, has_keys)
            can_be_blind |= not has_keys and math.isinf(value)
            total = self._fill(total, mask, value)
        assert total is not None
        if can_be_blind:
            # Attention by hand makes NaN of a row that sees no key, fused kernels make zeros.
            is_blind = self._call("all", self._call(torch.eq, total, -math.inf), -1, keepdim=True)
            total = self._call("masked_fill", total, is_blind, math.nan)
        fake = fake_of(total)
        if fake is not None and fake.shape[-1] != self.num_keys:
            total = self._call("expand", total, *fake.shape[:-1], self.num_keys)
        return self._dense(total)

    def _dense(self, mask: fx.Node) -> fx.Node:
        """Return the mask with its keys side by side.

        A bias by relative position comes as [S, T, H], turned: T5's attentions were left to two products and a softmax.
        """
        fake = fake_of(mask)
        return mask if fake is None or has_dense_keys(fake) else self._call("contiguous", mask)

    def _always_sees(self, mask: Mask) -> bool:
        known = self.constants.of(mask.node)
        seen = None if known is None else _seen(mask, known.value, self.dtype)
        if known is None or seen is None or not bool(seen.any(-1).all()):
            return False
        self.context.assume(known.sources)
        return True

    def _fill_value(self, mask: Mask, has_keys: bool) -> float:
        assert mask.fill is not None
        if math.isnan(mask.fill) or mask.fill > _LEAST_FILL:
            raise UnfitError(f"masked scores are replaced by {mask.fill}, which does not hide them")
        if math.isinf(mask.fill) or has_keys:
            return -math.inf
        if self.dtype is torch.float16:
            raise UnfitError("float16 has no number low enough to replace a score in a sum")
        return HIDDEN

    def _add(self, total: fx.Node | None, mask: Mask) -> fx.Node:
        node = self._four(mask)
        fake = fake_of(node)
        assert fake is not None
        if not fake.is_floating_point():
            raise UnfitError(f"a mask of {fake.dtype} is added to the scores")
        if self.dtype is torch.float16 and not self._is_bias(mask.node):
            # By hand -65504 swallows a score of the same dtype; a fused kernel adds both in float32.
            raise UnfitError("a sum in float16 keeps the scores of rows that see no key, which the mask may make")
        if mask.factor != 1.0:
            node = self._call(torch.mul, node, mask.factor)
        if fake.dtype != self.dtype:
            is_narrowed = torch.promote_types(fake.dtype, self.dtype) is not self.dtype
            if is_narrowed and not _is_step_function(mask.node, self.constants):
                raise UnfitError(f"the mask has {fake.dtype} and the values have {self.dtype}")
            node = self._call("to", node, self.dtype)
        if fake.device.type == "cuda" and self.dtype is not torch.float16:
            is_infinite = self._call(torch.eq, node, -math.inf)
            node = self._call(torch.where, is_infinite, node, self._call(torch.clamp, node, min=HIDDEN))
        return node if total is None else self._call(torch.add, total, node)

    def _is_bias(self, node: fx.Node) -> bool:
        """Whether a mask is made of weights alone, with no number in its making that hides scores."""
        ahead, seen = [node], {node}
        while ahead:
            at = ahead.pop()
            tensor = self.context.real_tensor(at)
            if at.op == "placeholder" and (tensor is None or not is_of_the_model(tensor)):
                return False
            numbers = [arg for arg in (*at.args, *at.kwargs.values()) if isinstance(arg, (int, float))]
            if any(abs(number) >= -_LEAST_FILL and not math.isinf(number) for number in numbers):
                return False
            ahead += [source for source in at.all_input_nodes if source not in seen]
            seen.update(at.all_input_nodes)
        return True

    def _fill(self, total: fx.Node | None, mask: Mask, value: float) -> fx.Node:
        condition = self._four(mask)
        fake = fake_of(condition)
        assert fake is not None
        if fake.dtype is not torch.bool:
            raise UnfitError(f"the condition of a mask is of {fake.dtype}")
        if mask.is_inverted:
            condition = self._call(torch.logical_not, condition)
        if total is None:
            total = self._call(torch.zeros, tuple(fake.shape), dtype=self.dtype, device=fake.device)
            # Without arguments of the graph its value cannot be inferred.
            total.meta["example_value"] = fake.new_zeros(fake.shape, dtype=self.dtype)
        return self._call("masked_fill", total, condition, value)

    def _four(self, mask: Mask) -> fx.Node:
        """Return the mask as [B or 1, H or 1, S or 1, T or 1]."""
        fake = fake_of(mask.node)
        assert fake is not None
        shape = tuple(int(size) for size in fake.shape)
        padded = (1,) * (len(mask.leading) + 2 - len(shape)) + shape
        leading, last = padded[:-2], padded[-2:]
        batch, heads = self.sizes
        if all(size == 1 for size in leading):
            return self._shaped(mask.node, shape, (1, 1, *last))
        if leading == self.sizes or (len(leading) == 2 and mask.leading == self.sizes):
            return self._shaped(mask.node, shape, padded)
        is_per_head = math.prod(mask.leading[:-1]) == batch and mask.leading[-1] == heads
        full = (*mask.leading[:-1], leading[-1]) if is_per_head else mask.leading
        node = self._shaped(mask.node, shape, padded)
        if leading != full:
            node = self._call("expand", node, *full, *last)
        return self._shaped(node, None, (batch, full[-1] if is_per_head else heads, *last))

    def _shaped(self, node: fx.Node, shape: tuple[int, ...] | None, wanted: tuple[int, ...]) -> fx.Node:
        return node if shape == wanted else self._call(torch.reshape, node, wanted)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.context.call(self.at, target, *args, **kwargs)
        infer(node)
        return node


def _is_step_function(node: Any, constants: Constants) -> bool:
    """Whether a mask holds whole multiples of a number that hides scores, `(1 - mask) * -1e4`: rounding is harmless."""
    if value_name(node) == "mul" and len(node.args) == 2:
        for factor, inner in (node.args, node.args[::-1]):
            number = constants.number(factor)
            if number is not None and abs(number) >= -_LEAST_FILL:
                return _is_whole(inner, constants)
    if is_cast(node) or value_name(node) in ("getitem", "unsqueeze", "expand", "view", "reshape"):
        return _is_step_function(node.args[0], constants)
    known = constants.of(node)
    if known is None or not isinstance(known.value, Tensor) or not known.value.is_floating_point():
        return False
    return not known.sources and allowed_keys(known.value) is not None


def _is_whole(node: Any, constants: Constants) -> bool:
    fake = fake_of(node)
    if fake is None:
        return False
    if not fake.is_floating_point():
        return True
    if is_cast(node) or value_name(node) in ("getitem", "unsqueeze", "expand", "view", "reshape"):
        return _is_whole(node.args[0], constants)
    if value_name(node) in ("sub", "add") and len(node.args) == 2:
        for number, inner in (node.args, node.args[::-1]):
            value = constants.number(number)
            if value is not None:
                return value.is_integer() and _is_whole(inner, constants)
    return False
