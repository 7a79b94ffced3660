"""One CUDA graph around a call: inputs copied in, one replay, outputs copied, lent, or made anew by a last product.

Inductor's own CUDA graphs keep Dynamo's guards and its wrapper in front of every replay, about 1 ms a call for the 249
weights and caches of a 1.1B decoder on an H200 (torch 2.11), nearly as long as the replay itself. Here the drop-in's
own checks are all that stands before it.

Large outputs are lent: the call is captured twice, each with memory of its own, and a replay writes to memory that no
caller holds any more. A decoder that returns its grown cache (268 MB, OPT, batch 8) spent 0.28 of 0.98 ms on copies.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from agnitra_lab.device.graphs import Segments, Watched, capture, everywhere
from agnitra_lab.errors import PatchError
from agnitra_lab.patch.liveness import Liveness
from agnitra_lab.patch.output_strides import OutputStrides, copied

_NUM_WARM_CALLS = 3
_FEW_INPUTS = 2
_LEAST_LENT_BYTES = 2**23
"""A copy of as much takes 4 us of an H200, and a launch."""
_Inputs = Mapping[int, tuple[int, torch.dtype]]
"""Address of an input's memory in the graph -> its place in what the call is given, and its dtype."""
_ROOM = 4
"""Times what the first capture took that has to be free for a second one."""


def _nothing() -> None:
    """There is nothing to put back."""


class GraphedCall:
    """A callable that replays the captured call. The inputs must look like those of the capture (the signature does).

    Args:
        call: takes what a call is given and runs what is to be captured; called a few times first.
        given: what the first call is given; its tensors are on one CUDA device.
        liveness: the model's tensors, which the graph reads and writes in place.
        strides: what the results are given.
        written: places in `given` of the tensors that the call writes to.
        restore: puts back what else it writes, after each call that is made here.
        watched: which of its ops a capture sees.

    Raises:
        PatchError: when the call cannot be captured, with the reason.
    """

    def __init__(
        self, call: Callable[[Sequence[Any]], Sequence[Tensor]], given: Sequence[Any], liveness: Liveness,
        strides: OutputStrides | None = None, *, written: Collection[int] = (), restore: Callable[[], None] = _nothing,
        watched: Watched = everywhere,
    ) -> None:  # fmt: skip
        _refuse_uncapturable(given)
        self._call, self._restore, self._watched = call, restore, watched
        self._given = [_same_layout(value) if isinstance(value, Tensor) else value for value in given]
        self._positions = [index for index, value in enumerate(given) if isinstance(value, Tensor)]
        self._static = [self._given[index] for index in self._positions]
        self._written = sorted(written)
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in liveness.tensors}
        self._inputs = {
            self._given[index].untyped_storage().data_ptr(): (index, self._given[index].dtype)
            for index in self._positions
        }
        self._strides = strides
        kept = {index: self._given[index].clone() for index in self._positions}
        self._kept = {index: kept[index] for index in self._written}
        try:
            self._instances = [self._capture(has_tail=True)]
            if self._graph.tail is not None and not (self._instances[0].returns_tail and self._agrees(given)):
                self._instances = [self._capture(has_tail=False)]
            self._graph.replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            torch.cuda.synchronize()
            first_line = (str(error).strip().splitlines() or ["no message"])[0]
            raise PatchError(f"the call cannot be captured: {first_line}") from error
        self._lend()
        self._put_back()
        self._kept = {}
        if not all(_same_values(before, self._given[index]) for index, before in kept.items()):
            raise PatchError("the graph writes to an input that the original leaves as it is")

    @property
    def _graph(self) -> Segments:
        return self._instances[0].graph

    def _capture(self, *, has_tail: bool) -> _Instance:
        before = torch.cuda.memory_reserved()
        graph, outputs = _captured(self._warm_call, has_tail, self._watched)
        num_bytes = torch.cuda.memory_reserved() - before
        return _Instance(graph, outputs, self._owned, self._inputs, self._strides, num_bytes)

    def _warm_call(self) -> Sequence[Tensor]:
        outputs = self._call(self._given)
        if not _is_capturing():
            # A cache that counts its tokens would be full after some calls.
            self._put_back()
        return outputs

    def _put_back(self) -> None:
        # What counts the call's ops does not count these.
        with _disable_current_modes():
            for index, kept in self._kept.items():
                self._given[index].copy_(kept)
            self._restore()

    def _agrees(self, given: Sequence[Any]) -> bool:
        """Whether a replay gives what the call gives."""
        # A result may be an input that was written, and is put back before the second call.
        found = list(map(torch.clone, self(given)))
        self._put_back()
        expected = self._call(self._given)
        is_same = all(map(_same_values, found, expected))
        self._put_back()
        return is_same

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

    def __call__(self, given: Sequence[Any]) -> list[Tensor]:
        """Replay the call on what another one is given."""
        self.load(given)
        return self.replay(given)

    def load(self, given: Sequence[Any]) -> None:
        """Copy new inputs to where the graph reads them; nothing that anyone else holds is written."""
        if len(self._positions) > _FEW_INPUTS:
            torch._foreach_copy_(self._static, [given[index] for index in self._positions])
        else:
            for static, index in zip(self._static, self._positions, strict=True):
                static.copy_(given[index])

    def replay(self, given: Sequence[Any]) -> list[Tensor]:
        """Run the call on the inputs that were loaded last, and write to them what the call writes."""
        instance = next((each for each in self._instances if each.is_free()), None)
        if instance is not None:
            made = instance.replay()
            self._write_back(given)
            return instance.results(made, given)
        # Whoever keeps every result gets new memory each time.
        outputs = self._call(self._given)
        self._write_back(given)
        return self._instances[0].results_of(outputs, given)

    def _write_back(self, given: Sequence[Any]) -> None:
        if self._written:
            places = self._written
            torch._foreach_copy_([given[index] for index in places], [self._given[index] for index in places])


