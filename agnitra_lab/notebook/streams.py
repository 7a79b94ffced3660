"""What a worker's thread prints goes to its own log: a stream of the kernel would put it under another cell."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Sink = Callable[[str], None]

_LOCK = threading.Lock()
_SINKS: dict[int, Sink] = {}
_STREAMS = ("stdout", "stderr")


class _Routed:
    """Stands in for a stream while a worker runs: text of the worker's thread goes to its sink, the rest passes."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def write(self, text: str) -> int:
        sink = _SINKS.get(threading.get_ident())
        if sink is None:
            return int(self._original.write(text) or 0)
        sink(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


@contextmanager
def routed(sink: Sink) -> Iterator[None]:
    """Send what this thread prints in the block to `sink`."""
    with _LOCK:
        if not _SINKS:
            for name in _STREAMS:
                if not isinstance(getattr(sys, name), _Routed):
                    setattr(sys, name, _Routed(getattr(sys, name)))
        _SINKS[threading.get_ident()] = sink
    try:
        yield
    finally:
        with _LOCK:
            _SINKS.pop(threading.get_ident(), None)
            if not _SINKS:
                for name in _STREAMS:
                    stream = getattr(sys, name)
                    # Someone who replaced the stream meanwhile, such as %%capture, puts back what they found.
                    if isinstance(stream, _Routed):
                        setattr(sys, name, stream._original)
