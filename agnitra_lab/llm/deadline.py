"""A total deadline for blocking work: HTTP time-outs are per read, so a server that drips bytes never trips them."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from agnitra_lab.errors import LLMTimeoutError

Result = TypeVar("Result")


class Deadline:
    """One budget of wall time, shared by everything that one answer takes."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._started_s = time.monotonic()

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the deadline was set, above 0."""
        return max((time.monotonic() - self._started_s) * 1e3, 1e-6)

    @property
    def remaining_s(self) -> float:
        """Seconds that are left, 0 when none are."""
        return max(self.deadline_s - self.elapsed_ms / 1e3, 0.0)

    def expired(self) -> LLMTimeoutError:
        """Return the error that says so."""
        return LLMTimeoutError(f"The language model gave no complete answer within {self.deadline_s:g} s.")


class Connection:
    """The sockets of one exchange, so that another thread can cut them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_cut = False

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Note each socket that opens; the signature is that of httpcore's `trace` extension.

        Raises:
            ConnectionAbortedError: the connection was cut, so nothing more may be sent.
        """
        stream: Any = info.get("return_value")
        with self._lock:
            if event.endswith(("connect_tcp.complete", "start_tls.complete")) and hasattr(stream, "get_extra_info"):
                opened = stream.get_extra_info("socket")
                if isinstance(opened, socket.socket):
                    self._sockets.append(opened)
            is_cut = self._is_cut
        if is_cut:
            self.cut()
            raise ConnectionAbortedError("the deadline passed")

    def cut(self) -> None:
        """Shut every socket down. A thread that waits in recv() wakes at once; close() alone would leave it there."""
        with self._lock:
            self._is_cut = True
            for opened in self._sockets:
                with contextlib.suppress(OSError):
                    # The base method: SSLSocket.shutdown would drop the TLS state under the reading thread.
                    socket.socket.shutdown(opened, socket.SHUT_RDWR)


def run_within(deadline: Deadline, work: Callable[[], Result], *, cut: Callable[[], None]) -> Result:
    """Run blocking `work` and return its result, or cut it when the deadline passes.

    The work runs in a daemon thread, which keeps no process alive; an interrupt of the caller cuts it as well.

    Args:
        deadline: what is left of the answer's time.
        work: the blocking call.
        cut: makes a blocked `work` return soon; called from this thread.

    Raises:
        LLMTimeoutError: the deadline passed first.
        Exception: whatever `work` raised.
    """
    outcome: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, name="agnitra-llm", daemon=True).start()
    try:
        result, error = outcome.get(timeout=deadline.remaining_s)
    except queue.Empty:
        raise deadline.expired() from None
    finally:
        cut()
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
