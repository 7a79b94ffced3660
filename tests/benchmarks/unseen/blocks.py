"""Whole blocks and small models in fp32, of the kinds of KernelBench's level 3."""

from __future__ import annotations

import math

import torch
from sizes import sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

FP32 = torch.float32


class GPTBlock(nn.Module):
    """minGPT's block: scores, mask, softmax and GELU in single steps; or with ReLU in place of softmax."""

    causal: Tensor

    def __init__(self, width: int, num_heads: int, longest: int, *, is_relu: bool) -> None:
        super().__init__()
        self.num_heads, self.is_relu = num_heads, is_relu
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("causal", torch.tril(torch.ones(longest, longest)).view(1, 1, longest, longest))

    def attend(self, x: Tensor) -> Tensor:
        B, S, E = x.shape
        q, k, v = (
            part.view(B, S, self.num_heads, E // self.num_heads).transpose(1, 2)
            for part in self.c_attn(x).split(E, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.causal[:, :, :S, :S] == 0, float("-inf"))
        weights = F.relu(scores) if self.is_relu else F.softmax(scores, dim=-1)
        return self.c_proj((weights @ v).transpose(1, 2).contiguous().view(B, S, E))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.first_norm(x))
        h = self.c_fc(self.second_norm(x))
        h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
        return x + self.mlp_proj(h)


class CappedAttention(nn.Module):
    """Gemma 2's attention in single steps: scores capped by tanh, a window of conditions as transformers makes them."""

    def __init__(self, width: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, S, E = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        places = torch.arange(S, device=x.device)
        seen = places.new_ones((), dtype=torch.bool)
        seen = seen & (places[None] <= places[:, None])
        seen = seen & (places[:, None] - places[None] < self.window)
        scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 / 50.0) * 50.0
        scores = scores + torch.where(seen, 0.0, torch.finfo(x.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.out(torch.matmul(weights, v).transpose(1, 2).reshape(B, S, E))


class BidirectionalLSTM(nn.Module):
    """Stacked LSTMs in both directions, and a classifier of the last step."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, width, num_layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1, :])


class ImageAttention(nn.Module):
    """Attention of torch among the pixels of an image, sequence first, and a norm after the residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(channels, 4), nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        B, C, Y, X = x.shape
        pixels = x.view(B, C, Y * X).permute(2, 0, 1)
        pixels = self.norm(self.attention(pixels, pixels, pixels)[0] + pixels)
        return pixels.permute(1, 2, 0).view(B, C, Y, X)


def deep_mlp() -> Workload:
    """Narrow linear layers in a row: each is too small to fill a device."""
    rows, width, depth = sized((256, 1024, 8), (4, 16, 2))

    def build() -> nn.Module:
        return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))

    return workload("deep-mlp", build, values(rows, width), dtype=FP32)


def gpt_block() -> Workload:
    """A transformer block in fp32."""
    batch, sequence, width, heads, longest = sized((16, 512, 768, 12, 1024), (1, 16, 16, 2, 16))
    return workload("gpt-block", lambda: GPTBlock(width, heads, longest, is_relu=False),
                    values(batch, sequence, width), dtype=FP32)  # fmt: skip


def relu_attention() -> Workload:
    """The same block with ReLU of the scores, which no fused attention computes."""
    batch, sequence, width, heads, longest = sized((8, 1024, 768, 12, 1024), (1, 16, 16, 2, 16))
    return workload("relu-attention", lambda: GPTBlock(width, heads, longest, is_relu=True),
                    values(batch, sequence, width), dtype=FP32)  # fmt: skip


def capped_attention() -> Workload:
    """One layer's attention of the widths of Gemma 2 9B."""
    batch, sequence, width, heads = sized((2, 2048, 4096, 16), (1, 130, 32, 2))
    return workload("capped-attention", lambda: CappedAttention(width, heads, sequence // 2),
                    values(batch, sequence, width), dtype=torch.bfloat16)  # fmt: skip


def bidirectional_lstm() -> Workload:
    """A recurrent classifier."""
    batch, sequence, width, depth = sized((16, 256, 256, 3), (2, 6, 8, 1))
    return workload("bidirectional-lstm", lambda: BidirectionalLSTM(width, depth), values(batch, sequence, width),
                    dtype=FP32)  # fmt: skip


def image_attention() -> Workload:
    """Every pixel attends to every pixel."""
    shape = sized((2, 128, 64, 64), (1, 16, 4, 4))
    return workload("image-attention", lambda: ImageAttention(shape[1]), values(*shape), dtype=FP32)
