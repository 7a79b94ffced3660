"""The chat client against a real server that misbehaves in each way that servers do."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import llm_server as misbehave
import pytest

from agnitra_lab.errors import LLMAnswerError, LLMError, LLMRefusalError, LLMTimeoutError
from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.exchange import MAX_BODY_BYTES
from agnitra_lab.llm.settings import NO_KEY, LLMSettings

KEY = "canary-KEY-0123456789abcdef"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
QUESTION = [{"role": "user", "content": "hello"}]
LIVENESS_S = 5.0


@pytest.fixture(scope="module", autouse=True)
def _client_library() -> None:
    """Import the client library once, outside every deadline."""
    pytest.importorskip("openai")


@pytest.fixture
def server() -> Iterator[misbehave.MisbehavingServer]:
    with misbehave.serve() as state:
        yield state


def client_of(server: misbehave.MisbehavingServer, deadline_s: float = 10.0, api_key: str | None = KEY) -> ChatClient:
    return ChatClient(LLMSettings(server.base_url, api_key, "asked-model", deadline_s))


def ask(client: ChatClient):
    return client.complete(QUESTION, schema_name="answer", json_schema=SCHEMA)


def test_a_good_answer_comes_back_with_its_model_tokens_and_time(server):
    server.will(misbehave.answer('{"a": 1}'))
    reply = ask(client_of(server))
    assert (reply.text, reply.model) == ('{"a": 1}', "served-model")
    assert (reply.input_tokens, reply.output_tokens) == (11, 7)
    assert reply.wall_ms > 0


def test_the_request_carries_the_key_the_model_and_the_strict_schema(server):
    server.will(misbehave.answer("{}"))
    ask(client_of(server))
    (seen,) = server.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.body["model"] == "asked-model"
    assert seen.body["messages"] == QUESTION
    expected = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    assert seen.body["response_format"] == expected


def test_the_environments_key_and_identity_never_reach_a_server_of_the_call(server, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, f"secret-of-{name}")
    server.will(misbehave.answer("{}"))
    ask(client_of(server, api_key=None))
    (seen,) = server.seen
    assert seen.headers["authorization"] == f"Bearer {NO_KEY}"
    assert "secret-of" not in json.dumps(seen.headers) + json.dumps(seen.body)


def test_a_proxy_of_the_environment_sees_no_plain_http_request(server, monkeypatch):
    server.will(misbehave.answer("{}"))
    with misbehave.serve(misbehave.answer("{}")) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        ask(client_of(server))
        assert proxy.seen == []
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "behaviour",
    [
        misbehave.stall_before_headers,
        misbehave.stall_after_headers,
        misbehave.drip_headers,
        misbehave.drip_body,
        misbehave.drip_error_body,
    ],
    ids=lambda behaviour: behaviour.__name__,
)
def test_a_slow_answer_is_cut_at_the_total_deadline(server, behaviour):
    server.will(behaviour)
    started_s = time.monotonic()
    with pytest.raises(LLMTimeoutError):
        ask(client_of(server, deadline_s=0.6))
    assert time.monotonic() - started_s < 0.6 + LIVENESS_S


@pytest.mark.parametrize("behaviour", [misbehave.drip_headers, misbehave.drip_body], ids=lambda item: item.__name__)
def test_the_thread_of_a_cut_answer_ends_while_the_server_still_drips(server, behaviour):
    server.will(behaviour)
    with pytest.raises(LLMTimeoutError):
        ask(client_of(server, deadline_s=0.5))
    limit_s = time.monotonic() + LIVENESS_S
    while any(thread.name == "agnitra-llm" for thread in threading.enumerate()):
        assert time.monotonic() < limit_s, "the worker thread outlived its connection"
        time.sleep(0.02)


def test_a_process_ends_while_a_stalled_server_holds_its_answer(server):
    server.will(misbehave.stall_before_headers)
    program = textwrap.dedent(
        f"""
        from agnitra_lab.errors import LLMTimeoutError
        from agnitra_lab.llm.client import ChatClient
        from agnitra_lab.llm.settings import LLMSettings
        try:
            ChatClient(LLMSettings({server.base_url!r}, None, "m", 0.5)).complete([], schema_name="s", json_schema={{}})
        except LLMTimeoutError:
            print("cut")
        """
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=25)
    assert (finished.returncode, finished.stdout.strip(), finished.stderr) == (0, "cut", "")


def test_the_retry_without_a_schema_shares_the_first_requests_deadline(server):
    server.will(misbehave.error(400), misbehave.stall_before_headers)
    started_s = time.monotonic()
    with pytest.raises(LLMTimeoutError):
        ask(client_of(server, deadline_s=0.6))
    assert time.monotonic() - started_s < 0.6 + LIVENESS_S
    assert len(server.seen) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_http_error_is_a_refusal_that_names_the_status_and_is_not_repeated(server, status):
    server.will(misbehave.error(status, "declined here"))
    with pytest.raises(LLMRefusalError, match=rf"HTTP {status}: declined here"):
        ask(client_of(server))
    assert len(server.seen) == 1


def test_an_http_error_with_an_html_body_quotes_none_of_it(server):
    server.will(misbehave.respond(502, b"<html><script>alert(1)</script></html>", content_type="text/html"))
    with pytest.raises(LLMRefusalError) as caught:
        ask(client_of(server))
    assert "HTTP 502" in str(caught.value)
    assert "script" not in str(caught.value)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_and_names_no_time_is_asked_once_more(server, status):
    server.will(misbehave.error(status, "declined here"))
    with pytest.raises(LLMRefusalError, match=rf"HTTP {status}: declined here"):
        ask(client_of(server))
    assert len(server.seen) == 2


def test_a_failure_that_passes_costs_no_answer(server):
    server.will(misbehave.error(502), misbehave.answer('{"a": 2}'))
    assert ask(client_of(server)).text == '{"a": 2}'


def formats_of(server: misbehave.MisbehavingServer) -> list[str | None]:
    return [seen.body.get("response_format", {}).get("type") for seen in server.seen]


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_the_schema_is_asked_for_any_object_and_then_without_a_format(server, status):
    refusal = misbehave.error(status, "response_format is not supported")
    server.will(refusal, refusal, misbehave.answer('{"a": 2}'))
    assert ask(client_of(server)).text == '{"a": 2}'
    assert formats_of(server) == ["json_schema", "json_object", None]


def test_what_a_server_accepts_is_remembered_for_the_next_question(server):
    server.will(misbehave.error(400, "only json_object"), misbehave.answer('{"a": 2}'))
    client = client_of(server)
    ask(client), ask(client)
    assert formats_of(server) == ["json_schema", "json_object", "json_object"]


def test_a_bad_question_is_a_refusal_once_no_simpler_one_is_left(server):
    server.will(misbehave.error(400, "bad question"))
    client = client_of(server)
    with pytest.raises(LLMRefusalError, match="bad question"):
        ask(client)
    assert len(server.seen) == 3
    with pytest.raises(LLMRefusalError):
        ask(client)
    # Nothing was found out: the next question begins with the schema again.
    assert formats_of(server)[3] == "json_schema"


def test_a_token_limit_goes_by_the_name_that_the_server_knows(server):
    server.will(misbehave.error(400, "Unknown field: max_completion_tokens"), misbehave.answer('{"a": 1}'))
    ask(ChatClient(LLMSettings(server.base_url, None, "m", 10.0, max_output_tokens=77)))
    limits = [{k: v for k, v in seen.body.items() if k.startswith("max")} for seen in server.seen]
    assert limits == [{"max_completion_tokens": 77}, {"max_tokens": 77}]
    assert formats_of(server) == ["json_schema", "json_schema"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_is_refused_and_nothing_reaches_it(server, status):
    with misbehave.serve(misbehave.answer("{}")) as other:
        server.will(misbehave.respond(status, b"", location=f"{other.base_url}/chat/completions"))
        with pytest.raises(LLMRefusalError, match="redirect"):
            ask(client_of(server))
        assert other.seen == []


def test_a_refusal_field_is_a_refusal(server):
    server.will(misbehave.answer(None, message={"role": "assistant", "content": None, "refusal": "I cannot."}))
    with pytest.raises(LLMRefusalError, match="I cannot"):
        ask(client_of(server))


def test_a_content_filter_is_a_refusal(server):
    server.will(misbehave.answer("", finish_reason="content_filter"))
    with pytest.raises(LLMRefusalError, match="filter"):
        ask(client_of(server))


def test_an_empty_list_of_choices_is_a_refusal(server):
    server.will(misbehave.respond(200, b'{"id": "c", "choices": []}'))
    with pytest.raises(LLMRefusalError, match="empty list"):
        ask(client_of(server))


def test_an_error_object_under_status_200_is_a_refusal(server):
    server.will(misbehave.respond(200, b'{"error": {"message": "upstream is down"}}'))
    with pytest.raises(LLMRefusalError, match="upstream is down"):
        ask(client_of(server))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<!doctype html><html></html>",
        b"I would merge the projections.",
        b"[1, 2]",
        b'{"id": "c"}',
        b'{"choices": {"0": 1}}',
        b'{"choices": [7]}',
        b'{"choices": [{"message": "text"}]}',
        b'{"choices": [{"message": {"content": 7}}]}',
        b'{"choices": [{"message": {"content": "  "}}]}',
        b'{"choices": NaN}',
        b'{"choices": [], "choices": []}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_that_is_no_chat_completion_is_an_answer_error(server, body):
    server.will(misbehave.respond(200, body))
    with pytest.raises(LLMAnswerError):
        ask(client_of(server))


def test_an_answer_cut_at_the_token_limit_is_an_answer_error(server):
    server.will(misbehave.answer('{"a":', finish_reason="length"))
    with pytest.raises(LLMAnswerError, match="token limit"):
        ask(client_of(server))


@pytest.mark.parametrize("behaviour", [misbehave.endless_body], ids=["endless"])
def test_a_body_without_end_is_cut_at_the_size_limit(server, behaviour):
    server.will(behaviour)
    with pytest.raises(LLMAnswerError, match="larger than"):
        ask(client_of(server))


def test_a_body_of_exactly_the_limit_is_read(server):
    bare = misbehave.completion("")
    server.will(misbehave.respond(200, misbehave.completion("x" * (MAX_BODY_BYTES - len(bare)))))
    assert len(ask(client_of(server)).text) == MAX_BODY_BYTES - len(bare)


def test_a_compressed_answer_is_refused_before_it_is_unpacked(server):
    server.will(misbehave.respond(200, gzip.compress(b" " * (50 << 20)), content_encoding="gzip"))
    with pytest.raises(LLMAnswerError, match="compressed"):
        ask(client_of(server))
    assert server.seen[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "behaviour",
    [misbehave.close_mid_body, misbehave.close_at_once, misbehave.garbage],
    ids=lambda behaviour: behaviour.__name__,
)
def test_a_connection_that_breaks_is_a_refusal(server, behaviour):
    server.will(behaviour)
    with pytest.raises(LLMRefusalError, match=r"No answer from http://127\.0\.0\.1"):
        ask(client_of(server))


def test_a_refused_connection_is_a_refusal():
    with misbehave.serve() as gone:
        client = client_of(gone)
    with pytest.raises(LLMRefusalError, match="refused"):
        ask(client)


def test_a_key_that_the_server_echoes_stays_out_of_the_reply(server):
    server.will(misbehave.answer(json.dumps({"a": f"Bearer {KEY}"})))
    reply = ask(client_of(server))
    assert KEY not in repr(reply)
    assert "[redacted]" in reply.text


@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_key_that_the_server_echoes_stays_out_of_the_error_and_the_log(server, status, caplog):
    caplog.set_level(logging.DEBUG)
    body = json.dumps({"error": {"message": f"bad key {KEY} in Bearer {KEY}"}}).encode()
    server.will(misbehave.respond(status, body))
    with pytest.raises(LLMError) as caught:
        ask(client_of(server))
    told = "".join(str(part) for part in (caught.value, caught.value.__cause__, repr(caught.value), caplog.text))
    assert KEY not in told
    assert "[redacted]" in str(caught.value)


def test_terminal_escapes_in_a_servers_message_are_dropped(server):
    server.will(misbehave.error(500, "\x1b[2Jred\x07"))
    with pytest.raises(LLMRefusalError) as caught:
        ask(client_of(server))
    assert caught.value.message.isprintable()


def test_threads_share_one_client(server):
    server.will(misbehave.answer('{"a": 1}'))
    client = client_of(server)
    replies: list[str] = []
    threads = [threading.Thread(target=lambda: replies.append(ask(client).text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == ['{"a": 1}'] * 4
