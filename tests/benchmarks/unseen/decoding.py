"""Language models that make one token a call, with caches of two kinds.

Shape legend: B batch, S new tokens, C cache length, H heads, G key/value heads, D head size, E hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from language import GroupedSizes, RMSNorm, rotate
from sizes import Draw, ids, sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

BF16 = torch.bfloat16


class OptLayer(nn.Module):
    """The cache grows by `cat`; attention by bmm over heads folded into the batch."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_size = num_heads, hidden // num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor, keys: Tensor, old_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, S, _ = x.shape
        H, D = self.num_heads, self.head_size
        y = self.attention_norm(x)
        q, k, v = (layer(y).view(B, S, H, D).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = torch.cat([keys, k], 2), torch.cat([old_values, v], 2)
        scores = torch.bmm((q * D**-0.5).reshape(B * H, S, -1), k.reshape(B * H, -1, D).transpose(1, 2))
        y = torch.bmm(F.softmax(scores, dim=-1), v.reshape(B * H, -1, D))
        x = x + self.out(y.view(B, H, S, D).transpose(1, 2).reshape(B, S, -1))
        return x + self.down(F.relu(self.up(self.mlp_norm(x)))), k, v


class Opt(nn.Module):
    """LayerNorm, biases, learned positions, ReLU; caches are inputs and outputs (Zhang et al. 2022)."""

    def __init__(self, hidden: int, num_heads: int, num_layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.position_embed = nn.Embedding(vocabulary, hidden), nn.Embedding(2048, hidden)
        self.layers = nn.ModuleList(OptLayer(hidden, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens_BS: Tensor, position_BS: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        """Return logits and each layer's longer keys and values, for `past` [layers, 2, B, H, C, D]."""
        x = self.embed(tokens_BS) + self.position_embed(position_BS)
        caches: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x, *longer = layer(x, past[index, 0], past[index, 1])
            caches += longer
        return (self.norm(x) @ self.embed.weight.T, *caches)


class QwenLayer(nn.Module):
    """Biases on q, k and v; a preallocated cache, written by an index of positions."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, sizes: GroupedSizes, batch: int, cache_length: int) -> None:
        super().__init__()
        self.head_size = sizes.head_size
        q_size, kv_size = sizes.num_heads * sizes.head_size, sizes.num_kv_heads * sizes.head_size
        self.q_proj, self.k_proj = nn.Linear(sizes.hidden, q_size), nn.Linear(sizes.hidden, kv_size)
        self.v_proj = nn.Linear(sizes.hidden, kv_size)
        self.o_proj = nn.Linear(q_size, sizes.hidden, bias=False)
        self.gate_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)
        self.attention_norm, self.mlp_norm = RMSNorm(sizes.hidden), RMSNorm(sizes.hidden)
        shape = (batch, sizes.num_kv_heads, cache_length, sizes.head_size)
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position_S: Tensor, allowed: Tensor) -> Tensor:
        B, S, _ = x.shape
        y = self.attention_norm(x)
        q, k, v = (
            layer(y).view(B, S, -1, self.head_size).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        self.k_cache[:, :, position_S] = k
        self.v_cache[:, :, position_S] = v
        y = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=allowed, enable_gqa=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(B, S, -1))
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Qwen(nn.Module):
    """Angles and mask are made from a vector of positions in each call (Qwen Team 2024)."""

    inverse: Tensor

    def __init__(self, sizes: GroupedSizes, batch: int, cache_length: int) -> None:
        super().__init__()
        self.cache_length = cache_length
        self.embed = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(QwenLayer(sizes, batch, cache_length) for _ in range(sizes.num_layers))
        self.norm = RMSNorm(sizes.hidden)
        self.register_buffer("inverse", 1e6 ** (-torch.arange(0, sizes.head_size, 2).float() / sizes.head_size))

    def forward(self, tokens_BS: Tensor, position_S: Tensor) -> Tensor:
        x = self.embed(tokens_BS)
        angles = torch.cat([position_S[:, None].float() * self.inverse.float()] * 2, -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        slots = torch.arange(self.cache_length, device=tokens_BS.device)
        allowed = slots[None, None, None] <= position_S[None, None, :, None]
        for layer in self.layers:
            x = layer(x, cos, sin, position_S, allowed)
        return F.linear(self.norm(x), self.embed.weight)


def _at(position: int) -> Draw:
    """The same position whatever the seed."""
    return lambda _seed, device, _dtype: torch.tensor([position], device=device)


def opt_decode() -> Workload:
    """Eight layers of the widths of OPT 1.3B, eight sequences of 511 tokens."""
    hidden, heads, depth, vocabulary = sized((2048, 32, 8, 50_272), (16, 2, 2, 64))
    batch, cached, positions = sized((8, 511, 2048), (2, 7, 64))
    past = values(depth, 2, batch, heads, cached, hidden // heads)
    return workload("opt-decode", lambda: Opt(hidden, heads, depth, vocabulary), ids(batch, 1, below=vocabulary),
                    ids(batch, 1, below=positions), past, dtype=BF16, num_residual_layers=16, items=batch,
                    unit="tokens", phase="decode")  # fmt: skip


def qwen2_decode() -> Workload:
    """Fourteen layers of the widths of Qwen 2 1.5B, four sequences, a cache that is not full."""
    sizes = sized(GroupedSizes(1536, 12, 2, 128, 8960, 14, 151_936), GroupedSizes(16, 2, 1, 8, 32, 2, 64))
    batch, cache_length, position = sized((4, 2048, 1500), (2, 16, 9))
    return workload("qwen2-decode", lambda: Qwen(sizes, batch, cache_length), ids(batch, 1, below=sizes.vocabulary),
                    _at(position), dtype=BF16, num_residual_layers=28, items=batch, unit="tokens",
                    phase="decode")  # fmt: skip
