"""Language models of other families than the suite's, over a whole prompt.

Shape legend: B batch, S sequence, H heads, G key/value heads, D head size, E hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sizes import ids, sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

BF16 = torch.bfloat16


class RMSNorm(nn.Module):
    """Root mean square norm in fp32; the weight is multiplied after the cast back."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class OnePlusRMSNorm(RMSNorm):
    """Gemma's: the weight is kept about zero, and multiplied before the cast back."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).type_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last dimension."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def rotary(sequence: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make cos and sin of all positions in the graph: [S, size] each."""
    inverse = 10000.0 ** (-torch.arange(0, size, 2, device=device).float() / size)
    angles = torch.cat([torch.outer(torch.arange(sequence, device=device).float(), inverse)] * 2, -1)
    return angles.cos(), angles.sin()


# --- Gemma 2 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupedSizes:
    """Sizes of a decoder with grouped heads and a gated MLP."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate: int
    num_layers: int
    vocabulary: int


class GemmaLayer(nn.Module):
    """Norms before and after each branch, scores capped by tanh, GeGLU."""

    def __init__(self, sizes: GroupedSizes) -> None:
        super().__init__()
        self.sizes = sizes
        q_size, kv_size = sizes.num_heads * sizes.head_size, sizes.num_kv_heads * sizes.head_size
        self.q_proj = nn.Linear(sizes.hidden, q_size, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, sizes.hidden, bias=False)
        self.gate_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)
        self.before_attention, self.after_attention = OnePlusRMSNorm(sizes.hidden), OnePlusRMSNorm(sizes.hidden)
        self.before_mlp, self.after_mlp = OnePlusRMSNorm(sizes.hidden), OnePlusRMSNorm(sizes.hidden)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor) -> Tensor:
        B, S, _ = x.shape
        H, G, D = self.sizes.num_heads, self.sizes.num_kv_heads, self.sizes.head_size
        q, k, v = (layer(x).view(B, S, -1, D).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (part[:, :, None].expand(B, G, H // G, S, D).reshape(B, H, S, D) for part in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * D**-0.5
        scores = torch.tanh(scores / 50.0) * 50.0
        scores = scores.masked_fill(~allowed, torch.finfo(x.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.o_proj(torch.matmul(weights, v).transpose(1, 2).reshape(B, S, -1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor) -> Tensor:
        x = x + self.after_attention(self.attend(self.before_attention(x), cos, sin, allowed))
        y = self.before_mlp(x)
        y = self.down_proj(F.gelu(self.gate_proj(y), approximate="tanh") * self.up_proj(y))
        return x + self.after_mlp(y)


class Gemma(nn.Module):
    """Every second layer sees a window; the head is the embedding, its logits capped (Gemma Team 2024)."""

    def __init__(self, sizes: GroupedSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(GemmaLayer(sizes) for _ in range(sizes.num_layers))
        self.norm = OnePlusRMSNorm(sizes.hidden)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        S, device = tokens_BS.shape[1], tokens_BS.device
        x = self.embed(tokens_BS) * (self.sizes.hidden**0.5)
        cos, sin = (table.to(x.dtype) for table in rotary(S, self.sizes.head_size, device))
        place = torch.arange(S, device=device)
        causal = place[:, None] >= place[None]
        window = causal & (place[:, None] - place[None] < max(4, S // 2))
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, window if index % 2 == 0 else causal)
        logits = self.norm(x) @ self.embed.weight.T
        return torch.tanh(logits / 30.0) * 30.0


# --- GPT-NeoX --------------------------------------------------------------------------------------------------------


class NeoXLayer(nn.Module):
    """Attention and MLP side by side; q, k and v packed by head, the first part of each head rotated."""

    def __init__(self, hidden: int, num_heads: int, rotated: int) -> None:
        super().__init__()
        self.num_heads, self.head_size, self.rotated = num_heads, hidden // num_heads, rotated
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, S, _ = x.shape
        part = self.rotated
        packed = self.qkv(self.attention_norm(x)).view(B, S, self.num_heads, 3 * self.head_size)
        q, k, v = packed.transpose(1, 2).chunk(3, dim=-1)
        q = torch.cat((rotate(q[..., :part], cos, sin), q[..., part:]), -1)
        k = torch.cat((rotate(k[..., :part], cos, sin), k[..., part:]), -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, S, -1)
        return x + self.out(y) + self.down(F.gelu(self.up(self.mlp_norm(x))))


class NeoX(nn.Module):
    """Logits of the last token (Black et al. 2022)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, hidden: int, num_heads: int, rotated: int, num_layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(NeoXLayer(hidden, num_heads, rotated) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, vocabulary, bias=False)
        cos, sin = rotary(2048, rotated, self.norm.weight.device)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        S = tokens_BS.shape[1]
        x = self.embed(tokens_BS)
        cos, sin = self.cos[:S].to(x.dtype), self.sin[:S].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x)[:, -1])


