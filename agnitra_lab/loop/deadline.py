"""Work that is given up after a while though it never asks for the time, as torch.compile tunes kernel after kernel.

The exception is raised in the working thread between two of its Python instructions, as Ctrl-C is in the main one; but
not while a module is being imported, which would be half there from then on.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_WATCH_S = 0.25


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
    has_ended, is_on_its_way = threading.Event(), threading.Event()
    turn = threading.Lock()

    def watch() -> None:
        while not has_ended.wait(_WATCH_S):
            if clock_s() >= deadline_s and not _is_importing(thread):
                with turn:
                    if not has_ended.is_set():
                        is_on_its_way.set()
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(OutOfTimeError)
                        )
                return

    watcher = threading.Thread(target=watch, name="deadline", daemon=True)
    watcher.start()
    has_arrived = False
    try:
        yield
    except OutOfTimeError:
        has_arrived = True
        raise
    finally:
        with turn:
            has_ended.set()
        if is_on_its_way.is_set() and not has_arrived:
            _let_arrive()
        watcher.join()


def _is_importing(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _let_arrive() -> None:
    """Take in an exception that was raised for work that ended at that moment, before it reaches what comes after.

    Python can also be told to forget it, by raising None; but CPython 3.11 then takes the thread for interrupted for
    good, and a profile function that is set later makes it spin without end.
    """
    with contextlib.suppress(OutOfTimeError):
        for _ in range(100):
            time.sleep(0)