class _Instance:
    """One capture of the call.

    Attributes:
        graph: what replays it.
        returns_tail: whether a result is what the graph's tail makes.
        num_copied_bytes: of results that a caller gets copies of, with their own strides.
        num_bytes: of memory that the capture took.
    """

    def __init__(
        self, graph: Segments, outputs: Sequence[Tensor], owned: Collection[int], inputs: _Inputs,
        strides: OutputStrides | None, num_bytes: int,
    ) -> None:  # fmt: skip
        self.graph = graph
        wanted = strides.of(len(outputs)) if strides is not None else [None] * len(outputs)
        storage = graph.tail.storage if graph.tail is not None else None
        self._results: list[_Result] = [
            _result_of(leaf, layout, owned, inputs, storage) for leaf, layout in zip(outputs, wanted, strict=True)
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

    def replay(self) -> Tensor | None:
        """Run the call; return what its tail made."""
        self.graph.replay()
        return self.graph.tail() if self.graph.tail is not None else None

    def results(self, made: Tensor | None, given: Sequence[Any]) -> list[Tensor]:
        """Return what the caller gets of the replay that made this."""
        return [result(made, given) for result in self._results]

    def results_of(self, outputs: Sequence[Tensor], given: Sequence[Any]) -> list[Tensor]:
        """Return what the caller gets of a call that was not replayed."""
        return [result.of(leaf, given) for result, leaf in zip(self._results, outputs, strict=True)]


@dataclass(frozen=True)
class _AsItIs:
    """A tensor of the model's own."""

    leaf: Tensor

    def __call__(self, made: Tensor | None, given: Sequence[Any]) -> Tensor:
        return self.leaf

    def of(self, leaf: Tensor, given: Sequence[Any]) -> Tensor:
        return leaf


@dataclass(frozen=True)
class _OfInput:
    """An input, or a view of one."""

    index: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self, made: Tensor | None, given: Sequence[Any]) -> Tensor:
        value: Tensor = given[self.index]
        if (self.shape, self.stride, self.offset) == (value.shape, value.stride(), 0):
            return value
        return value.as_strided(self.shape, self.stride, value.storage_offset() + self.offset)

    def of(self, leaf: Tensor, given: Sequence[Any]) -> Tensor:
        return self(None, given)


