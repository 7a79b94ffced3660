"""More single layers in fp32: norms, reductions, scans, products of odd sizes, convolutions of other ranks."""

from __future__ import annotations

import torch
from sizes import Formula, sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

FP32 = torch.float32


# --- norms and activations -------------------------------------------------------------------------------------------


def batch_norm() -> Workload:
    """BatchNorm with its running statistics, on images."""
    shape = sized((32, 64, 256, 256), (2, 4, 8, 8))
    return workload("batch-norm", lambda: nn.BatchNorm2d(shape[1]), values(*shape), dtype=FP32)


def instance_norm() -> Workload:
    """Each image and channel normed for itself."""
    shape = sized((32, 64, 256, 256), (2, 4, 8, 8))
    return workload("instance-norm", lambda: nn.InstanceNorm2d(shape[1]), values(*shape), dtype=FP32)


def mean_absolute_norm() -> Workload:
    """Long rows divided by the mean of their absolute values."""
    shape = sized((2048, 32_768), (4, 64))
    return workload("mean-absolute-norm", lambda: Formula(lambda x: x / torch.mean(torch.abs(x), dim=1, keepdim=True)),
                    values(*shape), dtype=FP32)  # fmt: skip


def softplus() -> Workload:
    """One pointwise function of torch."""
    shape = sized((8192, 16_384), (4, 64))
    return workload("softplus", lambda: Formula(F.softplus), values(*shape), dtype=FP32)


# --- reductions and scans --------------------------------------------------------------------------------------------


def minimum_of_middle_dimension() -> Workload:
    """Smallest values along a dimension whose elements lie an odd distance apart."""
    shape = sized((64, 1024, 1023), (2, 8, 6))
    return workload("minimum-of-middle-dimension", lambda: Formula(lambda x: torch.min(x, dim=1)[0]), values(*shape),
                    dtype=FP32)  # fmt: skip


def mean_of_first_dimension() -> Workload:
    """Few long sums side by side."""
    shape = sized((16_384, 3000), (8, 6))
    return workload("mean-of-first-dimension", lambda: Formula(lambda x: torch.mean(x, dim=0)), values(*shape),
                    dtype=FP32)  # fmt: skip


def masked_cumsum() -> Workload:
    """Running sums of what a mask lets through."""
    shape = sized((2048, 32_768), (4, 64))

    def add(x: Tensor, gate: Tensor) -> Tensor:
        return torch.cumsum(x * (gate > 0), dim=1)

    return workload("masked-cumsum", lambda: Formula(add), values(*shape), values(*shape), dtype=FP32)


def exclusive_cumsum() -> Workload:
    """Running sums that begin with zero."""
    shape = sized((2048, 32_768), (4, 64))

    def add(x: Tensor) -> Tensor:
        return torch.cumsum(torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1), dim=1)

    return workload("exclusive-cumsum", lambda: Formula(add), values(*shape), dtype=FP32)


def top_values() -> Workload:
    """The largest values of each row, and where they are."""
    shape = sized((4096, 32_000), (4, 64))
    return workload("top-values", lambda: Formula(lambda x: torch.topk(x, 8, dim=-1)), values(*shape), dtype=FP32)


# --- products --------------------------------------------------------------------------------------------------------


def batched_product() -> Workload:
    """Each pair of matrices for itself."""
    batch, rows, inner, columns = sized((64, 512, 1024, 1024), (2, 8, 12, 8))
    return workload("batched-product", lambda: Formula(torch.bmm), values(batch, rows, inner),
                    values(batch, inner, columns), dtype=FP32)  # fmt: skip


def product_of_short_rows() -> Workload:
    """An inner dimension of 64: the result is what moves."""
    rows, inner = sized((16_384, 64), (16, 4))
    return workload("product-of-short-rows", lambda: Formula(torch.matmul), values(rows, inner), values(inner, rows),
                    dtype=FP32)  # fmt: skip


def product_of_long_rows() -> Workload:
    """A small result over an inner dimension of half a million."""
    rows, inner = sized((256, 524_288), (4, 64))
    return workload("product-of-long-rows", lambda: Formula(torch.matmul), values(rows, inner), values(inner, rows),
                    dtype=FP32)  # fmt: skip


