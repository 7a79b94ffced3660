"""What all unseen workloads share: the size for the default device, inputs by seed, the finished `Workload`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.seeding import normal, token_ids

SizeT = TypeVar("SizeT")
Draw = Callable[[int, str, torch.dtype], Tensor]
"""(seed, device, dtype) -> one input."""


class Formula(nn.Module):
    """A function of the inputs alone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def default_device() -> str:
    """Return "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def sized(full: SizeT, tiny: SizeT) -> SizeT:
    """Choose the size that fits the default device: `full` on CUDA, `tiny` on a CPU."""
    return tiny if default_device() == "cpu" else full


def values(*shape: int) -> Draw:
    """Standard normal values of `shape`."""
    return lambda seed, device, dtype: normal(seed, shape, device, dtype)


def ids(*shape: int, below: int) -> Draw:
    """Integers of `shape` from 0 to `below` - 1: tokens, positions, nodes."""
    return lambda seed, device, _dtype: token_ids(seed, shape, below, device)


def workload(
    name: str,
    build: Callable[[], nn.Module],
    *draws: Draw,
    dtype: torch.dtype,
    num_residual_layers: int = 1,
    items: int = 1,
    unit: Literal["tokens", "images", "samples", "calls"] = "calls",
    phase: Literal["prefill", "decode"] | None = None,
) -> Workload:
    """Make a workload on the default device.

    Args:
        name: what artifacts call it.
        build: makes the model at the size of that device.
        draws: one for each positional input; the n-th draws from the seed of the call plus n.
        dtype: of weights and inputs on CUDA; fp32 on a CPU.
        num_residual_layers: branches that end in one residual stream (see `init_weights`).
        items: items that one call processes.
        unit: what an item is.
        phase: "prefill" or "decode" for language models.
    """
    device = default_device()
    kept = torch.float32 if device == "cpu" else dtype
    model = seeded(build, device, kept, num_residual_layers=num_residual_layers)

    def make_inputs(seed: int) -> Inputs:
        return tuple(draw(seed + index, device, kept) for index, draw in enumerate(draws)), {}

    settings = {"scale": sized("full", "tiny"), "dtype": str(kept).removeprefix("torch.")}
    return assemble(name, model, make_inputs, settings, items=items, unit=unit, phase=phase)
