"""Nested values (lists, tuples, mappings, dataclasses, caches that hold tensors) walked and rebuilt in one way."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch

# Deep enough for a cache of layers of tensors; a bound, because plain objects may refer to anything.
_MAX_DEPTH = 8


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf with its path, in a fixed order; a tensor is a leaf, and so is what holds no tensor."""
    parts = _parts(value)
    if parts is None:
        yield path, value
        return
    for name, part in parts:
        yield from leaves(part, path + name)


def tensors(value: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the tensor leaves with their paths."""
    return [(path, leaf) for path, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Rebuild `value` with every tensor replaced by `change(tensor)`; a tensor met twice is replaced once."""
    return _rebuild(value, change, {})


def _rebuild(item: Any, change: Callable[[torch.Tensor], Any], replaced: dict[int, Any]) -> Any:
    # No closure that calls itself: it would be a cycle that holds every tensor until the collector runs, and timing
    # loops switch the collector off.
    if isinstance(item, torch.Tensor):
        if id(item) not in replaced:
            replaced[id(item)] = change(item)
        return replaced[id(item)]
    parts = _parts(item)
    if parts is None:
        return item
    return _with_parts(item, [_rebuild(part, change, replaced) for _, part in parts])


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if _is_record(value):
        return [(f".{name}", item) for name, item in _attributes(value).items()]
    return None


def _is_record(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (torch.nn.Module, type, ModuleType, FunctionType, str, bytes, int, float, torch.dtype)):
        return False
    if dataclasses.is_dataclass(value):
        return True
    return depth < _MAX_DEPTH and any(_holds_tensor(item, depth + 1) for item in _attributes(value).values())


def _holds_tensor(value: Any, depth: int) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if depth >= _MAX_DEPTH:
        return False
    if isinstance(value, Mapping):
        return any(_holds_tensor(item, depth + 1) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(item, depth + 1) for item in value)
    return _is_record(value, depth)


def _attributes(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return getattr(value, "__dict__", {})


def _with_parts(value: Any, parts: list[Any]) -> Any:
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
    for name, part in zip(_attributes(value), parts, strict=True):
        object.__setattr__(rebuilt, name, part)
    return rebuilt
