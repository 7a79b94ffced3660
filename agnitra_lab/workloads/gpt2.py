"""GPT-2 as Hugging Face writes it: fused QKV through addmm, the GELU formula spelled out, a tied head.

Shape legend: B batch, S sequence, H heads, D head size, E hidden, V vocabulary.

Source: Radford et al. 2019 (GPT-2); layout of transformers' modeling_gpt2.
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
class GPT2Config:
    """Sizes of the decoder and of one call."""

    hidden: int
    num_layers: int
    num_heads: int
    vocabulary: int
    batch: int
    sequence: int


SCALES = {
    "tiny": GPT2Config(64, 2, 4, 257, batch=2, sequence=16),
    "small": GPT2Config(256, 3, 8, 2001, batch=2, sequence=128),
    "full": GPT2Config(768, 6, 12, 50_257, batch=4, sequence=1024),
}


class Conv1D(nn.Module):
    """A linear layer whose weight lies [inputs, outputs], as GPT-2's checkpoints do."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_inputs, num_outputs))
        self.bias = nn.Parameter(torch.empty(num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(shape)


def gelu_new(x: Tensor) -> Tensor:
    """The tanh approximation of GELU in single steps, as the original code has it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class GPT2Block(nn.Module):
    """Pre-norm block with fused QKV."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(config.hidden), nn.LayerNorm(config.hidden)
        self.c_attn = Conv1D(config.hidden, 3 * config.hidden)
        self.out = Conv1D(config.hidden, config.hidden)
        self.c_fc = Conv1D(config.hidden, 4 * config.hidden)
        self.down = Conv1D(4 * config.hidden, config.hidden)

    def forward(self, x_BSE: Tensor) -> Tensor:
        batch, sequence, hidden = x_BSE.shape
        q_BSE, k_BSE, v_BSE = self.c_attn(self.ln_1(x_BSE)).split(hidden, dim=2)
        q_BHSD, k_BHSD, v_BHSD = (
            part.view(batch, sequence, self.num_heads, -1).transpose(1, 2) for part in (q_BSE, k_BSE, v_BSE)
        )
        out_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=True)
        x_BSE = x_BSE + self.out(out_BHSD.transpose(1, 2).reshape(batch, sequence, hidden))
        return x_BSE + self.down(gelu_new(self.c_fc(self.ln_2(x_BSE))))


class GPT2(nn.Module):
    """Logits [B, S, V] of tokens [B, S]."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocabulary, config.hidden)
        self.wpe = nn.Embedding(config.sequence, config.hidden)
        self.blocks = nn.ModuleList(GPT2Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens_BS: Tensor) -> Tensor:
        positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSE = self.wte(tokens_BS) + self.wpe(positions_S)
        for block in self.blocks:
            x_BSE = block(x_BSE)
        return self.lm_head(self.ln_f(x_BSE))


def prefill(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """A batch of prompts at GPT-2's widths with half its layers."""
    config = SCALES[scale]
    model = seeded(lambda: GPT2(config), device, dtype, num_residual_layers=2 * config.num_layers)

    def make_inputs(seed: int) -> Inputs:
        return (token_ids(seed, (config.batch, config.sequence), config.vocabulary, device),), {}

    return assemble("gpt2-prefill", model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch * config.sequence, unit="tokens", phase="prefill")  # fmt: skip
