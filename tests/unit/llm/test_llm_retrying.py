"""Asked again after the time that the server names, and never past the deadline."""

from __future__ import annotations

import time
from email.utils import formatdate

import llm_server as misbehave
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.errors import LLMRefusalError
from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.retrying import MAX_REPEATS, retry_after_s, wait_before_repeat_s
from agnitra_lab.llm.settings import LLMSettings


def ask(server, deadline_s: float = 10.0):
    client = ChatClient(LLMSettings(server.base_url, None, "m", deadline_s))
    return client.complete([{"role": "user", "content": "q"}], schema_name="s", json_schema={})


def busy(after: str, status: int = 429):
    return misbehave.respond(status, b'{"error": {"message": "busy"}}', retry_after=after)


@pytest.fixture(scope="module", autouse=True)
def _client_library() -> None:
    pytest.importorskip("openai")


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_after_the_time_that_it_names(status):
    with misbehave.serve(busy("0.4", status), misbehave.answer('{"a": 1}')) as server:
        started_s = time.monotonic()
        assert ask(server).text == '{"a": 1}'
    assert time.monotonic() - started_s >= 0.4


def test_a_wait_past_the_deadline_is_not_begun_and_is_said():
    with misbehave.serve(busy("30")) as server:
        started_s = time.monotonic()
        with pytest.raises(LLMRefusalError, match="asks to wait 30 s") as caught:
            ask(server, deadline_s=2.0)
        assert time.monotonic() - started_s < 1.5
        assert len(server.seen) == 1
    assert "HTTP 429" in str(caught.value)


def test_a_server_that_stays_busy_is_asked_a_bounded_number_of_times():
    with misbehave.serve(busy("0")) as server:
        with pytest.raises(LLMRefusalError):
            ask(server)
        assert len(server.seen) == MAX_REPEATS + 1


def test_a_wrong_key_is_never_tried_again():
    with misbehave.serve(misbehave.respond(401, b"{}", retry_after="0")) as server:
        with pytest.raises(LLMRefusalError, match="Check the API key"):
            ask(server)
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [("5", 5.0), (" 2.5 ", 2.5), ("0", 0.0), ("-3", 0.0), ("1e99", 86_400.0), (None, None), ("", None), ("soon", None),
     ("nan", None), ("inf", None), ("9" * 200, None), ("Wed, 99 Foo 2026", None)],
)  # fmt: skip
def test_what_retry_after_says(header, wait_s):
    assert retry_after_s(header) == wait_s


def test_retry_after_may_be_a_date():
    assert retry_after_s(formatdate(time.time() + 90, usegmt=True)) == pytest.approx(90, abs=3)
    assert retry_after_s(formatdate(time.time() - 90, usegmt=True)) == 0.0


@given(st.text(max_size=60))
def test_any_header_gives_a_bounded_wait_or_none(header):
    wait_s = retry_after_s(header)
    assert wait_s is None or 0 <= wait_s <= 86_400


@given(st.integers(100, 599), st.none() | st.floats(0, 86_400))
def test_repeats_always_end(status, asked_s):
    waits = [wait_before_repeat_s(status, asked_s, number) for number in range(10)]
    assert sum(wait is not None for wait in waits) <= MAX_REPEATS
