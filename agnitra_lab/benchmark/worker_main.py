"""The worker's own side: take a job from the pipe, run it, say how it went. Loads torch only when a job does."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import importlib.util
import os
import pickle
import re
import select
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from agnitra_lab.benchmark.worker_frames import FrameError, FrameReader, encode

JobStatus = Literal["ok", "error", "out_of_memory", "device_lost"]

# Asks whether the worker still lives; answered at once.
PING = b""
_PR_SET_PDEATHSIG = 1
# How long a job may go on after the parent has died.
_ORPHAN_GRACE_S = 1.0
# What a driver says once its context is beyond use: every later call in this process fails with the same words.
_DEVICE_LOST = re.compile(
    r"(?i)illegal memory access|device-side assert|unspecified launch failure|misaligned address|illegal instruction"
    r"|uncorrectable ECC|cuda (driver )?error|triton error \[cuda\]"
)
_OUT_OF_MEMORY = re.compile(r"(?i)out of memory|can(no|')t allocate memory|std::bad_alloc")


@dataclass(frozen=True)
class Setup:
    """What a worker is told before its first job."""

    sys_path: tuple[str, ...]
    parent_pid: int
    max_memory_bytes: int | None
    # The signal follows the parent's thread, not its process: only a main thread lives as long.
    should_die_with_parent_thread: bool


@dataclass(frozen=True)
class Job:
    """A callable by name, and its pickled (args, kwargs): unpickled only once the answer can say that it failed."""

    number: int
    function: str
    arguments: bytes


@dataclass(frozen=True)
class Answer:
    """How one job went. `value` is pickled on its own, so that a value the parent cannot read costs no answer."""

    number: int
    status: JobStatus
    message: str
    value: bytes


def main() -> None:
    """Serve jobs until the parent closes the pipe. argv: the descriptors of the pipes for jobs and for answers."""
    jobs_fd, answers_fd = (int(text) for text in sys.argv[1:3])
    del sys.argv[1:]
    for descriptor in (jobs_fd, answers_fd):
        os.set_inheritable(descriptor, False)
    frames = _frames(jobs_fd)
    _prepare(pickle.loads(next(frames)), jobs_fd)
    _send(answers_fd, Answer(0, "ok", "", b""))
    own_pid = os.getpid()
    for frame in frames:
        if frame == PING:
            _send(answers_fd, Answer(0, "ok", "", b""))
            continue
        answer = _answer(pickle.loads(frame))
        if os.getpid() != own_pid:
            os._exit(0)  # a fork that the job made and that came back from it: only one process answers
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        _send(answers_fd, answer)


def classify(error: BaseException) -> JobStatus:
    """Tell a candidate's mistake from a process that is spent, looking through every wrapped error.

    Returns:
        "device_lost" when the device's context is poisoned, "out_of_memory", or "error".
    """
    chain = list(_chain(error))
    memory = [link for link in chain if _is_out_of_memory(link)]
    if any(_DEVICE_LOST.search(_text(link)) for link in chain if link not in memory):
        return "device_lost"
    return "out_of_memory" if memory else "error"


def _prepare(setup: Setup, jobs_fd: int) -> None:
    import resource  # absent on Windows, where the parent imports this module as well

    sys.path[:] = [*setup.sys_path, *(entry for entry in sys.path if entry not in setup.sys_path)]
    # A core file of a process with a CUDA context takes longer to write than the next candidate may wait.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if setup.max_memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (setup.max_memory_bytes, setup.max_memory_bytes))
    if sys.platform == "linux":
        # When the machine itself runs out of memory, the kernel shall take this process and not its parent.
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        if setup.should_die_with_parent_thread:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != setup.parent_pid:
                os._exit(1)
    # Where it crashed or hung stands in the captured stderr: both print every thread's stack, even while C code runs.
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)
    threading.Thread(target=_watch_parent, args=(jobs_fd,), name="watch-parent", daemon=True).start()


def _watch_parent(jobs_fd: int) -> None:
    poll = select.poll()
    poll.register(jobs_fd, 0)  # no event but the hang-up, which no descriptor can decline
    poll.poll()
    time.sleep(_ORPHAN_GRACE_S)  # an idle worker ends by itself: it reads the end of the pipe
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _frames(descriptor: int) -> Iterator[bytes]:
    reader = FrameReader()
    while True:
        frame = reader.next()
        if frame is not None:
            yield frame
            continue
        piece = os.read(descriptor, 2**16)
        if not piece:
            return
        reader.feed(piece)


def _answer(job: Job) -> Answer:
    try:
        value = _run(job)
        _wait_for_device()
    except BaseException as error:
        _print_trace(error)
        status = classify(error)
        message = f"{type(error).__name__}: {_first_line(error)}".removesuffix(": ")
        if status != "device_lost":
            status, message = _after_failure(status, message)
        return Answer(job.number, status, message, b"")
    try:
        return Answer(job.number, "ok", "", pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))
    except BaseException as error:
        status = classify(error)
        message = f"the result, a {type(value).__name__}, cannot be pickled ({_first_line(error)})"
        return Answer(job.number, status, message, b"")


def _after_failure(status: JobStatus, message: str) -> tuple[JobStatus, str]:
    """See whether the device outlived a job that failed for another reason."""
    try:
        _wait_for_device()
    except Exception as error:
        return classify(error), f"{message}; then {type(error).__name__}: {_first_line(error)}"
    return status, message


def _run(job: Job) -> Any:
    try:
        args, kwargs = pickle.loads(job.arguments)
    except Exception as error:
        raise TypeError(f"the arguments cannot be read in the worker ({_first_line(error)})") from error
    return _resolve(job.function)(*args, **kwargs)


def _resolve(function: str) -> Callable[..., Any]:
    home, _, name = function.rpartition(":")
    found: Any = _module_of_file(Path(home)) if home.endswith(".py") else importlib.import_module(home)
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _module_of_file(path: Path) -> ModuleType:
    # A name of its own: the file's stem may be that of an installed package.
    name = f"_agnitra_job_{zlib.crc32(bytes(path)):08x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _wait_for_device() -> None:
    """Wait for what the job has launched: an illegal access must fall to the candidate that made it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: torch is not to be imported for the sake of a comparison.
    has_name = any(kind.__name__ in ("MemoryError", "OutOfMemoryError") for kind in type(error).__mro__)
    return has_name or bool(_OUT_OF_MEMORY.search(_text(error)))


def _print_trace(error: BaseException) -> None:
    # The frames hold what the job had allocated: without it there may be no memory left to print with.
    for link in _chain(error):
        traceback.clear_frames(link.__traceback__)
    with suppress(Exception):
        traceback.print_exception(error)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be read)"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in _text(error).splitlines() if line.strip()), "")


def _flush(stream: Any) -> None:
    with suppress(Exception):  # closed or replaced by the job: its text is lost, its answer is not
        stream.flush()


def _send(descriptor: int, answer: Answer) -> None:
    try:
        frame = encode(pickle.dumps(answer))
    except FrameError as error:
        frame = encode(pickle.dumps(Answer(answer.number, "error", f"the result is too large ({error})", b"")))
    rest = memoryview(frame)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
