"""The Whisper encoder: two 1-d convolutions over a mel spectrogram, then pre-norm transformer blocks.

Shape legend: B batch, M mel bins, T frames, S frames after the stride (T/2), H heads, D head size, E hidden.

Source: Radford et al. 2022 (Whisper), widths of large-v3; layout of openai/whisper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.seeding import normal


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes of the encoder and of one call."""

    num_mels: int
    hidden: int
    num_heads: int
    num_layers: int
    batch: int
    num_frames: int


SCALES = {
    "tiny": WhisperConfig(16, 64, 4, 2, batch=1, num_frames=64),
    "small": WhisperConfig(80, 192, 3, 3, batch=1, num_frames=1000),
    "full": WhisperConfig(128, 1280, 20, 4, batch=4, num_frames=3000),
}


def sinusoids(length: int, channels: int) -> Tensor:
    """Fixed positions [length, channels]: sines, then cosines, over geometric time scales."""
    step = math.log(10_000) / (channels // 2 - 1)
    rates = torch.exp(-step * torch.arange(channels // 2))
    angles = torch.arange(length)[:, None] * rates[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class AudioBlock(nn.Module):
    """Self-attention without a key bias, then GELU feed-forward."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attn_ln, self.mlp_ln = nn.LayerNorm(config.hidden), nn.LayerNorm(config.hidden)
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(config.hidden, config.hidden, bias=False)
        self.value = nn.Linear(config.hidden, config.hidden)
        self.out = nn.Linear(config.hidden, config.hidden)
        self.up = nn.Linear(config.hidden, 4 * config.hidden)
        self.down = nn.Linear(4 * config.hidden, config.hidden)

    def forward(self, x_BSE: Tensor) -> Tensor:
        normed_BSE = self.attn_ln(x_BSE)
        q_BHSD, k_BHSD, v_BHSD = (
            project(normed_BSE).view(*normed_BSE.shape[:2], self.num_heads, -1).permute(0, 2, 1, 3)
            for project in (self.query, self.key, self.value)
        )
        out_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD)
        x_BSE = x_BSE + self.out(out_BHSD.permute(0, 2, 1, 3).flatten(start_dim=2))
        return x_BSE + self.down(F.gelu(self.up(self.mlp_ln(x_BSE))))


class AudioEncoder(nn.Module):
    """Hidden states [B, S, E] of mel spectrograms [B, M, T]."""

    positions_SE: Tensor

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.num_mels, config.hidden, 3, padding=1)
        self.conv2 = nn.Conv1d(config.hidden, config.hidden, 3, stride=2, padding=1)
        self.register_buffer("positions_SE", sinusoids(config.num_frames // 2, config.hidden))
        self.blocks = nn.ModuleList(AudioBlock(config) for _ in range(config.num_layers))
        self.ln_post = nn.LayerNorm(config.hidden)

    def forward(self, mel_BMT: Tensor) -> Tensor:
        x_BES = F.gelu(self.conv2(F.gelu(self.conv1(mel_BMT))))
        x_BSE = (x_BES.permute(0, 2, 1) + self.positions_SE).to(x_BES.dtype)
        for block in self.blocks:
            x_BSE = block(x_BSE)
        return self.ln_post(x_BSE)


def encoder(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Encode windows of thirty seconds with four layers of large-v3."""
    config = SCALES[scale]
    model = seeded(lambda: AudioEncoder(config), device, dtype, num_residual_layers=2 * config.num_layers)

    def make_inputs(seed: int) -> Inputs:
        return (normal(seed, (config.batch, config.num_mels, config.num_frames), device, dtype),), {}

    return assemble("whisper-encoder", model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch, unit="samples")  # fmt: skip
