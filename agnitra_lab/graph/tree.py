"""What calls take and give: nested lists, tuples, mappings, dataclasses and caches that hold tensors, in one way.

A cache is a plain object, such as those that transformers' decoders are given: it holds tensors, or lists and mappings
that may hold some after the next call.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch

# Deep enough for a cache of layers of tensors; a bound, because plain objects may refer to anything.
_MAX_DEPTH = 8


def leaves(value: Any, path: str = "", above: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Yield every leaf with its path, in a fixed order; a tensor is a leaf, and so is what holds no tensor.

    Args:
        value: what is walked; an object that refers back to one that holds it is a leaf there.
        path: of the value.
        above: the objects that hold it.
    """
    parts = parts_of(value) if id(value) not in above else None
    if parts is None:
        yield path, value
        return
    for name, part in parts:
        yield from leaves(part, path + name, above | {id(value)})


def tensors(value: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the tensor leaves with their paths."""
    return [(path, leaf) for path, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


ADDRESS_MARK = "_dynamo_static_input_type"
"""Attribute of tensors whose address Dynamo may rely on: it sets it on a model's, `mark_static_address` on any."""


def span_of(tensor: torch.Tensor) -> int:
    """Return how many elements a strided tensor's memory reaches over, from its first to its last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def writable_tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors that a call may write to and that can be put back, each once.

    None whose elements share memory, as expanded ones do, nor sparse, nested, quantised or meta tensors.
    """
    unique = {id(tensor): tensor for _, tensor in tensors(value)}.values()
    return [tensor for tensor in unique if is_plain(tensor) and torch._debug_has_internal_overlap(tensor) != 1]


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is numbers in strided memory: not sparse, nested, quantised or meta."""
    is_odd = tensor.is_nested or tensor.is_quantized or tensor.is_meta
    return tensor.layout is torch.strided and not is_odd


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Rebuild `value` with every tensor replaced by `change(tensor)`; a tensor met twice is replaced once."""
    return _rebuild(value, change, {}, {})


def put_parts(value: Any, old: Sequence[Any], new: Sequence[Any]) -> Any:
    """Put new parts for the old ones into a list, mapping or object; a tuple is made anew where they differ."""
    if all(ours is theirs for ours, theirs in zip(new, old, strict=True)):
        return value
    if isinstance(value, list):
        value[:] = new
    elif isinstance(value, dict):
        for key, part in zip(list(value), new, strict=True):
            value[key] = part
    elif isinstance(value, (tuple, Mapping)):
        return with_parts(value, list(new))
    else:
        for name, part in zip(attributes_of(value), new, strict=True):
            set_attribute(value, name, part)
    return value


class Containers:
    """Lists, mappings and objects as they are now: which tensors and numbers each holds.

    Args:
        value: what is walked.
    """

    def __init__(self, value: Any) -> None:
        self._kept: list[tuple[Any, Any]] = []
        waiting, seen = [value], set()
        while waiting:
            item = waiting.pop()
            parts = parts_of(item)
            if parts is None or id(item) in seen:
                continue
            seen.add(id(item))
            waiting.extend(part for _, part in parts)
            if isinstance(item, (list, dict)):
                self._kept.append((item, copy.copy(item)))
            elif hasattr(item, "__dict__"):
                self._kept.append((item.__dict__, dict(item.__dict__)))

    def restore(self) -> None:
        """Put back into each what it held."""
        for item, before in self._kept:
            if isinstance(item, list):
                item[:] = before
            elif item.keys() != before.keys() or any(item[name] is not before[name] for name in before):
                item.clear()
                item.update(before)


@contextmanager
def untouched(value: Any) -> Iterator[None]:
    """Put back what a block does to the tensors of a value, and to the containers that hold them.

    For inputs that nobody is given: code that was compiled for them may write to them whatever it is called with.
    """
    containers = Containers(value)
    kept = [(tensor, tensor.detach().clone()) for tensor in writable_tensors(value)]
    try:
        yield
    finally:
        containers.restore()
        for tensor, before in kept:
            # By value, because compiled code writes past the version counter.
            if not torch.equal(tensor, before):
                put_back(tensor, before)


def put_back(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Write values into a tensor, whatever is known of it to autograd."""
    # Leaving inference mode turns gradients on, and a leaf that requires them takes no write then.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(values)


def _rebuild(item: Any, change: Callable[[torch.Tensor], Any], replaced: dict[int, Any], made: dict[int, Any]) -> Any:
    # No closure that calls itself: it would be a cycle that holds every tensor until the collector runs, and timing
    # loops switch the collector off.
    if isinstance(item, torch.Tensor):
        if id(item) not in replaced:
            replaced[id(item)] = change(item)
        return replaced[id(item)]
    if id(item) in made:
        return made[id(item)]
    parts = parts_of(item)
    if parts is None:
        return item
    # What refers back to it meanwhile keeps what it has.
    made[id(item)] = item
    made[id(item)] = with_parts(item, [_rebuild(part, change, replaced, made) for _, part in parts])
    return made[id(item)]


def parts_of(value: Any) -> list[tuple[str, Any]] | None:
    """Return what a container holds, with the end of each part's path; None for a leaf."""
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if is_record(value):
        return [(f".{name}", item) for name, item in attributes_of(value).items()]
    return None


def is_record(value: Any, depth: int = 0) -> bool:
    """Whether an object is walked into: a dataclass, or one that holds tensors or may come to hold some."""
    if isinstance(value, (torch.nn.Module, type, ModuleType, FunctionType, str, bytes, int, float, torch.dtype)):
        return False
    if dataclasses.is_dataclass(value):
        return True
    parts = attributes_of(value).values() if depth < _MAX_DEPTH else ()
    return any(_holds_tensor(item, depth + 1) or _may_be_filled(item) for item in parts)


def _may_be_filled(value: Any) -> bool:
    """Whether a container is empty now: an empty cache is one too."""
    return type(value) in (list, dict) and not value


def _holds_tensor(value: Any, depth: int) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if depth >= _MAX_DEPTH:
        return False
    if isinstance(value, Mapping):
        return any(_holds_tensor(item, depth + 1) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(item, depth + 1) for item in value)
    return is_record(value, depth)


def attributes_of(value: Any) -> dict[str, Any]:
    """Return what a record holds, by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return getattr(value, "__dict__", {})


def with_parts(value: Any, parts: list[Any]) -> Any:
    """Return a container like `value` that holds these parts, in the order of `parts_of`."""
    if isinstance(value, tuple):
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, list):
        return type(value)(parts)
    if isinstance(value, Mapping):
        if not isinstance(value, dict):
            return dict(zip(value, parts, strict=True))
        rebuilt = copy.copy(value)
        for key, part in zip(list(value), parts, strict=True):
            rebuilt[key] = part
        return rebuilt
    rebuilt = copy.copy(value)
    for name, part in zip(attributes_of(value), parts, strict=True):
        set_attribute(rebuilt, name, part)
    return rebuilt


def set_attribute(value: Any, name: str, part: Any) -> None:
    """Put a part into a record, past what its class makes of that: a frozen dataclass, a property of the same name."""
    table = getattr(value, "__dict__", {})
    if name in table:
        table[name] = part
    else:
        object.__setattr__(value, name, part)
