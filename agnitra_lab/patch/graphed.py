"""One CUDA graph around a whole call: inputs copied in, one replay, outputs cloned out, or made anew by a last product.

Inductor's own CUDA graphs keep Dynamo's guards and its wrapper in front of every replay, about 1 ms a call for the 249
weights and caches of a 1.1B decoder on an H200 (torch 2.11), nearly as long as the replay itself. Here the drop-in's
own checks are all that stands before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from agnitra_lab.device.graphs import Segments, capture
from agnitra_lab.errors import PatchError
from agnitra_lab.patch.liveness import Liveness
from agnitra_lab.patch.output_strides import OutputStrides, copied
from agnitra_lab.patch.signature import PLAIN

_NUM_WARM_CALLS = 3
_FEW_INPUTS = 2


class GraphedCall:
    """A callable that replays the captured call. The inputs must look like those of the capture (the signature does).

    Args:
        call: takes the input leaves and runs what is to be captured; called a few times first, so state that it
            writes must be restored by the caller.
        leaves: the input leaves; tensors on one CUDA device and plain values.
        liveness: the model's tensors, which the graph reads and writes in place.
        strides: what the results are given.

    Raises:
        PatchError: when the call cannot be captured, with the reason.
    """

    def __init__(
        self, call: Callable[[Sequence[Any]], Any], leaves: Sequence[Any], liveness: Liveness,
        strides: OutputStrides | None = None,
    ) -> None:  # fmt: skip
        _refuse_uncapturable(leaves)
        static = [_same_layout(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._static = [static[index] for index in self._positions]
        kept = list(map(torch.clone, self._static))
        try:
            self._capture(call, static, liveness, strides, has_tail=True)
            if self._graph.tail is not None and not (self._returns_tail and _agree(self(leaves), call(static))):
                self._capture(call, static, liveness, strides, has_tail=False)
            self._graph.replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            torch.cuda.synchronize()
            first_line = (str(error).strip().splitlines() or ["no message"])[0]
            raise PatchError(f"the call cannot be captured: {first_line}") from error
        if not all(map(_same_values, kept, self._static)):
            raise PatchError("the call writes to its inputs, which a replay would do to copies of them")

    def _capture(
        self, call: Callable[[Sequence[Any]], Any], static: Sequence[Any], liveness: Liveness,
        strides: OutputStrides | None, *, has_tail: bool,
    ) -> None:  # fmt: skip
        self._graph, outputs = _captured(lambda: call(static), has_tail=has_tail)
        leaves, self._structure = _pytree.tree_flatten(outputs)
        self._is_single = len(leaves) == 1 and outputs is leaves[0]
        owned = {tensor.untyped_storage().data_ptr() for tensor in liveness.tensors}
        wanted = strides.of(len(leaves)) if strides is not None else [None] * len(leaves)
        storage = self._graph.tail.storage if self._graph.tail is not None else None
        self._results = [_result_of(leaf, layout, owned, storage) for leaf, layout in zip(leaves, wanted, strict=True)]
        self._returns_tail = any(isinstance(result, _OfTail) for result in self._results)

    def __call__(self, given: Sequence[Any]) -> Any:
        """Replay the call on new input leaves."""
        self.load(given)
        return self.replay()

    def load(self, given: Sequence[Any]) -> None:
        """Copy new input leaves to where the graph reads them; nothing that anyone else holds is written."""
        if len(self._positions) > _FEW_INPUTS:
            torch._foreach_copy_(self._static, [given[index] for index in self._positions])
        else:
            for static, index in zip(self._static, self._positions, strict=True):
                static.copy_(given[index])

    def replay(self) -> Any:
        """Run the call on the leaves that were loaded last."""
        self._graph.replay()
        made = self._graph.tail() if self._graph.tail is not None else None
        leaves = [result(made) for result in self._results]
        return leaves[0] if self._is_single else _pytree.tree_unflatten(leaves, self._structure)


@dataclass(frozen=True)
class _AsItIs:
    """A plain value, or a tensor of the model's own."""

    leaf: Any

    def __call__(self, made: Tensor | None) -> Any:
        return self.leaf


@dataclass(frozen=True)
class _Copied:
    """A tensor in the graph's memory, which the next replay overwrites."""

    leaf: Tensor
    strides: tuple[int, ...] | None

    def __call__(self, made: Tensor | None) -> Any:
        return copied(self.leaf, self.strides)


@dataclass(frozen=True)
class _OfTail:
    """A view of what the tail has computed, new memory each time."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self, made: Tensor | None) -> Any:
        assert made is not None
        return made.as_strided(self.shape, self.stride, self.offset)


def _result_of(
    leaf: Any, strides: tuple[int, ...] | None, owned: Collection[int], tail: int | None
) -> _AsItIs | _Copied | _OfTail:
    storage = leaf.untyped_storage().data_ptr() if isinstance(leaf, Tensor) else None
    if storage is None or storage in owned:
        return _AsItIs(leaf)
    if storage == tail and strides is None:
        return _OfTail(leaf.shape, leaf.stride(), leaf.storage_offset())
    return _Copied(leaf, strides)


def _captured(call: Callable[[], Any], *, has_tail: bool) -> tuple[Segments, Any]:
    try:
        return capture(call, num_warm_calls=_NUM_WARM_CALLS, should_cut=True, has_tail=has_tail)
    except RuntimeError:
        # Cutting asks more of a call than capturing does: its ops must go through the dispatcher undisturbed.
        torch.cuda.synchronize()
        return capture(call, num_warm_calls=_NUM_WARM_CALLS)


def _agree(left: Any, right: Any) -> bool:
    pairs = zip(_pytree.tree_leaves(left), _pytree.tree_leaves(right), strict=True)
    return all(_same_values(one, other) for one, other in pairs if isinstance(one, Tensor))


def _refuse_uncapturable(leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.device.type != "cuda":
                raise PatchError(f"an input tensor is on {leaf.device}; a CUDA graph reads CUDA memory alone")
            if torch._debug_has_internal_overlap(leaf) == 1:
                raise PatchError("an input tensor's elements share memory with each other, so it cannot be copied into")
        elif not isinstance(leaf, PLAIN):
            raise PatchError(f"an input is a {type(leaf).__name__}, whose value no guard compares")


def _same_layout(leaf: Tensor) -> Tensor:
    copied = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    return copied.copy_(leaf)


def _same_values(left: Tensor, right: Tensor) -> bool:
    return bool(torch.equal(left.nan_to_num() if left.is_floating_point() else left,
                            right.nan_to_num() if right.is_floating_point() else right))  # fmt: skip
