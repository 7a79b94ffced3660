"""What users hand in -> `Workload`: a module and its inputs, a pair, or a workload as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import UsageError


def as_workload(model: Any, inputs: Any = None, *, name: str | None = None) -> Workload:
    """Make a workload of a callable and its inputs.

    Args:
        model: a callable (usually a `torch.nn.Module`, set to eval mode by its owner) or a `Workload`.
        inputs: one call's inputs: a tuple or list of positional inputs, a mapping of keyword inputs, or one
            tensor; None for no inputs.
        name: what artifacts call it; by default the model's class name.

    Raises:
        UsageError: when `model` is not callable, or inputs come with a finished workload.
    """
    if isinstance(model, Workload):
        if inputs is not None:
            raise UsageError(
                "Got a Workload and inputs; a Workload carries its own inputs.", hint="Pass one of the two."
            )
        return model
    if not callable(model):
        raise UsageError(
            f"The model must be callable, got {type(model).__name__}.",
            hint="Pass a torch.nn.Module, a function, or an agnitra_lab.Workload.",
        )
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, (tuple, list)):
        args = tuple(inputs)
    elif inputs is not None:
        args = (inputs,)
    return Workload(name or _name_of(model), model, args, kwargs)


def _name_of(model: Any) -> str:
    return getattr(model, "__name__", None) or type(model).__name__
