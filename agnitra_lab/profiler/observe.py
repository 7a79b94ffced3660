"""Observe a stretch of work from outside: wall and CPU seconds, CUDA memory, NVML samples, energy, GPM counters."""

from __future__ import annotations

import contextlib
import functools
import operator
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch
from torch import nn

from agnitra_lab.contracts import GpuSample, MemoryTelemetry
from agnitra_lab.contracts.telemetry import GpmMetrics
from agnitra_lab.device.gpm import GpmCounters
from agnitra_lab.device.nvml import NvmlSampler, throttle_words

SAMPLE_PERIOD_MS = 100.0
NO_CUDA = "no CUDA device: GPU metrics are not available on this machine"
_ON_CPU = "the target ran on the CPU"
_NO_PEAK_ON_CPU = "torch does not track peak memory on a CPU: only its CUDA allocator keeps a peak"
_NO_PEAK_READ = "the CUDA device failed before its memory counters were read"


@dataclass
class Observation:
    """What was seen. Absent values are None and have a reason.

    Attributes:
        wall_ms: from entry to exit, with the device idle at both.
        cpu_s: CPU seconds of the process, all threads.
        samples: NVML readings.
        sample_period_ms: time between two of them, None without any.
        sample_reason: why there are none.
        energy_j: energy that the GPU used.
        energy_reason: why it is None.
        gpm: Hopper's counters, with their own reason; None on a CPU.
        allocated_before_bytes, allocated_after_bytes, peak_memory_bytes: of torch's CUDA allocator.
        memory_reason: why they are None.
    """

    wall_ms: float = 0.0
    cpu_s: float = 0.0
    samples: list[GpuSample] = field(default_factory=list)
    sample_period_ms: float | None = None
    sample_reason: str | None = None
    energy_j: float | None = None
    energy_reason: str | None = None
    gpm: GpmMetrics | None = None
    allocated_before_bytes: int | None = None
    allocated_after_bytes: int | None = None
    peak_memory_bytes: int | None = None
    memory_reason: str | None = None

    @property
    def cpu_utilisation(self) -> float | None:
        """CPU seconds over wall seconds."""
        return self.cpu_s / (self.wall_ms / 1e3) if self.wall_ms > 0 else None

    @property
    def throttle(self) -> tuple[str, ...]:
        """Every reason for lower clocks that a sample showed, in the driver's words."""
        return throttle_words(functools.reduce(operator.or_, (s.throttle_reasons or 0 for s in self.samples), 0))


class Observer:
    """Observes its `with` block; `observation` is complete after it.

    On a CPU nothing is sampled. On a GPU the driver is read before the wall clock starts and after it has stopped
    (the energy counter alone takes 3.5 ms on an H200), and between the two at most ten times a second.
    """

    def __init__(self, device: torch.device) -> None:
        """Prepare.

        Args:
            device: the device to synchronise with and to sample; a CPU is not sampled.
        """
        self.observation = Observation()
        self._device = device
        self._sampler: NvmlSampler | None = None
        self._counters: GpmCounters | None = None
        self._readers = contextlib.ExitStack()
        self._started_ns = 0
        self._cpu_started_s = 0.0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            # The peak of this block alone: the process's own peak counter starts again here.
            torch.cuda.reset_peak_memory_stats(self._device)
            self.observation.allocated_before_bytes = int(torch.cuda.memory_allocated(self._device))
            self._start_readers()
        else:
            reason = _ON_CPU if torch.cuda.is_available() else NO_CUDA
            self.observation.sample_reason = self.observation.energy_reason = reason
            self.observation.memory_reason = _NO_PEAK_ON_CPU
        self._cpu_started_s = time.process_time()
        self._started_ns = time.perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seen = self.observation
        is_cuda = self._device.type == "cuda"
        seen.memory_reason = _NO_PEAK_READ if is_cuda else _NO_PEAK_ON_CPU
        try:
            if is_cuda:
                torch.cuda.synchronize(self._device)
        finally:
            seen.wall_ms = (time.perf_counter_ns() - self._started_ns) / 1e6
            seen.cpu_s = time.process_time() - self._cpu_started_s
            self._stop_readers()
        if is_cuda:
            seen.allocated_after_bytes = int(torch.cuda.memory_allocated(self._device))
            seen.peak_memory_bytes = int(torch.cuda.max_memory_allocated(self._device))
            seen.memory_reason = None

    def _start_readers(self) -> None:
        index = self._device.index if self._device.index is not None else torch.cuda.current_device()
        # An interrupt between the two ends the first: no thread outlives a block that never began.
        with contextlib.ExitStack() as stack:
            self._sampler = stack.enter_context(NvmlSampler(index, SAMPLE_PERIOD_MS))
            # Last in and first out, so that the sampler's slow energy reading does not dilute the counters.
            self._counters = stack.enter_context(GpmCounters(index))
            self._readers = stack.pop_all()

    def _stop_readers(self) -> None:
        self._readers.close()
        seen = self.observation
        if self._sampler is not None:
            seen.samples, seen.sample_reason = list(self._sampler.samples), self._sampler.reason
            seen.sample_period_ms = self._sampler.period_ms if seen.samples else None
            seen.energy_j, seen.energy_reason = self._sampler.energy_j, self._sampler.energy_reason
        if self._counters is not None:
            seen.gpm = self._counters.metrics


def memory_of(observation: Observation, roots: Iterable[nn.Module]) -> MemoryTelemetry:
    """Return the memory quantities of a capture.

    Args:
        observation: of the block.
        roots: root modules; a parameter that several share counts once.

    Returns:
        The quantities; `reason` says why the allocator's are None.
    """
    parameters = {id(parameter): parameter for root in roots for parameter in root.parameters()}
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    is_cuda = observation.peak_memory_bytes is not None
    return MemoryTelemetry(
        peak_memory_bytes=observation.peak_memory_bytes,
        allocated_before_bytes=observation.allocated_before_bytes,
        allocated_after_bytes=observation.allocated_after_bytes,
        parameter_bytes=num_bytes if parameters else None,
        source="torch.cuda allocator" if is_cuda else None,
        reason=observation.memory_reason if not is_cuda else None,
    )
