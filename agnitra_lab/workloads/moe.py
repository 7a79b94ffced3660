"""A mixture-of-experts decoder: a router over many small gated experts in place of each feed-forward layer.

Every expert runs on every token and the router's weights, zero where an expert was not chosen, sum the results: the
form that Hugging Face's Llama 4 and gpt-oss use when no grouped kernel is there, and the one that is a single graph.

Shape legend: B batch, S sequence, T tokens (B times S), X experts, K experts a token, E hidden, I expert width.

Source: Muennighoff et al. 2024, "OLMoE" (widths of the 1B-7B model).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.llama import Llama, LlamaConfig
from agnitra_lab.workloads.seeding import WEIGHT_SEED, token_ids


@dataclass(frozen=True)
class MoEConfig(LlamaConfig):
    """A decoder whose `intermediate` is the width of one expert."""

    num_experts: int = 8
    num_chosen: int = 2


SCALES = {
    "tiny": MoEConfig(32, 32, 2, 4, 4, 256, batch=2, sequence=16, num_experts=4, num_chosen=2),
    "small": MoEConfig(256, 128, 2, 8, 8, 2048, batch=1, sequence=256, num_experts=8, num_chosen=2),
    "full": MoEConfig(2048, 1024, 2, 16, 16, 50_304, batch=1, sequence=1024, num_experts=64, num_chosen=8),
}


class Experts(nn.Module):
    """Router and experts: [B, S, E] -> [B, S, E]."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.num_experts, self.num_chosen = config.num_experts, config.num_chosen
        self.router = nn.Linear(config.hidden, config.num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden, 2 * config.intermediate))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.intermediate, config.hidden))

    def forward(self, x_BSE: Tensor) -> Tensor:
        x_TE = x_BSE.flatten(0, 1)
        scores_TX = F.softmax(self.router(x_TE), dim=-1, dtype=torch.float)
        top_TK, chosen_TK = torch.topk(scores_TX, self.num_chosen, dim=-1)
        weights_TX = torch.zeros_like(scores_TX).scatter_(1, chosen_TK, top_TK).to(x_TE.dtype)
        x_XTE = x_TE.repeat(self.num_experts, 1).view(self.num_experts, -1, x_TE.shape[-1])
        gate_XTI, up_XTI = torch.bmm(x_XTE, self.gate_up_proj).chunk(2, dim=-1)
        out_XTE = torch.bmm(F.silu(gate_XTI) * up_XTI, self.down_proj)
        out_TE = (out_XTE * weights_TX.transpose(0, 1).unsqueeze(-1)).sum(dim=0)
        return out_TE.view_as(x_BSE)


class MoEDecoder(Llama):
    """Logits [B, S, V] of tokens [B, S]."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config, has_cache=False)
        for layer in self.layers:
            layer.mlp = Experts(config)


def separate_routes(model: MoEDecoder, config: MoEConfig) -> None:
    """Give tokens kinds and routers opinions on each, in place, so that no choice of experts is close to a tie.

    With a random router, bf16 rounding alone changed the choice for so many tokens that torch.compile matched eager
    in 98.9% of elements (64 experts, 8 chosen, two layers, CPU): no implementation could pass the equivalence check.
    """
    num_experts, num_chosen = config.num_experts, config.num_chosen
    generator = torch.Generator().manual_seed(WEIGHT_SEED)
    kinds_XE = torch.empty(num_experts, config.hidden).normal_(generator=generator)
    steps_X = torch.arange(num_experts)
    distance_XX = (steps_X[None, :] - steps_X[:, None]) % num_experts
    # A kind's chosen experts follow its own number, each a little less wanted; all others lie far below.
    levels_XX = torch.where(distance_XX < num_chosen, 2.0 - distance_XX / num_chosen, -2.0)
    device = model.embed.weight.device
    with torch.no_grad():
        kinds_VE = kinds_XE[torch.arange(config.vocabulary) % num_experts]
        model.embed.weight.mul_(0.5).add_(kinds_VE.to(device))
        for experts in model.modules():
            if isinstance(experts, Experts):
                experts.router.weight.copy_(levels_XX.T @ kinds_XE / config.hidden)


def prefill(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """A prompt through two layers of 64 experts, eight a token."""
    config = SCALES[scale]
    model = seeded(lambda: MoEDecoder(config), device, dtype, num_residual_layers=2 * config.num_layers)
    separate_routes(model, config)

    def make_inputs(seed: int) -> Inputs:
        return (token_ids(seed, (config.batch, config.sequence), config.vocabulary, device),), {}

    return assemble("moe-prefill", model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch * config.sequence, unit="tokens", phase="prefill")  # fmt: skip
