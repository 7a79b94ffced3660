"""The recorded client: replies in order, from memory or from a file."""

from __future__ import annotations

import json

import pytest

from agnitra_lab.errors import LLMRefusalError, UsageError
from agnitra_lab.llm.recorded import RecordedClient


def ask(client: RecordedClient, text: str = "q") -> str:
    return client.complete([{"role": "user", "content": text}], schema_name="s", json_schema={}).text


def test_replies_come_in_order_and_questions_are_kept():
    client = RecordedClient(['{"a": 1}', {"b": 2}])
    assert (ask(client, "first"), ask(client, "second")) == ('{"a": 1}', '{"b": 2}')
    assert [question[0]["content"] for question in client.questions] == ["first", "second"]


def test_a_question_after_the_last_reply_is_a_refusal():
    client = RecordedClient(["{}"])
    ask(client)
    with pytest.raises(LLMRefusalError, match="holds 1 replies; this is question 2"):
        ask(client)


def test_a_reply_says_that_it_is_recorded():
    reply = RecordedClient(["{}"]).complete([], schema_name="s", json_schema={})
    assert (reply.model, reply.input_tokens) == ("recorded", None)


def test_a_recording_is_read_from_a_file(tmp_path):
    path = tmp_path / "replies.json"
    path.write_text(json.dumps({"model": "recorded:tutorial", "replies": [{"a": 1}, "text"]}), encoding="utf-8")
    client = RecordedClient.from_file(path)
    assert (client.model, ask(client), ask(client)) == ("recorded:tutorial", '{"a": 1}', "text")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"replies": [7]}', '{"replies": {}}'])
def test_a_file_that_is_no_recording_is_a_usage_error(tmp_path, text):
    path = tmp_path / "replies.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"replies\.json"):
        RecordedClient.from_file(path)


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError):
        RecordedClient.from_file(tmp_path / "none.json")
