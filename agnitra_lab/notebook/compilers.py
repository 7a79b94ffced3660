"""The compilers that a step started: a cancelled step ends them, because its thread waits for them in C."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_COMPILERS = ("g++", "c++", "cc1plus", "clang", "ld", "as", "collect2", "cc", "gcc", "cc1", "ptxas", "nvcc", "cicc")
_PROC = Path("/proc")


def running() -> dict[int, int]:
    """Find the compilers below this process.

    Returns:
        Process id -> when it began, in clock ticks since the machine's start; empty where there is no /proc.
    """
    table = dict(filter(None, map(_read, _PROC.glob("[0-9]*"))))
    below = {os.getpid()}
    # A parent may have a larger id than its child, so one pass is not enough.
    while grown := {pid for pid, (parent, _, _) in table.items() if parent in below} - below:
        below |= grown
    return {pid: table[pid][2] for pid in below if pid in table and _is_compiler(table[pid][1])}


def end_since(earlier: dict[int, int]) -> int:
    """End the compilers below this process that were not running `earlier`; return how many there were."""
    begun = {pid: since for pid, since in running().items() if earlier.get(pid) != since}
    for pid, since in begun.items():
        # The id may have passed to another process since it was read.
        if running_since(pid) == since:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    return len(begun)


def running_since(pid: int) -> int | None:
    """When a process began; None when there is none."""
    found = _read(_PROC / str(pid))
    return found[1][2] if found else None


def _is_compiler(name: str) -> bool:
    stem = name.rsplit("-linux-gnu-", 1)[-1]
    return any(stem == known or stem.startswith(f"{known}-") for known in _COMPILERS)


def _read(folder: Path) -> tuple[int, tuple[int, str, int]] | None:
    """Process id -> (parent, name, begun)."""
    try:
        text = (folder / "stat").read_text(errors="replace")
    except OSError:
        return None
    name = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()
    return int(folder.name), (int(fields[1]), name, int(fields[19]))
