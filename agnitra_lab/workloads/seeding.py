"""Random weights and inputs from fixed seeds, the same on every machine."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

WEIGHT_SEED = 20251122
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def init_weights(model: ModuleT, *, num_residual_layers: int = 1) -> ModuleT:
    """Fill parameters and random buffers in place, so that activations keep a realistic scale.

    Embedding tables are standard normal (torch's own default, and the scale of a residual stream); other matrices are
    normal with std 1/sqrt(columns); a layer that ends a residual branch is divided by
    sqrt(num_residual_layers); convolutions are He-normal; norm statistics are near one, not exactly, so that
    folding mistakes show.

    Source: Radford et al. 2019 (GPT-2), section 2.3, for the residual scale; He et al. 2015.
    """
    generator = torch.Generator().manual_seed(WEIGHT_SEED)

    def normal_(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(torch.empty(tensor.shape).normal_(mean, std, generator=generator))

    ends = ("o_proj.weight", "down_proj.weight", "out.weight", "down.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 4:
                normal_(parameter, 0.0, math.sqrt(2.0 / parameter[0].numel()))
            elif "embed" in name or "tables" in name:
                normal_(parameter, 0.0, 1.0)
            elif parameter.dim() >= 2:
                residual_scale = math.sqrt(num_residual_layers) if name.endswith(ends) else 1.0
                normal_(parameter, 0.0, 1.0 / (math.sqrt(parameter.shape[-1]) * residual_scale))
            else:
                normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.empty(buffer.shape).uniform_(0.5, 1.5, generator=generator))
            elif name.endswith("running_mean") or "cache" in name:
                normal_(buffer, 0.0, 0.1 if name.endswith("running_mean") else 1.0)
    return model


def token_ids(seed: int, shape: tuple[int, ...], vocabulary: int, device: str) -> Tensor:
    """Draw int64 token ids of `shape`."""
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def normal(seed: int, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    """Draw standard normal values of `shape`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
