"""Jobs for the worker's tests, each run in a process of its own. Imports no more than the standard library."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agnitra_lab.benchmark.worker_frames import MAGIC


def add(left: int, right: int = 1) -> int:
    return left + right


def own_pid() -> int:
    return os.getpid()


def environment() -> dict[str, str]:
    return dict(os.environ)


def has_torch() -> bool:
    return "torch" in sys.modules


def size_of(text: bytes) -> int:
    return len(text)


def repeat(num_bytes: int) -> bytes:
    return b"x" * num_bytes


def raise_text(text: str) -> None:
    raise RuntimeError(text)


def raise_wrapped(text: str) -> None:
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        raise ValueError("the candidate does not run") from error


def return_before_the_device_fails() -> str:
    """Return as after an asynchronous launch: the device tells of the illegal access when it is waited for."""

    def synchronize() -> None:
        raise_text("CUDA error: an illegal memory access was encountered")

    cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = SimpleNamespace(cuda=cuda)  # type: ignore[assignment]
    return "launched"


def leave() -> None:
    sys.exit("no more")


def hang() -> None:
    while True:
        time.sleep(60.0)


def hang_in_c_and_decline_to_end() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.PyDLL(None).sleep(600)  # a PyDLL call keeps the interpreter's lock: no other thread runs


def segfault() -> None:
    ctypes.string_at(0)


def exit_at_once(code: int) -> None:
    os._exit(code)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def allocate(num_bytes: int) -> int:
    return len(bytearray(num_bytes))


def print_much(num_bytes: int) -> str:
    line = "x" * 1023 + "\n"
    for _ in range(num_bytes // len(line)):
        sys.stdout.write(line)
        sys.stderr.write(line)
    os.write(1, b"straight to stdout\n")
    sys.stdout.write("the last words\n")
    return "printed"


def a_lock() -> Any:
    return threading.Lock()


class OnlyHere:
    """Lives in a module that the parent cannot import by the name that it has in the worker."""


def an_instance() -> OnlyHere:
    return OnlyHere()


def start_sleeper(path: str, leaves_the_group: bool, ending: str) -> None:
    sleeper = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=leaves_the_group
    )
    Path(path).write_text(str(sleeper.pid))
    {"hang": hang, "segfault": segfault, "return": lambda: None}[ending]()


def fork_and_return_twice() -> str:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return "parent" if child else "child"


def write_to_every_pipe(text: bytes, code: int | None = None) -> None:
    for entry in Path("/proc/self/fd").iterdir():
        descriptor = int(entry.name)
        if descriptor > 2:
            try:
                os.write(descriptor, text)
            except OSError:
                continue
    if code is not None:
        os._exit(code)


def half_an_answer() -> None:
    write_to_every_pipe(MAGIC + bytes(6), code=0)
