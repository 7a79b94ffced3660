"""One measurement with a deadline: whatever a `measure` does, it becomes a `Measurement`, also when it hangs."""

from __future__ import annotations

import contextvars
import inspect
import queue
import threading
from collections.abc import Callable
from typing import Any

from agnitra_lab.contracts.search import FailureClass, KernelConfig, Measurement
from agnitra_lab.errors import AgnitraError, TemplateError
from agnitra_lab.redact import redact_text
from agnitra_lab.refine.bound import Bound
from agnitra_lab.refine.study import as_measurement

MAX_DETAIL = 300
GRACE_S = 5.0
"""A measurement that the end of the budget finds under way may still end by itself."""

Measure = Callable[..., "float | Measurement"]

# In this order: "out of shared memory" is no compile error, though the compiler says it.
_MARKS: tuple[tuple[FailureClass, tuple[str, ...]], ...] = (
    ("timeout", ("timeout", "timed out", "deadline")),
    ("oom", ("out of memory", "out_of_memory", "shared memory", "outofresources", "out of resource")),
    ("wrong", ("another result", "wrong", "mismatch", "elements match")),
    ("crash", ("crash", "sigsegv", "device_lost", "illegal memory", "illegal address", "misaligned")),
    ("constraint", ("refuse", "not recorded", "constraint", "must be")),
    ("compile", ("compil", "ptxas", "mlir", "llvm")),
)


class Meter:
    """Takes measurements in a thread of its own, so that one that hangs costs its time and no more.

    The thread of a hanging measurement cannot be ended: it is left behind, and the next one gets a fresh thread.

    Attributes:
        budget_s: seconds that the search may take.
    """

    def __init__(self, measure: Measure, budget_s: float, trial_timeout_s: float | None = None) -> None:
        self.budget_s = budget_s
        self._measure = measure
        self._trial_timeout_s = trial_timeout_s
        self._takes_bound = takes_bound(measure)
        self._hand: _Hand | None = None

    def take(self, config: KernelConfig, bound: Bound, elapsed_s: float) -> Measurement:
        """Measure one config.

        Args:
            config: what to measure.
            bound: what is known of the best config.
            elapsed_s: of the search so far.

        Returns:
            The measurement; a failed one for whatever the measure raised, and for a hang.
        """
        limit_s = max(self.budget_s - elapsed_s, 0.0) + GRACE_S
        if self._trial_timeout_s is not None:
            limit_s = min(limit_s, self._trial_timeout_s)
        if self._hand is None:
            self._hand = _Hand()
        given = {"bound": bound} if self._takes_bound else {}
        answer = self._hand.call(lambda: self._measure(config, **given), limit_s)
        if answer is None:
            self._hand = None
            return Measurement(latency_ms=None, failure="timeout", detail=f"hangs: no answer within {limit_s:.3g} s")
        value, error = answer
        if error is None:
            return _read(value)
        if not isinstance(error, Exception):
            raise error
        return failed(error)


class _Hand:
    """A daemon thread that runs one call after another."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(_work, self._calls, self._answers), daemon=True).start()

    def call(self, function: Callable[[], Any], limit_s: float) -> tuple[Any, BaseException | None] | None:
        self._calls.put(function)
        try:
            return self._answers.get(timeout=limit_s)
        except queue.Empty:
            return None

    def __del__(self) -> None:
        self._calls.put(_end)


def _work(calls: queue.SimpleQueue[Callable[[], Any]], answers: queue.SimpleQueue[Any]) -> None:
    while (function := calls.get()) is not _end:
        try:
            answers.put((function(), None))
        except BaseException as error:
            answers.put((None, error))


def _end() -> None:
    """Tell the thread that nothing more will come."""


def failed(error: Exception) -> Measurement:
    """Read an exception as a failed measurement. Compilers raise types of their own, so any Exception is one."""
    text = error.message if isinstance(error, AgnitraError) else f"{type(error).__name__}: {error}"
    return Measurement(latency_ms=None, failure=failure_class(text, error), detail=redact_text(text)[:MAX_DETAIL])


def failure_class(text: str, error: Exception | None = None) -> FailureClass:
    """Tell the class of a failure from what was raised and said."""
    if isinstance(error, MemoryError):
        return "oom"
    if isinstance(error, TimeoutError):
        return "timeout"
    lowered = text.lower()
    for name, marks in _MARKS:
        if any(mark in lowered for mark in marks):
            return name
    if isinstance(error, TemplateError):
        return "constraint"
    return "launch" if error is not None else "unknown"


def _read(value: Any) -> Measurement:
    try:
        return as_measurement(value)
    except (TypeError, ValueError) as error:
        return failed(error)


def takes_bound(measure: Measure) -> bool:
    """Tell whether a measure compares its samples with those of the best config."""
    try:
        return "bound" in inspect.signature(measure).parameters
    except (TypeError, ValueError):
        return False
