"""What Linux says about the CPU: its name, its memory and its last-level cache. Absent facts are None."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

_UNIT_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@cache
def cpu_name() -> str:
    """Return the CPU's own name, or the architecture where the system does not tell it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"(?m)^(?:model name|Hardware|Processor)\s*:\s*(\S.*)$", text)
    return match.group(1).strip() if match else platform.processor() or platform.machine() or "CPU"


def total_memory_bytes() -> int | None:
    """Return the physical memory in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def cache_bytes(level: int) -> int | None:
    """Return the size in bytes of the data or unified cache of `level` as seen by the first CPU."""
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            is_wanted = (folder / "level").read_text().strip() == str(level)
            if is_wanted and (folder / "type").read_text().strip() != "Instruction":
                return parse_size((folder / "size").read_text())
        except OSError:
            continue
    return None


def last_level_cache_bytes() -> int | None:
    """Return the size in bytes of the largest-numbered cache level that exists."""
    return next((size for level in (4, 3, 2, 1) if (size := cache_bytes(level))), None)


def parse_size(text: str) -> int | None:
    """Parse the kernel's size notation ("107520K") into bytes; None when it is not one."""
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]?)\s*", text)
    return int(match.group(1)) * _UNIT_BYTES[match.group(2)] if match else None
