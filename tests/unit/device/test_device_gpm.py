"""GPM counters never raise and never turn a lack of data into a zero. The structures are NVML's own."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from agnitra_lab.contracts import GpmMetrics
from agnitra_lab.device.gpm import GpmCounters

_NAN = float("nan")
_LONG_S = 0.31
_VALUES = (80.0, 40.0, 25.0, 60.0, 5.0)


def _driver(values: tuple[float, ...] = _VALUES, *, is_supported: bool = True, is_mig: bool = False) -> Any:
    """A driver whose counters, over any block, are `values` in percent, in the order of the contract's fields."""
    module: Any = ModuleType("pynvml")
    module.num_open = module.num_samples = 0
    for name in vars(pynvml):
        if "GPM" in name or name == "c_nvmlGpmMetricsGet_t":
            setattr(module, name, getattr(pynvml, name))
    ids = [pynvml.NVML_GPM_METRIC_SM_UTIL, pynvml.NVML_GPM_METRIC_SM_OCCUPANCY, pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL]
    ids += [pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL, pynvml.NVML_GPM_METRIC_FP32_UTIL]
    value_of = dict(zip(ids, values, strict=True))

    def open_session() -> None:
        module.num_open += 1

    def close_session() -> None:
        module.num_open -= 1

    def alloc() -> Any:
        module.num_samples += 1
        return pynvml.c_nvmlGpmSample_t()

    def free(_sample: Any) -> None:
        module.num_samples -= 1

    def metrics_get(request: Any) -> None:
        for index in range(request.numMetrics):
            request.metrics[index].value = value_of[request.metrics[index].metricId]

    module.nvmlInit, module.nvmlShutdown = open_session, close_session
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceIsMigDeviceHandle = lambda _handle: 0
    module.nvmlDeviceGetMigMode = lambda _handle: [int(is_mig), int(is_mig)]
    module.nvmlGpmQueryDeviceSupport = lambda _handle: SimpleNamespace(isSupportedDevice=int(is_supported))
    module.nvmlGpmSampleAlloc, module.nvmlGpmSampleFree = alloc, free
    module.nvmlGpmSampleGet = lambda _handle, sample: sample
    module.nvmlGpmMetricsGet = metrics_get
    return module


def _measure(driver: Any, monkeypatch: pytest.MonkeyPatch, block_s: float = _LONG_S) -> GpmMetrics:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    with GpmCounters() as counters:
        time.sleep(block_s)
    assert (driver.num_open, driver.num_samples) == (0, 0)
    return counters.metrics


def _has_no_value(metrics: GpmMetrics) -> bool:
    return all(value is None for value in metrics.model_dump(exclude={"reason"}).values())


def test_percentages_become_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _measure(_driver(), monkeypatch) == GpmMetrics(
        sm_utilisation=0.8,
        sm_occupancy=0.4,
        tensor_utilisation=0.25,
        dram_bandwidth_utilisation=0.6,
        fp32_utilisation=0.05,
    )


def test_an_idle_gpu_reads_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = _measure(_driver((0.0,) * 5), monkeypatch)
    assert metrics.sm_utilisation == metrics.dram_bandwidth_utilisation == 0.0
    assert metrics.reason is None


def test_a_short_block_has_no_values_and_the_reason_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = _measure(_driver(), monkeypatch, block_s=0.0)
    assert _has_no_value(metrics)
    assert "at least 300 ms" in (metrics.reason or "")


def test_counters_that_were_not_renewed_are_no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = _measure(_driver((0.0, 0.0, 0.0, _NAN, 0.0)), monkeypatch)
    assert _has_no_value(metrics)
    assert "not renewed" in (metrics.reason or "")


def test_a_single_absent_counter_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = _measure(_driver((80.0, 40.0, 25.0, _NAN, 5.0)), monkeypatch)
    assert metrics.sm_utilisation == 0.8
    assert metrics.dram_bandwidth_utilisation is None
    assert "dram_bandwidth_utilisation" in (metrics.reason or "")


def test_a_counter_that_nvml_refuses_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = _driver()
    fill = driver.nvmlGpmMetricsGet

    def refuse_first(request: Any) -> None:
        fill(request)
        request.metrics[0].nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED

    driver.nvmlGpmMetricsGet = refuse_first
    metrics = _measure(driver, monkeypatch)
    assert metrics.sm_utilisation is None
    assert metrics.sm_occupancy == 0.4


@pytest.mark.parametrize(
    ("driver", "words"), [(_driver(is_supported=False), "Hopper"), (_driver(is_mig=True), "without MIG")]
)
def test_a_gpu_that_cannot_tell_gives_the_way_to_get_it(
    driver: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = _measure(driver, monkeypatch)
    assert _has_no_value(metrics)
    assert words in (metrics.reason or "")


@pytest.mark.parametrize("call", ["nvmlGpmQueryDeviceSupport", "nvmlGpmSampleGet", "nvmlGpmMetricsGet"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_NO_PERMISSION, "NVreg_RestrictProfilingToAdminUsers=0"),
        (pynvml.NVML_ERROR_NOT_SUPPORTED, "Hopper"),
        (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, "driver"),
        (pynvml.NVML_ERROR_UNKNOWN, "NVML answered"),
    ],
)
def test_an_error_of_the_driver_becomes_a_reason(
    call: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = _driver()

    def refuse(*_args: Any) -> None:
        raise pynvml.NVMLError(code)

    setattr(driver, call, refuse)
    metrics = _measure(driver, monkeypatch)
    assert _has_no_value(metrics)
    assert words in (metrics.reason or "")


def test_an_old_python_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = _driver()
    del driver.nvmlGpmQueryDeviceSupport
    assert "nvidia-ml-py" in (_measure(driver, monkeypatch).reason or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_reason_is_in_plain_words() -> None:
    with GpmCounters() as counters:
        pass
    assert _has_no_value(counters.metrics)
    assert (counters.metrics.reason or "").startswith("No GPM metrics: ")


def test_an_exception_inside_the_block_passes_through_and_frees_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = _driver()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    with pytest.raises(KeyError), GpmCounters():
        raise KeyError("user code")
    assert (driver.num_open, driver.num_samples) == (0, 0)
