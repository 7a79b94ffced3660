"""More products and convolutions with what follows them, in the forms that people write."""

from __future__ import annotations

import torch
from sizes import Formula, sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

FP32 = torch.float32


class Then(nn.Module):
    """A layer and a function of its result."""

    def __init__(self, layer: nn.Module, function: Formula) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


class ConvBatchNormScale(nn.Module):
    """A normed convolution, times a number."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, outputs, 3), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * 2.0


class GemmNormGelu(nn.Module):
    """BatchNorm over the features of a product, two activations."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(size, size), nn.BatchNorm1d(size)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.gelu(self.norm(self.linear(x))))


class PoolLogSumExpResidual(nn.Module):
    """A row shrunk to one value by mean and log-sum-exp, added to the row that came in."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.subtract = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.mean(self.linear(x) - self.subtract, dim=1, keepdim=True)
        return F.gelu(torch.logsumexp(y, dim=1, keepdim=True)) + x


class ConvNormResidual(nn.Module):
    """tanh, hard-swish, a sum with the convolution, and log-sum-exp over the channels."""

    def __init__(self, channels: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, outputs, 3), nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.logsumexp(y + F.hardswish(torch.tanh(self.norm(y))), dim=1, keepdim=True)


class TransposedConvSoftmax(nn.Module):
    """A transposed convolution of images, softmax over channels, bias, scale, sigmoid."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, outputs, 4, stride=2, padding=1, output_padding=1)
        self.shift = nn.Parameter(torch.empty(outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid((F.softmax(self.conv(x), dim=1) + self.shift) * 2.0)


def _linear(name: str, rows: int, size: int, function: Formula) -> Workload:
    return workload(name, lambda: Then(nn.Linear(size, size), function), values(rows, size), dtype=FP32)


def gemm_sigmoid_sum() -> Workload:
    """Sigmoid, sums of rows, one log-sum-exp of all."""
    rows, size = sized((4096, 4096), (4, 16))
    return _linear("gemm-sigmoid-sum", rows, size,
                   Formula(lambda x: torch.logsumexp(torch.sum(torch.sigmoid(x), dim=1), dim=0)))  # fmt: skip


def gemm_mish_mish() -> Workload:
    """Two Mish functions of a product."""
    rows, size = sized((2048, 8192), (4, 16))
    return _linear("gemm-mish-mish", rows, size, Formula(lambda x: F.mish(F.mish(x))))


def gemm_swish_clamps() -> Workload:
    """Swish, a division, and tanh between two clamps."""
    rows, size = sized((2048, 8192), (4, 16))

    def chain(x: Tensor) -> Tensor:
        return torch.clamp(torch.tanh(torch.clamp(x * torch.sigmoid(x) / 2.0, -1.0, 1.0)), -1.0, 1.0)

    return _linear("gemm-swish-clamps", rows, size, Formula(chain))


def gemm_max_gelu() -> Workload:
    """The largest value of each row, less their mean."""
    rows, size = sized((1024, 8192), (4, 16))

    def chain(x: Tensor) -> Tensor:
        x = torch.max(x, dim=1, keepdim=True).values
        return F.gelu(x - x.mean(dim=0, keepdim=True))

    return _linear("gemm-max-gelu", rows, size, Formula(chain))


def gemm_pool_gelu_scale_max() -> Workload:
    """Means of sixteen columns, GELU, a factor, the largest of each row."""
    rows, size = sized((2048, 8192), (4, 32))

    def chain(x: Tensor) -> Tensor:
        x = F.gelu(F.avg_pool1d(x.unsqueeze(1), 16).squeeze(1)) * 2.0
        return torch.max(x, dim=1).values

    return _linear("gemm-pool-gelu-scale-max", rows, size, Formula(chain))


def gemm_norm_gelu() -> Workload:
    """BatchNorm of a product, GELU and ReLU."""
    rows, size = sized((8192, 4096), (4, 16))
    return workload("gemm-norm-gelu", lambda: GemmNormGelu(size), values(rows, size), dtype=FP32)


def gemm_pool_log_sum_exp_residual() -> Workload:
    """One value a row, added to the row."""
    rows, size = sized((2048, 8192), (4, 16))
    return workload("gemm-pool-log-sum-exp-residual", lambda: PoolLogSumExpResidual(size), values(rows, size),
                    dtype=FP32)  # fmt: skip


def conv_norm_scale() -> Workload:
    """BatchNorm and a factor, both of which can go into the convolution."""
    shape, outputs = sized(((64, 8, 128, 128), 64), ((1, 4, 8, 8), 8))
    return workload("conv-norm-scale", lambda: ConvBatchNormScale(shape[1], outputs), values(*shape), dtype=FP32)


def conv_gelu_global_pool() -> Workload:
    """GELU of a convolution, the mean of each channel."""
    shape, outputs = sized(((64, 8, 256, 256), 64), ((1, 4, 8, 8), 8))
    function = Formula(lambda x: F.adaptive_avg_pool2d(F.gelu(x), 1).squeeze(-1).squeeze(-1))
    return workload("conv-gelu-global-pool", lambda: Then(nn.Conv2d(shape[1], outputs, 3), function), values(*shape),
                    dtype=FP32)  # fmt: skip


def conv_hardswish_pool_mish() -> Workload:
    """A number less, hard-swish, maxima, Mish."""
    shape, outputs = sized(((64, 64, 128, 128), 128), ((1, 4, 8, 8), 8))
    function = Formula(lambda x: F.mish(F.max_pool2d(F.hardswish(x - 0.5), 2)))
    return workload("conv-hardswish-pool-mish", lambda: Then(nn.Conv2d(shape[1], outputs, 3), function),
                    values(*shape), dtype=FP32)  # fmt: skip


def conv_norm_residual() -> Workload:
    """GroupNorm, two activations, a residual, log-sum-exp over channels."""
    shape, outputs, groups = sized(((64, 8, 128, 128), 64, 16), ((1, 4, 8, 8), 8, 4))
    return workload("conv-norm-residual", lambda: ConvNormResidual(shape[1], outputs, groups), values(*shape),
                    dtype=FP32)  # fmt: skip


def conv_3d_min_softmax() -> Workload:
    """The smallest of a depth, softmax over channels."""
    shape, outputs = sized(((64, 3, 24, 32, 32), 24), ((1, 3, 6, 8, 8), 8))
    function = Formula(lambda x: torch.softmax(torch.min(x, dim=2)[0], dim=1))
    return workload("conv-3d-min-softmax", lambda: Then(nn.Conv3d(3, outputs, 3), function), values(*shape),
                    dtype=FP32)  # fmt: skip


def conv_3d_mish_tanh() -> Workload:
    """Two pointwise functions of a convolved volume."""
    shape, outputs = sized(((16, 32, 32, 64, 64), 64), ((1, 4, 6, 8, 8), 8))
    return workload("conv-3d-mish-tanh",
                    lambda: Then(nn.Conv3d(shape[1], outputs, 3), Formula(lambda x: torch.tanh(F.mish(x)))),
                    values(*shape), dtype=FP32)  # fmt: skip


def transposed_conv_softmax() -> Workload:
    """Softmax over the channels of a transposed convolution, and pointwise steps."""
    shape, outputs = sized(((32, 64, 64, 64), 128), ((1, 4, 8, 8), 8))
    return workload("transposed-conv-softmax", lambda: TransposedConvSoftmax(shape[1], outputs), values(*shape),
                    dtype=FP32)  # fmt: skip


def transposed_conv_global_pool() -> Workload:
    """A transposed convolution of which the channels' means are needed: algebra leaves sums of the input."""
    shape, outputs = sized(((16, 64, 128, 128), 128), ((1, 4, 8, 8), 8))

    def chain(x: Tensor) -> Tensor:
        x = torch.logsumexp(torch.mean(x, dim=(2, 3), keepdim=True), dim=1, keepdim=True)
        return torch.sum(x, dim=(2, 3)) * 10.0

    return workload("transposed-conv-global-pool",
                    lambda: Then(nn.ConvTranspose2d(shape[1], outputs, 3), Formula(chain)), values(*shape),
                    dtype=FP32)  # fmt: skip
