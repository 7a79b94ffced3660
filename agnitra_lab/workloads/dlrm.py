"""A DLRM-style recommender: embedding bags, a bottom and a top MLP, pairwise dot interactions.

Shape legend: B batch, F sparse features, L ids a bag, E embedding size.

Source: Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.seeding import init_weights, normal, token_ids


@dataclass(frozen=True)
class DLRMConfig:
    """Table sizes, MLP widths and one call's samples."""

    num_tables: int
    rows: int
    embedding: int
    dense: int
    hidden: int
    bag: int
    batch: int


SCALES = {
    "tiny": DLRMConfig(4, 100, 8, 6, 16, bag=3, batch=8),
    "small": DLRMConfig(8, 10_000, 32, 13, 128, bag=8, batch=256),
    "full": DLRMConfig(26, 1_000_000, 64, 13, 512, bag=16, batch=4096),
}


class DLRM(nn.Module):
    """Click logits [B] of dense features [B, dense] and ids [B, F, L]."""

    pairs: Tensor

    def __init__(self, config: DLRMConfig) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(config.rows, config.embedding, mode="sum") for _ in range(config.num_tables)
        )
        self.bottom = nn.Sequential(
            nn.Linear(config.dense, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.embedding), nn.ReLU()
        )
        num_pairs = (config.num_tables + 1) * config.num_tables // 2
        self.top = nn.Sequential(
            nn.Linear(num_pairs + config.embedding, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1)
        )
        pairs = torch.tril_indices(config.num_tables + 1, config.num_tables + 1, offset=-1)
        self.register_buffer("pairs", pairs, persistent=False)

    def forward(self, dense: Tensor, ids_BFL: Tensor) -> Tensor:
        dense_BE = self.bottom(dense)
        sparse = [table(ids_BFL[:, index]) for index, table in enumerate(self.tables)]
        features_BFE = torch.stack([dense_BE, *sparse], dim=1)
        products_BFF = features_BFE @ features_BFE.transpose(1, 2)
        interactions = products_BFF[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat((dense_BE, interactions), dim=1)).squeeze(1)


def dlrm(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Score a batch of samples."""
    config = SCALES[scale]
    with torch.device(device):
        model = DLRM(config)
    model = init_weights(model).to(device, dtype).eval()

    def make_inputs(seed: int) -> Inputs:
        ids_BFL = token_ids(seed, (config.batch, config.num_tables, config.bag), config.rows, device)
        return (normal(seed + 1, (config.batch, config.dense), device, dtype), ids_BFL), {}

    args, kwargs = make_inputs(0)
    return Workload("dlrm", model, args, kwargs, config.batch, "samples", None, make_inputs,
                    settings={"scale": scale, **vars(config)})  # fmt: skip
