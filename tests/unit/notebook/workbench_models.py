"""Models of the workbench's tests: one that a compiler always makes faster, slow ones, failing ones."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch
from torch import nn

QUICK = {"suggest": "preset", "sampler": None, "budget_s": 1.0, "timing_s": 0.3, "only": "torch.compile"}
"""One candidate, and as little timing as there can be."""


class Chain(nn.Module):
    """Waits unless it is compiled, so that the compiled candidate wins on a machine that is busy with other things."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            time.sleep(0.05)
        for _ in range(10):
            x = (x * 0.99 + 0.01).clamp(-3.0, 3.0)
        return x


class Small(nn.Module):
    """A model that no compiler makes faster: one product of library speed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(512, 512)

    def forward(self, x):
        return self.linear(x)


class Sleeper(nn.Module):
    """Takes its time in small pieces, and says when it has begun."""

    def __init__(self, pause_s=0.02, num_pauses=1000):
        super().__init__()
        self.pause_s, self.num_pauses = pause_s, num_pauses
        self.begun = threading.Event()

    def forward(self, x):
        for _ in range(self.num_pauses):
            self.begun.set()
            time.sleep(self.pause_s)
        return x + 1


class Stubborn(Sleeper):
    """Is in one long call that no exception reaches."""

    def forward(self, x):
        self.begun.set()
        time.sleep(self.pause_s)
        return x + 1


class Moody(nn.Module):
    """Raises from its second call on, until it is mended."""

    def __init__(self):
        super().__init__()
        self.num_calls, self.is_mended = 0, False

    def forward(self, x):
        self.num_calls += 1
        if self.num_calls > 1 and not self.is_mended:
            raise ValueError("the sensor is <b>unplugged</b>")
        return x * 2


class Chatty(nn.Module):
    """Prints when it is called."""

    def forward(self, x):
        print("called with", tuple(x.shape))
        return x + 1


def json_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.json"))
