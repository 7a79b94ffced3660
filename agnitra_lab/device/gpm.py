"""Hopper's own counters over a block: NVML's GPM takes them at both ends, and gives shares of the GPU's peaks."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any, Self

from agnitra_lab.contracts.telemetry import GpmMetrics
from agnitra_lab.device.nvml import OpenGpu, close_gpu, failure_words, open_gpu

MIN_BLOCK_MS = 300.0
"""The counters are renewed about every 100 ms. On an H200 a block of 20 ms read 0.0 and NaN throughout, one of 114 ms
that was busy for an eighth of it 0.0 throughout, and one of 145 ms two thirds of its busy share."""

_METRICS = {
    "sm_utilisation": "NVML_GPM_METRIC_SM_UTIL",
    "sm_occupancy": "NVML_GPM_METRIC_SM_OCCUPANCY",
    "tensor_utilisation": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "dram_bandwidth_utilisation": "NVML_GPM_METRIC_DRAM_BW_UTIL",
    "fp32_utilisation": "NVML_GPM_METRIC_FP32_UTIL",
}

_FAILURES = {
    "AttributeError": "the installed pynvml knows no GPM; install nvidia-ml-py 12.560 or newer, and no package pynvml",
    "NVMLError_FunctionNotFound": "the NVIDIA driver is too old for GPM; it came with driver 525",
    "NVMLError_NotSupported": "this GPU has no GPM counters; a Hopper GPU (H100, H200) or a newer one has",
    "NVMLError_NoPermission": (
        "this account may not read GPM counters; run as root, or have the administrator load the driver with "
        "NVreg_RestrictProfilingToAdminUsers=0"
    ),
}


class GpmCounters:
    """Takes the counters at entry and exit of its `with` block; never raises.

    A reading takes 0.1 ms, the first of a process 0.65 ms, and needs no special rights (H200, driver 580). The two
    ends are as old as the counters' last renewal: in shorter blocks idle time around the block dilutes the values, from
    300 ms on they stand.

    Attributes:
        metrics: complete after the block. They are of the whole GPU, other processes included.

    Source: NVML API reference, GPM functions: more than 100 ms between two samples, for the counters' refresh rate.
    """

    def __init__(self, device_index: int = 0) -> None:
        """Prepare.

        Args:
            device_index: torch's device index (after CUDA_VISIBLE_DEVICES), not NVML's.
        """
        self.metrics = GpmMetrics(reason="No GPM metrics: the block has not run.")
        self._device_index = device_index
        self._gpu = OpenGpu(None, None, None)
        self._samples: list[Any] = []
        self._started_ns = 0

    def __enter__(self) -> Self:
        self._gpu = open_gpu(self._device_index)
        failure = self._gpu.reason
        if failure is None:
            try:
                failure = self._start()
            except Exception as error:
                failure = _failure_words(error)
        if failure is None:
            self.metrics = GpmMetrics(reason="No GPM metrics: the block has not ended.")
        else:
            self.metrics = GpmMetrics(reason=f"No GPM metrics: {failure}.")
            self._close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._gpu.nvml is None:
            return
        try:
            self.metrics = self._finish()
        except Exception as problem:
            self.metrics = GpmMetrics(reason=f"No GPM metrics: {_failure_words(problem)}.")
        finally:
            self._close()

    def _start(self) -> str | None:
        """Take the first sample, or return why there is none."""
        nvml, handle, _ = self._gpu
        if _is_partitioned(nvml, handle):
            return (
                "this GPU is split into MIG slices, and the counters of the whole would mix in the other slices; "
                "profile on a GPU without MIG"
            )
        if not nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
            return _FAILURES["NVMLError_NotSupported"]
        for _ in range(2):
            self._samples.append(nvml.nvmlGpmSampleAlloc())
        nvml.nvmlGpmSampleGet(handle, self._samples[0])
        self._started_ns = time.perf_counter_ns()
        return None

    def _finish(self) -> GpmMetrics:
        nvml, handle, _ = self._gpu
        block_ms = (time.perf_counter_ns() - self._started_ns) / 1e6
        if block_ms < MIN_BLOCK_MS:
            return GpmMetrics(
                reason=f"No GPM metrics: the block took {block_ms:.1f} ms, and the counters need at least "
                f"{MIN_BLOCK_MS:.0f} ms; profile more calls."
            )
        nvml.nvmlGpmSampleGet(handle, self._samples[1])
        request = nvml.c_nvmlGpmMetricsGet_t()
        request.version = nvml.NVML_GPM_METRICS_GET_VERSION
        request.numMetrics = len(_METRICS)
        request.sample1, request.sample2 = self._samples
        for index, metric in enumerate(_METRICS.values()):
            request.metrics[index].metricId = getattr(nvml, metric)
        nvml.nvmlGpmMetricsGet(request)
        found = [(request.metrics[index].nvmlReturn, request.metrics[index].value) for index in range(len(_METRICS))]
        return _metrics_of(found, block_ms)

    def _close(self) -> None:
        gpu, self._gpu = self._gpu, OpenGpu(None, None, None)
        while self._samples:
            sample = self._samples.pop()
            try:
                gpu.nvml.nvmlGpmSampleFree(sample)
            except Exception:
                continue
        close_gpu(gpu)


def _metrics_of(found: list[tuple[int, float]], block_ms: float) -> GpmMetrics:
    """Turn NVML's percentages into shares.

    Args:
        found: return code and value of each metric, in the order of `_METRICS`.
        block_ms: between the two samples.
    """
    shares: dict[str, float | None] = {
        name: value / 100.0 if code == 0 and math.isfinite(value) and value >= 0.0 else None
        for name, (code, value) in zip(_METRICS, found, strict=True)
    }
    # Two samples of the same renewal: the bandwidth is 0/0, a NaN, and the zeros beside it mean as little.
    is_stale = any(math.isnan(value) for _, value in found) and not any(shares.values())
    if is_stale:
        return GpmMetrics(reason=f"No GPM metrics: the counters were not renewed in a block of {block_ms:.0f} ms.")
    missing = [name for name, share in shares.items() if share is None]
    return GpmMetrics(**shares, reason=f"NVML gave no value for {', '.join(missing)}." if missing else None)


def _is_partitioned(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceIsMigDeviceHandle(handle)) or bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except Exception:  # GPUs that cannot be split do not know the question
        return False


def _failure_words(error: Exception) -> str:
    return _FAILURES.get(type(error).__name__) or failure_words(error)
