"""The sampler never raises: it samples, or it says why it does not."""

from __future__ import annotations

import builtins
import itertools
import re
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from agnitra_lab.device import nvml
from agnitra_lab.device.nvml import MIN_PERIOD_MS, NvmlSampler, driver_version, throttle_words


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


def _sampling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "agnitra-nvml"]


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
    assert driver.num_open == 0


def test_samples_follow_each_other_in_time_at_the_period(monkeypatch: pytest.MonkeyPatch, cpu_torch: None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _driver(is_supported=True))
    with NvmlSampler(period_ms=MIN_PERIOD_MS) as sampler:
        while len(sampler.samples) < 3:
            time.sleep(0.001)
    assert len(sampler.samples) >= 4
    times = [sample.time_ms for sample in sampler.samples]
    assert times == sorted(times)


@pytest.mark.parametrize(("asked_ms", "kept_ms"), [(1.0, 100.0), (float("nan"), 100.0), (250.0, 250.0)])
def test_it_samples_ten_times_a_second_at_most(asked_ms: float, kept_ms: float) -> None:
    assert NvmlSampler(period_ms=asked_ms).period_ms == kept_ms


def test_leaving_the_block_does_not_wait_for_the_period(monkeypatch: pytest.MonkeyPatch, cpu_torch: None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _driver(is_supported=True))
    with NvmlSampler(period_ms=3_600_000) as sampler:
        pass
    assert sampler.reason is None
    assert not _sampling_threads()


def test_two_hundred_uses_leave_no_thread_and_no_session_behind(
    monkeypatch: pytest.MonkeyPatch, cpu_torch: None
) -> None:
    driver = _driver(is_supported=True)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    num_threads = threading.active_count()
    sampler = NvmlSampler()
    for _ in range(200):
        with sampler:
            assert len(_sampling_threads()) == 1
        assert len(sampler.samples) == 2
    assert threading.active_count() == num_threads
    assert driver.num_open == 0


def test_a_driver_that_hangs_does_not_hang_the_block(monkeypatch: pytest.MonkeyPatch, cpu_torch: None) -> None:
    driver = _driver(is_supported=True)
    answers, is_hanging = threading.Event(), threading.Event()

    def hang(_handle: Any) -> int:
        if threading.current_thread().name == "agnitra-nvml":
            is_hanging.set()
            answers.wait()
        return 0

    driver.nvmlDeviceGetPowerUsage = hang
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(nvml, "_EXIT_TIMEOUT_S", 0.01)
    with NvmlSampler() as sampler:
        is_hanging.wait()
    answers.set()
    assert "has not answered" in (sampler.reason or "")
    assert sampler.energy_j is None
    assert sampler.energy_reason is not None


def test_energy_is_the_difference_of_the_counter(monkeypatch: pytest.MonkeyPatch, cpu_torch: None) -> None:
    driver = _driver(is_supported=True)
    counter = itertools.count(7_000, 2_500)
    driver.nvmlDeviceGetTotalEnergyConsumption = lambda _handle: next(counter)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    with NvmlSampler() as sampler:
        time.sleep(0.101)
    assert sampler.energy_j == 2.5
    assert sampler.energy_reason is None


@pytest.mark.parametrize(
    ("block_s", "is_supported", "words"),
    [(0.0, True, "needs at least 100 ms"), (0.101, True, "did not advance"), (0.0, False, "counts no energy")],
)
def test_energy_that_is_not_known_is_none_with_a_reason(
    block_s: float, is_supported: bool, words: str, monkeypatch: pytest.MonkeyPatch, cpu_torch: None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _driver(is_supported=is_supported))
    with NvmlSampler() as sampler:
        time.sleep(block_s)
    assert sampler.energy_j is None
    assert words in (sampler.energy_reason or "")


def test_a_driver_that_lost_a_call_costs_that_reading_alone(monkeypatch: pytest.MonkeyPatch, cpu_torch: None) -> None:
    driver = _driver(is_supported=True)
    del driver.nvmlDeviceGetCurrentClocksThrottleReasons
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    with NvmlSampler() as sampler:
        pass
    assert [sample.throttle_reasons for sample in sampler.samples] == [None, None]
    assert [sample.sm_clock_mhz for sample in sampler.samples] == [1980, 1980]


def test_throttle_words_are_the_drivers_own_names() -> None:
    import pynvml

    prefix = "nvmlClocksThrottleReason"
    names = {name.removeprefix(prefix): value for name, value in vars(pynvml).items() if name.startswith(prefix)}
    known = {name: bit for name, bit in names.items() if 0 < bit <= 0x400 and name not in ("All", "UserDefinedClocks")}
    assert len(known) >= 9
    for name, bit in known.items():
        assert throttle_words(bit) == (re.sub("(?<!^)([A-Z])", r" \1", name).lower(),)


def test_throttle_reasons_come_together_lowest_bit_first() -> None:
    assert throttle_words(0x8 | 0x4) == ("sw power cap", "hw slowdown")


def test_full_clocks_have_no_throttle_words_and_a_new_bit_is_named_by_its_number() -> None:
    assert throttle_words(0) == ()
    assert throttle_words(0x8001) == ("gpu idle", "unknown reason 0x8000")


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
