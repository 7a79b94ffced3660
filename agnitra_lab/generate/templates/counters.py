"""Memory in which the programs of a launch count themselves: zero before, zero after, and no kernel to make it so.

A launch that clears its own counters costs one kernel more, which is what counting is to save. So each device has
memory that was cleared once, and whoever counts in it leaves it as it was. Launches that may run at the same time must
not share any: those of one stream take turns and share a piece; each launch that a CUDA graph holds has a piece of its
own for good, as a graph may be replayed on any stream.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_ALIGNED = 32
"""A line of 128 bytes: the counters of two launches are never in one."""
_CLEARED = 2**16
"""Counters that are cleared together: 256 KiB, for 93 captures of a decoder of 22 layers."""


class CounterMemory:
    """The counters of one device.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._unused = self._cleared(0)
        self._of_stream: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def of_stream(self, stream: int, number: int) -> Tensor:
        """Return the zeros in which launches on one stream count; not to be called in a capture."""
        with self._lock:
            # A capture comes after plain calls, and cannot clear more.
            if self._unused.numel() < max(_CLEARED // 2, number + _ALIGNED):
                self._unused = self._cleared(max(_CLEARED, 2 * number + _ALIGNED))
            if self._of_stream.get(stream, self._unused[:0]).numel() < number:
                self._of_stream[stream] = self._taken(number)
            return self._of_stream[stream][:number]

    def of_graph(self, number: int) -> Tensor | None:
        """Return zeros for one captured launch alone; None where there are not enough of them."""
        with self._lock:
            return self._taken(number) if number <= self._unused.numel() else None

    def _taken(self, number: int) -> Tensor:
        length = -(-number // _ALIGNED) * _ALIGNED
        piece, self._unused = self._unused[:number], self._unused[length:]
        return piece

    def _cleared(self, number: int) -> Tensor:
        with torch.inference_mode(False):
            cleared = torch.zeros(number, dtype=torch.int32, device=self._device)
        if number and self._device.type == "cuda":
            # Whichever stream counts in it first must find it cleared.
            torch.cuda.current_stream(self._device).synchronize()
        return cleared


_memory: dict[torch.device, CounterMemory] = {}


def counters(number: int, device: torch.device) -> Tensor:
    """Return zeros for one launch on the current stream, which must leave them as zeros.

    Args:
        number: how many.
        device: where; on a CPU (in the interpreter, or to compile ahead) they are new ones each time.

    Returns:
        [number] int32.
    """
    if device.type != "cuda":
        return torch.zeros(number, dtype=torch.int32, device=device)
    memory = _memory.get(device) or _memory.setdefault(device, CounterMemory(device))
    if not torch.cuda.is_current_stream_capturing():
        return memory.of_stream(torch.cuda.current_stream(device).cuda_stream, number)
    piece = memory.of_graph(number)
    # A graph that was captured with no call before it clears its counters itself, at each replay.
    return torch.zeros(number, dtype=torch.int32, device=device) if piece is None else piece
