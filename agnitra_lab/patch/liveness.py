"""Whether a model is still what was compiled: the same tensors in the same memory, the same settings around them.

A compiled call that goes past Dynamo's guards has only this between it and a stale answer, so it looks at everything
that such a call bakes in: each parameter, buffer and tensor attribute, each plain attribute (numbers, strings, flags,
functions) of the modules and of the settings that hang on them (a configuration object, a dictionary, a list), hooks,
autocast, and what torch's own global guard looks at.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from agnitra_lab.patch.dict_watch import DictWatch
from agnitra_lab.patch.stamps import same_addresses

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_BEHAVIOUR = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)
_NO_SETTINGS = (nn.Module, Tensor, types.ModuleType, *_BEHAVIOUR)
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
# What these compute depends on no attribute but their parameters and children.
_WITHOUT_SETTINGS = (nn.Linear, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.Sequential)
_Slot = tuple[dict[Any, Any], Any, Any]
"""A dictionary, a key of it, and its value there."""
_SETTINGS_DEPTH, _MAX_SETTINGS = 3, 1000
_NO_HOMES = frozenset({*sys.stdlib_module_names, "torch"})


class Surroundings:
    """What surrounds a call: training flag, autocast, and hooks, compared with their state at install.

    Dynamo does not look at hooks again after it has compiled (`skip_nnmodule_hook_guards`), so this does.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.training = module.training
        tensors = [*module.parameters(), *module.buffers()]
        self.device_types = sorted({"cpu", *(tensor.device.type for tensor in tensors)})
        self.autocast = self._autocast()
        tables = [table for owner in module.modules() for table in (owner._forward_hooks, owner._forward_pre_hooks)]
        tables += [nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]
        self.empty = [table for table in tables if not table]
        self.filled = [(table, list(table)) for table in tables if table]
        self._watch = DictWatch(tables)

    def _autocast(self) -> list[Any]:
        return [
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in self.device_types
        ]

    def difference(self) -> str | None:
        """Return what differs from the state at install, None when nothing does."""
        if self.module.training is not self.training:
            return "training mode"
        if self._autocast() != self.autocast:
            return "autocast"
        if self._watch.may_be_written():
            if any(self.empty) or any(list(table) != keys for table, keys in self.filled):
                return "hooks changed"
            self._watch.settle()
        return None


