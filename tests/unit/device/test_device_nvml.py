"""The sampler never raises: it samples, or it says why it does not."""

from __future__ import annotations

import builtins
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from agnitra_lab.device.nvml import NvmlSampler, driver_version


class _NotSupportedError(Exception):
    pass


def _driver(*, is_supported: bool, visible: dict[str, int] | None = None) -> ModuleType:
    """A driver that answers every reading, or refuses every reading as a MIG slice does."""
    module: Any = ModuleType("pynvml")
    module.num_open = 0
    module.handles = []

    def reading(value: Any) -> Any:
        def call(*_args: Any) -> Any:
            if not is_supported:
                raise _NotSupportedError("Not Supported")
            return value

        return call

    def count(step: int) -> Any:
        def call() -> None:
            module.num_open += step

        return call

    def by_uuid(uuid: str) -> int:
        module.handles.append(("uuid", uuid))
        return (visible or {})[uuid]

    def by_index(index: int) -> int:
        module.handles.append(("index", index))
        return index

    module.nvmlInit, module.nvmlShutdown = count(1), count(-1)
    module.nvmlDeviceGetHandleByUUID, module.nvmlDeviceGetHandleByIndex = by_uuid, by_index
    module.nvmlDeviceGetUtilizationRates = reading(SimpleNamespace(gpu=37))
    module.nvmlDeviceGetMemoryInfo = reading(SimpleNamespace(used=5))
    module.nvmlDeviceGetPowerUsage = reading(123_000)
    module.nvmlDeviceGetClockInfo = reading(1980)
    module.nvmlDeviceGetTemperature = reading(41)
    module.nvmlDeviceGetCurrentClocksThrottleReasons = reading(0)
    module.nvmlDeviceGetTotalEnergyConsumption = reading(7_000)
    module.NVML_CLOCK_SM = module.NVML_TEMPERATURE_GPU = 0
    return module


@pytest.fixture
def cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to sample")
def test_without_a_gpu_there_are_no_samples_and_the_reason_is_in_plain_words() -> None:
    with NvmlSampler() as sampler:
        pass
    assert sampler.samples == []
    assert sampler.reason is not None
    assert sampler.reason.startswith("No GPU samples: ")
    assert driver_version() is None


def test_without_the_python_package_the_reason_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pynvml":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with NvmlSampler() as sampler:
        pass
    assert sampler.reason is not None
    assert "nvidia-ml-py" in sampler.reason


def test_even_the_shortest_block_gets_a_first_and_a_last_sample(
    monkeypatch: pytest.MonkeyPatch, cpu_torch: None
) -> None:
    driver = _driver(is_supported=True)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    with NvmlSampler(period_ms=10_000) as sampler:
        pass
    assert [sample.power_w for sample in sampler.samples] == [123.0, 123.0]
    assert sampler.energy_j == 0.0
    assert driver.num_open == 0


def test_samples_follow_each_other_in_time_at_the_period(monkeypatch: pytest.MonkeyPatch, cpu_torch: None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _driver(is_supported=True))
    with NvmlSampler(period_ms=1) as sampler:
        while len(sampler.samples) < 5:
            time.sleep(0.001)
    times = [sample.time_ms for sample in sampler.samples]
    assert times == sorted(times)


def test_a_gpu_that_refuses_every_reading_gives_a_reason_and_no_empty_samples(
    monkeypatch: pytest.MonkeyPatch, cpu_torch: None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _driver(is_supported=False))
    with NvmlSampler() as sampler:
        pass
    assert sampler.samples == []
    assert sampler.reason is not None
    assert "MIG" in sampler.reason


def test_an_exception_inside_the_block_passes_through_and_stops_the_thread(
    monkeypatch: pytest.MonkeyPatch, cpu_torch: None
) -> None:
    driver = _driver(is_supported=True)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    with pytest.raises(KeyError), NvmlSampler():
        raise KeyError("user code")
    assert driver.num_open == 0


@pytest.mark.parametrize(
    ("visible_devices", "handle"), [("3,1", ("index", 1)), ("GPU-a,GPU-b", ("uuid", "GPU-b")), ("", ("index", 1))]
)
def test_torchs_index_is_mapped_through_cuda_visible_devices(
    visible_devices: str, handle: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, cpu_torch: None
) -> None:
    driver = _driver(is_supported=True, visible={"GPU-a": 0, "GPU-b": 1})
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible_devices)
    with NvmlSampler(device_index=1):
        pass
    assert driver.handles == [handle]
