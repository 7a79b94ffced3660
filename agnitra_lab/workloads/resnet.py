"""A ResNet-style convolutional classifier with bottleneck blocks.

Source: He et al. 2015, "Deep Residual Learning for Image Recognition", table 1 (the full scale is ResNet-50).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.seeding import init_weights, normal


@dataclass(frozen=True)
class ResNetConfig:
    """Blocks a stage, width of the first stage, and one call's images."""

    num_blocks: tuple[int, ...]
    width: int
    batch: int
    edge: int
    num_classes: int = 1000


SCALES = {
    "tiny": ResNetConfig((1, 1), 8, batch=1, edge=32, num_classes=10),
    "small": ResNetConfig((1, 1, 1, 1), 32, batch=1, edge=128, num_classes=100),
    "full": ResNetConfig((3, 4, 6, 3), 64, batch=64, edge=224),
}


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each with batch norm, around a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != 4 * width:
            conv = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Class logits [B, classes] of images [B, 3, edge, edge]."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, config.width, 7, 2, padding=3, bias=False)
        self.stem_bn = nn.BatchNorm2d(config.width)
        channels, blocks = config.width, []
        for stage, num_blocks in enumerate(config.num_blocks):
            width = config.width * 2**stage
            for index in range(num_blocks):
                blocks.append(Bottleneck(channels, width, stride=2 if index == 0 and stage > 0 else 1))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem_bn(self.stem(images))), 3, 2, padding=1)
        return self.head(self.blocks(x).mean((2, 3)))


def resnet(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Classify a batch of images."""
    config = SCALES[scale]
    model = init_weights(ResNet(config)).to(device, dtype).eval()

    def make_inputs(seed: int) -> Inputs:
        return (normal(seed, (config.batch, 3, config.edge, config.edge), device, dtype),), {}

    args, kwargs = make_inputs(0)
    return Workload("resnet", model, args, kwargs, config.batch, "images", None, make_inputs,
                    settings={"scale": scale, **vars(config)})  # fmt: skip
