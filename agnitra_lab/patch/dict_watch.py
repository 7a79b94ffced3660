"""Whether any of many dictionaries was written to since it was last asked: one look instead of reading them all.

A decoder of 22 layers keeps its weights and settings in some 600 dictionaries, and reading them takes a tenth of a
call's time (130 us of 1.1 ms beside an H200). CPython calls back on writes to a dictionary since 3.12 (`PyDict_Watch`),
which Dynamo's guards use as well. Where it does not, or not for every write (3.13.0 leaves out instance attributes),
each question is answered with "maybe".
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

_SINCE = (3, 12)
_NUM_PROBES = 64
_news: dict[str, int] = {}
_num_watching: dict[int, int] = {}
"""Watches by the id of the dictionary: a flag of the dictionary itself says that it is watched, and there is one."""


def _callback() -> Any:
    """Return what CPython calls before each write: a C function that notes it, and returns no negative number.

    It is put together from functions of C: code of Python could be interrupted, and lose both the interrupt and the
    write. `min` hands its four arguments (event, dictionary, key, value) to `setdefault`, which gives the first of them
    each time, so that `min` returns the event.
    """
    kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)
    return kind(partial(min, key=partial(_news.setdefault, "written")))


class _Watcher:
    """This process's one registration with CPython."""

    def __init__(self) -> None:
        api = ctypes.pythonapi
        self._watch, self._unwatch = api.PyDict_Watch, api.PyDict_Unwatch
        for function in (self._watch, self._unwatch):
            function.argtypes, function.restype = [ctypes.c_int, ctypes.py_object], ctypes.c_int
        # CPython keeps its address alone.
        self._callback = _callback()
        self._id = api.PyDict_AddWatcher(self._callback)
        self._is_open = True
        # Dictionaries outlive this module at exit, and what they would call does not.
        atexit.register(self.close)

    def add(self, table: dict[Any, Any]) -> None:
        self._watch(self._id, table)

    def remove(self, table: dict[Any, Any]) -> None:
        if self._is_open:  # models may outlive it, at exit
            self._unwatch(self._id, table)

    def close(self) -> None:
        self._is_open = False
        ctypes.pythonapi.PyDict_ClearWatcher(self._id)

    def sees_every_write(self) -> bool:
        """Try each way to write to an object's attributes, often enough for CPython to specialise it."""

        class Probe:
            pass

        probe: Any = Probe()
        probe.value = 0
        table = vars(probe)
        self.add(table)
        seen = 0

        def look() -> int:
            found = bool(_news)
            _news.clear()
            return found

        try:
            for number in range(1, _NUM_PROBES + 1):
                probe.value = number
                seen += look()
            for write in (
                partial(object.__setattr__, probe, "other", 1), partial(table.pop, "other"), partial(table.update, a=1),
                partial(delattr, probe, "a"), table.clear,
            ):  # fmt: skip
                write()
                seen += look()
            quiet = getattr(probe, "value", None) is None and not look()
        finally:
            self.remove(table)
        return quiet and seen == _NUM_PROBES + 5


def _made() -> _Watcher | None:
    is_locked = getattr(sys, "_is_gil_enabled", lambda: True)()
    if sys.version_info < _SINCE or sys.implementation.name != "cpython" or not is_locked:
        return None
    try:
        made = _Watcher()
        if made.sees_every_write():
            return made
        atexit.unregister(made.close)
        made.close()
        return None
    except (AttributeError, RuntimeError, ctypes.ArgumentError):  # another interpreter, or all eight watchers in use
        return None


class _Generations:
    """Counts the times at which something was found written."""

    def __init__(self) -> None:
        self._number = 0
        self._watcher: _Watcher | None = None
        self._is_made = False

    def watcher(self) -> _Watcher | None:
        if not self._is_made:
            self._watcher, self._is_made = _made(), True
        return self._watcher

    def now(self) -> int:
        if _news:
            _news.clear()
            self._number += 1
        return self._number


_generations = _Generations()


class DictWatch:
    """Watches dictionaries from now on, for as long as it lives.

    Args:
        tables: the dictionaries; instances' `__dict__` among them.
    """

    def __init__(self, tables: Iterable[dict[Any, Any]]) -> None:
        self._seen = self._asked = -1
        self._is_watching = _generations.watcher() is not None
        if self._is_watching:
            kept = list({id(table): table for table in tables}.values())
            _watch(kept)
            # Before the dictionaries go: CPython would call back while it frees one, with whatever error is on its way.
            weakref.finalize(self, _unwatch, kept).atexit = False

    def may_be_written(self) -> bool:
        """Whether a dictionary (of this watch, or of another) was written to since `settle`; True where unknown."""
        self._asked = _generations.now()
        return not self._is_watching or self._asked != self._seen

    def settle(self) -> None:
        """Take as known what was there when this was last asked, and the caller has read since: no later write."""
        self._seen = self._asked


def _watch(tables: Sequence[dict[Any, Any]]) -> None:
    watcher = _generations.watcher()
    assert watcher is not None
    for table in tables:
        _num_watching[id(table)] = _num_watching.get(id(table), 0) + 1
        watcher.add(table)


def _unwatch(tables: Sequence[dict[Any, Any]]) -> None:
    watcher = _generations.watcher()
    assert watcher is not None
    for table in tables:
        _num_watching[id(table)] -= 1
        if not _num_watching[id(table)]:
            del _num_watching[id(table)]
            watcher.remove(table)
