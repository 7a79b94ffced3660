"""Models of images, sound and tables, and their layers, in plain torch as people write them (see written_language.py).

Shape legend: B batch, C channels, Y and X rows and columns, T time steps, E hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from written_language import B, Built, E, Formula, hidden, linear

C = 16


def image(*shape: int, seed: int = 1) -> Tensor:
    return hidden(*(shape or (B, C, 8, 8)), seed=seed)


class SwinBlock(nn.Module):
    """Windows of 4 x 4, shifted by two: a bias from a table and a mask of what the shift brought together."""

    def __init__(self, heads: int = 2, window: int = 4, side: int = 8) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (E // heads) ** -0.5
        self.first, self.second = nn.LayerNorm(E), nn.LayerNorm(E)
        self.qkv, self.proj, self.softmax = linear(3 * E, E, True), linear(E, E, True), nn.Softmax(dim=-1)
        self.mlp = nn.Sequential(linear(4 * E, E, True), nn.GELU(), linear(E, 4 * E, True))
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        distance = (places[:, :, None] - places[:, None, :]) + window - 1
        self.register_buffer("index", distance[0] * (2 * window - 1) + distance[1])
        regions = torch.zeros(1, side, side, 1)
        for number, (rows, columns) in enumerate([(a, b) for a in self._cuts() for b in self._cuts()]):
            regions[:, rows, columns] = number
        regions = self.windows(regions).squeeze(-1)
        mask = regions[:, None, :] - regions[:, :, None]
        self.register_buffer("mask", mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0))

    def _cuts(self) -> list[slice]:
        return [slice(0, -self.window), slice(-self.window, -2), slice(-2, None)]

    def windows(self, x: Tensor) -> Tensor:
        b, height, width, c = x.shape
        w = self.window
        x = x.view(b, height // w, w, width // w, w, c)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, c)

    def attend(self, x: Tensor) -> Tensor:
        n, s, _ = x.shape
        qkv = self.qkv(x).reshape(n, s, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * self.scale
        scores = q @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(s, s, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        count = self.mask.shape[0]
        scores = scores.view(n // count, count, self.heads, s, s) + self.mask.unsqueeze(1).unsqueeze(0)
        weights = self.softmax(scores.view(-1, self.heads, s, s))
        return self.proj((weights @ v).transpose(1, 2).reshape(n, s, E))

    def forward(self, x: Tensor) -> Tensor:
        b, height, width, _ = x.shape
        w = self.window
        h = torch.roll(self.first(x), shifts=(-2, -2), dims=(1, 2))
        h = self.attend(self.windows(h)).view(b, height // w, width // w, w, w, E)
        h = h.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, height, width, E)
        x = x + torch.roll(h, shifts=(2, 2), dims=(1, 2))
        return x + self.mlp(self.second(x))


class ViTBlock(nn.Module):
    """timm: packed q k v by unbind, the query scaled before the product, LayerScale."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (E // heads) ** -0.5
        self.first, self.second = nn.LayerNorm(E, eps=1e-6), nn.LayerNorm(E, eps=1e-6)
        self.qkv, self.proj = linear(3 * E, E, True), linear(E, E, True)
        self.up, self.down = linear(4 * E, E, True), linear(E, 4 * E, True)
        self.gamma, self.drop = nn.Parameter(torch.rand(E)), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        qkv = self.qkv(self.first(x)).reshape(b, s, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = self.drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1))
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(b, s, E)) * self.gamma
        return x + self.down(self.drop(F.gelu(self.up(self.second(x))))) * self.gamma


