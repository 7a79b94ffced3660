"""One CUDA graph around a call: inputs copied in, one replay, outputs copied, lent, or made anew by a last product.

Inductor's own CUDA graphs keep Dynamo's guards and its wrapper in front of every replay, about 1 ms a call for the 249
weights and caches of a 1.1B decoder on an H200 (torch 2.11), nearly as long as the replay itself. Here the drop-in's
own checks are all that stands before it.

Large outputs are lent: the call is captured twice, each with memory of its own, and a replay writes to memory that no
caller holds any more. A decoder that returns its grown cache (268 MB, OPT, batch 8) spent 0.28 of 0.98 ms on copies.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

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
_LEAST_LENT_BYTES = 2**23
"""A copy of as much takes 4 us of an H200, and a launch."""
_ROOM = 4
"""Times what the first capture took that has to be free for a second one."""


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
        self._call, self._leaves = call, [_same_layout(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._static = [self._leaves[index] for index in self._positions]
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in liveness.tensors}
        self._strides = strides
        kept = list(map(torch.clone, self._static))
        try:
            self._instances = [self._capture(has_tail=True)]
            if self._graph.tail is not None and not (
                self._instances[0].returns_tail and _agree(self(leaves), call(self._leaves))
            ):
                self._instances = [self._capture(has_tail=False)]
            self._graph.replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            torch.cuda.synchronize()
            first_line = (str(error).strip().splitlines() or ["no message"])[0]
            raise PatchError(f"the call cannot be captured: {first_line}") from error
        self._lend()
        if not all(map(_same_values, kept, self._static)):
            raise PatchError("the call writes to its inputs, which a replay would do to copies of them")

    @property
    def _graph(self) -> Segments:
        return self._instances[0].graph

    def _capture(self, *, has_tail: bool) -> _Instance:
        before = torch.cuda.memory_reserved()
        graph, outputs = _captured(lambda: self._call(self._leaves), has_tail=has_tail)
        return _Instance(graph, outputs, self._owned, self._strides, torch.cuda.memory_reserved() - before)

    def _lend(self) -> None:
        """Capture the call once more, where its results are worth lending and there is room for a second set."""
        first = self._instances[0]
        if first.num_copied_bytes < _LEAST_LENT_BYTES or _free_bytes() < _ROOM * first.num_bytes:
            return
        try:
            second = self._capture(has_tail=first.graph.tail is not None)
            second.graph.replay()
            torch.cuda.synchronize()
        except RuntimeError:
            # What one capture can do without, two can: results are copied.
            torch.cuda.synchronize()
            return
        if second.returns_tail == first.returns_tail:
            # A view that some cycle still holds would be taken for the graph's own.
            gc.collect()
            first.lend_what_differs_from(second)
            self._instances.append(second)

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
        for instance in self._instances:
            if instance.is_free():
                return instance.replay()
        # Whoever keeps every result gets new memory each time.
        return self._instances[0].results_of(self._call(self._leaves))


class _Instance:
    """One capture of the call.

    Attributes:
        graph: what replays it.
        returns_tail: whether a result is what the graph's tail makes.
        num_copied_bytes: of results that a caller gets copies of, with their own strides.
        num_bytes: of memory that the capture took.
    """

    def __init__(
        self, graph: Segments, outputs: Any, owned: Collection[int], strides: OutputStrides | None, num_bytes: int
    ) -> None:
        self.graph = graph
        leaves, self._structure = _pytree.tree_flatten(outputs)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise PatchError(f"the result holds a {type(leaf).__name__}, which each call would have to make anew")
        self._is_single = len(leaves) == 1 and outputs is leaves[0]
        num_tensors = sum(isinstance(leaf, Tensor) for leaf in leaves)
        of_tensors = iter(strides.of(num_tensors) if strides is not None else [None] * num_tensors)
        wanted = [next(of_tensors) if isinstance(leaf, Tensor) else None for leaf in leaves]
        storage = graph.tail.storage if graph.tail is not None else None
        self._results: list[_Result] = [
            _result_of(leaf, layout, owned, storage) for leaf, layout in zip(leaves, wanted, strict=True)
        ]
        self._lent: list[_Lent] = []
        self.returns_tail = any(isinstance(result, _OfTail) for result in self._results)
        self.num_copied_bytes = sum(
            result.leaf.numel() * result.leaf.element_size() for result in self._results if _is_plain_copy(result)
        )
        self.num_bytes = num_bytes

    def lend_what_differs_from(self, other: _Instance) -> None:
        """Let both give out their results as they are from now on, instead of copies.

        Memory that two captures share is an input's or a constant's: of that there are copies as before.
        """
        for index, pair in enumerate(zip(self._results, other._results, strict=True)):
            mine, theirs = pair
            if _is_plain_copy(mine) and _is_plain_copy(theirs) and not _share_memory(mine.leaf, theirs.leaf):
                self._results[index], other._results[index] = _Lent(mine.leaf), _Lent(theirs.leaf)
        for instance in (self, other):
            instance._lent = [result for result in instance._results if isinstance(result, _Lent)]

    def is_free(self) -> bool:
        """Whether no caller holds a result that was lent."""
        return all(result.is_free() for result in self._lent)

    def replay(self) -> Any:
        """Run the call, and return what its caller gets."""
        self.graph.replay()
        made = self.graph.tail() if self.graph.tail is not None else None
        return self._arranged([result(made) for result in self._results])

    def results_of(self, outputs: Any) -> Any:
        """Return what the caller gets of a call that was not replayed."""
        leaves = _pytree.tree_leaves(outputs)
        return self._arranged([result.of(leaf) for result, leaf in zip(self._results, leaves, strict=True)])

    def _arranged(self, leaves: list[Any]) -> Any:
        return leaves[0] if self._is_single else _pytree.tree_unflatten(leaves, self._structure)


@dataclass(frozen=True)
class _AsItIs:
    """A plain value, or a tensor of the model's own."""

    leaf: Any

    def __call__(self, made: Tensor | None) -> Any:
        return self.leaf

    def of(self, leaf: Any) -> Any:
        return leaf


