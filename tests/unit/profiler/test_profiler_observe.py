"""What is observed around a block: the driver is read outside of the wall time, and an absent value has its reason."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from agnitra_lab.contracts import GpuSample
from agnitra_lab.device.nvml import OpenGpu
from agnitra_lab.profiler import observe
from agnitra_lab.profiler.observe import NO_CUDA, Observation, Observer, memory_of


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CUDA device and its driver in name only; the list holds what was asked of them, in order."""
    seen: list[str] = []

    def logged(name: str, value: Any = None) -> Any:
        def call(*_args: Any, **_kwargs: Any) -> Any:
            seen.append(name)
            return value

        return call

    for name, value in {"reset_peak_memory_stats": None, "memory_allocated": 10, "max_memory_allocated": 30}.items():
        monkeypatch.setattr(torch.cuda, name, logged(name, value))
    monkeypatch.setattr(torch.cuda, "synchronize", logged("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver: Any = ModuleType("pynvml")
    driver.nvmlShutdown = logged("shutdown")
    driver.nvmlDeviceGetTotalEnergyConsumption = logged("energy", 7_000)
    driver.nvmlDeviceGetPowerUsage = logged("sample", 300_000)
    driver.nvmlDeviceIsMigDeviceHandle = lambda _handle: 0
    driver.nvmlDeviceGetMigMode = lambda _handle: [0, 0]
    driver.nvmlGpmQueryDeviceSupport = lambda _handle: SimpleNamespace(isSupportedDevice=1)
    driver.nvmlGpmSampleAlloc, driver.nvmlGpmSampleFree = object, logged("gpm free")
    driver.nvmlGpmSampleGet = logged("gpm sample")
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    for module in ("nvml", "gpm"):
        monkeypatch.setattr(f"agnitra_lab.device.{module}.open_gpu", lambda _index: OpenGpu(driver, 0, None))
    clock = SimpleNamespace(perf_counter_ns=logged("clock", 0), process_time=lambda: 0.0)
    monkeypatch.setattr(observe, "time", clock)
    return seen


def test_the_driver_is_read_before_the_clock_starts_and_after_it_stops(log: list[str]) -> None:
    with Observer(torch.device("cuda")) as observer:
        log.append("body")
    first, last = log.index("clock"), len(log) - 1 - log[::-1].index("clock")
    assert log[first : last + 1] == ["clock", "body", "synchronize", "clock"]
    assert {"energy", "sample", "gpm sample"} <= set(log[:first])
    assert [name for name in log[last + 1 :] if name in ("gpm free", "sample")] == ["gpm free", "gpm free", "sample"]
    assert observer.observation.samples[0].power_w == 300.0
    assert observer.observation.sample_period_ms == 100.0


def test_on_a_gpu_each_absent_value_has_its_own_reason(log: list[str]) -> None:
    with Observer(torch.device("cuda")) as observer:
        pass
    seen = observer.observation
    assert seen.sample_reason is None
    assert seen.energy_j is None
    assert "energy counter" in (seen.energy_reason or "")
    assert seen.gpm is not None
    assert seen.gpm.sm_utilisation is None
    assert "300 ms" in (seen.gpm.reason or "")
    assert (seen.peak_memory_bytes, seen.memory_reason) == (30, None)


def test_a_device_that_fails_at_the_end_still_gives_its_samples(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_device: Any) -> None:
        raise RuntimeError("illegal memory access")

    observer = Observer(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="illegal"), observer:
        monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert len(observer.observation.samples) == 2
    assert log.count("shutdown") == 2
    memory = memory_of(observer.observation, [])
    assert memory.peak_memory_bytes is None
    assert "failed" in (memory.reason or "")


def test_an_interrupt_while_the_readers_start_leaves_no_thread(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_index: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("agnitra_lab.device.gpm.open_gpu", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Observer(torch.device("cuda")).__enter__()
    assert not [thread for thread in threading.enumerate() if thread.name == "agnitra-nvml"]
    assert log.count("shutdown") == 1


def test_on_a_cpu_nothing_is_sampled_and_every_reason_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    num_threads = threading.active_count()
    with Observer(torch.device("cpu")) as observer:
        assert threading.active_count() == num_threads
    seen = observer.observation
    assert (seen.samples, seen.sample_period_ms, seen.gpm, seen.energy_j, seen.throttle) == ([], None, None, None, ())
    assert seen.sample_reason == seen.energy_reason == NO_CUDA
    assert seen.wall_ms > 0


def test_a_null_peak_on_a_cpu_says_why() -> None:
    layer = nn.Linear(2, 3)
    with Observer(torch.device("cpu")) as observer:
        layer(torch.zeros(1, 2))
    memory = memory_of(observer.observation, [layer, layer])
    assert memory.parameter_bytes == (2 * 3 + 3) * 4
    assert memory.peak_memory_bytes is None
    assert "CPU" in (memory.reason or "")


def test_throttle_words_are_those_of_all_samples_together() -> None:
    samples = [GpuSample(time_ms=float(bits), throttle_reasons=bits) for bits in (0, 4, 1)]
    samples.append(GpuSample(time_ms=9.0, throttle_reasons=None))
    assert Observation(samples=samples).throttle == ("gpu idle", "sw power cap")
