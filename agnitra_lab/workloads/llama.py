"""A Llama-style decoder in plain torch, in prefill and in decode with a static KV cache.

Shape legend: B batch, S sequence, C cache length, H query heads, G key/value heads, D head size, E hidden,
V vocabulary.

Source: Touvron et al. 2023, "LLaMA" (architecture); the static cache follows pytorch-labs/gpt-fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.seeding import init_weights, token_ids


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of one decoder and of one call."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int
    batch: int
    sequence: int
    """Prompt length in prefill, cache length in decode."""
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.hidden // self.num_heads


_TINY = LlamaConfig(64, 176, 2, 4, 2, 256, batch=1, sequence=32)
_SMALL = LlamaConfig(256, 704, 4, 8, 4, 4096, batch=1, sequence=256)
_FULL = LlamaConfig(2048, 5632, 22, 32, 4, 32000, batch=1, sequence=1024)

DECODE_SCALES = {"tiny": _TINY, "small": _SMALL, "full": _FULL}
PREFILL_SCALES = {
    "tiny": LlamaConfig(64, 176, 2, 4, 2, 256, batch=2, sequence=32),
    "small": LlamaConfig(256, 704, 4, 8, 4, 4096, batch=1, sequence=128),
    "full": LlamaConfig(2048, 5632, 22, 32, 4, 32000, batch=4, sequence=1024),
}


class RMSNorm(nn.Module):
    """Root mean square norm, computed in fp32 and cast back before the weight, as Llama does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_float = x.float()
        scale = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x_float * scale).to(x.dtype) * self.weight


def rotate(x_BHSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Apply rotary position embedding to the halves of the last dimension."""
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * cos_SD + torch.cat((-second, first), dim=-1) * sin_SD


class Attention(nn.Module):
    """Grouped-query attention; with a cache it writes the new keys and values at `position_S`."""

    k_cache_BGCD: Tensor
    v_cache_BGCD: Tensor

    def __init__(self, config: LlamaConfig, *, has_cache: bool) -> None:
        super().__init__()
        kv_size = config.num_kv_heads * config.head_size
        self.num_heads, self.num_kv_heads, self.head_size = config.num_heads, config.num_kv_heads, config.head_size
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.has_cache = has_cache
        if has_cache:
            shape = (config.batch, config.num_kv_heads, config.sequence, config.head_size)
            self.register_buffer("k_cache_BGCD", torch.randn(shape))
            self.register_buffer("v_cache_BGCD", torch.randn(shape))

    def _heads(self, x_BSE: Tensor, num_heads: int) -> Tensor:
        batch, sequence, _ = x_BSE.shape
        return x_BSE.view(batch, sequence, num_heads, self.head_size).transpose(1, 2)

    def forward(
        self, x_BSE: Tensor, cos_SD: Tensor, sin_SD: Tensor, position_S: Tensor | None, mask_SC: Tensor | None
    ) -> Tensor:
        """Attend to the given positions, or causally to the prompt itself without a cache."""
        q_BHSD = rotate(self._heads(self.q_proj(x_BSE), self.num_heads), cos_SD, sin_SD)
        k_BGSD = rotate(self._heads(self.k_proj(x_BSE), self.num_kv_heads), cos_SD, sin_SD)
        v_BGSD = self._heads(self.v_proj(x_BSE), self.num_kv_heads)
        if position_S is not None:
            k_BGSD = self.k_cache_BGCD.index_copy_(2, position_S, k_BGSD)
            v_BGSD = self.v_cache_BGCD.index_copy_(2, position_S, v_BGSD)
        out_BHSD = F.scaled_dot_product_attention(
            q_BHSD, k_BGSD, v_BGSD, attn_mask=mask_SC, is_causal=mask_SC is None, enable_gqa=True
        )
        return self.o_proj(out_BHSD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BSE)) * self.up_proj(x_BSE))


class Block(nn.Module):
    """Pre-norm decoder block."""

    def __init__(self, config: LlamaConfig, *, has_cache: bool) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config, has_cache=has_cache)
        self.post_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BSE: Tensor, *rest: Any) -> Tensor:
        x_BSE = x_BSE + self.attention(self.input_norm(x_BSE), *rest)
        return x_BSE + self.mlp(self.post_norm(x_BSE))


class Llama(nn.Module):
    """Decoder with an untied head. `forward(tokens_BS)` is prefill; with a cache, `forward(tokens_BS, position_S)`
    is decode: it reads and writes the static cache in place."""

    cos_CD: Tensor
    sin_CD: Tensor
    causal_CC: Tensor

    def __init__(self, config: LlamaConfig, *, has_cache: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Block(config, has_cache=has_cache) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.has_cache = has_cache
        steps = torch.arange(config.sequence, dtype=torch.float32)
        half = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
        angles_CD = torch.outer(steps, config.rope_base**-half).repeat(1, 2)
        self.register_buffer("cos_CD", angles_CD.cos(), persistent=False)
        self.register_buffer("sin_CD", angles_CD.sin(), persistent=False)
        if has_cache:
            causal = torch.ones(config.sequence, config.sequence, dtype=torch.bool).tril()
            self.register_buffer("causal_CC", causal, persistent=False)

    def forward(self, tokens_BS: Tensor, position_S: Tensor | None = None) -> Tensor:
        if self.has_cache:
            cos_SD, sin_SD, mask_SC = self.cos_CD[position_S], self.sin_CD[position_S], self.causal_CC[position_S]
        else:
            sequence = tokens_BS.shape[1]
            cos_SD, sin_SD, mask_SC = self.cos_CD[:sequence], self.sin_CD[:sequence], None
        x_BSE = self.embed(tokens_BS)
        for layer in self.layers:
            x_BSE = layer(x_BSE, cos_SD, sin_SD, position_S, mask_SC)
        return self.lm_head(self.norm(x_BSE))


def _build(config: LlamaConfig, *, has_cache: bool, device: str, dtype: torch.dtype) -> Llama:
    with torch.device(device):
        model = Llama(config, has_cache=has_cache)
    return init_weights(model, num_residual_layers=2 * config.num_layers).to(device, dtype).eval()


def prefill(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """The whole prompt at once: logits [B, S, V] of tokens [B, S]."""
    config = PREFILL_SCALES[scale]
    model = _build(config, has_cache=False, device=device, dtype=dtype)

    def make_inputs(seed: int) -> Inputs:
        return (token_ids(seed, (config.batch, config.sequence), config.vocabulary, device),), {}

    args, kwargs = make_inputs(0)
    return Workload(
        "llama-prefill", model, args, kwargs, config.batch * config.sequence, "tokens", "prefill", make_inputs,
        settings={"scale": scale, **vars(config)},
    )  # fmt: skip


def decode(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """One token a sequence against a full static cache: logits [B, 1, V]."""
    config = DECODE_SCALES[scale]
    model = _build(config, has_cache=True, device=device, dtype=dtype)

    def make_inputs(seed: int) -> Inputs:
        # The last slot, so that every call attends to the whole cache.
        position_S = torch.tensor([config.sequence - 1], device=device)
        return (token_ids(seed, (config.batch, 1), config.vocabulary, device), position_S), {}

    args, kwargs = make_inputs(0)
    return Workload(
        "llama-decode", model, args, kwargs, config.batch, "tokens", "decode", make_inputs,
        settings={"scale": scale, **vars(config)},
    )  # fmt: skip
