"""GPU samples through NVML: a background thread that never raises and says in plain words why it has nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

from agnitra_lab.contracts.device import GpuSample

MIN_PERIOD_MS = 100.0
"""The driver renews its readings no faster, so a denser series would repeat old ones and cost more."""
MIN_ENERGY_BLOCK_MS = 100.0
"""The driver renews its energy counter every 20 to 100 ms, so over a shorter block it may not have moved."""
_EXIT_TIMEOUT_S = 2.0

_THROTTLE_WORDS = {
    0x001: "gpu idle",
    0x002: "applications clocks setting",
    0x004: "sw power cap",
    0x008: "hw slowdown",
    0x010: "sync boost",
    0x020: "sw thermal slowdown",
    0x040: "hw thermal slowdown",
    0x080: "hw power brake slowdown",
    0x100: "display clock setting",
    0x200: "board limit",
    0x400: "reliability",
}


class OpenGpu(NamedTuple):
    """An NVML session on one GPU, to be ended with `close_gpu`.

    Attributes:
        nvml: the module `pynvml`, None when there is nothing to read.
        handle: of the GPU.
        reason: why there is nothing to read, a clause without its full stop; else None.
    """

    nvml: Any
    handle: Any
    reason: str | None


class NvmlSampler:
    """Samples one GPU at entry, at exit and, 10 times a second at most, while the `with` block runs.

    Utilisation, memory, power, SM clock, temperature and throttle reasons together take about 0.1 ms a sample.
    The energy counter takes 3.5 ms (H200, driver 580), so it is read at entry and exit only.

    Attributes:
        period_ms: time between two samples, as it is kept.
        samples: the readings so far; empty when there is nothing to read. `time_ms` counts from the entry's reading.
        reason: why there are no samples, else None.
        energy_j: energy that the GPU used inside the block. The counter is up to 100 ms old at either end, so this
            is good to a tenth only from 1 s on.
        energy_reason: why there is no energy, else None.
    """

    def __init__(self, device_index: int = 0, period_ms: float = MIN_PERIOD_MS) -> None:
        """Prepare a sampler.

        Args:
            device_index: torch's device index (after CUDA_VISIBLE_DEVICES), not NVML's.
            period_ms: time between two samples; below `MIN_PERIOD_MS` (100 ms) it is raised to that.
        """
        self.period_ms = max(MIN_PERIOD_MS, period_ms)
        self.samples: list[GpuSample] = []
        self.reason: str | None = None
        self.energy_j: float | None = None
        self.energy_reason: str | None = None
        self._device_index = device_index
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._gpu = OpenGpu(None, None, None)
        self._started_s = 0.0
        self._energy_at_entry_mj: int | None = None

    def __enter__(self) -> Self:
        self.samples, self.energy_j = [], None
        self._stop = threading.Event()
        self._gpu = open_gpu(self._device_index)
        if self._gpu.nvml is None:
            self.reason = f"No GPU samples: {self._gpu.reason}."
            self.energy_reason = f"No energy reading: {self._gpu.reason}."
            return self
        self.reason = self.energy_reason = None
        self._energy_at_entry_mj = self._energy_mj()
        self._started_s = time.perf_counter()
        # Here and not in the thread, which would read beside the first launches of a short block.
        self._sample()
        thread = threading.Thread(target=self._run, args=(self._stop,), name="agnitra-nvml", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread is left: the samples of entry and exit remain
            return self
        self._thread = thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gpu = self._gpu
        if gpu.nvml is None:
            return
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(_EXIT_TIMEOUT_S)
            if thread.is_alive():
                # Another call would wait for the same driver, and a shutdown would pull it from under the thread.
                self.samples = list(self.samples)
                self.reason = f"The NVIDIA driver has not answered for {_EXIT_TIMEOUT_S:.0f} s."
                self.energy_reason = f"No energy reading: {self.reason}"
                return
        try:
            self._sample()
            self._finish_energy()
        finally:
            self._gpu = OpenGpu(None, None, None)
            close_gpu(gpu)
        if not any(_has_reading(sample) for sample in self.samples):
            self.samples = []
            self.reason = "The NVIDIA driver gave no readings for this GPU (a MIG slice or a permission can do that)."

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(self.period_ms / 1e3):
            self._sample()

    def _sample(self) -> None:
        sample = _quietly(self._read)
        if sample is not None:
            self.samples.append(sample)

    def _read(self) -> GpuSample:
        nvml, handle, _ = self._gpu
        utilisation = _quietly(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        memory = _quietly(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        power_mw = _quietly(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        temperature_c = _quietly(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        return GpuSample(
            time_ms=(time.perf_counter() - self._started_s) * 1e3,
            gpu_utilisation=float(utilisation.gpu) if utilisation is not None else None,
            memory_used_bytes=int(memory.used) if memory is not None else None,
            power_w=power_mw / 1e3 if power_mw is not None else None,
            sm_clock_mhz=_quietly(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            temperature_c=float(temperature_c) if temperature_c is not None else None,
            throttle_reasons=_quietly(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        )

    def _energy_mj(self) -> int | None:
        nvml, handle, _ = self._gpu
        return _quietly(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    def _finish_energy(self) -> None:
        block_ms = (time.perf_counter() - self._started_s) * 1e3
        if self._energy_at_entry_mj is None:
            self.energy_reason = "The NVIDIA driver counts no energy for this GPU (a MIG slice, or older than Volta)."
            return
        if block_ms < MIN_ENERGY_BLOCK_MS:
            self.energy_reason = (
                f"The block took {block_ms:.1f} ms, and the driver's energy counter needs at least "
                f"{MIN_ENERGY_BLOCK_MS:.0f} ms."
            )
            return
        energy_mj = self._energy_mj()
        used_mj = energy_mj - self._energy_at_entry_mj if energy_mj is not None else 0
        if used_mj > 0:
            self.energy_j = used_mj / 1e3
        else:
            # A GPU draws power at all times: a counter that stands still was not read, or was reset.
            self.energy_reason = f"The NVIDIA driver's energy counter did not advance in {block_ms:.0f} ms."


def throttle_words(bits: int) -> tuple[str, ...]:
    """Decode the driver's reasons for clocks below their maximum.

    Args:
        bits: nvmlClocksThrottleReason* bits, as in `GpuSample.throttle_reasons`; those of several samples may be
            joined by |.

    Returns:
        The reasons in the driver's words, lowest bit first; empty for full clocks. A bit that is not known is named
        by its number.
    """
    known = tuple(words for bit, words in _THROTTLE_WORDS.items() if bits & bit)
    rest = bits & ~sum(_THROTTLE_WORDS)
    return (*known, f"unknown reason {rest:#x}") if rest else known


def driver_version() -> str | None:
    """Return the NVIDIA driver's version, or None where NVML does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None
    found = _quietly(pynvml.nvmlSystemGetDriverVersion)
    _quietly(pynvml.nvmlShutdown)
    return found.decode() if isinstance(found, bytes) else found


