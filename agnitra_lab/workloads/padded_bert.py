"""BERT over texts of unequal length: the same encoder with an additive padding mask, as transformers builds it.

Shape legend: B batch, S sequence, H heads, D head size, E hidden.

Source: Devlin et al. 2018 (BERT); the mask of transformers' get_extended_attention_mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.encoder import EncoderBlock, EncoderConfig
from agnitra_lab.workloads.seeding import token_ids

SCALES = {
    "tiny": EncoderConfig(64, 2, 4, batch=4, sequence=32, vocabulary=512),
    "small": EncoderConfig(256, 4, 8, batch=4, sequence=64, vocabulary=4096),
    "full": EncoderConfig(768, 6, 12, batch=32, sequence=256),
}


class MaskedBlock(EncoderBlock):
    """A post-norm block whose attention takes a mask."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, is_pre_norm=False)

    def _attend_masked(self, x_BSE: Tensor, mask_B11S: Tensor) -> Tensor:
        q_BHSD, k_BHSD, v_BHSD = (
            project(x_BSE).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        out_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, attn_mask=mask_B11S)
        return self.out(out_BHSD.transpose(1, 2).flatten(2))

    def forward(self, x_BSE: Tensor, mask_B11S: Tensor) -> Tensor:  # type: ignore[override]
        x_BSE = self.norm1(x_BSE + self._attend_masked(x_BSE, mask_B11S))
        return self.norm2(x_BSE + self.down(F.gelu(self.up(x_BSE))))


class PaddedTextEncoder(nn.Module):
    """Hidden states [B, S, E] of tokens [B, S] and their mask [B, S] (int64: 1 for a token, 0 for padding)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.token_embed = nn.Embedding(config.vocabulary, config.hidden, padding_idx=0)
        self.position_embed = nn.Embedding(config.sequence, config.hidden)
        self.norm = nn.LayerNorm(config.hidden)
        self.blocks = nn.ModuleList(MaskedBlock(config) for _ in range(config.num_layers))

    def forward(self, tokens_BS: Tensor, attention_mask: Tensor) -> Tensor:
        x_BSE = self.norm(self.token_embed(tokens_BS) + self.position_embed.weight[: tokens_BS.shape[1]])
        mask_B11S = attention_mask[:, None, None, :].to(x_BSE.dtype)
        mask_B11S = (1.0 - mask_B11S) * torch.finfo(x_BSE.dtype).min
        for block in self.blocks:
            x_BSE = block(x_BSE, mask_B11S)
        return x_BSE


def bert_padded(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Encode a batch of texts between an eighth of the sequence and the whole of it; padding counts as tokens."""
    config = SCALES[scale]
    model = seeded(lambda: PaddedTextEncoder(config), device, dtype, num_residual_layers=2 * config.num_layers)
    shape = (config.batch, config.sequence)

    def make_inputs(seed: int) -> Inputs:
        shortest = config.sequence // 8
        lengths_B = shortest + token_ids(seed + 1, (config.batch,), config.sequence - shortest + 1, device)
        mask_BS = (torch.arange(config.sequence, device=device)[None, :] < lengths_B[:, None]).to(torch.int64)
        tokens_BS = token_ids(seed, shape, config.vocabulary, device) * mask_BS
        return (tokens_BS,), {"attention_mask": mask_BS}

    return assemble("bert-padded", model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch * config.sequence, unit="tokens")  # fmt: skip
