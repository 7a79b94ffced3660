"""One piece of long work in a thread of its own: the kernel stays free, Cancel is quick, a deadline ends it.

A cancelled job counts as ended within 0.4 s. Its thread gets an exception at its next line of Python, and the compilers
that it waits for are ended; what it may still be doing in C it does to no effect, and the next job waits for it.
"""

from __future__ import annotations

import contextvars
import ctypes
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

from agnitra_lab.notebook import compilers
from agnitra_lab.notebook.streams import Sink, routed

Outcome = Literal["done", "failed", "cancelled"]

GRACE_S = 0.4
_POLL_S = 0.05
_NUDGE_S = 1.0
_IMPORT_MACHINERY = "<frozen importlib._bootstrap>"
# Two steps at a time would measure each other.
_TURN = threading.Lock()
_holder = ""


class Cancelled(KeyboardInterrupt):
    """Raised in the worker's thread: whatever cares for an interrupt, such as a search's ledger, cares for this."""


class Job:
    """Runs `work` once.

    Args:
        work: what to do; it may take as long as it needs, up to the deadline.
        name: what other workbenches are told they wait for.
        deadline_s: seconds after which it is cancelled.
        tell: gets what is going on while it waits for its turn.
        log: gets what the thread prints.
        on_end: called once with the outcome and the exception, from any thread.
        state: makes the context managers that give the thread its owner's torch settings.
        context: of the cell that owns the job, so that what is displayed comes under that cell.

    Attributes:
        why: why it was cancelled, in words; None when it was not.
    """

    def __init__(
        self,
        work: Callable[[], None],
        *,
        name: str,
        deadline_s: float,
        tell: Callable[[str], None],
        log: Sink,
        on_end: Callable[[Outcome, BaseException | None], None],
        state: Callable[[], ExitStack] = ExitStack,
        context: contextvars.Context | None = None,
    ) -> None:
        self._work, self._name, self._deadline_s = work, name, deadline_s
        self._tell, self._log, self._on_end, self._state = tell, log, on_end, state
        self._lock = threading.Lock()
        self._declared, self._left, self._asked = threading.Event(), threading.Event(), threading.Event()
        self._is_interruptible = False
        self.why: str | None = None
        self._compilers = compilers.running()
        run = (context or contextvars.copy_context()).copy().run
        self._thread = threading.Thread(target=run, args=(self._run,), name=f"agnitra-{name}", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name=f"agnitra-{name}-watch", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()
        self._watcher.start()

    def cancel(self, why: str = "cancelled") -> None:
        """Ask for the end; returns at once. The outcome is declared within `GRACE_S`. A second time changes nothing."""
        if self.why is None:
            self.why = why
            self._asked.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the outcome; return whether it is declared. An interrupt of the waiting thread passes through."""
        ends_s = None if timeout_s is None else time.monotonic() + timeout_s
        # Short waits: a signal is handled between them on every platform.
        while not self._declared.wait(_POLL_S if ends_s is None else max(0.0, min(_POLL_S, ends_s - time.monotonic()))):
            if ends_s is not None and time.monotonic() >= ends_s:
                return False
        return True

    @property
    def has_left(self) -> bool:
        """Whether the thread has really ended."""
        return self._left.is_set()

    def _run(self) -> None:
        outcome: Outcome = "done"
        failure: BaseException | None = None
        try:
            self._take_turn()
            try:
                with routed(self._log), self._state():
                    self._is_interruptible = True
                    try:
                        self._work()
                    finally:
                        self._is_interruptible = False
            finally:
                _TURN.release()
        except BaseException as error:
            outcome, failure = ("cancelled" if self._asked.is_set() else "failed"), error
        self._left.set()
        self._declare(outcome, failure)

    def _take_turn(self) -> None:
        global _holder
        if not _TURN.acquire(blocking=False):
            self._tell(f"waiting for {_holder} to end its step")
            while not _TURN.acquire(timeout=_POLL_S):
                if self._asked.is_set():
                    raise Cancelled
        _holder = self._name

    def _watch(self) -> None:
        if not self._asked.wait(0) and not self._is_over_in_time():
            self.cancel(f"it took longer than {self._deadline_s:g} s, the deadline of a step")
        if self._left.is_set():
            return
        asked_s, nudged_s = time.monotonic(), 0.0
        while not self._left.is_set():
            now_s = time.monotonic()
            if now_s - nudged_s >= _NUDGE_S and self._is_interruptible and not self._is_importing():
                nudged_s = now_s
                self._interrupt()
            compilers.end_since(self._compilers)
            if now_s - asked_s >= GRACE_S:
                self._declare("cancelled", None)
            self._left.wait(_POLL_S if now_s - asked_s < 2 * GRACE_S else 10 * _POLL_S)

    def _is_over_in_time(self) -> bool:
        """Wait for the end or the deadline; True for the end, or when someone asks for it."""
        ends_s = time.monotonic() + self._deadline_s
        while not self._left.is_set() and not self._asked.is_set():
            if time.monotonic() >= ends_s:
                return False
            self._asked.wait(_POLL_S)
        return True

    def _is_importing(self) -> bool:
        """A module that was interrupted in the middle cannot be imported again where it registers operators."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        while frame is not None:
            if frame.f_code.co_filename == _IMPORT_MACHINERY:
                return True
            frame = frame.f_back
        return False

    def _interrupt(self) -> None:
        thread_id = self._thread.ident
        if thread_id is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(Cancelled))

    def _declare(self, outcome: Outcome, failure: BaseException | None) -> None:
        with self._lock:
            if self._declared.is_set():
                return
            try:
                self._on_end(outcome, failure)
            finally:
                self._declared.set()


def torch_state() -> Callable[[], ExitStack]:
    """Remember this thread's torch settings (grad mode, autocast, device): each of them is a thread's own.

    Returns:
        What gives another thread the same, as one context manager.
    """
    import torch

    is_grad, is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    autocasts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds]
    device = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def entered() -> ExitStack:
        stack: Any = ExitStack()
        stack.enter_context(torch.inference_mode(is_inference))
        stack.enter_context(torch.set_grad_enabled(is_grad))
        for kind, dtype in autocasts:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        if device is not None:
            stack.enter_context(torch.cuda.device(device))
        return stack

    return entered
