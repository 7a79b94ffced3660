"""Small matrices on one thread: a sampler's algebra must not wait for cores that others use.

A model of a search is a few hundred rows at most. numpy's OpenBLAS splits their factorisations over all cores, and its
threads meet at a spinning barrier: on two cores with a load of 5 the search of a decoder's five sites took 18.6 s, on
one thread 0.85 s, with the same answers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np

_LIBRARIES = "libscipy_openblas*"
_SUFFIXES = ("64_", "")
_LOCK = threading.Lock()
_num_inside = 0
_num_before = 0

Given = ParamSpec("Given")
Made = TypeVar("Made")


class _Threads(NamedTuple):
    """How to ask numpy's OpenBLAS for its number of threads, and to set it."""

    num: Callable[[], int]
    set_num: Callable[[int], None]


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let numpy's linear algebra use one thread while this lasts; where numpy has another BLAS, change nothing.

    The number is the process's own: whoever leaves last puts it back.
    """
    global _num_inside, _num_before
    threads = _threads()
    if threads is None:
        yield
        return
    with _LOCK:
        if _num_inside == 0:
            _num_before = threads.num()
            threads.set_num(1)
        _num_inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _num_inside -= 1
            if _num_inside == 0:
                threads.set_num(_num_before)


def on_one_blas_thread(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Wrap a function in `one_blas_thread`."""

    @functools.wraps(function)
    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with one_blas_thread():
            return function(*args, **kwargs)

    return wrapped


@functools.cache
def _threads() -> _Threads | None:
    # Wheels carry OpenBLAS beside the package (Linux) or in it (macOS); it is loaded already, so this only finds it.
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in sorted(folder.glob(_LIBRARIES)):
            library = ctypes.CDLL(str(path))
            for suffix in _SUFFIXES:
                with contextlib.suppress(AttributeError):
                    return _Threads(
                        getattr(library, f"scipy_openblas_get_num_threads{suffix}"),
                        getattr(library, f"scipy_openblas_set_num_threads{suffix}"),
                    )
    return None
