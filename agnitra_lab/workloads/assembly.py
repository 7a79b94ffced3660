"""The steps every suite builder shares: seeded weights on the device, then a finished `Workload`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.seeding import init_weights

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv3d)


def seeded(build: Callable[[], ModuleT], device: str, dtype: torch.dtype, *, num_residual_layers: int = 1) -> ModuleT:
    """Build a module on `device`, fill it from the fixed seed, and cast it to `dtype` in eval mode.

    Convolutions over one and three dimensions are rescaled to He-normal: `init_weights` knows only those over two,
    and would leave activations growing by the square root of the channels with every layer.
    """
    with torch.device(device):
        model = build()
    init_weights(model, num_residual_layers=num_residual_layers)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _CONVOLUTIONS):
                weight = module.weight
                weight.mul_(math.sqrt(2.0 * weight.shape[-1] / weight[0].numel()))
    return model.to(device, dtype).eval()


def assemble(
    name: str,
    model: Callable[..., Any],
    make_inputs: Callable[[int], Inputs],
    settings: dict[str, Any],
    *,
    items: int,
    unit: Literal["tokens", "images", "samples", "calls"],
    phase: Literal["prefill", "decode"] | None = None,
) -> Workload:
    """Make the workload of a model whose own inputs are those of seed 0.

    Args:
        name: what artifacts call it.
        model: the module, in eval mode.
        make_inputs: seed -> (args, kwargs).
        settings: what it was built with, for the record.
        items: items that one call processes.
        unit: what an item is.
        phase: "prefill" or "decode" for language models.
    """
    args, kwargs = make_inputs(0)
    return Workload(name, model, args, kwargs, items, unit, phase, make_inputs, settings)
