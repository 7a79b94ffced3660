"""How long one call takes on its device, for choosing between implementations while a graph is rewritten."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from agnitra_lab.device.exclusive import exclusive
from agnitra_lab.device.graphs import capture

_CALLS_PER_SAMPLE = 10
_NUM_SAMPLES = 9
_HOST_BUDGET_S = 0.5


def time_ms(call: Callable[[], Any], device: torch.device) -> float | None:
    """Return the median time of one call in ms, None when it refuses to run.

    On CUDA calls are replayed from a CUDA graph, because for short ones the launch from Python would be all that is
    seen: this is device time. Elsewhere it is wall time, with fewer samples for long calls.
    """
    try:
        with exclusive(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return _replayed_ms(call) if device.type == "cuda" else _host_ms(call)
    except (RuntimeError, NotImplementedError):
        if device.type == "cuda":
            torch.cuda.synchronize()
        return None


def _replayed_ms(call: Callable[[], Any]) -> float:
    graph, _ = capture(lambda: [call() for _ in range(_CALLS_PER_SAMPLE)], num_warm_calls=1)
    samples = []
    for _ in range(_NUM_SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / _CALLS_PER_SAMPLE)
    return sorted(samples)[len(samples) // 2]


def _host_ms(call: Callable[[], Any]) -> float:
    call()
    samples: list[float] = []
    begun = time.perf_counter()
    while len(samples) < 3 or (len(samples) < 25 and time.perf_counter() - begun < _HOST_BUDGET_S):
        started = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - started))
    return sorted(samples)[len(samples) // 2]
