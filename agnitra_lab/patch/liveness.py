"""Whether a model is still what was compiled: the same tensors in the same memory, the same settings around them.

A compiled call that goes past Dynamo's guards has only this between it and a stale answer, so it looks at everything
that such a call bakes in: each parameter, buffer and tensor attribute, each plain attribute (numbers, strings, flags,
functions), hooks, autocast, and what torch's own global guard looks at.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_BEHAVIOUR = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
# What these compute depends on no attribute but their parameters and children.
_WITHOUT_SETTINGS = (nn.Linear, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.Sequential)
_versions = attrgetter("_version")


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
        if any(self.empty) or any(list(table) != keys for table, keys in self.filled):
            return "hooks changed"
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
        self._tensor_slots = [
            (table, name) for table in attributes for name, value in table.items() if isinstance(value, Tensor)
        ]
        # A method put on an instance is one attribute more.
        self._attributes = attributes
        self._num_attributes = list(map(len, attributes))
        tables = [owner.__dict__ for owner in modules if type(owner) not in _WITHOUT_SETTINGS] or attributes
        self._readers = [reader for reader in map(_plain_reader, tables) if reader is not None]
        self._plain = self.plain_values()
        self._values = self._read()
        self.tensors: list[Tensor] = [value for value in self._values if isinstance(value, Tensor)]
        # Lists compare items by identity first, in one loop of C. Two tensors of one element each would go on
        # to compare by value, which is not enough; those of more elements raise.
        self._small = [index for index, value in enumerate(self._values) if _is_small(value)]
        self._addresses = list(map(Tensor.data_ptr, self.tensors))
        self._indices = list(range(len(self.tensors)))
        self._global_state = _global_state_guard()
        # One call into C++ for all addresses (what Inductor's own CUDA graphs use), 2 us instead of 20.
        self._compare = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)

    def _read(self) -> list[Any]:
        given = list(chain.from_iterable(map(dict.values, self._tables)))
        return given + [table.get(name) for table, name in self._tensor_slots]

    def plain_values(self) -> list[Any]:
        """Return the plain attributes as they are now."""
        return [reader(table) for reader, table in self._readers]

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
        """Return what a compiled call would not see, None when all is as it was: some 20 us for 250 weights."""
        if not self.has_the_same_tensors():
            return "weights changed"
        if self._compare is not None:
            is_same = self._compare(self.tensors, self._addresses, self._indices)
        else:
            is_same = list(map(Tensor.data_ptr, self.tensors)) == self._addresses
        if not is_same:
            return "weights moved"
        try:
            if self.plain_values() != self._plain or list(map(len, self._attributes)) != self._num_attributes:
                return "attributes changed"
        except KeyError:
            return "attributes changed"
        if self._global_state is not None and not self._global_state.check():
            return "torch's global state"
        return None


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
