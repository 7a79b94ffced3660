"""A video classifier of 3-d residual convolutions.

Shape legend: B batch, C channels, T frames, Y rows, X columns.

Source: Tran et al. 2018, "A Closer Look at Spatiotemporal Convolutions" (R3D-18's widths, one block a stage).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.seeding import normal


@dataclass(frozen=True)
class VideoConfig:
    """Channels a stage, and one call's clips."""

    widths: tuple[int, ...]
    batch: int
    num_frames: int
    edge: int
    num_classes: int = 400


SCALES = {
    "tiny": VideoConfig((8, 16), batch=1, num_frames=4, edge=16, num_classes=10),
    "small": VideoConfig((16, 32, 64), batch=1, num_frames=8, edge=80, num_classes=100),
    "full": VideoConfig((64, 128, 256, 512), batch=8, num_frames=16, edge=112),
}


class BasicBlock3d(nn.Module):
    """Two 3x3x3 convolutions with batch norm around a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            conv = nn.Conv3d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm3d(width))

    def forward(self, x_BCTYX: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x_BCTYX)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x_BCTYX))


class VideoResNet(nn.Module):
    """Class logits [B, classes] of clips [B, 3, T, edge, edge]."""

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        width = config.widths[0]
        self.stem = nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), padding=(1, 3, 3), bias=False)
        self.stem_bn = nn.BatchNorm3d(width)
        blocks, channels = [], width
        for stage, width in enumerate(config.widths):
            blocks.append(BasicBlock3d(channels, width, stride=2 if stage else 1))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.head = nn.Linear(channels, config.num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem_bn(self.stem(clips))))
        return self.head(self.pool(x).flatten(1))


def classify(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Classify a batch of clips."""
    config = SCALES[scale]
    model = seeded(lambda: VideoResNet(config), device, dtype)

    def make_inputs(seed: int) -> Inputs:
        return (normal(seed, (config.batch, 3, config.num_frames, config.edge, config.edge), device, dtype),), {}

    return assemble("video-conv3d", model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch, unit="samples")  # fmt: skip
