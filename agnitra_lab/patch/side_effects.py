"""What a call does beside computing: lists, mappings and objects that its hooks and its functions reach, and change.

A path past Dynamo runs no Python of the model. A hook that keeps each activation in somebody's list would stop doing
so, and nothing would say that. Hooks that hand on what the result holds, as those of transformers' models do, change
nothing.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

_DEPTH = 3
_MAX_REACHED, _MOST_PARTS = 1000, 10_000
"""Objects that are looked at, and values of one of them; of a longer list it is the length."""
_CONTAINERS = (list, dict, set, deque)
_OPAQUE = (nn.Module, Tensor, types.ModuleType, type, str, bytes, bool, int, float, complex, type(None))


class Reached:
    """Everything that is reached, as it is now.

    Args:
        model: a module, or what is called in its place.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        functions = list(_functions_of(model))
        # Cells hold what an inner function rebinds, such as a counter.
        self._cells = [cell for function in functions for cell in _cells_of(function)]
        self._contents = list(map(_content, self._cells))
        self._held: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        waiting = [(value, 0) for function in functions for value in _values_of(function)]
        while waiting and len(seen) < _MAX_REACHED:
            value, depth = waiting.pop()
            if id(value) in seen or not _is_kept(value):
                continue
            seen.add(id(value))
            parts = _parts_of(value)
            self._held.append((value, parts))
            if depth < _DEPTH:
                waiting += [(part, depth + 1) for part in parts]

    def has_changed(self) -> bool:
        """Whether any of it holds something else than it did."""
        contents = list(map(_content, self._cells))
        return any(new is not old for new, old in zip(contents, self._contents, strict=True)) or any(
            not _are_same(_parts_of(value), parts) for value, parts in self._held
        )


def _functions_of(model: Callable[..., Any]) -> Iterator[Any]:
    if not isinstance(model, nn.Module):
        yield model
        return
    classes: dict[type, None] = {}
    for module in model.modules():
        classes[type(module)] = None
        # Set on the instance, in the place of the class's.
        if "forward" in vars(module):
            yield vars(module)["forward"]
        yield from (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    everywhere = nn.modules.module
    yield from (*everywhere._global_forward_hooks.values(), *everywhere._global_forward_pre_hooks.values())
    for kind in classes:
        if kind.__module__.partition(".")[0] != "torch":
            # Not by the class's own lookup, which TorchScript has changed.
            yield inspect.getattr_static(kind, "forward")


def _cells_of(function: Any) -> Iterable[types.CellType]:
    plain = _plain_function(function)
    return plain.__closure__ or () if plain is not None else ()


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _values_of(function: Any) -> Iterator[Any]:
    if isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values())
        yield from _values_of(function.func)
        return
    if isinstance(function, types.MethodType):
        yield function.__self__
    plain = _plain_function(function)
    if plain is None:
        yield function
        return
    yield from map(_content, plain.__closure__ or ())
    for name in plain.__code__.co_names:
        value = plain.__globals__.get(name)
        # Objects of a file, such as its logger, are everybody's.
        if isinstance(value, _CONTAINERS):
            yield value


def _plain_function(function: Any) -> types.FunctionType | None:
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, (types.MethodType, staticmethod, classmethod)):
        function = function.__func__
    return function if isinstance(function, types.FunctionType) else None


def _is_kept(value: Any) -> bool:
    if isinstance(value, _CONTAINERS):
        return True
    return not isinstance(value, (*_OPAQUE, types.FunctionType, types.MethodType)) and hasattr(value, "__dict__")


def _parts_of(value: Any) -> list[Any]:
    if isinstance(value, _CONTAINERS) and len(value) > _MOST_PARTS:
        return [len(value)]
    if isinstance(value, dict):
        return [part for pair in list(value.items()) for part in pair]
    return list(value) if isinstance(value, _CONTAINERS) else [part for pair in vars(value).items() for part in pair]


def _are_same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        new is old or (isinstance(old, (bool, int, float, str)) and type(new) is type(old) and new == old)
        for new, old in zip(left, right, strict=True)
    )