# --- BLOOM -----------------------------------------------------------------------------------------------------------


class BloomLayer(nn.Module):
    """Slopes times positions are the input of a baddbmm; the softmax is in fp32."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_size = num_heads, hidden // num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def attend(self, x: Tensor, alibi: Tensor, future: Tensor) -> Tensor:
        B, S, _ = x.shape
        H, D = self.num_heads, self.head_size
        q, k, v = self.qkv(x).view(B, S, H, 3, D).unbind(3)
        q = q.transpose(1, 2).reshape(B * H, S, -1)
        k = k.permute(0, 2, 3, 1).reshape(B * H, D, S)
        v = v.transpose(1, 2).reshape(B * H, S, -1)
        scores = alibi.baddbmm(q, k, beta=1.0, alpha=D**-0.5).view(B, H, S, S)
        scores = scores.masked_fill(future, torch.finfo(x.dtype).min)
        weights = F.softmax(scores.float(), dim=-1).to(x.dtype).view(B * H, S, S)
        out = torch.bmm(weights, v).view(B, H, S, -1).permute(0, 2, 1, 3).reshape(B, S, -1)
        return self.out(out)

    def forward(self, x: Tensor, alibi: Tensor, future: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x), alibi, future)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Bloom(nn.Module):
    """Layers over hidden states: no position but ALiBi's (Press et al. 2021)."""

    slopes: Tensor

    def __init__(self, hidden: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.layers = nn.ModuleList(BloomLayer(hidden, num_heads) for _ in range(num_layers))
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, num_heads + 1).float() / num_heads))

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        alibi = (self.slopes[None, :, None] * torch.arange(S, device=x.device)[None, None]).to(x.dtype)
        alibi = alibi.expand(B, -1, -1).reshape(B * self.num_heads, 1, S)
        future = torch.triu(torch.ones(S, S, dtype=torch.bool, device=x.device), 1)
        for layer in self.layers:
            x = layer(x, alibi, future)
        return x


def gemma2_prefill() -> Workload:
    """Four layers of Gemma 2's widths."""
    sizes = sized(GroupedSizes(2304, 8, 4, 256, 9216, 4, 64_000), GroupedSizes(16, 2, 1, 8, 32, 2, 64))
    shape = sized((2, 1024), (1, 12))
    return workload("gemma2-prefill", lambda: Gemma(sizes), ids(*shape, below=sizes.vocabulary), dtype=BF16,
                    num_residual_layers=8, items=shape[0] * shape[1], unit="tokens", phase="prefill")  # fmt: skip


def neox_prefill() -> Workload:
    """Six layers of the widths of Pythia 2.8B."""
    hidden, heads, rotated, depth, vocabulary = sized((2560, 32, 20, 6, 50_304), (16, 2, 4, 2, 64))
    shape = sized((2, 1024), (1, 12))
    return workload("neox-prefill", lambda: NeoX(hidden, heads, rotated, depth, vocabulary),
                    ids(*shape, below=vocabulary), dtype=BF16, num_residual_layers=12, items=shape[0] * shape[1],
                    unit="tokens", phase="prefill")  # fmt: skip


def bloom_alibi() -> Workload:
    """Four layers of the widths of BLOOM 1.7B, hidden states in and out."""
    batch, sequence, hidden, heads, depth = sized((4, 1024, 2048, 16, 4), (1, 12, 16, 2, 1))
    return workload("bloom-alibi", lambda: Bloom(hidden, heads, depth), values(batch, sequence, hidden), dtype=BF16,
                    num_residual_layers=8, items=batch * sequence, unit="tokens")  # fmt: skip
