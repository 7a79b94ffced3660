"""What a machine is and can do, as facts that travel with every number."""

from __future__ import annotations

from typing import Literal

from agnitra_lab.contracts.base import Contract, Count, NonNegative, Positive


class DeviceInfo(Contract):
    """The device that ran, and the versions of what ran on it. Absent facts are None."""

    type: Literal["cpu", "cuda"]
    name: str
    arch: str | None = None
    """Compute capability ("sm90") on CUDA, the instruction set ("AVX2") on a CPU."""
    num_multiprocessors: Count | None = None
    num_threads: Count | None = None
    total_memory_bytes: Count | None = None
    l2_cache_bytes: Count | None = None
    torch_version: str | None = None
    triton_version: str | None = None
    cuda_version: str | None = None
    driver_version: str | None = None
    python_version: str | None = None


class DevicePeaks(Contract):
    """Ceilings measured on the device in this process: every number is reported with its ceiling."""

    copy_bandwidth_gb_per_s: Positive | None = None
    gemm_tflop_per_s: Positive | None = None
    gemm_dtype: str | None = None


class GpuSample(Contract):
    """One NVML reading. A value that the driver does not give is None."""

    time_ms: NonNegative
    gpu_utilisation: NonNegative | None = None
    memory_used_bytes: Count | None = None
    power_w: NonNegative | None = None
    sm_clock_mhz: Count | None = None
    temperature_c: float | None = None
    throttle_reasons: Count | None = None
