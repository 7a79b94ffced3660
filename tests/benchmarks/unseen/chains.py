"""A product or convolution and what follows it, of the kinds of KernelBench's level 2."""

from __future__ import annotations

import torch
from sizes import sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

FP32 = torch.float32


class Shift(nn.Module):
    """Adds a parameter. It is drawn about one where it is a vector, being no `bias` by name."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class ClampedTransposedConv(nn.Module):
    """Bias, clamp, scale, clamp, and the scale back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1)
        self.shift = Shift(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.clamp(self.shift(self.conv(x)), 0.0, 1.0)
        return torch.clamp(x * 2.0, 0.0, 1.0) / 2.0


class SwishGroupNorm(nn.Module):
    """A product that is written twice, gated by itself, shifted and normed."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.linear, self.shift = nn.Linear(inputs, outputs), Shift(outputs)
        self.norm = nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.shift(torch.sigmoid(self.linear(x)) * self.linear(x)))


class LogSumExpChain(nn.Module):
    """Rows shrunk to their log-sum-exp, then two leaky ReLUs and two GELUs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.logsumexp(self.linear(x), dim=1, keepdim=True)
        return F.gelu(F.gelu(F.leaky_relu(F.leaky_relu(x, 0.01), 0.01)))


class ScaledRowSum(nn.Module):
    """The sum of a product's rows: algebra makes it a product with one vector."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sum(torch.matmul(x, self.weight.T) / 2, dim=1, keepdim=True) * 1.5


class PooledRowSum(nn.Module):
    """Maxima of pairs of a product's columns, summed: pooling keeps algebra away."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear, self.pool = nn.Linear(size, size), nn.MaxPool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sum(self.pool(self.linear(x).unsqueeze(1)).squeeze(1), dim=1) * 0.5


class ChannelMinimum(nn.Module):
    """The smallest channel of a convolution, through two tanh."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(torch.min(self.conv(x), dim=1, keepdim=True)[0]))


class VolumeNormPool(nn.Module):
    """A transposed convolution of volumes, a norm of their last dimension, pooling, GELU."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(channels, outputs, 3, stride=2, padding=1, output_padding=1)
        self.norm, self.pool = nn.LayerNorm([outputs]), nn.AvgPool3d(2)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.pool(self.norm(self.conv(x) + 1.0)))


class VolumeNormMean(nn.Module):
    """The mean of a norm's output: algebra leaves its parameters only."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(3, outputs, 3), nn.GroupNorm(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean(dim=[1, 2, 3, 4])


class RowNormResidual(nn.Module):
    """Rows of a product, normed as if they were images, plus and times a second input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(size, size), nn.InstanceNorm2d(1)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = self.norm(self.linear(x).unsqueeze(1).unsqueeze(1)).squeeze(1).squeeze(1)
        return (x + other) * other


def conv_relu_shift() -> Workload:
    """Convolution, ReLU, and a parameter of each channel."""
    shape, outputs = sized(((32, 64, 128, 128), 128), ((1, 4, 8, 8), 8))
    return workload("conv-relu-shift",
                    lambda: nn.Sequential(nn.Conv2d(shape[1], outputs, 3), nn.ReLU(), Shift(outputs, 1, 1)),
                    values(*shape), dtype=FP32)  # fmt: skip


def transposed_conv_clamp() -> Workload:
    """Pointwise steps after a transposed convolution."""
    shape = sized((32, 64, 128, 128), (1, 4, 8, 8))
    return workload("transposed-conv-clamp", lambda: ClampedTransposedConv(shape[1]), values(*shape), dtype=FP32)


def conv_3d_softmax_pool() -> Workload:
    """Softmax over the channels of volumes, and two poolings."""
    shape, outputs = sized(((32, 3, 16, 32, 32), 16), ((1, 3, 10, 12, 12), 8))
    return workload("conv-3d-softmax-pool",
                    lambda: nn.Sequential(nn.Conv3d(3, outputs, 3), nn.Softmax(dim=1), nn.MaxPool3d(2),
                                          nn.MaxPool3d(2)),
                    values(*shape), dtype=FP32)  # fmt: skip


def gemm_group_norm_hardtanh() -> Workload:
    """GroupNorm of a product's rows, cut at both ends."""
    rows, size, groups = sized((1024, 8192, 16), (4, 16, 4))
    return workload("gemm-group-norm-hardtanh",
                    lambda: nn.Sequential(nn.Linear(size, size), nn.GroupNorm(groups, size), nn.Hardtanh(-2.0, 2.0)),
                    values(rows, size), dtype=FP32)  # fmt: skip


def gemm_swish_group_norm() -> Workload:
    """The same product written twice, which a compiler should do once."""
    rows, inputs, outputs, groups = sized((4096, 1024, 4096, 64), (4, 16, 16, 4))
    return workload("gemm-swish-group-norm", lambda: SwishGroupNorm(inputs, outputs, groups), values(rows, inputs),
                    dtype=FP32)  # fmt: skip


def gemm_log_sum_exp() -> Workload:
    """A product of which one value a row is needed."""
    rows, size = sized((1024, 8192), (4, 16))
    return workload("gemm-log-sum-exp", lambda: LogSumExpChain(size), values(rows, size), dtype=FP32)


def gemm_row_sum() -> Workload:
    """A product of which the sums of rows are needed; most of it can be derived away."""
    rows, size = sized((1024, 8192), (4, 16))
    return workload("gemm-row-sum", lambda: ScaledRowSum(size), values(rows, size), dtype=FP32)


def gemm_max_pool_sum() -> Workload:
    """A product, pooled before it is summed."""
    rows, size = sized((128, 16_384), (4, 16))
    return workload("gemm-max-pool-sum", lambda: PooledRowSum(size), values(rows, size), dtype=FP32)


def gemm_dropout_softmax() -> Workload:
    """A classifier's last layer, with a dropout that does nothing."""
    rows, size = sized((128, 16_384), (4, 16))
    return workload("gemm-dropout-softmax",
                    lambda: nn.Sequential(nn.Linear(size, size), nn.Dropout(0.2), nn.Softmax(dim=1)),
                    values(rows, size), dtype=FP32)  # fmt: skip


def conv_min_tanh() -> Workload:
    """A convolution of which one channel's value is needed."""
    shape, outputs = sized(((64, 16, 256, 256), 64), ((1, 4, 8, 8), 8))
    return workload("conv-min-tanh", lambda: ChannelMinimum(shape[1], outputs), values(*shape), dtype=FP32)


def transposed_conv_3d_norm_pool() -> Workload:
    """A norm between a transposed convolution and a pooling of volumes."""
    shape, outputs = sized(((16, 32, 16, 32, 32), 64), ((1, 4, 4, 4, 4), 8))
    return workload("transposed-conv-3d-norm-pool", lambda: VolumeNormPool(shape[1], outputs), values(*shape),
                    dtype=FP32)  # fmt: skip


def conv_3d_group_norm_mean() -> Workload:
    """The mean of a normed convolution; most of it can be derived away."""
    shape, outputs = sized(((64, 3, 24, 32, 32), 24), ((1, 3, 6, 8, 8), 8))
    return workload("conv-3d-group-norm-mean", lambda: VolumeNormMean(outputs), values(*shape), dtype=FP32)


def gemm_instance_norm_residual() -> Workload:
    """InstanceNorm as a norm of rows, and a second input."""
    rows, size = sized((1024, 4096), (4, 16))
    return workload("gemm-instance-norm-residual", lambda: RowNormResidual(size), values(rows, size),
                    values(rows, size), dtype=FP32)  # fmt: skip
