"""Cold caches: what one call left in the cache must not help the next, on either side."""

from __future__ import annotations

import time

import torch

from agnitra_lab.device import cpu

_MIN_CUDA_BYTES = 256 * 2**20
_CPU_BYTES = (16 * 2**20, 256 * 2**20)
# On a CPU with a large shared cache a full sweep can cost several times the call itself.
_CPU_SHARE_OF_CALL, _CPU_MIN_S = 0.5, 2e-3


class ColdCache:
    """Sweeps a buffer through the cache. Call it outside the timed span, and synchronise after it."""

    def __init__(self, device: torch.device, *, call_s: float = 0.0) -> None:
        """Allocate the buffer.

        Args:
            device: where the calls run.
            call_s: how long one call takes; a CPU sweep is cut to half of that, and to no less than 2 ms.
        """
        if device.type == "cuda":
            l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 0
            free_bytes, _ = torch.cuda.mem_get_info(device)
            size_bytes = min(max(2 * l2_bytes, _MIN_CUDA_BYTES), free_bytes // 2)
        else:
            low, high = _CPU_BYTES
            size_bytes = min(max(2 * (cpu.last_level_cache_bytes() or 0), low), high)
        self._buffer = torch.zeros(max(size_bytes // 4, 1), dtype=torch.int32, device=device)
        if device.type != "cuda":
            self._shorten(max(call_s * _CPU_SHARE_OF_CALL, _CPU_MIN_S))

    def __call__(self) -> None:
        self._buffer.zero_()

    def _shorten(self, limit_s: float) -> None:
        sweep_s = float("inf")
        for _ in range(2):
            started_s = time.perf_counter()
            self()
            sweep_s = min(sweep_s, time.perf_counter() - started_s)
        if sweep_s > limit_s:
            self._buffer = self._buffer[: max(int(self._buffer.numel() * limit_s / sweep_s), 1)].clone()
