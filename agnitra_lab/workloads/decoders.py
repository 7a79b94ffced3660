"""Llama-style decoders at other widths: 8B shapes, Qwen-style QK norm, and a sliding window.

Shape legend: B batch, S sequence, H query heads, G key/value heads, D head size, E hidden.

Sources: Grattafiori et al. 2024 (Llama 3, table 3); Yang et al. 2025 (Qwen3, 8B widths); Jiang et al. 2023 (Mistral).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads import llama
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.llama import Attention, Llama, LlamaConfig, RMSNorm, rotate
from agnitra_lab.workloads.seeding import token_ids


@dataclass(frozen=True)
class WindowConfig(LlamaConfig):
    """A decoder whose queries see the last `window` positions."""

    window: int = 0


DECODE_1B_SCALES = {
    **llama.DECODE_SCALES,
    "small": LlamaConfig(512, 1408, 8, 8, 2, 16_000, batch=1, sequence=1024),
}
DECODE_8B_SCALES = {
    "tiny": LlamaConfig(64, 224, 2, 8, 2, 256, batch=1, sequence=32, rope_base=500_000.0),
    "small": LlamaConfig(768, 2688, 4, 12, 3, 16_000, batch=1, sequence=1024, rope_base=500_000.0),
    "full": LlamaConfig(4096, 14336, 4, 32, 8, 128_256, batch=1, sequence=4096, rope_base=500_000.0),
}
PREFILL_8B_SCALES = {
    "tiny": LlamaConfig(64, 224, 2, 8, 2, 256, batch=2, sequence=32, rope_base=500_000.0),
    "small": LlamaConfig(512, 1792, 2, 16, 4, 2048, batch=1, sequence=128, rope_base=500_000.0),
    "full": LlamaConfig(4096, 14336, 4, 32, 8, 128_256, batch=1, sequence=2048, rope_base=500_000.0),
}
QK_NORM_SCALES = {
    "tiny": LlamaConfig(64, 192, 2, 4, 2, 256, batch=2, sequence=32, rope_base=1e6, norm_eps=1e-6),
    "small": LlamaConfig(384, 1152, 3, 6, 2, 2048, batch=1, sequence=160, rope_base=1e6, norm_eps=1e-6),
    "full": LlamaConfig(4096, 12288, 4, 32, 8, 151_936, batch=1, sequence=2048, rope_base=1e6, norm_eps=1e-6),
}
WINDOW_SCALES = {
    "tiny": WindowConfig(64, 224, 2, 4, 2, 256, batch=2, sequence=32, window=8),
    "small": WindowConfig(256, 896, 3, 8, 2, 2048, batch=1, sequence=256, window=64),
    "full": WindowConfig(4096, 14336, 4, 32, 8, 32_000, batch=1, sequence=4096, window=1024),
}


class QKNormAttention(Attention):
    """Attention that norms each query and key head before the rotation; prefill only."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config, has_cache=False)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps)
        self.k_norm = RMSNorm(self.head_size, config.norm_eps)

    def forward(
        self, x_BSE: Tensor, cos_SD: Tensor, sin_SD: Tensor, position_S: Tensor | None, mask_SC: Tensor | None
    ) -> Tensor:
        shape = (*x_BSE.shape[:-1], -1, self.head_size)
        q_BHSD = self.q_norm(self.q_proj(x_BSE).view(shape)).transpose(1, 2)
        k_BGSD = self.k_norm(self.k_proj(x_BSE).view(shape)).transpose(1, 2)
        v_BGSD = self.v_proj(x_BSE).view(shape).transpose(1, 2)
        q_BHSD, k_BGSD = rotate(q_BHSD, cos_SD, sin_SD), rotate(k_BGSD, cos_SD, sin_SD)
        out_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=True)
        return self.o_proj(out_BHSD.transpose(1, 2).flatten(2))


class QKNormDecoder(Llama):
    """Logits [B, S, V] of tokens [B, S]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config, has_cache=False)
        for layer in self.layers:
            layer.attention = QKNormAttention(config)


class SlidingWindowDecoder(Llama):
    """Logits [B, S, V] of tokens [B, S]; the mask of the window is made once a call and shared by the layers."""

    def __init__(self, config: WindowConfig) -> None:
        super().__init__(config, has_cache=False)
        self.window = config.window

    def forward(self, tokens_BS: Tensor, position_S: Tensor | None = None) -> Tensor:
        sequence = tokens_BS.shape[1]
        steps_S = torch.arange(sequence, device=tokens_BS.device)
        distance_SS = steps_S[:, None] - steps_S[None, :]
        mask_SS = (distance_SS >= 0) & (distance_SS < self.window)
        x_BSE = self.embed(tokens_BS)
        for layer in self.layers:
            x_BSE = layer(x_BSE, self.cos_CD[:sequence], self.sin_CD[:sequence], None, mask_SS)
        return self.lm_head(self.norm(x_BSE))


def _prefill(name: str, model: Llama, config: LlamaConfig, scale: str, device: str) -> Workload:
    def make_inputs(seed: int) -> Inputs:
        return (token_ids(seed, (config.batch, config.sequence), config.vocabulary, device),), {}

    return assemble(name, model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch * config.sequence, unit="tokens", phase="prefill")  # fmt: skip


def _decode(name: str, config: LlamaConfig, scale: str, device: str, dtype: torch.dtype) -> Workload:
    model = seeded(lambda: Llama(config, has_cache=True), device, dtype, num_residual_layers=2 * config.num_layers)

    def make_inputs(seed: int) -> Inputs:
        # The last slot, so that every call attends to the whole cache.
        position_S = torch.tensor([config.sequence - 1], device=device)
        return (token_ids(seed, (config.batch, 1), config.vocabulary, device), position_S), {}

    return assemble(name, model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch, unit="tokens", phase="decode")  # fmt: skip


def llama_1b_decode(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """One token of the whole 1.1B decoder against a static cache of 1024."""
    return _decode("llama-1b-decode", DECODE_1B_SCALES[scale], scale, device, dtype)


def llama_8b_decode(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """One token against a static cache of 4096, at 8B widths with four layers."""
    return _decode("llama-8b-decode", DECODE_8B_SCALES[scale], scale, device, dtype)


def llama_8b_prefill(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """A prompt of 2048 tokens at 8B widths with four layers."""
    config = PREFILL_8B_SCALES[scale]
    model = seeded(lambda: Llama(config, has_cache=False), device, dtype, num_residual_layers=2 * config.num_layers)
    return _prefill("llama-8b-prefill", model, config, scale, device)


def qk_norm_prefill(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """A prompt of 2048 tokens through a Qwen3-style decoder: RMS norm of each query and key head before RoPE."""
    config = QK_NORM_SCALES[scale]
    model = seeded(lambda: QKNormDecoder(config), device, dtype, num_residual_layers=2 * config.num_layers)
    return _prefill("qwen-qk-norm-prefill", model, config, scale, device)


def sliding_window_prefill(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """A prompt of 4096 tokens where each query sees the last 1024, through a boolean mask as people write it."""
    config = WINDOW_SCALES[scale]
    model = seeded(lambda: SlidingWindowDecoder(config), device, dtype, num_residual_layers=2 * config.num_layers)
    return _prefill("sliding-window-prefill", model, config, scale, device)