def open_gpu(device_index: int) -> OpenGpu:
    """Open an NVML session on the GPU that torch calls `device_index`; never raises."""
    try:
        import pynvml
    except ImportError:
        return OpenGpu(None, None, "the Python package nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except Exception as error:
        return OpenGpu(None, None, failure_words(error))
    try:
        return OpenGpu(pynvml, _handle_of(pynvml, device_index), None)
    except Exception as error:
        _quietly(pynvml.nvmlShutdown)
        return OpenGpu(None, None, failure_words(error))


def close_gpu(gpu: OpenGpu) -> None:
    """End the session; NVML counts its users, so this ends no other's."""
    if gpu.nvml is not None:
        _quietly(gpu.nvml.nvmlShutdown)


def failure_words(error: Exception) -> str:
    """Say why NVML gave nothing, in a clause without its full stop."""
    words = {
        "NVMLError_LibraryNotFound": "this machine has no NVIDIA driver",
        "NVMLError_DriverNotLoaded": "the NVIDIA driver is installed and not loaded",
        "NVMLError_NoPermission": "this account may not read the NVIDIA driver's counters",
        "NVMLError_LibRmVersionMismatch": "the NVIDIA driver and its library differ; reboot",
        "NVMLError_NotFound": "NVML does not list the GPU that torch uses",
        "NVMLError_InvalidArgument": "NVML does not list the GPU that torch uses",
    }
    return words.get(type(error).__name__, f"NVML answered {error}")


def _has_reading(sample: GpuSample) -> bool:
    return any(value is not None for name, value in sample if name != "time_ms")


def _quietly(call: Callable[[], Any]) -> Any:
    """Return the call's value, or None: NVML refuses single readings on MIG slices and old drivers."""
    try:
        return call()
    except Exception:
        return None


def _handle_of(nvml: ModuleType, device_index: int) -> Any:
    """Find the NVML handle of torch's device: by UUID, by PCI address, by CUDA_VISIBLE_DEVICES, by index."""
    uuid, pci_address = _torch_identity(device_index)
    if uuid is not None and (handle := _quietly(lambda: nvml.nvmlDeviceGetHandleByUUID(uuid))) is not None:
        return handle
    if pci_address is not None:
        handle = _quietly(lambda: nvml.nvmlDeviceGetHandleByPciBusId(pci_address))
        if handle is not None:
            return handle
    entries = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    if device_index < len(entries):
        entry = entries[device_index]
        if not entry.isdigit():
            return nvml.nvmlDeviceGetHandleByUUID(entry)
        device_index = int(entry)
    return nvml.nvmlDeviceGetHandleByIndex(device_index)


def _torch_identity(device_index: int) -> tuple[str | None, str | None]:
    import torch

    if not torch.cuda.is_available() or device_index >= torch.cuda.device_count():
        return None, None
    properties = torch.cuda.get_device_properties(device_index)
    uuid = getattr(properties, "uuid", None)
    parts = [getattr(properties, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    numbers = [part for part in parts if isinstance(part, int)]
    return (
        f"GPU-{uuid}" if uuid is not None else None,
        f"{numbers[0]:08x}:{numbers[1]:02x}:{numbers[2]:02x}.0" if len(numbers) == 3 else None,
    )
