"""Work that is given up after a while though it never asks for the time, as torch.compile tunes kernel after kernel.

The exception is raised in the working thread between two of its Python instructions, as Ctrl-C is in the main one; but
not while a module is being imported, which would be half there from then on. Python throws away what is raised while a
callback of the garbage collector or of a weak reference runs, and compilers have such callbacks: where the work goes on
as if nothing had been, it is raised again.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_WATCH_S = 0.25
# What was raised has arrived after so long, or Python code that nothing may be raised in has thrown it away.
_AGAIN_S = 1.0


class OutOfTimeError(BaseException):
    """The work was given up. No Exception, so that nothing that handles those takes it for a failure of its own."""


@contextmanager
def given_up_at(deadline_s: float, clock_s: Callable[[], float]) -> Iterator[None]:
    """Raise OutOfTimeError in this thread once a clock has reached a time, unless the block has ended before.

    Args:
        deadline_s: the clock's time.
        clock_s: asked from another thread, a few times a second.
    """
    thread = threading.get_ident()
    has_ended, has_raised = threading.Event(), threading.Event()
    turn = threading.Lock()

    def watch() -> None:
        wait_s = _WATCH_S
        while not has_ended.wait(wait_s):
            wait_s = _WATCH_S
            if clock_s() < deadline_s or _is_importing(thread) or _is_giving_up(thread):
                continue
            with turn:
                if not has_ended.is_set():
                    has_raised.set()
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(OutOfTimeError))
            wait_s = _AGAIN_S

    watcher = threading.Thread(target=watch, name="deadline", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        while not has_ended.is_set():
            with contextlib.suppress(OutOfTimeError), turn:
                has_ended.set()
        if has_raised.is_set():
            _let_arrive()
        watcher.join()


def _is_importing(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _is_giving_up(thread: int) -> bool:
    """Say whether a thread is on its way out: in a handler or a `finally` that what was raised has led to."""
    active: Any = sys._current_exceptions().get(thread)
    # Before Python 3.12 it is the type, the value and the traceback.
    error: BaseException | None = active[1] if isinstance(active, tuple) else active
    while error is not None and not isinstance(error, OutOfTimeError):
        error = error.__context__
    return error is not None


def _let_arrive() -> None:
    """Take in an exception that was raised for work that ended at that moment, before it reaches what comes after.

    Python can also be told to forget it, by raising None; but CPython 3.11 then takes the thread for interrupted for
    good, and a profile function that is set later makes it spin without end.
    """
    with contextlib.suppress(OutOfTimeError):
        for _ in range(100):
            time.sleep(0)
