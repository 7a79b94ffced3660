"""GPU samples through NVML: a background thread that never raises and says in plain words why it has nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, Self

from agnitra_lab.contracts.device import GpuSample

_EXIT_TIMEOUT_S = 2.0


class NvmlSampler:
    """Samples one GPU while the `with` block runs.

    Utilisation, memory, power, SM clock, temperature and throttle reasons together take about 0.1 ms a sample.
    The energy counter takes 3.5 ms (H200, driver 580), so it is read at entry and exit only.

    Attributes:
        samples: the readings so far; empty when there is nothing to read.
        reason: why there are no samples, else None.
        energy_j: energy that the GPU used inside the block, where the driver counts it.
    """

    def __init__(self, device_index: int = 0, period_ms: float = 100.0) -> None:
        """Prepare a sampler.

        Args:
            device_index: torch's device index (after CUDA_VISIBLE_DEVICES), not NVML's.
            period_ms: time between two samples; at least 1 ms.
        """
        self.samples: list[GpuSample] = []
        self.reason: str | None = None
        self.energy_j: float | None = None
        self._device_index = device_index
        self._period_s = max(period_ms, 1.0) / 1e3
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._nvml: ModuleType | None = None
        self._handle: Any = None
        self._started_s = 0.0
        self._energy_at_entry_mj: int | None = None

    def __enter__(self) -> Self:
        self._started_s = time.perf_counter()
        self._nvml, self._handle, self.reason = _open(self._device_index)
        if self._nvml is not None:
            self._energy_at_entry_mj = self._energy_mj()
            self._thread = threading.Thread(target=self._run, name="agnitra-nvml", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_EXIT_TIMEOUT_S)
        if self._nvml is None:
            return
        energy_mj = self._energy_mj()
        if energy_mj is not None and self._energy_at_entry_mj is not None:
            self.energy_j = max(energy_mj - self._energy_at_entry_mj, 0) / 1e3
        if not any(_has_reading(sample) for sample in self.samples):
            self.samples.clear()
            self.reason = "The NVIDIA driver gave no readings for this GPU (a MIG slice or a permission can do that)."
        _quietly(self._nvml.nvmlShutdown)

    def _run(self) -> None:
        while True:
            self.samples.append(self._read())
            if self._stop.wait(self._period_s):
                break
        self.samples.append(self._read())

    def _read(self) -> GpuSample:
        nvml, handle = self._nvml, self._handle
        assert nvml is not None
        utilisation = _quietly(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = _quietly(nvml.nvmlDeviceGetMemoryInfo, handle)
        power_mw = _quietly(nvml.nvmlDeviceGetPowerUsage, handle)
        temperature_c = _quietly(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        return GpuSample(
            time_ms=(time.perf_counter() - self._started_s) * 1e3,
            gpu_utilisation=float(utilisation.gpu) if utilisation is not None else None,
            memory_used_bytes=int(memory.used) if memory is not None else None,
            power_w=power_mw / 1e3 if power_mw is not None else None,
            sm_clock_mhz=_quietly(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            temperature_c=float(temperature_c) if temperature_c is not None else None,
            throttle_reasons=_quietly(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle),
        )

    def _energy_mj(self) -> int | None:
        return _quietly(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle) if self._nvml else None


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


def _has_reading(sample: GpuSample) -> bool:
    return any(value is not None for name, value in sample if name != "time_ms")


def _quietly(call: Callable[..., Any], *args: Any) -> Any:
    """Return the call's value, or None: NVML refuses single readings on MIG slices and old drivers."""
    try:
        return call(*args)
    except Exception:
        return None


def _open(device_index: int) -> tuple[ModuleType | None, Any, str | None]:
    try:
        import pynvml
    except ImportError:
        return None, None, "No GPU samples: the Python package nvidia-ml-py is not installed."
    try:
        pynvml.nvmlInit()
    except Exception as error:
        return None, None, _reason(error)
    try:
        return pynvml, _handle_of(pynvml, device_index), None
    except Exception as error:
        _quietly(pynvml.nvmlShutdown)
        return None, None, _reason(error)


def _reason(error: Exception) -> str:
    words = {
        "NVMLError_LibraryNotFound": "No GPU samples: this machine has no NVIDIA driver.",
        "NVMLError_DriverNotLoaded": "No GPU samples: the NVIDIA driver is installed and not loaded.",
        "NVMLError_NoPermission": "No GPU samples: this account may not read the NVIDIA driver's counters.",
        "NVMLError_LibRmVersionMismatch": "No GPU samples: the NVIDIA driver and its library differ; reboot.",
        "NVMLError_NotFound": "No GPU samples: NVML does not list the GPU that torch uses.",
        "NVMLError_InvalidArgument": "No GPU samples: NVML does not list the GPU that torch uses.",
    }
    return words.get(type(error).__name__, f"No GPU samples: NVML answered {error}.")


def _handle_of(nvml: ModuleType, device_index: int) -> Any:
    """Find the NVML handle of torch's device: by UUID, by PCI address, by CUDA_VISIBLE_DEVICES, by index."""
    uuid, pci_address = _torch_identity(device_index)
    if uuid is not None and (handle := _quietly(nvml.nvmlDeviceGetHandleByUUID, uuid)) is not None:
        return handle
    if pci_address is not None and (handle := _quietly(nvml.nvmlDeviceGetHandleByPciBusId, pci_address)) is not None:
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