class UNetBlock(nn.Module):
    """Stable Diffusion's residual block: group norm, SiLU, convolution, a time embedding, a 1 x 1 shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(4, C), nn.GroupNorm(4, 2 * C)
        self.conv1, self.conv2 = nn.Conv2d(C, 2 * C, 3, padding=1), nn.Conv2d(2 * C, 2 * C, 3, padding=1)
        self.time, self.shortcut = linear(2 * C, E, True), nn.Conv2d(C, 2 * C, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.first(x)))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.second(h)))
        return (self.shortcut(x) + h) / 1.0


class ConvNeXt2(nn.Module):
    """ConvNeXt V2: depthwise 7 x 7, channels last by permute, global response normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.dw, self.norm = nn.Conv2d(C, C, 7, padding=3, groups=C), nn.LayerNorm(C, eps=1e-6)
        self.up, self.down = linear(4 * C, C, True), linear(C, 4 * C, True)
        self.gamma, self.beta = nn.Parameter(torch.randn(1, 1, 1, 4 * C)), nn.Parameter(torch.randn(1, 1, 1, 4 * C))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.dw(x).permute(0, 2, 3, 1))
        h = F.gelu(self.up(h))
        length = torch.norm(h, p=2, dim=(1, 2), keepdim=True)
        h = self.gamma * (h * (length / (length.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + h
        return x + self.down(h).permute(0, 3, 1, 2)


class MobileBlock(nn.Module):
    """MobileNet V3: expand by 1 x 1, depthwise, squeeze and excite, project by 1 x 1, each with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(C, 4 * C, 1, bias=False), nn.BatchNorm2d(4 * C)
        self.dw, self.bn2 = nn.Conv2d(4 * C, 4 * C, 3, padding=1, groups=4 * C, bias=False), nn.BatchNorm2d(4 * C)
        self.squeeze, self.excite = nn.Conv2d(4 * C, C, 1), nn.Conv2d(C, 4 * C, 1)
        self.project, self.bn3 = nn.Conv2d(4 * C, C, 1, bias=False), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardswish(self.bn1(self.expand(x)))
        h = F.hardswish(self.bn2(self.dw(h)))
        s = F.adaptive_avg_pool2d(h, 1)
        h = h * F.hardsigmoid(self.excite(F.relu(self.squeeze(s))))
        return x + self.bn3(self.project(h))


class WaveNet(nn.Module):
    """Dilated causal convolutions with a tanh gate, and 1 x 1 ones to the residual and the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv1d(C, C, 2, dilation=2**i) for i in range(2))
        self.gates = nn.ModuleList(nn.Conv1d(C, C, 2, dilation=2**i) for i in range(2))
        self.residuals = nn.ModuleList(nn.Conv1d(C, C, 1) for _ in range(2))
        self.skips = nn.ModuleList(nn.Conv1d(C, C, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for index, layers in enumerate(zip(self.filters, self.gates, self.residuals, self.skips, strict=True)):
            filters, gate, residual, skip = layers
            padded = F.pad(x, (2**index, 0))
            h = torch.tanh(filters(padded)) * torch.sigmoid(gate(padded))
            total = total + skip(h)
            x = x + residual(h)
        return F.relu(total)


class ConformerConv(nn.Module):
    """The convolution module of a Conformer: 1 x 1, GLU over channels, depthwise, batch norm, SiLU, 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(C), nn.Conv1d(C, 2 * C, 1)
        self.dw, self.bn, self.second = nn.Conv1d(C, C, 5, padding=2, groups=C), nn.BatchNorm1d(C), nn.Conv1d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.norm(x).transpose(1, 2))
        h = self.second(F.silu(self.bn(self.dw(F.glu(h, dim=1)))))
        return x + h.transpose(1, 2)


class BasicBlock(nn.Module):
    """ResNet: two 3 x 3 convolutions, a strided 1 x 1 shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, 2 * C, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * C)
        self.conv2, self.bn2 = nn.Conv2d(2 * C, 2 * C, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * C)
        self.down = nn.Sequential(nn.Conv2d(C, 2 * C, 1, 2, bias=False), nn.BatchNorm2d(2 * C))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return F.relu(out, inplace=True)


def _style(m: Any, x: Tensor) -> Tensor:
    """Normalise each image's channels and relu, between convolutions."""
    return m.conv2(F.relu(m.norm(m.conv1(x))))


def _adain(m: Any, x: Tensor, style: Tensor) -> Tensor:
    """Give the statistics of each channel of one image to another: the deviation, eps inside the root."""
    n, c = x.shape[:2]
    mean = x.view(n, c, -1).mean(dim=2).view(n, c, 1, 1)
    std = (x.view(n, c, -1).var(dim=2) + 1e-5).sqrt().view(n, c, 1, 1)
    scale, shift = m.to_style(style).chunk(2, dim=1)
    return (x - mean) / std * scale[:, :, None, None] + shift[:, :, None, None]


def _mixer(m: Any, x: Tensor) -> Tensor:
    h = m.first(x).transpose(1, 2)
    x = x + m.tokens(h).transpose(1, 2)
    return x + m.channels(m.second(x))


def _towers(m: Any, *features: Tensor) -> Tensor:
    """One small MLP for each feature, as multi-task recommenders have them."""
    outs = [tower(feature) for tower, feature in zip(m.towers, features, strict=True)]
    return m.head(torch.cat(outs, dim=-1)).sigmoid()


def _cross(m: Any, x: Tensor) -> Tensor:
    """DCN V2: x0 * (W x + b) + x."""
    base = x
    for layer in m.layers:
        x = base * layer(x) + x
    return m.head(x)


def _pointnet(m: Any, points: Tensor) -> Tensor:
    h = F.relu(m.bn1(m.conv1(points)))
    h = m.bn2(m.conv2(h))
    return m.head(torch.max(h, 2)[0])


def _segment(m: Any, x: Tensor) -> Tensor:
    """Give class chances of each pixel: softmax over the channels, a 1 x 1 head, bilinear upsampling."""
    logits = F.interpolate(m.head(m.body(x).relu()), scale_factor=2, mode="bilinear", align_corners=False)
    return torch.softmax(logits, dim=1)


def _netvlad(m: Any, x: Tensor) -> Tensor:
    """Soft-assign descriptors to clusters: a product with a [K, N] Parameter, a batch norm, softmax, weighted sums."""
    b, n, e = x.shape
    chances = F.softmax(m.norm(torch.matmul(x.view(-1, e), m.clusters)), dim=1)[:, :6].view(b, n, 6)
    totals = chances.sum(dim=1, keepdim=True) * m.centres
    vlad = torch.matmul(chances.transpose(1, 2), x).transpose(1, 2) - totals
    return F.normalize(F.normalize(vlad).reshape(b, -1))


def _cosine(m: Any, x: Tensor) -> Tensor:
    """Attend by cosines, scaled by a learned temperature of each head and shifted by a learned bias (Swin V2)."""
    b, s, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, s, 3, 4, E // 4).permute(2, 0, 3, 1, 4).unbind(0)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * torch.clamp(m.scale, max=4.6).exp() + 16 * torch.sigmoid(m.bias)
    return m.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, s, E))


def mlp(rows: int, columns: int) -> nn.Sequential:
    return nn.Sequential(linear(4 * E, columns, True), nn.GELU(), linear(rows, 4 * E, True))


def tower() -> nn.Sequential:
    return nn.Sequential(linear(2 * E, E, True), nn.ReLU(), linear(E, 2 * E, True), nn.ReLU())


def with_statistics(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights that are not those of a fresh module."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.running_var, module.weight.data, module.running_mean, module.bias.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


VISION: dict[str, Callable[[], Built]] = {
    "swin block": lambda: (SwinBlock(), (image(B, 8, 8, E),)),
    "vit block": lambda: (ViTBlock(), (hidden(),)),
    "unet block": lambda: (UNetBlock(), (image(), hidden(B, E))),
    "unet block, channels innermost": lambda: (
        UNetBlock().to(memory_format=torch.channels_last), (image().to(memory_format=torch.channels_last), hidden(B, E))
    ),
    "convnext v2": lambda: (ConvNeXt2(), (image(),)),
    "mobilenet v3 block": lambda: (MobileBlock(), (image(),)),
    "wavenet": lambda: (WaveNet(), (image(B, C, 20),)),
    "conformer convolution": lambda: (ConformerConv(), (image(B, 20, C),)),
    "resnet block": lambda: (BasicBlock(), (image(),)),
    "style transfer": lambda: (
        Formula(_style, conv1=nn.Conv2d(C, C, 3), conv2=nn.Conv2d(C, C, 3), norm=nn.InstanceNorm2d(C, affine=True)),
        (image(),),
    ),
    "adain": lambda: (Formula(_adain, to_style=linear(2 * C, E, True)), (image(), hidden(B, E))),
    "mlp mixer": lambda: (
        Formula(_mixer, first=nn.LayerNorm(E), second=nn.LayerNorm(E), tokens=mlp(12, 12), channels=mlp(E, E)),
        (hidden(),),
    ),
    "batch norm mlp": lambda: (
        nn.Sequential(linear(E, E), nn.BatchNorm1d(E), nn.ReLU(), linear(E, E, True), nn.BatchNorm1d(E), nn.ReLU()),
        (hidden(24, E),),
    ),
    "towers": lambda: (
        Formula(_towers, towers=nn.ModuleList(tower() for _ in range(4)), head=linear(1, 4 * E, True)),
        tuple(hidden(24, E, seed=seed) for seed in range(4)),
    ),
    "cross network": lambda: (
        Formula(_cross, layers=nn.ModuleList(linear(E, E, True) for _ in range(2)), head=linear(1, E)), (hidden(24, E),)
    ),
    "pointnet": lambda: (
        Formula(_pointnet, conv1=nn.Conv1d(3, C, 1), conv2=nn.Conv1d(C, E, 1), bn1=nn.BatchNorm1d(C),
                bn2=nn.BatchNorm1d(E), head=linear(5, E, True)), (image(B, 3, 30),)
    ),
    "netvlad": lambda: (
        Formula(_netvlad, clusters=nn.Parameter(torch.randn(E, 7) / E), norm=nn.BatchNorm1d(7),
                centres=nn.Parameter(torch.randn(1, E, 6))), (hidden(),)
    ),
    "cosine attention": lambda: (
        Formula(_cosine, qkv=linear(3 * E, E, True), proj=linear(E, E), scale=nn.Parameter(torch.randn(4, 1, 1)),
                bias=nn.Parameter(torch.randn(4, 12, 12))), (hidden(),)
    ),
    "segmentation head": lambda: (
        Formula(_segment, body=nn.Conv2d(C, C, 3, padding=1), head=nn.Conv2d(C, 5, 1)), (image(),)
    ),
}  # fmt: skip
"""Name -> builder of a module and the inputs of one call."""
