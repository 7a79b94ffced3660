"""The two ends of a call as flat lists: what it is given, and the tensors that it returns.

A compiled graph and a CUDA graph know tensors in an order; arguments and results are lists, mappings, dataclasses and
caches that hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor

from agnitra_lab.errors import PatchError
from agnitra_lab.graph.tree import map_tensors, parts_of, set_attribute, span_of, tensors, with_parts
from agnitra_lab.patch.signature import PLAIN, looks_inside

_Getter = Callable[[Any], Any]
_Reader = Callable[[Any, list[Any]], None]
_Maker = Callable[[Sequence[Tensor], Sequence[Any]], Any]
_DEPTH_OF_ARGUMENTS = 2


class Arguments:
    """The tensors of a call's arguments, positional ones first, and the lists, mappings and caches that hold them.

    Args:
        args: positional arguments of one call; those of others must match its signature.
        kwargs: keyword arguments.

    Raises:
        PatchError: for an argument that a signature tells from another by its type alone.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        root = (args, dict(kwargs))
        self._read = _reader(root, frozenset())
        self._make = _maker(root, {id(tensor): index for index, (_, tensor) in enumerate(tensors(root))}, {})

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return those of a call whose arguments match the signature."""
        found: list[Any] = []
        self._read((args, kwargs), found)
        return found

    def rebuilt(self, given: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments like the first call's that hold the tensors of `given`."""
        args, kwargs = self._make([value for value in given if isinstance(value, Tensor)], given)
        return args, kwargs


@dataclass(frozen=True)
class Change:
    """What a call does to a list, mapping or cache that it is given, beside writing to its tensors.

    Attributes:
        index: its place in what the call is given.
        parts: what it puts there, by key.
        gone: keys that it takes away.
    """

    index: int
    parts: Mapping[Any, Any]
    gone: tuple[Any, ...]


def held(given: Sequence[Any]) -> list[dict[Any, Any] | None]:
    """Return what each container among these holds, by key; None for a tensor."""
    return [None if isinstance(value, Tensor) else _by_key(value) for value in given]


def changes(before: Sequence[dict[Any, Any] | None], given: Sequence[Any]) -> list[Change]:
    """Return what was changed since `held`."""
    found = []
    for index, (old, value) in enumerate(zip(before, given, strict=True)):
        if old is None:
            continue
        now = _by_key(value)
        parts = {key: part for key, part in now.items() if key not in old or not _is_same(old[key], part)}
        gone = tuple(key for key in old if key not in now)
        if parts or gone:
            found.append(Change(index, parts, gone))
    return found


def flat(result: Any, changed: Sequence[Change]) -> list[Tensor]:
    """Return the tensors of a call's result, and then those that it puts into what it was given."""
    return [tensor for _, tensor in tensors([result, [list(change.parts.values()) for change in changed]])]


class Result:
    """How a call's result is put together from tensors, in lists, mappings and objects as the first call's.

    Args:
        result: what the first call returned.
        given: what it was given; a cache that is returned is that cache.
        changed: what it did to that.

    Raises:
        PatchError: when it holds something that each call would have to make anew.
    """

    def __init__(self, result: Any, given: Sequence[Any], changed: Sequence[Change] = ()) -> None:
        objects = {id(value): index for index, value in enumerate(given) if not isinstance(value, Tensor)}
        slots = {id(tensor): index for index, tensor in enumerate(flat(result, changed))}
        self._make = _maker(result, slots, objects)
        self._changes = [
            (change, {key: _maker(part, slots, objects) for key, part in change.parts.items()}) for change in changed
        ]

    def __call__(self, made: Sequence[Tensor], given: Sequence[Any]) -> Any:
        """Return the result of a call, and do to what it was given what the call does.

        Args:
            made: its tensors, as `flat` orders them.
            given: what it was given.
        """
        for change, makers in self._changes:
            _put(given[change.index], {key: make(made, given) for key, make in makers.items()}, change.gone)
        return self._make(made, given)


class Ends:
    """What a call is given and returns.

    Attributes:
        arguments: reads what it is given.
        result: puts together what it returns.
        written: places, in what it is given, of the tensors that it writes to.
    """

    def __init__(self, arguments: Arguments, given: Sequence[Any], result: Result, written: Collection[int]) -> None:
        """Keep the sizes of what the first call was given, and none of it."""
        self.arguments, self.result, self.written = arguments, result, sorted(written)
        self._pieces = [
            (index, span_of(value) * value.element_size(), index in written)
            for index, value in enumerate(given)
            if isinstance(value, Tensor)
        ]

    def are_apart(self, given: Sequence[Any]) -> bool:
        """Whether no tensor that the call writes to lies in the memory of another input.

        A graph has memory of its own for each of them; what is written to one would not be seen in the other.
        """
        if not self.written:
            return True
        return are_apart((given[index].data_ptr(), size, is_written) for index, size, is_written in self._pieces)