class Liveness:
    """Identity and address of every tensor of a model, identity of its modules, value of every plain attribute.

    Attributes:
        tensors: parameters, buffers and tensor attributes.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        self._tables: list[dict[str, Any]] = [
            table for owner in modules for table in (owner._parameters, owner._buffers, owner._modules) if table
        ]
        attributes = [owner.__dict__ for owner in modules]
        if not modules and hasattr(model, "__dict__"):
            attributes = [model.__dict__]
        settings, self._fixed = _settings(attributes)
        self._tensor_slots = [
            (table, name)
            for table in (*attributes, *settings)
            for name, value in table.items()
            if isinstance(value, Tensor)
        ]
        # A method put on an instance is one attribute more.
        self._attributes = [*attributes, *settings]
        self._num_attributes = list(map(len, self._attributes))
        tables = [owner.__dict__ for owner in modules if type(owner) not in _WITHOUT_SETTINGS] or attributes
        self._readers = [reader for reader in map(_plain_reader, [*tables, *settings]) if reader is not None]
        self._lists = [kept for _, _, value in self._fixed for kept in _lists_in(value)]
        self._list_values = list(map(list, self._lists))
        self._plain = self._read_plain()
        self._values = self._read()
        self.tensors: list[Tensor] = [value for value in self._values if isinstance(value, Tensor)]
        # Lists compare items by identity first, in one loop of C. Two tensors of one element each would go on
        # to compare by value, which is not enough; those of more elements raise.
        self._small = [index for index, value in enumerate(self._values) if _is_small(value)]
        self._is_in_place = same_addresses(self.tensors, list(map(Tensor.data_ptr, self.tensors)))
        self._global_state = _global_state_guard()
        self._watch = DictWatch([*self._tables, *self._attributes])

    def _read(self) -> list[Any]:
        given = list(chain.from_iterable(map(dict.values, self._tables)))
        return given + [table.get(name) for table, name in self._tensor_slots]

    def _read_plain(self) -> list[Any]:
        return [reader(table) for reader, table in self._readers]

    def has_the_same_attributes(self) -> bool:
        """Whether every plain attribute has the value that it had, and no attribute came or went."""
        try:
            is_same = self._read_plain() == self._plain
        except KeyError:
            return False
        return (
            is_same
            and list(map(len, self._attributes)) == self._num_attributes
            and all(table.get(name) is value for table, name, value in self._fixed)
            and self._lists == self._list_values
        )

    def has_the_same_tensors(self) -> bool:
        """Whether every slot still holds the very tensor that it held."""
        given = self._read()
        try:
            is_same = given == self._values
        except (RuntimeError, TypeError):
            return False
        return is_same and all(given[index] is self._values[index] for index in self._small)

    def versions(self) -> list[int]:
        """Return the version counters, which in-place writes move; -1 for tensors made in inference mode."""
        return [-1 if tensor.is_inference() else tensor._version for tensor in self.tensors]

    def difference(self) -> str | None:
        """Return what a compiled call would not see, None when all is as it was.

        Where no dictionary was written to, only addresses, lists and torch's own state are looked at.
        """
        if self._watch.may_be_written():
            if not self.has_the_same_tensors():
                return "weights changed"
            if not self.has_the_same_attributes():
                return "attributes changed"
            self._watch.settle()
        elif self._lists != self._list_values:  # a list says nothing of what is written to it
            return "attributes changed"
        if not self._is_in_place():
            return "weights moved"
        if self._global_state is not None and not self._global_state.check():
            return "torch's global state"
        return None


def _settings(attributes: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[_Slot]]:
    """Find what hangs on attributes without being a module: configurations, dictionaries, and what those hold.

    Returns:
        Their dictionaries; and the slots that hold them, or lists, which must go on to hold these very objects.
    """
    found: list[dict[str, Any]] = []
    fixed: list[_Slot] = []
    seen = set(map(id, attributes))
    waiting = deque((table, _SETTINGS_DEPTH) for table in attributes)
    while waiting and len(found) < _MAX_SETTINGS:
        table, depth = waiting.popleft()
        for name, value in table.items():
            inner = None if name in _MODULE_INTERNALS else _table_of(value)
            if inner is None:
                fixed += [(table, name, value)] if any(True for _ in _lists_in(value)) else []
                continue
            fixed.append((table, name, value))
            if id(inner) not in seen and depth:
                seen.add(id(inner))
                found.append(inner)
                waiting.append((inner, depth - 1))
    return found, fixed


def _table_of(value: Any) -> dict[Any, Any] | None:
    """Return the dictionary that a setting is or keeps its attributes in; None for what is no setting."""
    if isinstance(value, dict):
        return value
    # A logger or a thread pool leads to half of the process, and computes nothing.
    home = type(value).__module__.partition(".")[0]
    if isinstance(value, _NO_SETTINGS) or (home in _NO_HOMES and not isinstance(value, types.SimpleNamespace)):
        return None
    table = getattr(value, "__dict__", None)
    return table if type(table) is dict else None


def _lists_in(value: Any) -> Iterator[list[Any]]:
    """Yield the lists that a plain value holds: one that was written to is equal to itself all the same."""
    if isinstance(value, (tuple, list)) and _is_plain(value):
        if isinstance(value, list):
            yield value
        for item in value:
            yield from _lists_in(item)


def _plain_reader(table: dict[str, Any]) -> tuple[Callable[[dict[str, Any]], Any], dict[str, Any]] | None:
    names = [name for name, value in table.items() if name not in _MODULE_INTERNALS and _is_plain(value)]
    return (itemgetter(*names), table) if names else None


def _is_small(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() <= 1


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (*_PLAIN, *_BEHAVIOUR))


def _global_state_guard() -> Any:
    """Return torch's own guard of default dtype, determinism, TF32 flags and threads; None where there is none."""
    make = getattr(getattr(torch._C._dynamo, "guards", None), "GlobalStateGuard", None)
    with torch.no_grad():
        return make() if make is not None else None
