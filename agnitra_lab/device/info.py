"""Which device runs, and the facts about it that travel with every number."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.device import cpu
from agnitra_lab.device.nvml import driver_version
from agnitra_lab.errors import MissingError, UsageError


def default_device() -> str:
    """Return "cuda" where a CUDA device answers, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe(device: torch.device | str | None = None) -> DeviceInfo:
    """Describe a device and the versions of what runs on it.

    Args:
        device: a torch device or its name; None takes the default device.

    Raises:
        UsageError: when the name is no device that this package knows.
        MissingError: when a CUDA device is asked for and there is none.
    """
    chosen = _parse(device if device is not None else default_device())
    return _describe_cuda(chosen) if chosen.type == "cuda" else _describe_cpu()


def device_of(*objects: Any) -> torch.device:
    """Return the device of the first accelerator tensor in `objects`, else the CPU.

    Args:
        objects: modules, tensors, or lists, tuples, mappings and dataclasses of them, nested as deep as they come.
            A module counts by its parameters and buffers. Scalars that stay on the CPU beside CUDA weights are
            usual (step counters, index tables), so one accelerator tensor decides.
    """
    for tensor in _tensors(objects):
        if tensor.device.type != "cpu":
            return tensor.device
    return torch.device("cpu")


def synchronize(device: torch.device | str) -> None:
    """Wait until everything queued on `device` has run, on all its streams; returns at once for a CPU."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.synchronize(chosen)


def _parse(device: torch.device | str) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"{str(device)!r} is not a device.", hint='Give "cpu", "cuda" or "cuda:1".') from error
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"Device {str(device)!r} is not supported.", hint='Give "cpu", "cuda" or "cuda:1".')
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise MissingError(
            f"Device {str(device)!r} was asked for, and torch sees no CUDA device.",
            hint='Use "cpu", or install a CUDA build of torch and check nvidia-smi.',
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise MissingError(f"Device {str(device)!r} was asked for, and torch sees {count} CUDA device(s).")
    return chosen


def _describe_cpu() -> DeviceInfo:
    return DeviceInfo(
        type="cpu",
        name=cpu.cpu_name(),
        arch=torch.backends.cpu.get_cpu_capability(),
        num_threads=torch.get_num_threads(),
        total_memory_bytes=cpu.total_memory_bytes(),
        l2_cache_bytes=cpu.cache_bytes(2),
        **_versions(),
    )


def _describe_cuda(device: torch.device) -> DeviceInfo:
    properties = torch.cuda.get_device_properties(device)
    return DeviceInfo(
        type="cuda",
        name=properties.name,
        arch=f"sm{properties.major}{properties.minor}",
        num_multiprocessors=properties.multi_processor_count,
        num_threads=torch.get_num_threads(),
        total_memory_bytes=properties.total_memory,
        l2_cache_bytes=getattr(properties, "L2_cache_size", None),
        cuda_version=torch.version.cuda,
        driver_version=driver_version(),
        **_versions(),
    )


def _versions() -> dict[str, Any]:
    try:
        triton_version: str | None = version("triton")
    except PackageNotFoundError:
        triton_version = None
    return {
        "torch_version": str(torch.__version__),
        "triton_version": triton_version,
        "python_version": platform.python_version(),
    }


def _tensors(objects: Iterable[Any]) -> Iterator[torch.Tensor]:
    for item in objects:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, torch.nn.Module):
            yield from item.parameters()
            yield from item.buffers()
        elif isinstance(item, Mapping):
            yield from _tensors(item.values())
        elif isinstance(item, (list, tuple)):
            yield from _tensors(item)
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            yield from _tensors(vars(item).values())
