"""DeepSeek's multi-head latent attention over a whole prompt (DeepSeek-AI 2024).

Shape legend: B batch, S sequence, H heads, E hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from language import RMSNorm, rotary, rotate
from sizes import sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of the layers.

    Attributes:
        hidden: of the residual stream.
        num_heads: each with its own keys and values.
        plain: part of a head's query and key without a position.
        rotated: part of a head's query and key with one; the key's is shared by all heads.
        value: size of a head's value.
        query_rank: of the latent that queries come from.
        kv_rank: of the latent that keys and values come from.
        intermediate: of the MLP.
        num_layers: how many.
    """

    hidden: int
    num_heads: int
    plain: int
    rotated: int
    value: int
    query_rank: int
    kv_rank: int
    intermediate: int
    num_layers: int


class LatentLayer(nn.Module):
    """Queries, keys and values by two small matrices each, with a norm between them."""

    def __init__(self, sizes: LatentSizes) -> None:
        super().__init__()
        self.sizes = sizes
        hidden, heads = sizes.hidden, sizes.num_heads
        self.q_a = nn.Linear(hidden, sizes.query_rank, bias=False)
        self.q_norm = RMSNorm(sizes.query_rank)
        self.q_b = nn.Linear(sizes.query_rank, heads * (sizes.plain + sizes.rotated), bias=False)
        self.kv_a = nn.Linear(hidden, sizes.kv_rank + sizes.rotated, bias=False)
        self.kv_norm = RMSNorm(sizes.kv_rank)
        self.kv_b = nn.Linear(sizes.kv_rank, heads * (sizes.plain + sizes.value), bias=False)
        self.o_proj = nn.Linear(heads * sizes.value, hidden, bias=False)
        self.gate_proj = nn.Linear(hidden, sizes.intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, sizes.intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate, hidden, bias=False)
        self.attention_norm, self.mlp_norm = RMSNorm(hidden), RMSNorm(hidden)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, S, _ = x.shape
        sizes = self.sizes
        q = self.q_b(self.q_norm(self.q_a(x))).view(B, S, sizes.num_heads, -1).transpose(1, 2)
        q_plain, q_rotated = q.split([sizes.plain, sizes.rotated], -1)
        latent, k_rotated = self.kv_a(x).split([sizes.kv_rank, sizes.rotated], -1)
        kv = self.kv_b(self.kv_norm(latent)).view(B, S, sizes.num_heads, -1).transpose(1, 2)
        k_plain, v = kv.split([sizes.plain, sizes.value], -1)
        k_rotated = rotate(k_rotated.view(B, S, 1, sizes.rotated).transpose(1, 2), cos, sin)
        q = torch.cat([q_plain, rotate(q_rotated, cos, sin)], -1)
        k = torch.cat([k_plain, k_rotated.expand(-1, sizes.num_heads, -1, -1)], -1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, S, -1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x), cos, sin)
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class LatentDecoder(nn.Module):
    """Layers over hidden states."""

    def __init__(self, sizes: LatentSizes) -> None:
        super().__init__()
        self.rotated = sizes.rotated
        self.layers = nn.ModuleList(LatentLayer(sizes) for _ in range(sizes.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = (table.to(x.dtype) for table in rotary(x.shape[1], self.rotated, x.device))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def deepseek_mla() -> Workload:
    """Four layers of the widths of DeepSeek-V2-Lite with a query latent, hidden states in and out."""
    sizes = sized(LatentSizes(2048, 16, 128, 64, 128, 1536, 512, 5632, 4), LatentSizes(16, 2, 8, 4, 8, 12, 8, 32, 1))
    batch, sequence = sized((2, 2048), (1, 12))
    return workload("deepseek-mla", lambda: LatentDecoder(sizes), values(batch, sequence, sizes.hidden),
                    dtype=torch.bfloat16, num_residual_layers=8, items=batch * sequence, unit="tokens")  # fmt: skip
