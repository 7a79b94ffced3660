"""Whole models of images: convolutional ones, windows of attention, and a mixer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sizes import sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

BF16, FP32 = torch.bfloat16, torch.float32
POOL = 0
"""Stands for a pooling in a list of widths."""
Stage = tuple[int, int, int, int, int]
"""Expansion, channels, blocks, stride, kernel."""


class VGG(nn.Module):
    """Convolutions of three by three and poolings, then wide linear layers (Simonyan and Zisserman 2014)."""

    def __init__(self, widths: Sequence[int], flat: int, hidden: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            if width == POOL:
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(flat, hidden), nn.ReLU(), nn.Dropout(0.0), nn.Linear(hidden, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class DenseNet(nn.Module):
    """Each layer reads all before it, put together by `cat` (Huang et al. 2016)."""

    def __init__(self, channels: int, growth: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for index, depth in enumerate(depths):
            self.blocks.append(nn.ModuleList(self._layer(channels + i * growth, growth) for i in range(depth)))
            channels += depth * growth
            if index < len(depths) - 1:
                self.transitions.append(self._transition(channels))
                channels //= 2
        self.norm, self.head = nn.BatchNorm2d(channels), nn.Linear(channels, 10)

    @staticmethod
    def _layer(channels: int, growth: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, growth, 3, padding=1, bias=False),
            nn.Dropout(0.0),
        )  # fmt: skip

    @staticmethod
    def _transition(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels // 2, 1, bias=False),
            nn.AvgPool2d(2, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            features = [x]
            for layer in block:
                x = layer(x)
                features.append(x)
                x = torch.cat(features, 1)
            if index < len(self.transitions):
                x = self.transitions[index](x)
        x = F.relu(self.norm(x), inplace=True)
        return self.head(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class InvertedResidual(nn.Module):
    """Expand, convolve each channel alone, project (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.is_residual = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)]
        layers += [nn.ReLU6(inplace=True), nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


class MobileNet(nn.Module):
    """MobileNetV2."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        channels, last = 32, 1280
        layers = [nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(inplace=True)]
        for expansion, outputs, depth, stride, _ in stages:
            for index in range(depth):
                layers.append(InvertedResidual(channels, outputs, stride if index == 0 else 1, expansion))
                channels = outputs
        layers += [nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(last, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class SqueezeExcite(nn.Module):
    """Channels weighed by what their means say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))


class EfficientNet(nn.Module):
    """Inverted residuals with squeeze and excitation, SiLU, and kernels of three and five (Tan and Le 2019)."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        stem = channels = 32
        self.blocks = nn.ModuleList()
        for expansion, outputs, depth, stride, kernel in stages:
            for index in range(depth):
                self.blocks.append(
                    self._block(channels, outputs, channels * expansion, kernel, stride if index == 0 else 1)
                )
                channels = outputs
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.SiLU())
        self.head = nn.Linear(channels, 1000)

    @staticmethod
    def _block(inputs: int, outputs: int, hidden: int, kernel: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU(),
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.SiLU(), SqueezeExcite(hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            x = x + y if y.shape == x.shape else y
        return self.head(x.mean((2, 3)))


class MixerBlock(nn.Module):
    """An MLP across the patches, then one across the channels (Tolstikhin et al. 2021)."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.patch_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patches_1, self.patches_2 = nn.Linear(patches, 2 * patches), nn.Linear(2 * patches, patches)
        self.channels_1, self.channels_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch_norm(x).transpose(1, 2)
        x = x + self.patches_2(F.gelu(self.patches_1(y))).transpose(1, 2)
        return x + self.channels_2(F.gelu(self.channels_1(self.channel_norm(x))))


class Mixer(nn.Module):
    """Patches of sixteen by sixteen, mixed; no layer between the last block and the mean."""

    def __init__(self, patches: int, width: int, depth: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.layers = nn.ModuleList(MixerBlock(patches, width) for _ in range(depth))
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


MOBILE_STAGES: list[Stage] = [
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
]  # fmt: skip
EFFICIENT_STAGES: list[Stage] = [
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
]  # fmt: skip


def vgg16() -> Workload:
    """Sixteen images through dense convolutions and a linear layer of 25 088 inputs."""
    stages = [64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL]
    widths, flat, hidden, classes = sized((stages, 512 * 49, 4096, 1000), ([8, POOL], 8 * 256, 32, 10))
    batch, side = sized((16, 224), (1, 32))
    return workload("vgg16", lambda: VGG(widths, flat, hidden, classes), values(batch, 3, side, side), dtype=BF16,
                    items=batch, unit="images")  # fmt: skip


def densenet121() -> Workload:
    """Many small convolutions, each after a norm and a longer `cat`."""
    channels, growth, depths = sized((64, 32, [6, 12, 24, 16]), (8, 4, [2, 2]))
    batch, side = sized((10, 224), (1, 64))
    return workload("densenet121", lambda: DenseNet(channels, growth, depths), values(batch, 3, side, side),
                    dtype=FP32, items=batch, unit="images")  # fmt: skip


def mobilenet_v2() -> Workload:
    """Depthwise convolutions with ReLU6 in fp32."""
    stages, batch, side = sized((MOBILE_STAGES, 32, 224), (MOBILE_STAGES[:1], 1, 32))
    return workload("mobilenet-v2", lambda: MobileNet(stages), values(batch, 3, side, side), dtype=FP32,
                    items=batch, unit="images")  # fmt: skip


def efficientnet() -> Workload:
    """Depthwise convolutions of two sizes with squeeze and excitation."""
    stages, batch, side = sized((EFFICIENT_STAGES, 32, 224), (EFFICIENT_STAGES[:1], 1, 32))
    return workload("efficientnet", lambda: EfficientNet(stages), values(batch, 3, side, side), dtype=BF16,
                    items=batch, unit="images")  # fmt: skip


def mixer() -> Workload:
    """No attention and no convolution: linear layers over transposed patches."""
    patches, width, depth = sized((196, 768, 8), (4, 16, 1))
    batch, side = sized((32, 224), (1, 32))
    return workload("mixer", lambda: Mixer(patches, width, depth), values(batch, 3, side, side), dtype=BF16,
                    num_residual_layers=16, items=batch, unit="images")  # fmt: skip
