"""Observe a stretch of work from outside: wall and CPU seconds, CUDA memory, NVML samples."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch
from torch import nn

from agnitra_lab.contracts import GpuSample, MemoryTelemetry
from agnitra_lab.device.nvml import NvmlSampler

SAMPLE_PERIOD_MS = 100.0
NO_CUDA = "no CUDA device: GPU metrics are not available on this machine"


@dataclass
class Observation:
    """What was seen. Absent values are None and have a reason.

    Attributes:
        wall_ms: from entry to exit, with the device idle at both.
        cpu_s: CPU seconds of the process, all threads.
        samples: NVML readings.
        sample_reason: why there are none.
        allocated_before_bytes, allocated_after_bytes, peak_memory_bytes: of torch's CUDA allocator.
    """

    wall_ms: float = 0.0
    cpu_s: float = 0.0
    samples: list[GpuSample] = field(default_factory=list)
    sample_reason: str | None = None
    allocated_before_bytes: int | None = None
    allocated_after_bytes: int | None = None
    peak_memory_bytes: int | None = None

    @property
    def cpu_utilisation(self) -> float | None:
        """CPU seconds over wall seconds."""
        return self.cpu_s / (self.wall_ms / 1e3) if self.wall_ms > 0 else None


class Observer:
    """Observes its `with` block; `observation` is complete after it."""

    def __init__(self, device: torch.device) -> None:
        """Prepare.

        Args:
            device: the device to synchronise with and to sample; a CPU is not sampled.
        """
        self.observation = Observation()
        self._device = device
        self._sampler: NvmlSampler | None = None
        self._started_ns = 0
        self._cpu_started_s = 0.0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            # The peak of this block alone: the process's own peak counter starts again here.
            torch.cuda.reset_peak_memory_stats(self._device)
            self.observation.allocated_before_bytes = int(torch.cuda.memory_allocated(self._device))
            index = self._device.index if self._device.index is not None else torch.cuda.current_device()
            self._sampler = NvmlSampler(index, SAMPLE_PERIOD_MS)
            self._sampler.__enter__()
        else:
            has_cuda = torch.cuda.is_available()
            self.observation.sample_reason = "the target ran on the CPU" if has_cuda else NO_CUDA
        self._cpu_started_s = time.process_time()
        self._started_ns = time.perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seen = self.observation
        try:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            seen.wall_ms = (time.perf_counter_ns() - self._started_ns) / 1e6
            seen.cpu_s = time.process_time() - self._cpu_started_s
            if self._sampler is not None:
                self._sampler.__exit__(kind, error, trace)
                seen.samples, seen.sample_reason = list(self._sampler.samples), self._sampler.reason
        if self._device.type == "cuda":
            seen.allocated_after_bytes = int(torch.cuda.memory_allocated(self._device))
            seen.peak_memory_bytes = int(torch.cuda.max_memory_allocated(self._device))


def memory_of(observation: Observation, roots: Iterable[nn.Module]) -> MemoryTelemetry:
    """Return the memory quantities of a capture.

    Args:
        observation: of the block.
        roots: root modules; a parameter that several share counts once.
    """
    parameters = {id(parameter): parameter for root in roots for parameter in root.parameters()}
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    is_cuda = observation.peak_memory_bytes is not None
    return MemoryTelemetry(
        peak_memory_bytes=observation.peak_memory_bytes,
        allocated_before_bytes=observation.allocated_before_bytes,
        allocated_after_bytes=observation.allocated_after_bytes,
        parameter_bytes=num_bytes if parameters else None,
        source="torch.cuda allocator" if is_cuda else "no CUDA allocator: torch does not track peak memory on a CPU",
    )
