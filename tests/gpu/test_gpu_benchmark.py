"""The benchmark on a real GPU: its own checks, and the controls that must fail there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agnitra_lab.benchmark.compare import compare
from agnitra_lab.benchmark.equivalence import check
from agnitra_lab.benchmark.inputs import redraw, shifted_copy
from agnitra_lab.benchmark.timing import measure_kernel, time_pair
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.device.info import describe, device_of
from agnitra_lab.device.nvml import NvmlSampler
from agnitra_lab.device.peaks import measure_peaks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)]
    return nn.Sequential(*layers).eval().to("cuda", dtype)


def _workload(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Workload:
    return Workload("mlp", model, (torch.randn(512, 1024, device="cuda", dtype=dtype),), items_per_call=512)


def test_the_gpu_is_described_with_what_the_contract_asks() -> None:
    info = describe("cuda")
    assert info.arch is not None
    assert info.arch.startswith("sm")
    assert info.num_multiprocessors
    assert info.l2_cache_bytes


def test_peaks_of_bf16_exceed_those_of_fp32() -> None:
    low, full = measure_peaks("cuda", torch.bfloat16), measure_peaks("cuda", torch.float32)
    assert low.gemm_tflop_per_s is not None
    assert full.gemm_tflop_per_s is not None
    assert low.gemm_tflop_per_s > full.gemm_tflop_per_s
    assert low.copy_bandwidth_gb_per_s == full.copy_bandwidth_gb_per_s


def test_the_sampler_reads_the_gpu_that_torch_uses() -> None:
    with NvmlSampler(torch.cuda.current_device(), period_ms=10) as sampler:
        x = torch.randn(4096, 4096, device="cuda")
        for _ in range(50):
            x = torch.tanh(x @ x)
        torch.cuda.synchronize()
    assert sampler.samples or sampler.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_compiled_model_passes_the_gate(dtype: torch.dtype) -> None:
    model = _model(dtype)
    found = check(_workload(model, dtype), torch.compile(model))
    assert found.problems == ()


def test_tf32_fails_the_exact_track_and_passes_the_relaxed_one() -> None:
    model = _model(torch.float32)

    def in_tf32(x: torch.Tensor) -> torch.Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return model(x)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    workload = _workload(model, torch.float32)
    assert not check(workload, in_tf32).is_equivalent
    assert check(workload, in_tf32, precision_track="relaxed").problems == ()


def test_an_unwritten_output_reads_poison_or_stale_values_and_fails() -> None:
    workload = _workload(_model())
    assert not check(workload, lambda x: torch.empty_like(x)).is_equivalent


def test_work_on_another_stream_is_inside_the_clock() -> None:
    model = _model()
    side = torch.cuda.Stream()

    def hidden(x: torch.Tensor) -> torch.Tensor:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(50):
                out = model(x)
        return out

    def open_work(x: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            out = model(x)
        return out

    workload = _workload(model)
    found = compare(workload, hidden, baseline=open_work, candidate_name="hidden", budget_s=1.0)
    assert found.speedup.median < 2


def test_the_device_span_is_no_longer_than_the_wall_time() -> None:
    model = _model()
    found = compare(_workload(model), model, candidate_name="same", budget_s=1.0)
    assert found.baseline_latency.device_ms_p50 is not None
    assert found.baseline_latency.device_ms_p50 < found.baseline_latency.latency_ms_p50
    assert found.equivalence.error_vs_fp64 is not None
    assert found.equivalence.problems == ()


def test_half_the_work_is_seen_in_both_clocks() -> None:
    model = _model()
    inputs = redraw(_workload(model), 0)
    found = time_pair(
        lambda x: [model(x) for _ in range(20)][-1], lambda x: [model(x) for _ in range(10)][-1],
        lambda index: shifted_copy(inputs), device="cuda", budget_s=1.0,
    )  # fmt: skip
    assert found.baseline_device_ms is not None
    assert found.candidate_device_ms is not None
    assert (found.baseline_ms / found.candidate_ms).mean() > 1.2
    assert found.baseline_device_ms.mean() / found.candidate_device_ms.mean() > 1.5


def test_a_kernel_ten_times_the_size_takes_longer() -> None:
    small, large = (torch.randn(size, device="cuda") for size in (2**22, 10 * 2**22))
    assert measure_kernel(lambda: large.mul(2), device="cuda") > 3 * measure_kernel(lambda: small.mul(2), device="cuda")


def test_redrawn_inputs_stay_on_their_device() -> None:
    assert device_of(redraw(_workload(_model()), 1)).type == "cuda"
