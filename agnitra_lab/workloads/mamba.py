"""Mamba-2 blocks whose state-space scan is written in plain torch, in chunks.

Shape legend: B batch, S sequence, C chunks, L chunk length, H heads, P head size, N state, E hidden, I inner width.

Source: Dao and Gu 2024, "Transformers are SSMs" (listing 1, ssd_minimal); widths of mamba2-370m.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.llama import RMSNorm
from agnitra_lab.workloads.seeding import token_ids


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of the model and of one call."""

    hidden: int
    num_layers: int
    state: int
    head_size: int
    chunk: int
    vocabulary: int
    batch: int
    sequence: int
    kernel: int = 4

    @property
    def inner(self) -> int:
        return 2 * self.hidden

    @property
    def num_heads(self) -> int:
        return self.inner // self.head_size


SCALES = {
    "tiny": MambaConfig(32, 2, 8, 16, 8, 256, batch=2, sequence=32),
    "small": MambaConfig(128, 2, 32, 32, 32, 1024, batch=1, sequence=512),
    "full": MambaConfig(1024, 4, 128, 64, 64, 50_288, batch=2, sequence=2048),
}


def segment_sums(x: Tensor) -> Tensor:
    """Sums of x over every segment: out[..., i, j] = sum of x[..., j+1 .. i], minus infinity above the diagonal."""
    length = x.shape[-1]
    x = x.unsqueeze(-1).expand(*x.shape, length)
    below = torch.tril(torch.ones(length, length, device=x.device, dtype=torch.bool), diagonal=-1)
    sums = torch.cumsum(x.masked_fill(~below, 0), dim=-2)
    keep = torch.tril(torch.ones(length, length, device=x.device, dtype=torch.bool), diagonal=0)
    return sums.masked_fill(~keep, -torch.inf)


def chunked_scan(x_BSHP: Tensor, decay_BSH: Tensor, in_BSN: Tensor, out_BSN: Tensor, chunk: int) -> Tensor:
    """The scan h[t] = exp(decay[t]) h[t-1] + in[t] x[t], y[t] = out[t] h[t], by chunks.

    Within a chunk it is a masked product as in attention; only one state a chunk goes through the recurrence.

    Returns:
        y [B, S, H, P], fp32.
    """
    x_BCLHP, in_BCLN, out_BCLN = (t.unflatten(1, (-1, chunk)) for t in (x_BSHP, in_BSN, out_BSN))
    decay_BHCL = decay_BSH.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2)
    sums_BHCL = torch.cumsum(decay_BHCL, dim=-1)
    within_BHCLL = torch.exp(segment_sums(decay_BHCL))
    y_diagonal = torch.einsum("bcln,bcsn,bhcls,bcshp->bclhp", out_BCLN, in_BCLN, within_BHCLL, x_BCLHP)
    to_end_BHCL = torch.exp(sums_BHCL[..., -1:] - sums_BHCL)
    states_BCHPN = torch.einsum("bcln,bhcl,bclhp->bchpn", in_BCLN, to_end_BHCL, x_BCLHP)
    states = torch.cat([torch.zeros_like(states_BCHPN[:, :1]), states_BCHPN], dim=1)
    between = torch.exp(segment_sums(F.pad(sums_BHCL[..., -1], (1, 0))))
    states_BCHPN = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    y_between = torch.einsum("bcln,bchpn,bhcl->bclhp", out_BCLN, states_BCHPN, torch.exp(sums_BHCL))
    return (y_diagonal + y_between).flatten(1, 2)


class MambaBlock(nn.Module):
    """Norm, one input projection, causal depthwise convolution, scan, gated norm, output projection."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        inner, state, num_heads = config.inner, config.state, config.num_heads
        self.sizes = (inner, inner + 2 * state, num_heads)
        self.state, self.num_heads, self.chunk, self.kernel = state, num_heads, config.chunk, config.kernel
        self.norm = RMSNorm(config.hidden, 1e-5)
        self.in_proj = nn.Linear(config.hidden, sum(self.sizes), bias=False)
        self.conv = nn.Conv1d(self.sizes[1], self.sizes[1], config.kernel, groups=self.sizes[1],
                              padding=config.kernel - 1)  # fmt: skip
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))
        self.decay_log = nn.Parameter(torch.zeros(num_heads))
        self.skip = nn.Parameter(torch.ones(num_heads))
        self.gated_norm = RMSNorm(inner, 1e-5)
        self.out = nn.Linear(inner, config.hidden, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        gate_BSI, mixed_BSM, dt_BSH = self.in_proj(self.norm(x_BSE)).split(self.sizes, dim=-1)
        mixed_BSM = F.silu(self.conv(mixed_BSM.transpose(1, 2))[..., : x_BSE.shape[1]].transpose(1, 2))
        x_BSI, in_BSN, out_BSN = mixed_BSM.float().split((self.sizes[0], self.state, self.state), dim=-1)
        dt_BSH = F.softplus(dt_BSH.float() + self.dt_bias.float())
        x_BSHP = x_BSI.unflatten(-1, (self.num_heads, -1))
        decay_BSH = -torch.exp(self.decay_log.float()) * dt_BSH
        y_BSHP = chunked_scan(x_BSHP * dt_BSH.unsqueeze(-1), decay_BSH, in_BSN, out_BSN, self.chunk)
        y_BSI = (y_BSHP + self.skip.float().unsqueeze(-1) * x_BSHP).flatten(2).to(x_BSE.dtype)
        return x_BSE + self.out(self.gated_norm(y_BSI * F.silu(gate_BSI)))


class Mamba(nn.Module):
    """Logits [B, S, V] of tokens [B, S], with a tied head."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.blocks = nn.ModuleList(MambaBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden, 1e-5)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSE = self.tokens(tokens_BS)
        for block in self.blocks:
            x_BSE = block(x_BSE)
        return F.linear(self.norm(x_BSE), self.tokens.weight)


def initialise_dynamics(model: Mamba) -> None:
    """Spread steps and decays as the paper does, in place: steps of 0.001 to 0.1 and decay rates of 1 to 16.

    A softplus inverted at the step keeps memory long; random values forget all within two tokens.
    """
    with torch.no_grad():
        for block in model.modules():
            if not isinstance(block, MambaBlock):
                continue
            steps_H = torch.logspace(-3, -1, block.num_heads)
            block.dt_bias.copy_(steps_H + torch.log(-torch.expm1(-steps_H)))
            # Interleaved, so that short steps do not always meet slow decay.
            rates_H = torch.linspace(1, 16, block.num_heads).flip(0).roll(block.num_heads // 2)
            block.decay_log.copy_(torch.log(rates_H))


def scan(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """A batch of prompts through four layers of mamba2-370m."""
    config = SCALES[scale]
    model = seeded(lambda: Mamba(config), device, dtype, num_residual_layers=config.num_layers)
    initialise_dynamics(model)

    def make_inputs(seed: int) -> Inputs:
        return (token_ids(seed, (config.batch, config.sequence), config.vocabulary, device),), {}

    return assemble("mamba-scan", model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch * config.sequence, unit="tokens", phase="prefill")  # fmt: skip
