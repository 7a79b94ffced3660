"""Recurrent networks over a whole sequence: `nn.LSTM` and `nn.GRU` with a linear head.

Shape legend: B batch, S steps, I features.

Source: Hochreiter and Schmidhuber 1997 (LSTM); Cho et al. 2014 (GRU).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.seeding import normal


@dataclass(frozen=True)
class RecurrentConfig:
    """Sizes of the network and of one call."""

    features: int
    hidden: int
    num_layers: int
    num_classes: int
    batch: int
    sequence: int
    is_bidirectional: bool = False


LSTM_SCALES = {
    "tiny": RecurrentConfig(16, 32, 2, 8, batch=2, sequence=12),
    "small": RecurrentConfig(128, 256, 2, 64, batch=8, sequence=128),
    "full": RecurrentConfig(512, 1024, 2, 512, batch=32, sequence=256),
}
GRU_SCALES = {
    "tiny": RecurrentConfig(16, 24, 2, 8, batch=2, sequence=12, is_bidirectional=True),
    "small": RecurrentConfig(80, 128, 2, 64, batch=8, sequence=64, is_bidirectional=True),
    "full": RecurrentConfig(240, 512, 3, 512, batch=16, sequence=400, is_bidirectional=True),
}


class RecurrentTagger(nn.Module):
    """Scores [B, S, classes] of features [B, S, I]."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], config: RecurrentConfig) -> None:
        super().__init__()
        self.rnn = cell(
            config.features, config.hidden, config.num_layers, batch_first=True, bidirectional=config.is_bidirectional
        )
        self.head = nn.Linear(config.hidden * (2 if config.is_bidirectional else 1), config.num_classes)

    def forward(self, x_BSI: Tensor) -> Tensor:
        return self.head(self.rnn(x_BSI)[0])


def _tag(
    name: str, cell: type[nn.LSTM] | type[nn.GRU], config: RecurrentConfig, scale: str, device: str, dtype: torch.dtype
) -> Workload:
    model = seeded(lambda: RecurrentTagger(cell, config), device, dtype)
    with torch.no_grad():
        for key, parameter in model.rnn.named_parameters():
            if key.startswith("bias"):
                # Their names end in a layer's number, so they were drawn near one, which saturates the gates.
                parameter.sub_(1.0)

    def make_inputs(seed: int) -> Inputs:
        return (normal(seed, (config.batch, config.sequence, config.features), device, dtype),), {}

    return assemble(name, model, make_inputs, {"scale": scale, **vars(config)}, items=config.batch, unit="samples")


def lstm(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Two LSTM layers of 1024 over 256 steps."""
    return _tag("lstm", nn.LSTM, LSTM_SCALES[scale], scale, device, dtype)


def gru(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Three bidirectional GRU layers of 512 over 400 steps."""
    return _tag("gru", nn.GRU, GRU_SCALES[scale], scale, device, dtype)