@dataclass(frozen=True)
class _Copied:
    """A tensor in the graph's memory, which the next replay overwrites."""

    leaf: Tensor
    strides: tuple[int, ...] | None

    def __call__(self, made: Tensor | None, given: Sequence[Any]) -> Tensor:
        return copied(self.leaf, self.strides)

    def of(self, leaf: Tensor, given: Sequence[Any]) -> Tensor:
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

    def __call__(self, made: Tensor | None, given: Sequence[Any]) -> Tensor:
        return self._leaf.detach()

    def of(self, leaf: Tensor, given: Sequence[Any]) -> Tensor:
        return leaf


@dataclass(frozen=True)
class _OfTail:
    """A view of what the tail has computed, new memory each time."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self, made: Tensor | None, given: Sequence[Any]) -> Tensor:
        assert made is not None
        return made.as_strided(self.shape, self.stride, self.offset)

    def of(self, leaf: Tensor, given: Sequence[Any]) -> Tensor:
        return leaf.clone()


_Result = _AsItIs | _OfInput | _Copied | _Lent | _OfTail


def _result_of(
    leaf: Tensor,
    strides: tuple[int, ...] | None,
    owned: Collection[int],
    inputs: _Inputs,
    tail: int | None,
) -> _Result:
    storage, offset = leaf.untyped_storage().data_ptr(), int(leaf.storage_offset())
    if storage in owned:
        return _AsItIs(leaf)
    index, dtype = inputs.get(storage, (None, None))
    if index is not None and leaf.dtype is dtype:
        # The graph's own copies of the inputs have no memory before or behind them.
        return _OfInput(index, leaf.shape, leaf.stride(), offset)
    if storage == tail and strides is None:
        return _OfTail(leaf.shape, leaf.stride(), offset)
    return _Copied(leaf, strides)


def _is_plain_copy(result: _Result) -> TypeGuard[_Copied]:
    return isinstance(result, _Copied) and result.strides is None


def _share_memory(left: Tensor, right: Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def _num_holders(storage: int) -> int:
    return int(torch._C._storage_Use_Count(storage))


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _free_bytes() -> int:
    """Return what captures can still have: free memory of the device, and what torch's allocator holds unused."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + unused


def _captured(
    call: Callable[[], Sequence[Tensor]], has_tail: bool, watched: Watched
) -> tuple[Segments, Sequence[Tensor]]:
    try:
        return capture(call, num_warm_calls=_NUM_WARM_CALLS, should_cut=True, has_tail=has_tail, watched=watched)
    except RuntimeError:
        # Cutting asks more of a call than capturing does: its ops must go through the dispatcher undisturbed.
        torch.cuda.synchronize()
        return capture(call, num_warm_calls=_NUM_WARM_CALLS)


def _refuse_uncapturable(given: Sequence[Any]) -> None:
    for value in given:
        if isinstance(value, Tensor):
            if value.device.type != "cuda":
                raise PatchError(f"an input tensor is on {value.device}; a CUDA graph reads CUDA memory alone")
            if torch._debug_has_internal_overlap(value) == 1:
                raise PatchError("an input tensor's elements share memory with each other, so it cannot be copied into")


def _same_layout(leaf: Tensor) -> Tensor:
    copied = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    return copied.copy_(leaf)


def _same_values(left: Tensor, right: Tensor) -> bool:
    return bool(torch.equal(left.nan_to_num() if left.is_floating_point() else left,
                            right.nan_to_num() if right.is_floating_point() else right))  # fmt: skip
