"""Work that is given up after a while though it never asks for the time, as torch.compile tunes kernel after kernel.

The exception is raised in the working thread between two of its Python instructions, as Ctrl-C is in the main one.
"""

from __future__ import annotations

import ctypes
import threading
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
    thread = ctypes.c_ulong(threading.get_ident())
    has_ended = threading.Event()
    turn = threading.Lock()

    def watch() -> None:
        while not has_ended.wait(_WATCH_S):
            if clock_s() >= deadline_s:
                with turn:
                    if not has_ended.is_set():
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(OutOfTimeError))
                return

    watcher = threading.Thread(target=watch, name="deadline", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        with turn:
            has_ended.set()
            # What was raised and has not arrived yet would arrive after the block.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
        watcher.join()