def product_of_odd_sizes() -> Workload:
    """Sizes that no block divides."""
    rows, inner, columns = sized((8205, 2949, 5921), (9, 7, 11))
    return workload("product-of-odd-sizes", lambda: Formula(torch.matmul), values(rows, inner), values(inner, columns),
                    dtype=FP32)  # fmt: skip


def product_of_three_dimensions() -> Workload:
    """A batch of matrices with one right operand."""
    shape, columns = sized(((16, 1024, 2048), 768), ((2, 6, 8), 6))
    return workload("product-of-three-dimensions", lambda: Formula(torch.matmul), values(*shape),
                    values(shape[-1], columns), dtype=FP32)  # fmt: skip


def upper_triangular_product() -> Workload:
    """Triangles that the caller has already made, and a result that is cut to one."""
    size = sized(4096, 16)

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        return torch.triu(torch.matmul(a, b))

    return workload("upper-triangular-product", lambda: Formula(multiply), values(size, size), values(size, size),
                    dtype=FP32)  # fmt: skip


# --- convolutions and pools ------------------------------------------------------------------------------------------


def dilated_conv_1d() -> Workload:
    """A strided and dilated convolution along a line."""
    shape, outputs = sized(((32, 64, 131_072), 128), ((1, 4, 64), 8))
    return workload("dilated-conv-1d", lambda: nn.Conv1d(shape[1], outputs, 3, stride=3, dilation=4, bias=False),
                    values(*shape), dtype=FP32)  # fmt: skip


def oblong_conv_3d() -> Workload:
    """A kernel of three different sizes over volumes."""
    shape, outputs = sized(((8, 3, 64, 64, 64), 64), ((1, 3, 8, 8, 8), 8))
    return workload("oblong-conv-3d", lambda: nn.Conv3d(shape[1], outputs, (3, 5, 7), bias=False), values(*shape),
                    dtype=FP32)  # fmt: skip


def transposed_conv_3d() -> Workload:
    """A strided transposed convolution of volumes."""
    shape, outputs = sized(((8, 32, 16, 32, 32), 64), ((1, 4, 4, 4, 4), 8))
    return workload("transposed-conv-3d", lambda: nn.ConvTranspose3d(shape[1], outputs, 3, stride=2, bias=False),
                    values(*shape), dtype=FP32)  # fmt: skip


def oblong_depthwise_conv() -> Workload:
    """Each channel for itself, with a kernel that is not square."""
    shape = sized((32, 128, 128, 256), (1, 4, 12, 12))
    return workload("oblong-depthwise-conv", lambda: nn.Conv2d(shape[1], shape[1], (3, 7), groups=shape[1]),
                    values(*shape), dtype=FP32)  # fmt: skip


def pointwise_conv() -> Workload:
    """A kernel of one pixel."""
    shape, outputs = sized(((16, 64, 512, 512), 128), ((1, 4, 8, 8), 8))
    return workload("pointwise-conv", lambda: nn.Conv2d(shape[1], outputs, 1, bias=False), values(*shape), dtype=FP32)


def wide_conv_2d() -> Workload:
    """The 3 x 3 convolution that fills most networks."""
    shape, outputs = sized(((32, 256, 56, 56), 256), ((1, 4, 8, 8), 8))
    return workload("wide-conv-2d", lambda: nn.Conv2d(shape[1], outputs, 3, padding=1), values(*shape), dtype=FP32)


def max_pool_1d() -> Workload:
    """Dilated maxima along a line."""
    shape = sized((64, 192, 32_768), (1, 2, 64))
    return workload("max-pool-1d", lambda: nn.MaxPool1d(8, 1, 4, dilation=3), values(*shape), dtype=FP32)


def average_pool_3d() -> Workload:
    """Overlapping means over volumes."""
    shape = sized((16, 32, 64, 64, 64), (1, 2, 8, 8, 8))
    return workload("average-pool-3d", lambda: nn.AvgPool3d(3, 2, 1), values(*shape), dtype=FP32)