def are_apart(spans: Iterable[tuple[int, int, bool]]) -> bool:
    """Whether none of these pieces of memory that are written reaches into another piece.

    Args:
        spans: address, bytes, and whether it is written.
    """
    end, was_written = 0, False
    for address, num_bytes, is_written in sorted(spans):
        if address < end and (is_written or was_written):
            return False
        if address + num_bytes > end:
            end, was_written = address + num_bytes, is_written
    return True


def _by_key(value: Any) -> dict[Any, Any]:
    if isinstance(value, list):
        return dict(enumerate(value))
    return dict(value) if isinstance(value, Mapping) else dict(vars(value))


def _is_same(old: Any, new: Any) -> bool:
    return old is new or (isinstance(old, PLAIN) and type(old) is type(new) and bool(old == new))


def _put(value: Any, parts: Mapping[Any, Any], gone: Sequence[Any]) -> None:
    if isinstance(value, list):
        kept = {**dict(enumerate(value)), **parts}
        value[:] = [kept[index] for index in sorted(kept) if index not in gone]
    elif isinstance(value, MutableMapping):
        for key in gone:
            del value[key]
        value.update(parts)
    else:
        for key in gone:
            object.__delattr__(value, key)
        for key, part in parts.items():
            set_attribute(value, key, part)


def _reader(value: Any, above: frozenset[int]) -> _Reader:
    """Return what appends the tensors and containers in a value like this one to a list.

    The paths are known from the first call: looking for tensors in a cache of 22 layers would take longer than the
    launch of the call.
    """
    if isinstance(value, Tensor):
        return _append
    inner = parts_of(value) if id(value) not in above and looks_inside(value) else None
    if inner is None:
        if not isinstance(value, PLAIN):
            raise PatchError(f"an input is a {type(value).__name__}, whose value no guard compares")
        return _nothing
    readers = [(get, _reader(part, above | {id(value)})) for get, (_, part) in zip(_getters(value), inner, strict=True)]
    readers = [(get, read) for get, read in readers if read is not _nothing]
    # The tuple and the mapping that arguments come in are each call's own, and a tuple is as good as an equal one.
    is_kept = len(above) >= _DEPTH_OF_ARGUMENTS and not isinstance(value, tuple)
    if not readers and not is_kept:
        return _nothing

    def read(item: Any, found: list[Any]) -> None:
        if is_kept:
            found.append(item)
        for get, inner_read in readers:
            inner_read(get(item), found)

    return read


def _append(item: Any, found: list[Any]) -> None:
    found.append(item)


def _nothing(item: Any, found: list[Any]) -> None:
    """Read nothing."""


def _getters(value: Any) -> list[_Getter]:
    if isinstance(value, Mapping):
        return [itemgetter(key) for key in value]
    if isinstance(value, (list, tuple)):
        return [itemgetter(index) for index in range(len(value))]
    # Not by getattr: a property may have the name of an attribute.
    names = [name.removeprefix(".") for name, _ in parts_of(value) or ()]
    return [lambda item, name=name: item.__dict__[name] for name in names]  # type: ignore[misc]


def _maker(
    value: Any, slots: Mapping[int, int], objects: Mapping[int, int], above: frozenset[int] = frozenset()
) -> _Maker:
    """Return what makes a value like this one from other tensors; lists, mappings and records are new ones."""
    if id(value) in objects:
        index = objects[id(value)]
        return lambda made, given: given[index]
    if isinstance(value, Tensor):
        slot = slots[id(value)]
        return lambda made, given: made[slot]
    inner = parts_of(value) if id(value) not in above else None
    if inner is None:
        if not isinstance(value, PLAIN):
            raise PatchError(f"the result holds a {type(value).__name__}, which each call would have to make anew")
        return lambda made, given: value
    makers = [_maker(part, slots, objects, above | {id(value)}) for _, part in inner]
    # Without the first call's tensors, which nobody needs any more.
    empty = map_tensors(value, lambda tensor: tensor.new_empty(0))
    return lambda made, given: with_parts(empty, [make(made, given) for make in makers])
