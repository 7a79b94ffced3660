"""The parent's hold on one worker process: start it, exchange frames within a deadline, end it with all it started."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from agnitra_lab.benchmark.worker_frames import FrameReader

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# The package's folder is given by hand and the working folder left out (-P), so that no file there shadows a module.
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from agnitra_lab.benchmark.worker_main import main; main()"
# A descriptor that a grandchild holds open hides the end of the pipe: look at the process itself this often.
_TICK_S = 0.1
_POLL_S = 0.005
_PIECE_BYTES = 2**16
# A grandchild may write to stderr without end; what stood there before the answer fits into one pipe.
_MAX_PIECES = 32
# The kernel frees a killed process's memory and device first; past this it is left to be reaped later.
_REAP_S = 8.0


class ChildDiedError(Exception):
    """The worker process ended, or closed its pipe, before it had answered."""


class WorkerChild:
    """One worker process in a session of its own, with pipes for jobs, answers and stderr.

    No thread reads the pipes: `exchange` serves all three while it waits, so neither side can block on a full one.
    """

    def __init__(self, *, env: Mapping[str, str], tail_bytes: int) -> None:
        """Start the process.

        Args:
            env: its whole environment.
            tail_bytes: how much of its stderr (and stdout, which goes the same way) to keep.

        Raises:
            OSError: when it cannot be started.
        """
        self._tail_bytes = tail_bytes
        self._tail = b""
        self._reader = FrameReader()
        jobs_read, self._jobs_fd = os.pipe()
        self._answers_fd, answers_write = os.pipe()
        self._stderr_fd, stderr_write = os.pipe()
        command = [sys.executable, "-P", "-c", _BOOT, str(_PACKAGE_ROOT), str(jobs_read), str(answers_write)]
        try:
            self._process = subprocess.Popen(
                command, env=dict(env), stdin=subprocess.DEVNULL, stdout=stderr_write, stderr=stderr_write,
                pass_fds=(jobs_read, answers_write), start_new_session=True,
            )  # fmt: skip
        except BaseException:
            self._close_pipes()
            raise
        finally:
            for descriptor in (jobs_read, answers_write, stderr_write):
                os.close(descriptor)
        for descriptor in (self._jobs_fd, self._answers_fd, self._stderr_fd):
            os.set_blocking(descriptor, False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_exited(self) -> bool:
        """Tell whether the process has ended. It is not reaped: until `end` has run, nobody else gets its id."""
        if self._process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def take_tail(self) -> str:
        """Return the last of what the process has printed since the last call."""
        self._drain()
        tail, self._tail = self._tail, b""
        return tail.decode("utf-8", errors="replace")

    def exchange(self, frame: bytes, deadline_s: float) -> bytes:
        """Send a frame and wait for the answer's payload.

        Args:
            frame: encoded.
            deadline_s: for both, from now.

        Raises:
            TimeoutError: past the deadline.
            ChildDiedError: when no answer can come any more.
            FrameError: when what came is no answer.
        """
        ends_s = time.monotonic() + deadline_s
        rest = memoryview(frame)
        with selectors.DefaultSelector() as selector:
            for descriptor in (self._answers_fd, self._stderr_fd):
                selector.register(descriptor, selectors.EVENT_READ)
            selector.register(self._jobs_fd, selectors.EVENT_WRITE)
            while True:
                # Asked before the pipe is read: what a dead process had written is in the pipe by then.
                is_over = self.has_exited()
                for key, _ in selector.select(0.0 if is_over else min(_TICK_S, max(ends_s - time.monotonic(), 0.0))):
                    if key.fd == self._jobs_fd:
                        rest = self._write(rest)
                        if not rest:
                            selector.unregister(self._jobs_fd)
                    elif key.fd == self._stderr_fd and not self._drain():
                        selector.unregister(self._stderr_fd)
                is_over |= not self._receive()
                payload = self._reader.next()
                if payload is not None:
                    return payload
                if is_over:
                    raise ChildDiedError
                if time.monotonic() >= ends_s:
                    raise TimeoutError

    def end(self, *, grace_s: float, is_asked: bool = False) -> int | None:
        """End the process and everything it started, and release the pipes. Calling it again changes nothing.

        Args:
            grace_s: how long it may take to end by itself before it is killed.
            is_asked: ask by closing its pipe, as for a worker that waits for a job, and not by SIGTERM.

        Returns:
            Its exit code; minus the signal's number when a signal ended it; None when the kernel does not let it go.
        """
        if self._stderr_fd < 0:
            return self._process.returncode
        strays = _descendants(self.pid)
        if is_asked:
            os.close(self._jobs_fd)
            self._jobs_fd = -1
        elif not self.has_exited():
            self._signal_group(signal.SIGTERM)
        try:
            self.wait(grace_s)
        finally:  # an interrupt while it waits must not leave the process behind
            self._kill(strays)
            self.wait(_REAP_S)
            code = self._process.poll()
            self._drain()
            self._close_pipes()
        return code

    def wait(self, limit_s: float) -> None:
        """Wait until the process has ended, reading on meanwhile: it may be printing its last words."""
        ends_s = time.monotonic() + limit_s
        while not self.has_exited() and time.monotonic() < ends_s:
            self._drain()
            time.sleep(_POLL_S)

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(OSError):
            os.killpg(self.pid, number)

    def _kill(self, strays: Mapping[int, tuple[int, str]]) -> None:
        self._signal_group(signal.SIGKILL)
        for pid, (_, started) in strays.items():
            # One that left the group. Its start time says that the number still is the same process.
            if _stat(pid)[1] == started:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _write(self, rest: memoryview) -> memoryview:
        try:
            return rest[os.write(self._jobs_fd, rest[:_PIECE_BYTES]) :]
        except BlockingIOError:
            return rest
        except BrokenPipeError:
            return rest[:0]  # it is dead or dying; the answers' pipe says so

    def _receive(self) -> bool:
        """Read what has come; return False at the end of the pipe."""
        while True:
            try:
                piece = os.read(self._answers_fd, _PIECE_BYTES)
            except BlockingIOError:
                return True
            if not piece:
                return False
            self._reader.feed(piece)

    def _drain(self) -> bool:
        """Keep the end of what stands in the stderr pipe; return False at the end of the pipe."""
        for _ in range(_MAX_PIECES):
            try:
                piece = os.read(self._stderr_fd, _PIECE_BYTES) if self._stderr_fd >= 0 else b""
            except BlockingIOError:
                return True
            if not piece:
                return False
            self._tail = (self._tail + piece)[-self._tail_bytes :]
        return True

    def _close_pipes(self) -> None:
        for descriptor in (self._jobs_fd, self._answers_fd, self._stderr_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._jobs_fd = self._answers_fd = self._stderr_fd = -1


def _stat(pid: int) -> tuple[int, str]:
    """Return (parent's id, start time) of a process, (0, "") where /proc does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[1]), fields[19]
    except (OSError, IndexError, ValueError):
        return 0, ""


def _descendants(root: int) -> dict[int, tuple[int, str]]:
    """Return the living descendants of a process, which may have left its group. On Linux only."""
    table = {int(path.name): _stat(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    found: dict[int, tuple[int, str]] = {}
    generation = {root}
    while generation:
        generation = {pid for pid, (parent, _) in table.items() if parent in generation and pid not in found}
        found.update((pid, table[pid]) for pid in generation)
    return found
