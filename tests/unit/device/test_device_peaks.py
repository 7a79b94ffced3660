"""Measured ceilings."""

from __future__ import annotations

import torch

from agnitra_lab.device.peaks import measure_peaks


def test_both_ceilings_are_measured_and_kept_for_the_process() -> None:
    peaks = measure_peaks("cpu", torch.float32)
    assert peaks.copy_bandwidth_gb_per_s is not None
    assert peaks.gemm_tflop_per_s is not None
    assert peaks.gemm_dtype == "float32"
    assert measure_peaks(torch.device("cpu"), torch.float32) is peaks


def test_a_dtype_without_matrix_products_has_no_such_ceiling() -> None:
    peaks = measure_peaks("cpu", torch.int64)
    assert peaks.gemm_tflop_per_s is None
    assert peaks.copy_bandwidth_gb_per_s == measure_peaks("cpu", torch.float32).copy_bandwidth_gb_per_s
