"""The device to oneself while something is timed: processes that share one device take turns through a locked file."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DeviceTurn:
    """This process's turn at the device. A thread that holds it may enter again; other threads and processes wait.

    The kernel gives the turn back when the process ends in whatever way, so that a crash blocks nobody.
    """

    def __init__(self, path: Path | str) -> None:
        """Open the file that the processes share.

        Args:
            path: created where it is missing; its content does not matter.

        Raises:
            OSError: when it cannot be opened.
        """
        self.path = Path(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._thread = threading.RLock()
        self._depth = 0
        self._waited_s = 0.0
        self._waiting_since_s: float | None = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for the turn, and keep it for the block."""
        with self._thread:
            if self._depth == 0:
                self._wait()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._lock(is_taken=False)

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting so far, a wait that is going on included."""
        since_s = self._waiting_since_s
        return self._waited_s + (time.monotonic() - since_s if since_s is not None else 0.0)

    def _wait(self) -> None:
        started_s = self._waiting_since_s = time.monotonic()
        try:
            self._lock(is_taken=True)
        finally:
            self._waiting_since_s = None
            self._waited_s += time.monotonic() - started_s

    def _lock(self, *, is_taken: bool) -> None:
        import fcntl  # absent on Windows, where one process has the device

        fcntl.flock(self._descriptor, fcntl.LOCK_EX if is_taken else fcntl.LOCK_UN)


_turn: DeviceTurn | None = None


def take_turns(path: Path | str | None) -> None:
    """Let every timing of this process from now on wait for its turn at a locked file; None ends that.

    Raises:
        OSError: when the file cannot be opened.
    """
    global _turn
    _turn = DeviceTurn(path) if path is not None else None


def shared_file() -> Path | None:
    """Return the file at which this process takes turns, for a process of its own to do the same."""
    return _turn.path if _turn is not None else None


@contextmanager
def exclusive() -> Iterator[None]:
    """Have the device to oneself for the block; at once, unless `take_turns` was called in this process."""
    if _turn is None:
        yield
        return
    with _turn.hold():
        yield


def waited_s() -> float:
    """Return the seconds that this process has waited for its turns: no share of a time limit or a compile time."""
    return _turn.waited_s if _turn is not None else 0.0
