"""Models of sound, scenes, clicks and graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sizes import ids, sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

BF16, FP32 = torch.bfloat16, torch.float32
WAVE_STEPS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""Kernel and stride of each convolution of wav2vec 2.0."""


class ConformerLayer(nn.Module):
    """Half an MLP, attention of torch, a gated depthwise convolution, half an MLP (Gulati et al. 2020)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first_mlp, self.second_mlp = self._mlp(width), self._mlp(width)
        self.attention_norm, self.conv_norm, self.last_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.gated = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, 31, padding=15, groups=width)
        self.batch_norm, self.pointwise = nn.BatchNorm1d(width), nn.Conv1d(width, width, 1)

    @staticmethod
    def _mlp(width: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first_mlp(x)
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = F.glu(self.gated(self.conv_norm(x).transpose(1, 2)), dim=1)
        x = x + self.pointwise(F.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)
        return self.last_norm(x + 0.5 * self.second_mlp(x))


class WaveFront(nn.Module):
    """Convolutions of raw sound, a norm of each channel after the first (Baevski et al. 2020)."""

    def __init__(self, channels: int, steps: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(channels if index else 1, channels, kernel, stride, bias=False)
            for index, (kernel, stride) in enumerate(steps)
        )
        self.channel_norm, self.norm = nn.GroupNorm(channels, channels), nn.LayerNorm(channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        for index, conv in enumerate(self.convs):
            x = conv(x)
            x = self.channel_norm(x) if index == 0 else x
            x = F.gelu(x)
        return self.proj(self.norm(x.transpose(1, 2)))


class RadianceField(nn.Module):
    """Waves of a point and a direction, eight linear layers, colour and density (Mildenhall et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [63] + [width + 63 if index == 4 else width for index in range(1, 8)]
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.density, self.features = nn.Linear(width, 1), nn.Linear(width, width)
        self.view, self.colour = nn.Linear(width + 27, width // 2), nn.Linear(width // 2, 3)

    @staticmethod
    def _waves(x: Tensor, count: int) -> Tensor:
        return torch.cat([x] + [wave(x * 2.0**i) for i in range(count) for wave in (torch.sin, torch.cos)], -1)

    def forward(self, points: Tensor, directions: Tensor) -> Tensor:
        points, directions = self._waves(points, 10), self._waves(directions, 4)
        h = points
        for index, layer in enumerate(self.layers):
            h = F.relu(layer(torch.cat([points, h], -1) if index == 4 else h))
        view = F.relu(self.view(torch.cat([self.features(h), directions], -1)))
        return torch.cat([torch.sigmoid(self.colour(view)), F.relu(self.density(h))], -1)


class DeepFM(nn.Module):
    """Pairs of embedded fields by the square of their sum, beside an MLP (Guo et al. 2017)."""

    offsets: Tensor

    def __init__(self, fields: int, rows: int, width: int) -> None:
        super().__init__()
        self.embed, self.first_embed = nn.Embedding(fields * rows, width), nn.Embedding(fields * rows, 1)
        self.register_buffer("offsets", torch.arange(fields) * rows)
        self.mlp = nn.Sequential(
            nn.Linear(fields * width, 400), nn.BatchNorm1d(400), nn.ReLU(),
            nn.Linear(400, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 1),
        )  # fmt: skip

    def forward(self, fields: Tensor) -> Tensor:
        rows = fields + self.offsets
        x = self.embed(rows)
        pairs = 0.5 * (x.sum(1).pow(2) - x.pow(2).sum(1)).sum(1, keepdim=True)
        return torch.sigmoid(self.first_embed(rows).sum(1) + pairs + self.mlp(x.flatten(1)))


class GraphConv(nn.Module):
    """Means over a node's neighbours by index_add, three times (Kipf and Welling 2016)."""

    def __init__(self, nodes: int, width: int) -> None:
        super().__init__()
        self.nodes = nodes
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        ones = torch.ones_like(targets, dtype=x.dtype)
        degree = torch.zeros(self.nodes, device=x.device, dtype=x.dtype).index_add(0, targets, ones).clamp(min=1)
        for layer in self.layers:
            h = layer(x)
            x = F.relu(torch.zeros_like(h).index_add(0, targets, h[sources]) / degree[:, None] + h)
        return x


def conformer() -> Workload:
    """Six layers over twenty seconds of speech."""
    batch, frames, width, heads, depth = sized((16, 500, 512, 8, 6), (1, 12, 16, 2, 1))
    return workload("conformer", lambda: nn.Sequential(*(ConformerLayer(width, heads) for _ in range(depth))),
                    values(batch, frames, width), dtype=BF16, num_residual_layers=24, items=batch,
                    unit="samples")  # fmt: skip


def wav2vec_front() -> Workload:
    """Ten seconds of sound at 16 kHz."""
    batch, length, channels, depth = sized((8, 160_000, 512, 7), (1, 200, 8, 2))
    return workload("wav2vec-front", lambda: WaveFront(channels, WAVE_STEPS[:depth]), values(batch, length),
                    dtype=BF16, items=batch, unit="samples")  # fmt: skip


def radiance_field() -> Workload:
    """Points along rays, in fp32."""
    points, width = sized((65_536, 256), (8, 16))
    return workload("radiance-field", lambda: RadianceField(width), values(points, 3), values(points, 3), dtype=FP32,
                    items=points, unit="samples")  # fmt: skip


def deepfm() -> Workload:
    """Clicks of 26 fields: gathers from one large table."""
    batch, fields, rows, width = sized((8192, 26, 40_000, 16), (4, 4, 16, 8))
    return workload("deepfm", lambda: DeepFM(fields, rows, width), ids(batch, fields, below=rows), dtype=BF16,
                    items=batch, unit="samples")  # fmt: skip


def graph_conv() -> Workload:
    """A random graph of eight edges a node; sums by atomics may differ in their last bits from call to call."""
    nodes, edges, width = sized((50_000, 400_000, 128), (16, 40, 8))
    return workload("graph-conv", lambda: GraphConv(nodes, width), values(nodes, width), ids(edges, below=nodes),
                    ids(edges, below=nodes), dtype=FP32, items=nodes, unit="samples")  # fmt: skip
