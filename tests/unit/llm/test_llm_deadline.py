"""The total deadline: blocking work returns, raises, or is cut."""

from __future__ import annotations

import socket
import threading

import pytest

from agnitra_lab.errors import LLMTimeoutError
from agnitra_lab.llm.deadline import Connection, Deadline, run_within


class Stream:
    """A network stream as httpcore hands it to a trace."""

    def __init__(self, opened: socket.socket) -> None:
        self.opened = opened

    def get_extra_info(self, name: str):
        return self.opened if name == "socket" else None


def test_work_that_ends_in_time_gives_its_result():
    assert run_within(Deadline(5.0), lambda: 7, cut=lambda: None) == 7


def test_what_the_work_raises_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        run_within(Deadline(5.0), lambda: 1 / 0, cut=lambda: None)


def test_blocked_work_is_cut_and_ends():
    near, far = socket.socketpair()
    connection = Connection()
    connection.trace("connection.connect_tcp.complete", {"return_value": Stream(near)})
    has_ended = threading.Event()

    def wait_for_a_byte() -> None:
        near.recv(1)
        has_ended.set()

    with near, far:
        with pytest.raises(LLMTimeoutError, match=r"within 0\.2 s"):
            run_within(Deadline(0.2), wait_for_a_byte, cut=connection.cut)
        assert has_ended.wait(5.0)


def test_a_connection_that_opens_after_the_cut_is_cut_at_once():
    near, far = socket.socketpair()
    connection = Connection()
    connection.cut()
    with near, far:
        with pytest.raises(ConnectionAbortedError):
            connection.trace("connection.connect_tcp.complete", {"return_value": Stream(near)})
        assert far.recv(1) == b""


def test_events_without_a_socket_are_let_pass():
    connection = Connection()
    connection.trace("http11.send_request_headers.started", {})
    connection.trace("connection.connect_tcp.complete", {"return_value": None})
    assert connection._sockets == []


def test_a_deadline_runs_out_and_never_below_zero():
    deadline = Deadline(1e-9)
    threading.Event().wait(0.01)
    assert deadline.remaining_s == 0.0
    assert deadline.elapsed_ms > 0.0
