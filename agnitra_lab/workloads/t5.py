"""A T5 encoder: relative position bias, unscaled attention by hand, RMS norm, gated GELU.

Shape legend: B batch, S sequence, H heads, D head size, E hidden.

Source: Raffel et al. 2019 (T5), widths of T5 v1.1 base; layout of transformers' modeling_t5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.seeding import token_ids


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder and of one call."""

    hidden: int
    head_size: int
    num_heads: int
    intermediate: int
    num_layers: int
    vocabulary: int
    batch: int
    sequence: int
    num_buckets: int = 32
    max_distance: int = 128


SCALES = {
    "tiny": T5Config(64, 16, 4, 128, 2, 256, batch=2, sequence=24),
    "small": T5Config(256, 32, 8, 512, 3, 2048, batch=4, sequence=96),
    "full": T5Config(768, 64, 12, 2048, 4, 32_128, batch=16, sequence=512),
}


class T5LayerNorm(nn.Module):
    """RMS norm without the subtraction of the mean, in fp32."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(self.weight.dtype)


def relative_buckets(distance_SS: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Map signed distances to buckets: exact when near, logarithmic when far, one half of them for each direction."""
    half = num_buckets // 2
    sign_SS = (distance_SS > 0).to(torch.long) * half
    distance_SS = torch.abs(distance_SS)
    max_exact = half // 2
    far_SS = max_exact + (
        torch.log(distance_SS.float() / max_exact) / math.log(max_distance / max_exact) * (half - max_exact)
    ).to(torch.long)
    far_SS = torch.min(far_SS, torch.full_like(far_SS, half - 1))
    return sign_SS + torch.where(distance_SS < max_exact, distance_SS, far_SS)


class T5Block(nn.Module):
    """Attention with an additive bias, then a gated feed-forward layer."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.head_size
        self.num_heads = config.num_heads
        self.norm1, self.norm2 = T5LayerNorm(config.hidden), T5LayerNorm(config.hidden)
        self.q = nn.Linear(config.hidden, inner, bias=False)
        self.k = nn.Linear(config.hidden, inner, bias=False)
        self.v = nn.Linear(config.hidden, inner, bias=False)
        self.out = nn.Linear(inner, config.hidden, bias=False)
        self.wi_0 = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.wi_1 = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x_BSE: Tensor, bias_HSS: Tensor) -> Tensor:
        """Attend with the relative position bias, then the gated MLP; x_BSE [batch, sequence, hidden] -> the same."""
        batch, sequence, _ = x_BSE.shape
        normed_BSE = self.norm1(x_BSE)
        q_BHSD, k_BHSD, v_BHSD = (
            project(normed_BSE).view(batch, sequence, self.num_heads, -1).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        scores_BHSS = torch.matmul(q_BHSD, k_BHSD.transpose(3, 2)) + bias_HSS
        weights_BHSS = F.softmax(scores_BHSS.float(), dim=-1).type_as(scores_BHSS)
        out_BSE = torch.matmul(weights_BHSS, v_BHSD).transpose(1, 2).contiguous().view(batch, sequence, -1)
        x_BSE = x_BSE + self.out(out_BSE)
        normed_BSE = self.norm2(x_BSE)
        return x_BSE + self.down(F.gelu(self.wi_0(normed_BSE), approximate="tanh") * self.wi_1(normed_BSE))


class T5Encoder(nn.Module):
    """Hidden states [B, S, E] of tokens [B, S]."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = config.num_buckets, config.max_distance
        self.embed = nn.Embedding(config.vocabulary, config.hidden)
        self.relative_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        self.norm = T5LayerNorm(config.hidden)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        steps_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        buckets_SS = relative_buckets(steps_S[None, :] - steps_S[:, None], self.num_buckets, self.max_distance)
        bias_HSS = self.relative_bias(buckets_SS).permute(2, 0, 1)
        x_BSE = self.embed(tokens_BS)
        for block in self.blocks:
            x_BSE = block(x_BSE, bias_HSS)
        return self.norm(x_BSE)


def encoder(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Encode a batch of texts with four layers of T5 v1.1 base."""
    config = SCALES[scale]
    model = seeded(lambda: T5Encoder(config), device, dtype, num_residual_layers=2 * config.num_layers)
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, T5Block):
                # T5 does not divide the scores by sqrt(D); its initial queries are that much smaller instead.
                block.q.weight.mul_(config.head_size**-0.5)

    def make_inputs(seed: int) -> Inputs:
        return (token_ids(seed, (config.batch, config.sequence), config.vocabulary, device),), {}

    return assemble("t5-encoder", model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch * config.sequence, unit="tokens")  # fmt: skip
