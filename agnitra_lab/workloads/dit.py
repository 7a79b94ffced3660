"""A diffusion transformer: one denoising step over latent patches, every block modulated by time and class.

Shape legend: B batch, P patches, H heads, D head size, E hidden, C latent channels.

Source: Peebles and Xie 2022, "Scalable Diffusion Models with Transformers" (widths of DiT-XL/2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.seeding import normal, token_ids


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the model and of one call; `edge` is that of the latent."""

    hidden: int
    num_layers: int
    num_heads: int
    batch: int
    edge: int
    channels: int = 4
    patch: int = 2
    num_classes: int = 1000


SCALES = {
    "tiny": DiTConfig(48, 2, 4, batch=2, edge=8, num_classes=10),
    "small": DiTConfig(288, 3, 4, batch=4, edge=16, num_classes=100),
    "full": DiTConfig(1152, 4, 16, batch=32, edge=32),
}


def modulate(x_BPE: Tensor, shift_BE: Tensor, scale_BE: Tensor) -> Tensor:
    """Shift and scale every patch by its sample's condition."""
    return x_BPE * (1 + scale_BE.unsqueeze(1)) + shift_BE.unsqueeze(1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep [B] through a two-layer MLP: [B, E]."""

    def __init__(self, hidden: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, time_B: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.num_frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=time_B.device)
        angles = time_B[:, None].float() * torch.exp(-math.log(10_000) * steps / half)[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(dtype))


class DiTBlock(nn.Module):
    """Attention and MLP with adaptive LayerNorm: shift, scale and gate come from the condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def _attend(self, x_BPE: Tensor) -> Tensor:
        batch, patches, hidden = x_BPE.shape
        qkv = self.qkv(x_BPE).reshape(batch, patches, 3, self.num_heads, hidden // self.num_heads)
        q_BHPD, k_BHPD, v_BHPD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out_BHPD = F.scaled_dot_product_attention(q_BHPD, k_BHPD, v_BHPD)
        return self.out(out_BHPD.transpose(1, 2).reshape(batch, patches, hidden))

    def forward(self, x_BPE: Tensor, condition_BE: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition_BE).chunk(6, dim=1)
        x_BPE = x_BPE + gate1.unsqueeze(1) * self._attend(modulate(self.norm1(x_BPE), shift1, scale1))
        hidden_BPE = F.gelu(self.up(modulate(self.norm2(x_BPE), shift2, scale2)), approximate="tanh")
        return x_BPE + gate2.unsqueeze(1) * self.down(hidden_BPE)


class DiT(nn.Module):
    """Predicted noise and variance [B, 2C, edge, edge] of latents [B, C, edge, edge], times [B] and classes [B]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden, patch = config.hidden, config.patch
        self.patch, self.num_side = patch, config.edge // patch
        self.patch_embed = nn.Conv2d(config.channels, hidden, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(1, self.num_side**2, hidden))
        self.time = TimeEmbedding(hidden)
        self.class_embed = nn.Embedding(config.num_classes + 1, hidden)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.head = nn.Linear(hidden, patch * patch * 2 * config.channels)

    def _unpatchify(self, x_BPE: Tensor) -> Tensor:
        side, patch = self.num_side, self.patch
        x = x_BPE.reshape(x_BPE.shape[0], side, side, patch, patch, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], -1, side * patch, side * patch)

    def forward(self, latents: Tensor, time_B: Tensor, classes_B: Tensor) -> Tensor:
        x_BPE = self.patch_embed(latents).flatten(2).transpose(1, 2) + self.position
        condition_BE = self.time(time_B, x_BPE.dtype) + self.class_embed(classes_B)
        for block in self.blocks:
            x_BPE = block(x_BPE, condition_BE)
        shift, scale = self.modulation(condition_BE).chunk(2, dim=1)
        return self._unpatchify(self.head(modulate(self.norm(x_BPE), shift, scale)))


def denoise(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """One denoising step of a batch of latents with four layers of DiT-XL/2."""
    config = SCALES[scale]
    model = seeded(lambda: DiT(config), device, dtype, num_residual_layers=2 * config.num_layers)

    def make_inputs(seed: int) -> Inputs:
        latents = normal(seed, (config.batch, config.channels, config.edge, config.edge), device, dtype)
        time_B = token_ids(seed + 1, (config.batch,), 1000, device)
        return (latents, time_B, token_ids(seed + 2, (config.batch,), config.num_classes, device)), {}

    return assemble("dit", model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch, unit="images")  # fmt: skip
