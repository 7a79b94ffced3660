"""CUDA graphs without a GPU: a replay is the call again, into the memory of its first results."""

from __future__ import annotations

import torch
from torch import Tensor

from agnitra_lab.device.graphs import Segments
from agnitra_lab.patch import graphed


class Replay(Segments):
    """A graph without a GPU."""

    def __init__(self, call, outputs) -> None:
        super().__init__([])
        self.call, self.outputs, self.num_replays = call, outputs, 0

    def replay(self) -> None:
        self.num_replays += 1
        for old, new in zip(self.outputs, self.call(), strict=True):
            if isinstance(old, Tensor) and old is not new:
                old.copy_(new)


def install(monkeypatch) -> None:
    """Let `GraphedCall` capture on a CPU, and lend results from 64 bytes on."""

    def capture(call, has_tail, watched):
        outputs, of = call(), call.__self__
        # A replay puts nothing back.
        return Replay(lambda: of._call(of._given), outputs), outputs

    monkeypatch.setattr(graphed, "_captured", capture)
    monkeypatch.setattr(graphed, "_refuse_uncapturable", lambda given: None)
    monkeypatch.setattr(graphed, "_free_bytes", lambda: 2**40)
    monkeypatch.setattr(graphed, "_LEAST_LENT_BYTES", 64)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
