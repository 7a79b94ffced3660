"""Four kinds of devices, as far as a rule of thumb can tell them apart: what a multiprocessor has, and how many."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from agnitra_lab.contracts.device import DeviceInfo

DeviceClass = Literal["sm_80", "sm_90", "consumer", "none"]
KIB = 1024


@dataclass(frozen=True)
class DeviceFacts:
    """What the rules know of a device.

    Attributes:
        name: its class.
        num_multiprocessors: of the device itself where it is known, else of the class's usual part.
        shared_memory_bytes: what one program may have at most (CUDA C programming guide, "technical specifications
            per compute capability").
        threads_per_multiprocessor: resident threads at most, from the same table.
    """

    name: DeviceClass
    num_multiprocessors: int
    shared_memory_bytes: int
    threads_per_multiprocessor: int


CLASSES: dict[DeviceClass, DeviceFacts] = {
    "sm_80": DeviceFacts("sm_80", 108, 163 * KIB, 2048),
    "sm_90": DeviceFacts("sm_90", 132, 227 * KIB, 2048),
    # Ampere, Ada and Blackwell cards of the 8.6, 8.9 and 12.0 kind.
    "consumer": DeviceFacts("consumer", 128, 99 * KIB, 1536),
    # A CPU, or nothing that is known: kernels run in the interpreter, where every program costs.
    "none": DeviceFacts("none", 1, 227 * KIB, 1024),
}


def facts_of(device: DeviceInfo | None) -> DeviceFacts:
    """Return the facts of a device; `none` for a CPU, and for a GPU whose compute capability is not known."""
    if device is None or device.type != "cuda":
        return CLASSES["none"]
    capability = re.fullmatch(r"sm_?(\d{2,3})[a-z]?", (device.arch or "").lower())
    if capability is None:
        return CLASSES["none"]
    usual = CLASSES[_class_of(int(capability[1]))]
    return DeviceFacts(
        usual.name, device.num_multiprocessors or usual.num_multiprocessors, usual.shared_memory_bytes,
        usual.threads_per_multiprocessor,
    )  # fmt: skip


def _class_of(capability: int) -> DeviceClass:
    if capability in (90, 100, 101, 103):
        return "sm_90"
    return "sm_80" if capability == 80 else "consumer"
