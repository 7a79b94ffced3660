"""Swin: attention in shifted windows (Liu et al. 2021).

Shape legend: B images, Y and X rows and columns, N windows of all images, S pixels of a window, H heads, E channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sizes import sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload


@dataclass(frozen=True)
class SwinSizes:
    """Widths and depths.

    Attributes:
        window: pixels along a window's side.
        width: channels of the first stage.
        side: pixels along the first stage's side.
        heads: of each stage.
        depths: blocks of each stage.
    """

    window: int
    width: int
    side: int
    heads: tuple[int, ...]
    depths: tuple[int, ...]


def into_windows(x_BYXE: Tensor, window: int) -> Tensor:
    """Cut images into squares: [N, window, window, E]."""
    B, Y, X, E = x_BYXE.shape
    x = x_BYXE.view(B, Y // window, window, X // window, window, E)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window, window, E)


def relative_index(window: int) -> Tensor:
    """Return the row of the bias table for each pair of a window's pixels: [S, S]."""
    places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    steps = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + window - 1
    return steps[..., 0] * (2 * window - 1) + steps[..., 1]


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """Return -100 for pairs of pixels that only the shift brought into one window, else 0: [windows, S, S]."""
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    regions = torch.zeros(1, side, side, 1)
    for number, (rows, columns) in enumerate((rows, columns) for rows in cuts for columns in cuts):
        regions[:, rows, columns] = number
    flat = into_windows(regions, window).view(-1, window**2)
    apart = flat[:, None] - flat[:, :, None]
    return apart.masked_fill(apart != 0, -100.0)


class WindowBlock(nn.Module):
    """Attention in windows with a bias by distance, shifted in every second block; then an MLP."""

    index: Tensor
    mask: Tensor | None

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.side, self.window, self.shift = heads, side, window, shift
        self.bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("index", relative_index(window))
        self.register_buffer("mask", shift_mask(side, window, shift) if shift else None)

    def attend(self, x_NSE: Tensor) -> Tensor:
        N, S, E = x_NSE.shape
        q, k, v = self.qkv(x_NSE).reshape(N, S, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * (E // self.heads) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.bias_table[self.index.view(-1)].view(S, S, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.mask is not None:
            count = self.mask.shape[0]
            scores = scores.view(N // count, count, self.heads, S, S) + self.mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.heads, S, S)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(N, S, E))

    def forward(self, x: Tensor) -> Tensor:
        B, L, E = x.shape
        side, window, shift = self.side, self.window, self.shift
        y = self.first_norm(x).view(B, side, side, E)
        if shift:
            y = torch.roll(y, shifts=(-shift, -shift), dims=(1, 2))
        y = self.attend(into_windows(y, window).view(-1, window**2, E))
        y = y.view(B, side // window, side // window, window, window, E)
        y = y.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, side, side, E)
        if shift:
            y = torch.roll(y, shifts=(shift, shift), dims=(1, 2))
        x = x + y.view(B, L, E)
        return x + self.fc2(F.gelu(self.fc1(self.second_norm(x))))


class Merge(nn.Module):
    """Four neighbours become one pixel of twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, L, E = x.shape
        side = int(L**0.5)
        x = x.view(B, side, side, E)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.linear(self.norm(x.view(B, -1, 4 * E)))


class Swin(nn.Module):
    """Stages of window blocks, merged in between."""

    def __init__(self, sizes: SwinSizes) -> None:
        super().__init__()
        self.depths = sizes.depths
        width, side, window = sizes.width, sizes.side, sizes.window
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.blocks, self.merges = nn.ModuleList(), nn.ModuleList()
        for stage, (heads, depth) in enumerate(zip(sizes.heads, sizes.depths, strict=True)):
            for index in range(depth):
                self.blocks.append(WindowBlock(width, heads, side, window, window // 2 if index % 2 else 0))
            if stage < len(sizes.depths) - 1:
                self.merges.append(Merge(width))
                width, side = 2 * width, side // 2
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        index = 0
        for stage, depth in enumerate(self.depths):
            for _ in range(depth):
                x = self.blocks[index](x)
                index += 1
            if stage < len(self.merges):
                x = self.merges[stage](x)
        return self.head(self.norm(x).mean(1))


def swin() -> Workload:
    """The first three stages of Swin-T."""
    sizes = sized(SwinSizes(7, 96, 56, (3, 6, 12), (2, 2, 6)), SwinSizes(4, 16, 8, (2,), (2,)))
    batch, side = sized((32, 224), (1, 32))
    return workload("swin", lambda: Swin(sizes), values(batch, 3, side, side), dtype=torch.bfloat16,
                    num_residual_layers=10, items=batch, unit="images")  # fmt: skip
