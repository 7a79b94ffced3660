"""Bidirectional transformer encoders: a BERT-style text encoder and a ViT, on one block.

Shape legend: B batch, S sequence, H heads, D head size, E hidden, P patches.

Sources: Devlin et al. 2018 (BERT); Dosovitskiy et al. 2020 (ViT).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.seeding import init_weights, normal, token_ids


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of one encoder and of one call. `sequence` is tokens for text, image edge in pixels for vision."""

    hidden: int
    num_layers: int
    num_heads: int
    batch: int
    sequence: int
    vocabulary: int = 30522
    patch: int = 16
    num_classes: int = 1000


BERT_SCALES = {
    "tiny": EncoderConfig(64, 2, 4, batch=2, sequence=32, vocabulary=512),
    "small": EncoderConfig(256, 4, 8, batch=4, sequence=64, vocabulary=4096),
    "full": EncoderConfig(768, 12, 12, batch=32, sequence=128),
}
VIT_SCALES = {
    "tiny": EncoderConfig(64, 2, 4, batch=1, sequence=64, num_classes=16),
    "small": EncoderConfig(192, 4, 3, batch=2, sequence=128, num_classes=100),
    "full": EncoderConfig(768, 12, 12, batch=64, sequence=224),
}


class EncoderBlock(nn.Module):
    """Attention and GELU feed-forward; pre-norm (ViT) or post-norm (BERT)."""

    def __init__(self, config: EncoderConfig, *, is_pre_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.is_pre_norm = config.num_heads, is_pre_norm
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(config.hidden, config.hidden)
        self.value = nn.Linear(config.hidden, config.hidden)
        self.out = nn.Linear(config.hidden, config.hidden)
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden), nn.LayerNorm(config.hidden)
        self.up = nn.Linear(config.hidden, 4 * config.hidden)
        self.down = nn.Linear(4 * config.hidden, config.hidden)

    def _attend(self, x_BSE: Tensor) -> Tensor:
        q_BHSD, k_BHSD, v_BHSD = (
            project(x_BSE).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD).transpose(1, 2).flatten(2))

    def forward(self, x_BSE: Tensor) -> Tensor:
        if self.is_pre_norm:
            x_BSE = x_BSE + self._attend(self.norm1(x_BSE))
            return x_BSE + self.down(F.gelu(self.up(self.norm2(x_BSE))))
        x_BSE = self.norm1(x_BSE + self._attend(x_BSE))
        return self.norm2(x_BSE + self.down(F.gelu(self.up(x_BSE))))


class TextEncoder(nn.Module):
    """BERT-style: hidden states [B, S, E] of tokens [B, S]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.token_embed = nn.Embedding(config.vocabulary, config.hidden)
        self.position_embed = nn.Embedding(config.sequence, config.hidden)
        self.norm = nn.LayerNorm(config.hidden)
        self.blocks = nn.ModuleList(EncoderBlock(config, is_pre_norm=False) for _ in range(config.num_layers))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSE = self.norm(self.token_embed(tokens_BS) + self.position_embed.weight[: tokens_BS.shape[1]])
        for block in self.blocks:
            x_BSE = block(x_BSE)
        return x_BSE


class VisionTransformer(nn.Module):
    """ViT: class logits [B, classes] of images [B, 3, edge, edge]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, config.hidden, config.patch, stride=config.patch)
        num_patches = (config.sequence // config.patch) ** 2
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden))
        self.position = nn.Parameter(torch.zeros(1, num_patches + 1, config.hidden))
        self.blocks = nn.ModuleList(EncoderBlock(config, is_pre_norm=True) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x_BPE = self.patch_embed(images).flatten(2).transpose(1, 2)
        x_BPE = torch.cat((self.class_token.expand(x_BPE.shape[0], -1, -1), x_BPE), dim=1) + self.position
        for block in self.blocks:
            x_BPE = block(x_BPE)
        return self.head(self.norm(x_BPE)[:, 0])


def bert(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Encode a batch of equal-length texts."""
    config = BERT_SCALES[scale]
    model = init_weights(TextEncoder(config), num_residual_layers=2 * config.num_layers).to(device, dtype).eval()

    def make_inputs(seed: int) -> Inputs:
        return (token_ids(seed, (config.batch, config.sequence), config.vocabulary, device),), {}

    args, kwargs = make_inputs(0)
    return Workload("bert", model, args, kwargs, config.batch * config.sequence, "tokens", None, make_inputs,
                    settings={"scale": scale, **vars(config)})  # fmt: skip


def vit(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Classify a batch of images."""
    config = VIT_SCALES[scale]
    model = init_weights(VisionTransformer(config), num_residual_layers=2 * config.num_layers).to(device, dtype).eval()

    def make_inputs(seed: int) -> Inputs:
        return (normal(seed, (config.batch, 3, config.sequence, config.sequence), device, dtype),), {}

    args, kwargs = make_inputs(0)
    return Workload("vit", model, args, kwargs, config.batch, "images", None, make_inputs,
                    settings={"scale": scale, **vars(config)})  # fmt: skip
