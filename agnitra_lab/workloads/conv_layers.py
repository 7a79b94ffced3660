"""Single convolution and pooling layers that compilers and libraries often serve badly.

Source: KernelBench (Ouyang et al. 2025), level 1, for the kinds of layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.workloads.layers import Shape, layer_workload


class PoolingPyramid(nn.Module):
    """Overlapping maxima, then averages, then one value a 7 x 7 region: [B, C, Y, X] -> [B, C, 7, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.maximum = nn.MaxPool2d(3, stride=2, padding=1)
        self.average = nn.AvgPool2d(3, stride=2, padding=1)
        self.regions = nn.AdaptiveAvgPool2d(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.regions(self.average(self.maximum(x)))


def depthwise_conv(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """A 7 x 7 convolution of each channel by itself."""
    shape: Shape = {"tiny": (1, 8, 16, 16), "small": (8, 192, 64, 64), "full": (32, 384, 56, 56)}[scale]
    channels = shape[1]
    return layer_workload(
        "depthwise-conv", scale, device, dtype, shape,
        lambda: nn.Conv2d(channels, channels, 7, padding=3, groups=channels), "images",
    )  # fmt: skip


def transposed_conv(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """An upsampling of two by a transposed 4 x 4 convolution that halves the channels."""
    shape: Shape = {"tiny": (1, 8, 8, 8), "small": (2, 128, 64, 64), "full": (16, 128, 128, 128)}[scale]
    channels = shape[1]
    return layer_workload(
        "transposed-conv", scale, device, dtype, shape,
        lambda: nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1), "images",
    )  # fmt: skip


def pooling(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """A maximum, an average and an adaptive pooling in a row."""
    shape: Shape = {"tiny": (1, 4, 32, 32), "small": (4, 64, 112, 112), "full": (32, 64, 224, 224)}[scale]
    return layer_workload("pooling", scale, device, dtype, shape, PoolingPyramid, "images")
