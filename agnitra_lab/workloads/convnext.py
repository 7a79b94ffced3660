"""ConvNeXt: depthwise 7x7 convolution, LayerNorm over channels last, and a two-layer MLP.

Shape legend: B batch, C channels, Y rows, X columns.

Source: Liu et al. 2022, "A ConvNet for the 2020s" (widths of ConvNeXt-T); layout of facebookresearch/ConvNeXt.
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
class ConvNeXtConfig:
    """Blocks and channels a stage, and one call's images."""

    num_blocks: tuple[int, ...]
    widths: tuple[int, ...]
    batch: int
    edge: int
    num_classes: int = 1000


SCALES = {
    "tiny": ConvNeXtConfig((1, 1), (16, 32), batch=1, edge=32, num_classes=10),
    "small": ConvNeXtConfig((1, 1, 2, 1), (24, 48, 96, 192), batch=4, edge=192, num_classes=100),
    "full": ConvNeXtConfig((2, 2, 3, 2), (96, 192, 384, 768), batch=64, edge=224),
}


class ChannelNorm(nn.Module):
    """LayerNorm over the second dimension of [B, C, Y, X]."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x_BCYX: Tensor) -> Tensor:
        mean_B1YX = x_BCYX.mean(1, keepdim=True)
        variance_B1YX = (x_BCYX - mean_B1YX).pow(2).mean(1, keepdim=True)
        x_BCYX = (x_BCYX - mean_B1YX) / torch.sqrt(variance_B1YX + self.eps)
        return self.weight[:, None, None] * x_BCYX + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, then the MLP in channels last, around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        out_BYXC = self.norm(self.dwconv(x_BCYX).permute(0, 2, 3, 1))
        out_BYXC = self.gamma * self.down(F.gelu(self.pwconv1(out_BYXC)))
        return x_BCYX + out_BYXC.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Class logits [B, classes] of images [B, 3, edge, edge]."""

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        widths = config.widths
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0])]
        for stage, num_blocks in enumerate(config.num_blocks):
            if stage:
                layers += [ChannelNorm(widths[stage - 1]), nn.Conv2d(widths[stage - 1], widths[stage], 2, stride=2)]
            layers += [ConvNeXtBlock(widths[stage]) for _ in range(num_blocks)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(images).mean([-2, -1])))


def classify(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Classify a batch of images with half the blocks of ConvNeXt-T."""
    config = SCALES[scale]
    model = seeded(lambda: ConvNeXt(config), device, dtype, num_residual_layers=sum(config.num_blocks))

    def make_inputs(seed: int) -> Inputs:
        return (normal(seed, (config.batch, 3, config.edge, config.edge), device, dtype),), {}

    return assemble("convnext", model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch, unit="images")  # fmt: skip
