"""The notebook's stop button for work that no cell waits for.

Between cells ipykernel ignores the interrupt that the button sends. While such work runs, and no cell does, the
interrupt cancels it; a cell that runs is interrupted as always. Handlers belong to the main thread, so the kernel's own
loop installs ours there, and puts back what was there before.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agnitra_lab.notebook.job import Job

_PERIOD_S = 0.2
_running: list[Job] = []
_before: Any = None


def on_stop_button(job: Job) -> None:
    """Let the stop button cancel a job that is about to start, in a kernel; elsewhere there is nothing to do."""
    call_later = _main_loop()
    if call_later is None:
        return
    _running.append(job)
    call_later(_install)
    threading.Thread(target=_remove_after, args=(job, call_later), name="agnitra-stop", daemon=True).start()


def _remove_after(job: Job, call_later: Callable[[Callable[[], None]], None]) -> None:
    while not job.wait(_PERIOD_S):
        continue
    _running.remove(job)
    call_later(_remove)


def _main_loop() -> Callable[[Callable[[], None]], None] | None:
    from IPython.core.getipython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    loop = getattr(kernel, "io_loop", None)
    return loop.add_callback if loop is not None else None


def _install() -> None:
    global _before
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not _stop:
        _before = signal.signal(signal.SIGINT, _stop)


def _remove() -> None:
    if not _running and signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, _before)


def _stop(number: int, frame: Any) -> None:
    for job in tuple(_running):
        job.cancel("stopped by the notebook's stop button")
