"""The cheap test before each call: is this the kind of call that the compiled graph was made for?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from agnitra_lab.graph.tree import is_record

Check = Callable[[Any], bool]
PLAIN = (type(None), bool, int, float, complex, str, type, torch.dtype, torch.device)
"""What an argument may be beside a tensor for a call to be told from another by its value."""


class Signature:
    """What the arguments of one call look like: structure, tensor shapes, dtypes, devices, strides, scalar values.

    `explain` walks the same checks and names the first that fails; it runs only after a miss.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._args = [_Leaf(f"argument {index}", value) for index, value in enumerate(args)]
        self._kwargs = {name: _Leaf(f"argument {name}", value) for name, value in kwargs.items()}
        self._checks = [leaf.matches for leaf in self._args]
        self._num_args = len(args)

    def matches(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call looks the same."""
        if len(args) != self._num_args or len(kwargs) != len(self._kwargs):
            return False
        for check, value in zip(self._checks, args, strict=True):
            if not check(value):
                return False
        for name, value in kwargs.items():
            leaf = self._kwargs.get(name)
            if leaf is None or not leaf.matches(value):
                return False
        return True

    def explain(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return which part of a call differs: "number of arguments", "shape", "dtype", "device", "strides", ..."""
        if len(args) != self._num_args or kwargs.keys() != self._kwargs.keys():
            return "number of arguments"
        pairs = [*zip(self._args, args, strict=True), *((self._kwargs[name], kwargs[name]) for name in kwargs)]
        return next((leaf.difference(value) for leaf, value in pairs if not leaf.matches(value)), "arguments")


def looks_inside(value: Any) -> bool:
    """Whether a signature compares what a value holds, and not its type alone."""
    if isinstance(value, (tuple, list, dict)):
        return True
    return is_record(value) and hasattr(value, "__dict__")


class _Leaf:
    """One argument. Containers and caches check what they hold; other objects must be of the same type, Dynamo guards
    the rest."""

    def __init__(self, where: str, value: Any, above: frozenset[int] = frozenset()) -> None:
        held_by, above = above, above | {id(value)}
        self.where = where
        self.type = type(value)
        self.items: list[_Leaf] = []
        self.keys: list[Any] = []
        self.value: Any = None
        if isinstance(value, Tensor):
            self.shape, self.stride, self.dtype, self.device = value.shape, value.stride(), value.dtype, value.device
            self.requires_grad = value.requires_grad
            self.matches: Check = self._matches_tensor
        elif isinstance(value, (tuple, list)):
            self.items = [_Leaf(where, item, above) for item in value]
            self.matches = self._matches_sequence
        elif isinstance(value, dict) and not is_dataclass(value):
            self.keys = list(value)
            self.items = [_Leaf(where, item, above) for item in value.values()]
            self.matches = self._matches_dict
        elif looks_inside(value) and id(value) not in held_by:
            self.keys = list(value.__dict__)
            self.items = [_Leaf(where, item, above) for item in value.__dict__.values()]
            self.matches = self._matches_record
        elif self.type in PLAIN:
            self.value = value
            self.matches = self._matches_value
        else:
            self.matches = self._matches_type

    def _matches_tensor(self, value: Any) -> bool:
        return (
            type(value) is self.type
            and value.shape == self.shape
            and value.dtype is self.dtype
            and value.stride() == self.stride
            and value.device == self.device
            and value.requires_grad is self.requires_grad
        )

    def _matches_sequence(self, value: Any) -> bool:
        return (
            type(value) is self.type
            and len(value) == len(self.items)
            and all(leaf.matches(item) for leaf, item in zip(self.items, value, strict=True))
        )

    def _matches_dict(self, value: Any) -> bool:
        return (
            type(value) is self.type
            and list(value) == self.keys
            and all(leaf.matches(item) for leaf, item in zip(self.items, value.values(), strict=True))
        )

    def _matches_record(self, value: Any) -> bool:
        return (
            type(value) is self.type
            and list(value.__dict__) == self.keys
            and all(leaf.matches(item) for leaf, item in zip(self.items, value.__dict__.values(), strict=True))
        )

    def _matches_value(self, value: Any) -> bool:
        return type(value) is self.type and value == self.value

    def _matches_type(self, value: Any) -> bool:
        return type(value) is self.type

    def difference(self, value: Any) -> str:
        """Name the first thing in which a value that does not match differs."""
        if type(value) is not self.type:
            return "type"
        if self.items:
            table = value if isinstance(value, (list, tuple, dict)) else value.__dict__
            if len(table) != len(self.items):
                return "structure"
            items = table.values() if isinstance(table, dict) else table
            return next(
                (leaf.difference(item) for leaf, item in zip(self.items, items, strict=True) if not leaf.matches(item)),
                "structure",
            )
        if isinstance(value, Tensor):
            for name, expected, given in (
                ("shape", self.shape, value.shape),
                ("dtype", self.dtype, value.dtype),
                ("device", self.device, value.device),
                ("strides", self.stride, value.stride()),
                ("requires_grad", self.requires_grad, value.requires_grad),
            ):
                if given != expected:
                    return name
        return "value"
