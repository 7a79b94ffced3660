"""What a caller gets of a compiled call's result: memory of its own, with the strides of the original's result.

Where Python runs between compiled graphs, the result holds what their CUDA graphs overwrite at the next call, wherever
its containers keep that. Those places are known from the first call: to look for the tensors in a decoder's cache took
longer than to copy them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agnitra_lab.graph.tree import attributes_of, parts_of, put_parts, tensors
from agnitra_lab.patch.layouts import is_dense
from agnitra_lab.patch.output_strides import OutputStrides, copied
from agnitra_lab.patch.signature import PLAIN

_FEW = 2
"""Copies for which one launch each is as good as one for all."""


class Returned:
    """Makes what a caller gets of what a compiled call returned.

    Args:
        outputs: what the first call returned.
        strides: what its tensors are given.
        is_overwritten: of each tensor, whether the next call writes to its memory; None where none is.

    Attributes:
        strides: as given.
    """

    def __init__(self, outputs: Any, strides: OutputStrides, is_overwritten: Sequence[bool] | None) -> None:
        wanted = strides.of(len(tensors(outputs)))
        overwritten = [False] * len(wanted) if is_overwritten is None else is_overwritten
        self.strides = strides
        self._places = Places(outputs)
        self._num_tensors = len(wanted)
        self._is_graphed = is_overwritten is not None
        self._restrided = [(index, layout) for index, layout in enumerate(wanted) if layout is not None]
        self._cloned = [index for index, is_so in enumerate(overwritten) if is_so and wanted[index] is None]

    def __bool__(self) -> bool:
        return bool(self._is_graphed or self._restrided)

    def __call__(self, outputs: Any) -> Any:
        """Put copies where they belong, in the very lists, mappings and objects; tuples alone are made anew."""
        found = self._places.read(outputs)
        if found is not None:
            return self._places.put(outputs, self._made_of(found))
        # Python between the graphs may return more at one call than at another.
        found = [tensor for _, tensor in tensors(outputs)]
        return Places(outputs).put(outputs, self._made_of(found))

    def _made_of(self, found: Sequence[Tensor]) -> list[Tensor]:
        made: dict[int, Tensor] = {}
        cloned: Sequence[int] = self._cloned
        if len(found) == self._num_tensors:
            made = {id(found[index]): copied(found[index], layout) for index, layout in self._restrided}
        else:
            cloned = range(len(found)) if self._is_graphed else ()
        leaves = {id(found[index]): found[index] for index in cloned if id(found[index]) not in made}
        made.update(zip(leaves, _clones(list(leaves.values())), strict=True))
        return [made.get(id(tensor), tensor) for tensor in found]


class Places:
    """Where the tensors of a value are, in the order of `graph.tree.tensors`.

    Args:
        value: lists, mappings and objects that hold tensors.
    """

    def __init__(self, value: Any) -> None:
        self._root = _place_of(value, frozenset())

    def read(self, value: Any) -> list[Tensor] | None:
        """Return the tensors of a value that is built alike, None for another one."""
        found: list[Tensor] = []
        return found if self._root.read(value, found) else None

    def put(self, value: Any, made: Sequence[Tensor]) -> Any:
        """Put these tensors in the places of those that were read, and return the value.

        Lists, mappings and objects are the same ones after that: a caller's own cache stays that cache.
        """
        return self._root.put(value, iter(made))


class _Place:
    """A part of a value.

    Attributes:
        holds_tensors: whether it is one, or holds some.
    """

    holds_tensors = False

    def read(self, item: Any, found: list[Tensor]) -> bool:
        """Append the tensors of an item to a list; return whether it is built like the first one."""
        return isinstance(item, PLAIN) or (not isinstance(item, Tensor) and parts_of(item) is None)

    def put(self, item: Any, made: Iterator[Tensor]) -> Any:
        """Return what stands for the item."""
        return item


class _TensorPlace(_Place):
    holds_tensors = True

    def read(self, item: Any, found: list[Tensor]) -> bool:
        if not isinstance(item, Tensor):
            return False
        found.append(item)
        return True

    def put(self, item: Any, made: Iterator[Tensor]) -> Any:
        return next(made)


class _BackReference(_Place):
    """An object that holds this place."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def read(self, item: Any, found: list[Tensor]) -> bool:
        return type(item) is self._kind


class _Container(_Place):
    def __init__(self, value: Any, above: frozenset[int]) -> None:
        self._kind = type(value)
        self._split = _splitter_of(value)
        self._keys, parts = self._split(value)
        self._inner = [_place_of(part, above | {id(value)}) for part in parts]
        self.holds_tensors = any(place.holds_tensors for place in self._inner)

    def read(self, item: Any, found: list[Tensor]) -> bool:
        if type(item) is not self._kind:
            return False
        keys, parts = self._split(item)
        if keys != self._keys:
            return False
        return all(place.read(part, found) for place, part in zip(self._inner, parts, strict=True))

    def put(self, item: Any, made: Iterator[Tensor]) -> Any:
        if not self.holds_tensors:
            return item
        parts = self._split(item)[1]
        return put_parts(item, parts, [place.put(part, made) for place, part in zip(self._inner, parts, strict=True)])


def _place_of(value: Any, above: frozenset[int]) -> _Place:
    if isinstance(value, Tensor):
        return _TensorPlace()
    if id(value) in above:
        return _BackReference(type(value))
    return _Place() if parts_of(value) is None else _Container(value, above)


def _splitter_of(value: Any) -> Callable[[Any], tuple[Any, Sequence[Any]]]:
    if isinstance(value, Mapping):
        return _split_mapping
    return _split_sequence if isinstance(value, (list, tuple)) else _split_record


def _split_mapping(value: Mapping[Any, Any]) -> tuple[tuple[Any, ...], list[Any]]:
    return tuple(value), list(value.values())


def _split_sequence(value: Sequence[Any]) -> tuple[int, Sequence[Any]]:
    return len(value), value


def _split_record(value: Any) -> tuple[tuple[str, ...], list[Any]]:
    table = attributes_of(value)
    return tuple(table), list(table.values())


def _clones(found: Sequence[Tensor]) -> list[Tensor]:
    """Return copies in memory of their own, with their strides where nothing lies between their elements."""
    if len(found) <= _FEW or not all(map(_is_simple, found)):
        return [tensor.clone() for tensor in found]
    made = [torch.empty_like(tensor) for tensor in found]
    torch._foreach_copy_(made, list(found))
    return made


def _is_simple(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and is_dense(tensor)
