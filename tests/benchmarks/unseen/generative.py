"""Models that make images: a diffusion step, a decoder of latents, and a doubling of resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from sizes import ids, sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

BF16 = torch.bfloat16


def group_norm(channels: int) -> nn.GroupNorm:
    """Norm of 32 groups, or of four where the channels do not divide so."""
    return nn.GroupNorm(4 if channels % 32 else 32, channels)


# --- Stable Diffusion ------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two convolutions; the time's embedding is added to each channel between them."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.first_norm, self.first = group_norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.second_norm, self.second = group_norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(F.silu(self.first_norm(x)))
        h = h + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.second(F.silu(self.second_norm(h)))


class Attention(nn.Module):
    """Queries of one sequence, keys and values of another or of the same."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, S, E = x.shape
        q, k, v = (
            part.view(B, -1, self.heads, E // self.heads).transpose(1, 2)
            for part in (self.q(x), self.k(context), self.v(context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, E))


class SpatialTransformer(nn.Module):
    """Pixels attend to one another, then to the prompt; then GeGLU."""

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.into, self.back = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = Attention(channels, channels, heads)
        self.cross_attention = Attention(channels, context, heads)
        self.expand, self.shrink = nn.Linear(channels, 8 * channels), nn.Linear(4 * channels, channels)

    def forward(self, image: Tensor, context: Tensor) -> Tensor:
        B, C, Y, X = image.shape
        x = self.into(self.norm(image)).permute(0, 2, 3, 1).reshape(B, Y * X, C)
        y = self.self_norm(x)
        x = x + self.self_attention(y, y)
        x = x + self.cross_attention(self.cross_norm(x), context)
        y, gate = self.expand(self.mlp_norm(x)).chunk(2, -1)
        x = x + self.shrink(y * F.gelu(gate))
        return self.back(x.reshape(B, Y, X, C).permute(0, 3, 1, 2)) + image


class UNet(nn.Module):
    """Two resolutions of Stable Diffusion's U-Net with skips by `cat` (Rombach et al. 2022)."""

    def __init__(self, channels: int, time: int, context: int, heads: int) -> None:
        super().__init__()
        self.channels, wide = channels, 2 * channels
        self.stem = nn.Conv2d(4, channels, 3, padding=1)
        self.time_mlp = nn.Sequential(nn.Linear(channels, time), nn.SiLU(), nn.Linear(time, time))
        self.outer = ResidualBlock(channels, channels, time)
        self.outer_attention = SpatialTransformer(channels, context, heads)
        self.reduce = nn.Conv2d(channels, channels, 3, 2, 1)
        self.inner = ResidualBlock(channels, wide, time)
        self.inner_attention = SpatialTransformer(wide, context, heads)
        self.middle = ResidualBlock(wide, wide, time)
        self.inner_up = ResidualBlock(2 * wide, wide, time)
        self.enlarge = nn.Conv2d(wide, wide, 3, padding=1)
        self.outer_up = ResidualBlock(wide + channels, channels, time)
        self.norm, self.head = group_norm(channels), nn.Conv2d(channels, 4, 3, padding=1)

    def embedding(self, steps: Tensor, dtype: torch.dtype) -> Tensor:
        """Waves of the time step, through an MLP."""
        half = self.channels // 2
        waves = torch.exp(-math.log(10000) * torch.arange(half, device=steps.device).float() / half)
        angles = steps.float()[:, None] * waves
        return self.time_mlp(torch.cat([angles.cos(), angles.sin()], -1).to(dtype))

    def forward(self, x: Tensor, steps: Tensor, context: Tensor) -> Tensor:
        time = self.embedding(steps, x.dtype)
        outer = self.outer_attention(self.outer(self.stem(x), time), context)
        inner = self.inner_attention(self.inner(self.reduce(outer), time), context)
        y = self.inner_up(torch.cat([self.middle(inner, time), inner], 1), time)
        y = self.enlarge(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        y = self.outer_up(torch.cat([y, outer], 1), time)
        return self.head(F.silu(self.norm(y)))


class LatentDecoder(nn.Module):
    """Latents to pixels: each step a residual block, a doubling and a convolution."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        channels, time = widths[0], 8
        self.stem = nn.Conv2d(4, channels, 3, padding=1)
        self.blocks, self.convs = nn.ModuleList(), nn.ModuleList()
        for width in widths:
            self.blocks.append(ResidualBlock(channels, width, time))
            self.convs.append(nn.Conv2d(width, width, 3, padding=1))
            channels = width
        self.norm, self.head = group_norm(channels), nn.Conv2d(channels, 3, 3, padding=1)
        self.constant = nn.Parameter(torch.empty(1, time))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, conv in zip(self.blocks, self.convs, strict=True):
            x = conv(F.interpolate(block(x, self.constant), scale_factor=2.0))
        return torch.tanh(self.head(F.silu(self.norm(x))))


# --- super-resolution ------------------------------------------------------------------------------------------------


class EDSR(nn.Module):
    """Residual blocks without norms, then channels shuffled into pixels (Lim et al. 2017)."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
            )
            for _ in range(depth)
        )
        self.upscale = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(channels, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x
        for block in self.blocks:
            y = y + 0.1 * block(y)
        return self.upscale(x + y)


def diffusion_unet() -> Workload:
    """One step of four latents with a prompt of 77 tokens."""
    channels, time, context, heads = sized((320, 1280, 768, 8), (16, 32, 16, 2))
    batch, side, steps, tokens = sized((4, 64, 1000, 77), (1, 8, 100, 5))
    return workload("diffusion-unet", lambda: UNet(channels, time, context, heads), values(batch, 4, side, side),
                    ids(batch, below=steps), values(batch, tokens, context), dtype=BF16, items=batch,
                    unit="images")  # fmt: skip


def vae_decoder() -> Workload:
    """A latent of 64 by 64 to an image of 512 by 512."""
    widths, side = sized(([256, 128, 128], 64), ([8, 8], 4))
    return workload("vae-decoder", lambda: LatentDecoder(widths), values(1, 4, side, side), dtype=BF16,
                    unit="images")  # fmt: skip


def super_resolution() -> Workload:
    """Images of 256 by 256 to twice the side."""
    channels, depth, batch, side = sized((64, 12, 4, 256), (8, 2, 1, 8))
    return workload("super-resolution", lambda: EDSR(channels, depth), values(batch, 3, side, side), dtype=BF16,
                    items=batch, unit="images")  # fmt: skip
