"""Single layers that other tools lose time on: GEMMs, norms, softmax, cross-entropy and a running sum.

Source: KernelBench (Ouyang et al. 2025), level 1, for the kinds of layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.seeding import normal, token_ids

Shape = tuple[int, ...]


class MatMul(nn.Module):
    """Product of two matrices."""

    def forward(self, a_MK: Tensor, b_KN: Tensor) -> Tensor:
        return torch.matmul(a_MK, b_KN)


class ActivationChain(nn.Module):
    """Linear layers with bias, each followed by another activation and a scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.expand = nn.Linear(size, 4 * size)
        self.mix = nn.Linear(4 * size, 4 * size)
        self.shrink = nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.expand(x))
        x = F.relu(self.mix(x)) * 0.5
        x = self.shrink(x)
        return torch.sigmoid(x) * x


class MiddleRMSNorm(nn.Module):
    """Root mean square norm over the features of [B, features, Y, X]."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + self.eps)


class Softmax(nn.Module):
    """Softmax over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=-1)


class CrossEntropy(nn.Module):
    """Loss of each token, as a perplexity needs it: a mean would hide a wrong one."""

    def forward(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        return F.cross_entropy(logits_TV.float(), targets_T, reduction="none")


class CumSum(nn.Module):
    """Running sum over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, dim=-1)


def layer_workload(
    name: str, scale: str, device: str, dtype: torch.dtype, shape: Shape, build: Callable[[], nn.Module],
    unit: Literal["images", "samples", "calls"] = "samples",
) -> Workload:  # fmt: skip
    """Make the workload of a layer that takes one standard normal tensor.

    Args:
        name: what artifacts call it.
        scale: for the record.
        device: where it runs.
        dtype: of weights and input.
        shape: of the input; its first dimension counts the items.
        build: makes the layer.
        unit: what an item is.
    """
    model = seeded(build, device, dtype)

    def make_inputs(seed: int) -> Inputs:
        return (normal(seed, shape, device, dtype),), {}

    settings = {"scale": scale, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
    return assemble(name, model, make_inputs, settings, items=shape[0], unit=unit)


def gemm_fp32(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """One square product of fp32 matrices that are both inputs."""
    size = {"tiny": 48, "small": 1280, "full": 4096}[scale]

    def make_inputs(seed: int) -> Inputs:
        return (normal(seed, (size, size), device, dtype), normal(seed + 1, (size, size), device, dtype)), {}

    settings = {"scale": scale, "shape": (size, size, size), "dtype": str(dtype).removeprefix("torch.")}
    return assemble("gemm-fp32", seeded(MatMul, device, dtype), make_inputs, settings, items=1, unit="calls")


def gemm_bias_activation(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Three linear layers with bias and an activation each."""
    size, rows = {"tiny": (16, 8), "small": (384, 256), "full": (1024, 4096)}[scale]
    return layer_workload(
        "gemm-bias-activation", scale, device, dtype, (rows, size), lambda: ActivationChain(size)
    )  # fmt: skip


def layer_norm_large(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """LayerNorm over the three last dimensions at once: few rows, each far longer than a block can hold."""
    shape: Shape = {"tiny": (2, 4, 8, 8), "small": (16, 64, 128, 128), "full": (16, 64, 256, 256)}[scale]
    workload = layer_workload("layer-norm-large", scale, device, dtype, shape, lambda: nn.LayerNorm(shape[1:]))
    assert isinstance(workload.model, nn.LayerNorm)
    with torch.no_grad():
        # A weight of three dimensions is drawn about zero, like a matrix; a norm's lies about one.
        workload.model.weight.add_(1.0)
    return workload


def rms_norm_middle_dim(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """RMS norm over the second of four dimensions: the reduced elements lie far apart."""
    shape: Shape = {"tiny": (2, 8, 6, 6), "small": (8, 64, 128, 128), "full": (16, 64, 256, 256)}[scale]
    return layer_workload("rms-norm-middle-dim", scale, device, dtype, shape, MiddleRMSNorm)


def softmax_long_rows(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Softmax over rows longer than one block's registers."""
    shape: Shape = {"tiny": (4, 512), "small": (256, 65_536), "full": (512, 131_072)}[scale]
    return layer_workload("softmax-long-rows", scale, device, dtype, shape, Softmax)


def cross_entropy(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Loss of each token over a large vocabulary."""
    tokens, vocabulary = {"tiny": (8, 128), "small": (512, 32_000), "full": (1024, 128_256)}[scale]

    def make_inputs(seed: int) -> Inputs:
        logits_TV = normal(seed, (tokens, vocabulary), device, dtype)
        return (logits_TV, token_ids(seed + 1, (tokens,), vocabulary, device)), {}

    settings = {"scale": scale, "shape": (tokens, vocabulary), "dtype": str(dtype).removeprefix("torch.")}
    return assemble("cross-entropy", seeded(CrossEntropy, device, dtype), make_inputs, settings,
                    items=tokens, unit="tokens")  # fmt: skip


def cumsum(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Running sums of long fp32 rows."""
    shape: Shape = {"tiny": (4, 64), "small": (1024, 16_384), "full": (2048, 32_768)}[scale]
    return layer_workload("cumsum", scale, device, dtype, shape, CumSum)
