"""A sampler's algebra runs on one thread, and the process has its number of threads back afterwards."""

from __future__ import annotations

import threading

import pytest

from agnitra_lab.refine import blas_threads
from agnitra_lab.refine.blas_threads import on_one_blas_thread, one_blas_thread

_BLAS = blas_threads._threads()


@pytest.fixture
def count():
    if _BLAS is None:
        pytest.skip("numpy has another BLAS here")
    _BLAS.set_num(2)
    return _BLAS.num


def test_one_thread_inside_and_as_many_as_before_outside(count):
    with one_blas_thread():
        assert count() == 1
        with one_blas_thread():
            assert count() == 1
        assert count() == 1
    assert count() == 2


def test_the_number_comes_back_after_an_exception(count):
    @on_one_blas_thread
    def fails():
        assert count() == 1
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    assert count() == 2


def test_whoever_leaves_last_puts_it_back(count):
    inside, leave = threading.Event(), threading.Event()

    def longer():
        with one_blas_thread():
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=longer)
    with one_blas_thread():
        other.start()
        inside.wait(10)
    assert count() == 1
    leave.set()
    other.join(10)
    assert count() == 2


def test_without_openblas_nothing_changes(count, monkeypatch):
    monkeypatch.setattr(blas_threads, "_threads", lambda: None)
    with one_blas_thread():
        assert count() == 2
    assert count() == 2
