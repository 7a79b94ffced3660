"""Causal attention as people write it by hand: softmax(QK^T / sqrt(d)) V in single steps.

Shape legend: B batch, S sequence, H heads, D head size, E hidden.

Source: layout of karpathy/minGPT's CausalSelfAttention.
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
class AttentionConfig:
    """Sizes of the layer and of one call."""

    hidden: int
    num_heads: int
    batch: int
    sequence: int


SCALES = {
    "tiny": AttentionConfig(32, 4, batch=2, sequence=16),
    "small": AttentionConfig(256, 8, batch=1, sequence=512),
    "full": AttentionConfig(1024, 16, batch=8, sequence=1024),
}


class HandAttention(nn.Module):
    """[B, S, E] -> [B, S, E]; the scores [B, H, S, S] are real tensors."""

    causal: Tensor

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.key = nn.Linear(config.hidden, config.hidden)
        self.query = nn.Linear(config.hidden, config.hidden)
        self.value = nn.Linear(config.hidden, config.hidden)
        self.dropout = nn.Dropout(0.1)
        self.proj = nn.Linear(config.hidden, config.hidden)
        causal = torch.tril(torch.ones(config.sequence, config.sequence))
        self.register_buffer("causal", causal.view(1, 1, config.sequence, config.sequence))

    def forward(self, x_BSE: Tensor) -> Tensor:
        B, S, E = x_BSE.size()
        k_BHSD = self.key(x_BSE).view(B, S, self.num_heads, E // self.num_heads).transpose(1, 2)
        q_BHSD = self.query(x_BSE).view(B, S, self.num_heads, E // self.num_heads).transpose(1, 2)
        v_BHSD = self.value(x_BSE).view(B, S, self.num_heads, E // self.num_heads).transpose(1, 2)
        scores_BHSS = (q_BHSD @ k_BHSD.transpose(-2, -1)) * (1.0 / math.sqrt(k_BHSD.size(-1)))
        scores_BHSS = scores_BHSS.masked_fill(self.causal[:, :, :S, :S] == 0, float("-inf"))
        weights_BHSS = self.dropout(F.softmax(scores_BHSS, dim=-1))
        return self.proj((weights_BHSS @ v_BHSD).transpose(1, 2).contiguous().view(B, S, E))


def attention(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """One layer over a batch of sequences."""
    config = SCALES[scale]
    model = seeded(lambda: HandAttention(config), device, dtype)

    def make_inputs(seed: int) -> Inputs:
        return (normal(seed, (config.batch, config.sequence, config.hidden), device, dtype),), {}

    return assemble("attention-by-hand", model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch * config.sequence, unit="tokens")  # fmt: skip
