"""Profiles of a workload that writes to what it is given: the caller's cache does not run full, and stays as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agnitra_lab.contracts import Workload
from agnitra_lab.loop.undisturbed import profile


class Decoder(nn.Module):
    """Writes one row of a cache at each call, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.eval()

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        cache["keys"].index_copy_(0, cache["length"].reshape(1), self.project(x))
        cache["length"].add_(1)
        return cache["keys"].sum(0)


def test_a_cache_with_room_for_three_tokens_is_enough_for_a_profile_of_many_calls() -> None:
    cache = {"keys": torch.zeros(16, 8), "length": torch.tensor(13)}
    telemetry = profile(Workload("decoder", Decoder(), (torch.ones(1, 8), cache)))
    assert telemetry.record.wall_ms is not None and telemetry.record.wall_ms > 0
    assert int(cache["length"]) == 13 and not cache["keys"].any()
