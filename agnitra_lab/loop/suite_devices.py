"""The devices that a run of the suite is spread over: of one kind, each seen by its workloads as the only one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from agnitra_lab.benchmark.worker import Worker
from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.device import info
from agnitra_lab.errors import AgnitraError, UsageError

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DESCRIBE_LIMIT_S = 60.0


@dataclass(frozen=True)
class Seat:
    """Where one workload after another runs.

    Attributes:
        turns_file: name of the file through which the processes at this device take turns.
        environment: what a process must be given to see this device alone.
    """

    turns_file: str = "device.lock"
    environment: dict[str, str] = field(default_factory=dict)


def describe(device: str, num_devices: int) -> tuple[DeviceInfo, list[Seat]]:
    """Look at the devices, each of which becomes a seat.

    Args:
        device: "cpu", "cuda", or one CUDA device such as "cuda:1".
        num_devices: above 1, the first so many CUDA devices that this process may see.

    Raises:
        UsageError: fewer devices than asked for, or of several kinds: a run holds the results of one.
        AgnitraError: a device does not answer.
    """
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return info.describe(device), [Seat()]
    if num_devices == 1:
        return _facts([device])[0], [Seat()]
    visible = _visible()
    if device != "cuda" or num_devices > len(visible):
        raise UsageError(
            f"{num_devices} devices asked for, {device!r} has {len(visible) if device == 'cuda' else 1}.",
            hint="Give --devices a number that nvidia-smi shows, and --device cuda or nothing.",
        )
    found = _facts([f"cuda:{index}" for index in range(num_devices)])
    kinds = list(dict.fromkeys(facts.name for facts in found))
    if len(kinds) > 1:
        raise UsageError(f"Devices of several kinds: {', '.join(kinds)}.", hint=f"Choose those of one: {_VISIBLE}.")
    return found[0], [Seat(f"device-{index}.lock", {_VISIBLE: visible[index]}) for index in range(num_devices)]


def _visible() -> list[str]:
    """Name the CUDA devices as the driver knows them, in the order in which torch numbers them."""
    named = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    return named or [str(index) for index in range(torch.cuda.device_count())]


def _facts(devices: Sequence[str]) -> list[DeviceInfo]:
    found = []
    # In a process of its own: a CUDA context in this one would hold memory of the devices for nothing.
    with Worker() as worker:
        for device in devices:
            outcome = worker.run(
                "agnitra_lab.device.info:describe", (device,), name=device, deadline_s=_DESCRIBE_LIMIT_S
            )  # fmt: skip
            if outcome.status != "ok":
                raise AgnitraError(f"Device {device!r} does not answer: {outcome.message}.", hint="Check nvidia-smi.")
            found.append(outcome.value)
    return found
