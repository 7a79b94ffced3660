"""The fp64 oracle: the same model in double precision, so that a candidate is judged by the truth and not by eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agnitra_lab.benchmark.state import ModuleState
from agnitra_lab.contracts.workload import Inputs
from agnitra_lab.graph.tree import map_tensors, tensors

_NARROW = (torch.float16, torch.bfloat16, torch.float32)
# Weights in double precision, and about as much again for what the call needs.
_MEMORY_FACTOR = 2.0


class Oracle:
    """A double-precision copy of a model. Calling it returns its outputs on upcast inputs.

    Attributes:
        inputs_after: path -> what the last call left in each of its inputs.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Copy the model.

        Raises:
            Exception: whatever the model's own deepcopy raises; `build_oracle` turns it into a note.
        """
        self._model = copy.deepcopy(model).double()
        for module in self._model.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, torch.Tensor) and value.dtype in _NARROW:
                    setattr(module, name, value.double())
        self._state = ModuleState(self._model)
        self.inputs_after: dict[str, torch.Tensor] = {}

    def __call__(self, inputs: Inputs) -> Any:
        args, kwargs = map_tensors(inputs, _upcast)
        self._state.restore()
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad(), _KeepDouble():
                outputs = self._model(*args, **kwargs)
            self.inputs_after = dict(tensors((args, kwargs)))
            return outputs
        finally:
            torch.set_default_dtype(default_dtype)

    def begin_as(self, state: ModuleState) -> None:
        """Start each call from where the original starts."""
        self._state.begin_as(state)

    def state(self, name: str) -> torch.Tensor | None:
        """Return what the last call left in a buffer or tensor attribute of the copy, by its full name."""
        return self._state.tensor(name)


def build_oracle(model: Callable[..., Any], device: torch.device) -> tuple[Oracle | None, str | None]:
    """Build the oracle of a workload's model.

    Returns:
        The oracle and None, or None and the reason why there is none.
    """
    if not isinstance(model, torch.nn.Module):
        return None, "no fp64 oracle: the model is a plain function"
    needed_bytes = int(_MEMORY_FACTOR * 8 * sum(parameter.numel() for parameter in model.parameters()))
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        if needed_bytes > free_bytes:
            return None, f"no fp64 oracle: it needs about {needed_bytes} bytes, {free_bytes} are free"
    try:
        return Oracle(model), None
    except Exception as error:
        return None, oracle_failure(error)


def oracle_failure(error: Exception) -> str:
    """Say why the double-precision copy could not be made or run."""
    text = (str(error).strip().splitlines() or [""])[0][:160]
    return f"no fp64 oracle: the model does not run in double precision ({type(error).__name__}: {text})"


class _KeepDouble(TorchDispatchMode):
    """Turns every cast to a narrower float into float64: norms and heads that say `.float()` would round."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide_kwargs = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*(_widen(value) for value in args), **wide_kwargs)


def _widen(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double() if tensor.dtype in _NARROW else tensor.detach().clone()
