"""Small models, and kernels whose call is the plain torch formula, so that graphs can be patched on any machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from agnitra_lab.contracts import Kernel, KernelConfig, Workload
from agnitra_lab.contracts.kernel import KernelSource


def rms_norm_formula(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, cast_before_weight: bool = True
) -> Any:
    summed = x if residual is None else x + residual
    wide = summed.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out = normed.to(x.dtype) * weight if cast_before_weight else (normed * weight.float()).to(x.dtype)
    return out if residual is None else (out, summed)


def swiglu_formula(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def formula_kernels() -> KernelSource:
    formulas = {"rms_norm": rms_norm_formula, "swiglu": swiglu_formula}
    kernels = {
        name: Kernel(KernelConfig(template=name, params={"BLOCK_N": 16}), "", name.ljust(64, "0"), call)
        for name, call in formulas.items()
    }
    return lambda template, shape, dtype: kernels.get(template)


class Attention(nn.Module):
    def __init__(self, width: int = 12, bias: bool = False) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width // 2, bias=bias)
        self.value = nn.Linear(width, width // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        num_rows, num_tokens, width = x.shape
        q = self.query(x).view(num_rows, num_tokens, 4, width // 4).transpose(1, 2)
        k = self.key(x).view(num_rows, num_tokens, 2, width // 4).transpose(1, 2)
        v = self.value(x).view(num_rows, num_tokens, 2, width // 4).transpose(1, 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + attended.transpose(1, 2).reshape(x.shape)


class GatedMLP(nn.Module):
    def __init__(self, width: int = 12, inner: int = 20) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class LlamaNorm(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + 1e-6)
        return self.weight * hidden.to(dtype)


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first_norm = LlamaNorm(width)
        self.attention = Attention(width)
        self.second_norm = LlamaNorm(width)
        self.mlp = GatedMLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first_norm(x))
        return x + self.mlp(self.second_norm(x))


def workload(model: Any, *args: Any, **kwargs: Any) -> Workload:
    return Workload("tiny", model.eval() if isinstance(model, nn.Module) else model, args, kwargs)


def build(model_class: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return model_class(*args, **kwargs).eval()
