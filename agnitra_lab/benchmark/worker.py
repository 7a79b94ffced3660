"""Isolation: a candidate runs in a worker process that may hang, crash or lose its device while the parent lives on."""

from __future__ import annotations

import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from agnitra_lab.benchmark.worker_child import ChildDiedError, WorkerChild
from agnitra_lab.benchmark.worker_frames import FrameError, encode
from agnitra_lab.benchmark.worker_main import PING, Answer, Job, Setup
from agnitra_lab.errors import AgnitraError, MissingError, UsageError
from agnitra_lab.redact import REDACTED, redact

Status = Literal["ok", "error", "timeout", "crash", "out_of_memory", "device_lost"]

# The process that had one of these can take the next job; after any other it is replaced.
_REUSABLE = ("ok", "error")
_START_LIMIT_S = 60.0
_PING_LIMIT_S = 2.0
_CLOSE_GRACE_S = 2.0
_TAIL_BYTES = 16 * 1024
# The redactor's rule leaves out what cloud providers name by the end: AWS_SECRET_ACCESS_KEY, AWS_ACCESS_KEY_ID.
_KEY_NAME = re.compile(r"(?i)(^|[-_])key(_id)?$")


@dataclass(frozen=True)
class Outcome:
    """How one candidate's job went.

    Attributes:
        name: the candidate.
        status: "ok"; "error" (the job raised, or its result cannot cross); "timeout"; "crash" (the process ended, or
            answered with garbage); "out_of_memory"; "device_lost" (the device's context was poisoned).
        value: what the job returned, None unless "ok".
        message: what happened, in one line; empty when "ok".
        exit_signal: after a crash or timeout the signal that ended the process, such as "SIGSEGV" (or "SIGTERM" and
            "SIGKILL", which this side sends); None where it exited by itself.
        wall_s: from handing the job over to the outcome, in s, the end of a spent process included.
        start_s: what starting a fresh process took before that, in s; 0 when one was there.
        stderr_tail: the last of what the job printed, on stdout or stderr, and the stacks of a crash or hang.
    """

    name: str
    status: Status
    value: Any
    message: str
    exit_signal: str | None
    wall_s: float
    start_s: float
    stderr_tail: str

    def __str__(self) -> str:
        return f"Candidate {self.name!r}: {self.status}" + (f" ({self.message})" if self.message else "")


