"""State that a module keeps between calls (a KV cache, a counter): captured, restored before each call, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ModuleState:
    """Buffers, plain tensor attributes and plain numbers of a module, as they were when this object was made."""

    def __init__(self, module: torch.nn.Module | None) -> None:
        self._module = module
        self._tensors = dict(_state_tensors(module))
        self._initial = {name: tensor.detach().clone() for name, (tensor, _, _) in self._tensors.items()}
        self._numbers = [(owner, dict(_plain_numbers(owner))) for owner in (module.modules() if module else ())]
        self._first, self._first_numbers = dict(self._initial), self._numbers
        self._begun: set[str] = set()
        self._written: set[str] | None = None

    def begin_here(self) -> None:
        """Take what is there now for the captured values; `put_back` still knows those that were there first."""
        for name, (_, slots, key) in self._tensors.items():
            value, kept = slots.get(key), self._first[name]
            if isinstance(value, torch.Tensor) and value.shape == kept.shape and not same_values(value, kept):
                self._initial[name] = value.detach().clone()
                self._begun.add(name)
        self._numbers = [(owner, dict(_plain_numbers(owner))) for owner, _ in self._first_numbers]

    def begin_as(self, other: ModuleState) -> None:
        """Take the captured values of another object, of a copy of the same module: what they mean, in own dtypes."""
        for name in other._begun & set(self._initial):
            value, kept = other._initial[name], self._initial[name]
            if kept.shape == value.shape:
                self._initial[name] = value.to(dtype=kept.dtype, device=kept.device, copy=True)
                self._begun.add(name)
        if len(self._numbers) == len(other._numbers):
            numbers = [given for _, given in other._numbers]
            self._numbers = [(owner, dict(given)) for (owner, _), given in zip(self._numbers, numbers, strict=True)]

    def put_back(self) -> None:
        """Leave everything as it was when this object was made."""
        begun = self._initial, self._numbers, self._written
        self._initial, self._numbers, self._written = self._first, self._first_numbers, None
        self.restore()
        self._initial, self._numbers, self._written = begun

    def limit_to(self, names: set[str] | None) -> None:
        """Restore only these tensors from now on, None for all: what no call writes need not be looked at each time."""
        self._written = names | self._begun if names is not None else None

    def restore(self) -> None:
        """Put the captured values back, into the same tensors."""
        with torch.no_grad():
            for name, (tensor, slots, key) in self._tensors.items():
                slots[key] = tensor
                if name in self._written if self._written is not None else self._differs(name):
                    tensor.copy_(self._initial[name])
        for owner, numbers in self._numbers:
            vars(owner).update(numbers)

    def _differs(self, name: str) -> bool:
        # A copy of equal values would still advance the version counter, and a frozen candidate's guard reads that.
        return not same_values(self._tensors[name][0], self._initial[name])

    def changed(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return name -> (before, a copy of what is there now) of each tensor that is not as it was captured."""
        found = {}
        for name, (tensor, _, _) in _state_tensors(self._module):
            before = self._initial.get(name)
            if before is not None and before.shape == tensor.shape and not same_values(before, tensor):
                found[name] = (before, tensor.detach().clone())
        return found

    def live(self) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors and parameters that the module holds now, with their names."""
        parameters = list(self._module.named_parameters()) if self._module is not None else []
        return [(name, tensor) for name, (tensor, _, _) in _state_tensors(self._module)] + parameters

    def tensor(self, name: str) -> torch.Tensor | None:
        """Return what the module holds under this name now."""
        return next((tensor for found, (tensor, _, _) in _state_tensors(self._module) if found == name), None)

    def flip_lowest_bits(self, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Flip the lowest bit of the finite elements of floating tensors that the masks show.

        Args:
            masks: name -> which elements of that tensor.

        Returns:
            Copies of what is there now.
        """
        for name, mask in masks.items():
            tensor = self.tensor(name)
            if tensor is not None and tensor.is_floating_point() and tensor.shape == mask.shape:
                with torch.no_grad():
                    bits = tensor.detach().contiguous().view(_INTEGER_OF[tensor.element_size()])
                    is_flipped = mask.to(tensor.device) & _is_finite(tensor)
                    tensor.copy_(torch.where(is_flipped, bits ^ 1, bits).view(tensor.dtype))
        found = {name: self.tensor(name) for name in masks}
        return {name: tensor.detach().clone() for name, tensor in found.items() if tensor is not None}

    def parameter_versions(self) -> list[int]:
        """Return the counters that every in-place write through torch advances, one a parameter."""
        if self._module is None:
            return []
        return [parameter._version for parameter in self._module.parameters() if not parameter.is_inference()]


def module_of(function: Callable[..., Any] | None) -> torch.nn.Module | None:
    """Return the module behind a callable: itself, what torch.compile wrapped, a bound method's or partial's owner."""
    seen: set[int] = set()
    found: Any = function
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        wrapped = vars(found).get("_modules", {}).get("_orig_mod") if isinstance(found, torch.nn.Module) else None
        if wrapped is None and isinstance(found, torch.nn.Module):
            return found
        found = wrapped or getattr(found, "__self__", None) or getattr(found, "func", None)
    return None


def same_values(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Say whether two tensors hold the same values, a NaN being equal to a NaN."""
    return bool(_same(left, right).all())


def difference_mask(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return where two tensors of one shape differ, a NaN being equal to a NaN."""
    return ~_same(left, right)


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor)


def _same(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype.itemsize == 1 and left.is_floating_point():
        left, right = left.float(), right.float()
    equal = left == right
    return equal | ((left != left) & (right != right)) if left.is_floating_point() or left.is_complex() else equal


def _state_tensors(
    module: torch.nn.Module | None,
) -> Iterator[tuple[str, tuple[torch.Tensor, dict[str, Any], str]]]:
    if module is None:
        return
    for prefix, owner in module.named_modules():
        for slots in (owner._buffers, vars(owner)):
            for key, value in list(slots.items()):
                if isinstance(value, torch.Tensor):
                    yield (f"{prefix}.{key}" if prefix else key), (value, slots, key)


def _plain_numbers(owner: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in vars(owner).items() if type(value) in (int, float, bool))
