"""Single layers and losses, of the kinds of KernelBench's level 1: none is a layer of the suite."""

from __future__ import annotations

import math

import torch
from sizes import Formula, sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

FP32 = torch.float32


# --- products --------------------------------------------------------------------------------------------------------


def tall_skinny_product() -> Workload:
    """A tall thin matrix times a flat wide one: the output is many times the inputs."""
    rows, inner = sized((8192, 64), (32, 4))
    return workload("tall-skinny-product", lambda: Formula(torch.matmul), values(rows, inner), values(inner, rows),
                    dtype=FP32)  # fmt: skip


def matrix_vector_product() -> Workload:
    """Few long rows times one vector."""
    rows, columns = sized((512, 131_072), (16, 64))
    return workload("matrix-vector-product", lambda: Formula(torch.matmul), values(rows, columns), values(columns, 1),
                    dtype=FP32)  # fmt: skip


def transposed_product() -> Workload:
    """Both matrices lie transposed."""
    inner, rows, columns = sized((4096, 2048, 4096), (12, 16, 8))
    return workload("transposed-product", lambda: Formula(lambda a, b: torch.matmul(a.T, b.T)), values(inner, rows),
                    values(columns, inner), dtype=FP32)  # fmt: skip


def triangular_product() -> Workload:
    """Two lower triangles, whose product is one too."""
    size = sized(4096, 16)

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        return torch.tril(torch.matmul(torch.tril(a), torch.tril(b)))

    return workload("triangular-product", lambda: Formula(multiply), values(size, size), values(size, size), dtype=FP32)


def einsum_of_four_dimensions() -> Workload:
    """A tensor of four dimensions times a matrix, spelled as an einsum."""
    shape, outputs = sized(((8, 128, 256, 256), 768), ((1, 4, 4, 8), 6))
    return workload("einsum-of-four-dimensions", lambda: Formula(lambda a, b: torch.einsum("bijl,lk->bijk", a, b)),
                    values(*shape), values(shape[-1], outputs), dtype=FP32)  # fmt: skip


# --- activations and norms -------------------------------------------------------------------------------------------


def gelu_by_formula() -> Workload:
    """The tanh approximation of GELU in single steps."""
    shape = sized((8192, 8192), (8, 16))

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))

    return workload("gelu-by-formula", lambda: Formula(gelu), values(*shape), dtype=FP32)


def group_norm() -> Workload:
    """GroupNorm of large images."""
    shape = sized((32, 64, 192, 192), (2, 8, 8, 8))
    return workload("group-norm", lambda: nn.GroupNorm(8, shape[1]), values(*shape), dtype=FP32)


def frobenius_norm() -> Workload:
    """A whole tensor divided by its one norm."""
    shape = sized((32, 64, 192, 192), (2, 4, 8, 8))
    return workload("frobenius-norm", lambda: Formula(lambda x: x / torch.norm(x, p="fro")), values(*shape), dtype=FP32)


def unit_rows() -> Workload:
    """Long rows divided by their Euclidean norms."""
    shape = sized((2048, 32_768), (4, 64))
    return workload("unit-rows", lambda: Formula(lambda x: x / torch.norm(x, p=2, dim=1, keepdim=True)),
                    values(*shape), dtype=FP32)  # fmt: skip


def log_softmax() -> Workload:
    """Log-softmax of rows longer than one block's registers."""
    shape = sized((1024, 65_536), (4, 64))
    return workload("log-softmax", lambda: Formula(lambda x: torch.log_softmax(x, dim=1)), values(*shape), dtype=FP32)


# --- reductions and scans --------------------------------------------------------------------------------------------


def max_pool_3d() -> Workload:
    """Dilated maxima over volumes."""
    shape = sized((8, 32, 64, 64, 64), (1, 2, 8, 8, 8))
    return workload("max-pool-3d", lambda: nn.MaxPool3d(3, 2, 1, dilation=2), values(*shape), dtype=FP32)


def average_pool_1d() -> Workload:
    """Overlapping means along a line."""
    shape = sized((64, 128, 8192), (1, 2, 64))
    return workload("average-pool-1d", lambda: nn.AvgPool1d(8, 1, 4), values(*shape), dtype=FP32)


def argmax_of_middle_dimension() -> Workload:
    """Where the largest value lies, along a dimension whose elements lie an odd distance apart."""
    shape = sized((64, 1024, 1023), (2, 8, 6))
    return workload("argmax-of-middle-dimension", lambda: Formula(lambda x: torch.argmax(x, dim=1)), values(*shape),
                    dtype=FP32)  # fmt: skip


def reversed_cumsum() -> Workload:
    """Running sums from the end, by two flips."""
    shape = sized((2048, 32_768), (4, 64))
    return workload("reversed-cumsum", lambda: Formula(lambda x: torch.cumsum(x.flip(1), dim=1).flip(1)),
                    values(*shape), dtype=FP32)  # fmt: skip


def cumprod() -> Workload:
    """Running products of factors about one."""
    shape = sized((2048, 32_768), (4, 64))

    def multiply(x: Tensor) -> Tensor:
        return torch.cumprod(torch.sigmoid(x) * 0.1 + 0.95, dim=1)

    return workload("cumprod", lambda: Formula(multiply), values(*shape), dtype=FP32)


# --- convolutions ----------------------------------------------------------------------------------------------------


def oblong_conv_2d() -> Workload:
    """A kernel and an image that are not square."""
    shape, outputs = sized(((8, 64, 512, 256), 128), ((1, 4, 8, 12), 8))
    return workload("oblong-conv-2d", lambda: nn.Conv2d(shape[1], outputs, (5, 7)), values(*shape), dtype=FP32)


def transposed_conv_1d() -> Workload:
    """A strided and dilated transposed convolution along a line."""
    shape, outputs = sized(((32, 64, 16_384), 128), ((1, 4, 16), 8))
    return workload("transposed-conv-1d",
                    lambda: nn.ConvTranspose1d(shape[1], outputs, 3, stride=2, padding=1, dilation=2),
                    values(*shape), dtype=FP32)  # fmt: skip


def separable_conv_2d() -> Workload:
    """A depthwise convolution, then a pointwise one."""
    shape, outputs = sized(((16, 64, 256, 256), 128), ((1, 4, 8, 8), 8))
    channels = shape[1]

    def build() -> nn.Module:
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        return nn.Sequential(depthwise, nn.Conv2d(channels, outputs, 1, bias=False))

    return workload("separable-conv-2d", build, values(*shape), dtype=FP32)


# --- losses and attention --------------------------------------------------------------------------------------------


def divergence_of_softmaxes() -> Workload:
    """Kullback-Leibler divergence of two distributions that are made in the graph."""
    shape = sized((4096, 8192), (4, 64))

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(torch.log(p.softmax(-1)), q.softmax(-1), reduction="batchmean")

    return workload("divergence-of-softmaxes", lambda: Formula(divergence), values(*shape), values(*shape), dtype=FP32)


def cosine_loss() -> Workload:
    """One minus the cosine of two rows, averaged."""
    shape = sized((8192, 4096), (4, 64))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return torch.mean(1 - F.cosine_similarity(a, b, dim=1))

    return workload("cosine-loss", lambda: Formula(loss), values(*shape), values(*shape), dtype=FP32)


def dot_product_attention() -> Workload:
    """Attention of torch without a mask, q, k and v as inputs."""
    shape = sized((8, 32, 1024, 128), (1, 2, 16, 8))
    return workload("dot-product-attention", lambda: Formula(F.scaled_dot_product_attention), values(*shape),
                    values(*shape), values(*shape), dtype=torch.bfloat16)  # fmt: skip
