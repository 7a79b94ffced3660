"""A workload: a callable, its inputs, and what one call stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Workload:
    """One unit of inference work that can be repeated, timed and compared.

    Attributes:
        name: what artifacts and tables call it.
        model: the callable; usually a `torch.nn.Module` in eval mode.
        args: positional inputs of one call.
        kwargs: keyword inputs of one call.
        items_per_call: how many items one call processes (tokens, images, samples).
        item_unit: what an item is.
        phase: "prefill" or "decode" for language models, else None.
        make_inputs: seed -> (args, kwargs), fresh inputs of the same shapes and dtypes. Without it fresh inputs
            are drawn to look like the given ones.
        settings: what a named workload was built with, for the record.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    items_per_call: int = 1
    item_unit: Literal["tokens", "images", "samples", "calls"] = "calls"
    phase: Literal["prefill", "decode"] | None = None
    make_inputs: Callable[[int], Inputs] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        """Run the model once on the workload's own inputs."""
        return self.model(*self.args, **self.kwargs)