@dataclass(frozen=True)
class _Copied:
    """A tensor in the graph's memory, which the next replay overwrites."""

    leaf: Tensor
    strides: tuple[int, ...] | None

    def __call__(self, made: Tensor | None) -> Any:
        return copied(self.leaf, self.strides)

    def of(self, leaf: Tensor) -> Tensor:
        return copied(leaf, self.strides)


class _Lent:
    """A tensor in the graph's memory that callers are given: it is not written while one of them holds any view of it.

    Whoever reads it on another stream has to wait for that before letting go, as for all memory of torch's.
    """

    def __init__(self, leaf: Tensor) -> None:
        self._leaf = leaf
        self._storage: int = leaf.untyped_storage()._cdata
        self._num_bytes = leaf.untyped_storage().nbytes()
        self._num_own = _num_holders(self._storage)

    def is_free(self) -> bool:
        """Whether nobody else holds its memory, and nobody has taken that away."""
        return _num_holders(self._storage) <= self._num_own and self._leaf.untyped_storage().nbytes() == self._num_bytes

    def __call__(self, made: Tensor | None) -> Any:
        return self._leaf.detach()

    def of(self, leaf: Tensor) -> Tensor:
        return leaf


@dataclass(frozen=True)
class _OfTail:
    """A view of what the tail has computed, new memory each time."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self, made: Tensor | None) -> Any:
        assert made is not None
        return made.as_strided(self.shape, self.stride, self.offset)

    def of(self, leaf: Tensor) -> Tensor:
        return leaf.clone()


_Result = _AsItIs | _Copied | _Lent | _OfTail


def _result_of(leaf: Any, strides: tuple[int, ...] | None, owned: Collection[int], tail: int | None) -> _Result:
    storage = leaf.untyped_storage().data_ptr() if isinstance(leaf, Tensor) else None
    if storage is None or storage in owned:
        return _AsItIs(leaf)
    if storage == tail and strides is None:
        return _OfTail(leaf.shape, leaf.stride(), leaf.storage_offset())
    return _Copied(leaf, strides)


def _is_plain_copy(result: _Result) -> TypeGuard[_Copied]:
    return isinstance(result, _Copied) and result.strides is None


def _share_memory(left: Tensor, right: Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def _num_holders(storage: int) -> int:
    return int(torch._C._storage_Use_Count(storage))


def _free_bytes() -> int:
    """Return what captures can still have: free memory of the device, and what torch's allocator holds unused."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + unused


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