class Worker:
    """Owns one child process at a time, a fresh interpreter in a session of its own, and hands it job after job.

    A process that hung, crashed, ran out of memory or lost its device is ended with all that it started; the next run
    starts another by itself. This contains failures, not malice: the child has the parent's rights, and its answers
    are unpickled.

    Example:
        with Worker() as worker:
            outcome = worker.run("my_package.jobs:time_candidate", (spec,), name="tile 64", deadline_s=60.0)
    """

    def __init__(
        self, *, env: Mapping[str, str] | None = None, max_memory_bytes: int | None = None, grace_s: float = 0.5
    ) -> None:
        """Prepare a worker; the first `run` starts its process.

        Args:
            env: variables to set on top of the parent's environment, from which all that look like credentials are
                left out.
            max_memory_bytes: limit on the child's address space. For work on the CPU alone: CUDA reserves far more
                addresses than it uses, and does not start under a limit.
            grace_s: time in s between SIGTERM and SIGKILL.

        Raises:
            MissingError: where there are no POSIX processes.
        """
        if os.name != "posix":
            raise MissingError("Isolated workers need POSIX processes.", hint="Run on Linux or macOS.")
        self._env = {**_without_credentials(dict(os.environ)), **(env or {})}
        self._max_memory_bytes = max_memory_bytes
        self._grace_s = grace_s
        self._child: WorkerChild | None = None
        self._num_jobs = 0
        self._is_closed = False
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The id of the process that would take the next job, None where none is running."""
        return self._child.pid if self._child is not None else None

    def run(
        self,
        job: str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str,
        deadline_s: float,
    ) -> Outcome:
        """Run one job in the worker process and wait for its outcome; one at a time, others wait their turn.

        Args:
            job: "package.module:function" or "path/to/file.py:function".
            args, kwargs: its arguments, pickled; describe a candidate rather than hand over a live one.
            name: the candidate, for the record.
            deadline_s: time for the job in s; starting a process is not counted.

        Returns:
            The outcome, whatever the job did.

        Raises:
            UsageError: when the job is no such name, the arguments cannot be pickled, or the worker is closed.
            AgnitraError: when no worker process can be started.
        """
        if deadline_s <= 0:
            raise UsageError(f"deadline_s is {deadline_s}, expected a time in s above 0.")
        function = _function(job)
        with self._lock:
            if self._is_closed:
                raise UsageError(f"The worker is closed, so {name!r} cannot run.", hint="Open another Worker.")
            self._num_jobs += 1
            frame = _job_frame(self._num_jobs, function, args, dict(kwargs or {}))
            try:
                start_s = self._ensure_child()
                return self._exchange(frame, name, deadline_s, start_s)
            except BaseException:  # KeyboardInterrupt as well: a job that nobody waits for must not hold the device
                self._drop(grace_s=0.0)
                raise

    def close(self) -> None:
        """End the process and release everything; the second call does nothing."""
        with self._lock:
            self._is_closed = True
            self._drop(grace_s=_CLOSE_GRACE_S, is_asked=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A fork's copy must not end the process that its original goes on using.
        child = getattr(self, "_child", None)
        if child is not None and not sys.is_finalizing() and os.getpid() == self._owner_pid:
            child.end(grace_s=0.0)

    def _ensure_child(self) -> float:
        """Start a process where none can take a job; return the seconds that took."""
        if self._child is not None and _is_responsive(self._child):
            return 0.0
        self._drop(grace_s=0.0)
        started_s = time.perf_counter()
        is_main_thread = threading.current_thread() is threading.main_thread()
        setup = Setup(tuple(map(os.path.abspath, sys.path)), os.getpid(), self._max_memory_bytes, is_main_thread)
        try:
            self._child = WorkerChild(env=self._env, tail_bytes=_TAIL_BYTES)
            self._child.exchange(encode(pickle.dumps(setup)), _START_LIMIT_S)
        except (OSError, ChildDiedError, FrameError) as error:
            tail = self._child.take_tail().strip() if self._child is not None else str(error)
            raise AgnitraError(
                f"The worker process does not start: {tail.splitlines()[-1] if tail else type(error).__name__}.",
                hint="Check env and max_memory_bytes (an interpreter alone takes about 200 MB of addresses).",
            ) from error
        return time.perf_counter() - started_s

    def _exchange(self, frame: bytes, name: str, deadline_s: float, start_s: float) -> Outcome:
        assert self._child is not None
        child, exit_signal, value = self._child, None, None
        started_s = time.perf_counter()
        status: Status
        try:
            status, message, value = self._read(child.exchange(frame, deadline_s))
        except TimeoutError:
            status, message = "timeout", f"no answer within {deadline_s:g} s"
        except ChildDiedError:
            child.wait(self._grace_s)  # the pipe closes a moment before the exit code is there
            status, message = "crash", ""
        except FrameError as error:
            status, message = "crash", f"answered with {error}"
        if status not in _REUSABLE:
            code = self._drop(grace_s=self._grace_s)
            exit_signal = _signal_name(code) if status in ("crash", "timeout") else None
            message = message or f"the process ended with {exit_signal or f'exit code {code}'}"
        wall_s = time.perf_counter() - started_s
        return Outcome(name, status, value, message, exit_signal, wall_s, start_s, child.take_tail())

    def _read(self, payload: bytes) -> tuple[Status, str, Any]:
        try:
            answer = pickle.loads(payload)
        except Exception as error:
            raise FrameError(f"an answer that cannot be read ({error})") from error
        if not isinstance(answer, Answer) or answer.number != self._num_jobs:
            raise FrameError("an answer to another question")
        if answer.status != "ok":
            return answer.status, answer.message, None
        try:
            return "ok", "", pickle.loads(answer.value)
        except Exception as error:
            return "error", f"the result cannot be read in the parent ({type(error).__name__}: {error})", None

    def _drop(self, *, grace_s: float, is_asked: bool = False) -> int | None:
        child, self._child = self._child, None
        return child.end(grace_s=grace_s, is_asked=is_asked) if child is not None else None


def _is_responsive(child: WorkerChild) -> bool:
    # A process that died or broke while idle is not the next candidate's fault. Asking costs under 0.1 ms.
    try:
        child.exchange(encode(PING), _PING_LIMIT_S)
    except (TimeoutError, ChildDiedError, FrameError):
        return False
    return True


def _function(job: str) -> str:
    home, colon, name = job.rpartition(":")
    if not (colon and home and all(part.isidentifier() for part in name.split("."))):
        raise UsageError(f"The job {job!r} is no 'package.module:function' and no 'path/to/file.py:function'.")
    # The worker keeps the working folder of its start, the parent may have moved on.
    return f"{Path(home).resolve()}:{name}" if home.endswith(".py") else job


def _job_frame(number: int, function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    try:
        arguments = pickle.dumps((tuple(args), kwargs), protocol=pickle.HIGHEST_PROTOCOL)
        return encode(pickle.dumps(Job(number, function, arguments)))
    except Exception as error:
        raise UsageError(
            f"The arguments of {function} cannot be sent to a worker ({error}).",
            hint="Pass a description from which the job can build the candidate.",
        ) from error


def _without_credentials(env: dict[str, str]) -> dict[str, str]:
    # By name alone, under a dummy value: what a value contains must not take PATH away.
    by_name = redact(dict.fromkeys(env, ""))
    return {name: value for name, value in env.items() if by_name[name] != REDACTED and not _KEY_NAME.search(name)}


def _signal_name(code: int | None) -> str | None:
    if code is None or code >= 0:
        return None
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
