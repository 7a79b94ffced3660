"""Ceilings measured on this device in this process: copy bandwidth, and matrix products in the workload's dtype."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from agnitra_lab.contracts.device import DevicePeaks
from agnitra_lab.device import cpu
from agnitra_lab.device.exclusive import exclusive
from agnitra_lab.device.info import synchronize

_COPY_BUDGET_S = 0.15
_GEMM_BUDGET_S = 0.20
_MIN_REPEATS, _MAX_REPEATS = 4, 20
# A size is the last one tried when it took this long: larger products no longer raise the rate.
_GEMM_LONG_S = 0.01
_CUDA_COPY_BYTES = 2**31
_CPU_COPY_BYTES = (64 * 2**20, 256 * 2**20)
_SIZES = {"cuda": (2048, 4096, 8192), "cpu": (256, 512, 1024, 2048)}


def measure_peaks(device: torch.device | str, dtype: torch.dtype) -> DevicePeaks:
    """Measure the device's ceilings, in about half a second; later calls return the same figures.

    Args:
        device: where to measure.
        dtype: dtype of the matrix product; a dtype without one (integers) leaves that figure None. float32 follows
            the process's TF32 setting, because the workload does too.

    Returns:
        The best of several runs: a ceiling is what the device reached at least once. Copy counts bytes read plus
        bytes written, on buffers that no cache holds; the product runs on normal random values, since zeros draw
        less power and clock higher.
    """
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return _measure(chosen, dtype, _float32_precision())


@cache
def _measure(device: torch.device, dtype: torch.dtype, float32_precision: str) -> DevicePeaks:
    with exclusive(), torch.no_grad():
        return DevicePeaks(
            copy_bandwidth_gb_per_s=_copy_bandwidth(device),
            gemm_tflop_per_s=_gemm_rate(device, dtype),
            gemm_dtype=str(dtype).removeprefix("torch."),
        )


def _float32_precision() -> str:
    # torch refuses to answer when a program mixes its old and new TF32 switches.
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "mixed"


@cache
def _copy_bandwidth(device: torch.device) -> float | None:
    num_bytes = _copy_bytes(device)
    try:
        source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
        target = torch.zeros_like(source)
    except RuntimeError:
        return None
    best_s = _best_s(lambda: target.copy_(source), device, _COPY_BUDGET_S)
    return 2 * num_bytes / best_s / 1e9


def _copy_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return max(min(_CUDA_COPY_BYTES, free_bytes // 8), 2**20) // 4 * 4
    low, high = _CPU_COPY_BYTES
    return min(max(2 * (cpu.last_level_cache_bytes() or 0), low), high)


def _gemm_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    if not dtype.is_floating_point:
        return None
    best_tflop_per_s: float | None = None
    sizes = _SIZES[device.type]
    for size in sizes:
        try:
            left = torch.randn(size, size, device=device).to(dtype)
            right = torch.randn(size, size, device=device).to(dtype)
            best_s = _best_s(lambda a=left, b=right: torch.mm(a, b), device, _GEMM_BUDGET_S / len(sizes))  # type: ignore[misc]
        except RuntimeError:
            break
        rate = 2 * size**3 / best_s / 1e12
        best_tflop_per_s = max(best_tflop_per_s or 0.0, rate)
        if best_s > _GEMM_LONG_S:
            break
    return best_tflop_per_s


def _best_s(call: Callable[[], object], device: torch.device, budget_s: float) -> float:
    call()
    synchronize(device)
    best_s = float("inf")
    deadline_s = time.perf_counter() + budget_s
    for repeat in range(_MAX_REPEATS):
        started_s = time.perf_counter()
        call()
        synchronize(device)
        now_s = time.perf_counter()
        best_s = min(best_s, now_s - started_s)
        if repeat + 1 >= _MIN_REPEATS and now_s > deadline_s:
            break
    return best_s
