"""Record mode: what a model answered, written down without secrets, answers the same questions later."""

from __future__ import annotations

import json

import llm_server as misbehave
import pytest

from agnitra_lab.errors import LLMRefusalError, UsageError
from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.recorded import RecordedClient, RecordingClient
from agnitra_lab.llm.settings import LLMSettings

KEY = "canary-KEY-0123456789abcdef"


def ask(client, text: str = "q"):
    return client.complete([{"role": "user", "content": text}], schema_name="s", json_schema={"type": "object"})


def recording_client(server, path) -> RecordingClient:
    settings = LLMSettings(server.base_url, KEY, "m", 10.0)
    return RecordingClient(ChatClient(settings), path, model=settings.model, origin=settings.origin)


def test_a_recorded_conversation_answers_again_in_its_order(tmp_path):
    path = tmp_path / "replies.json"
    with misbehave.serve(misbehave.answer('{"a": 1}'), misbehave.answer('{"a": 2}')) as server:
        client = recording_client(server, path)
        lived = [ask(client, text).text for text in ("one", "two")]
    replay = RecordedClient.from_file(path)
    replies = [ask(replay, text) for text in ("one", "two")]
    assert [reply.text for reply in replies] == lived == ['{"a": 1}', '{"a": 2}']
    assert {reply.source for reply in replies} == {"recording"}
    assert replay.model == "recorded:m"
    assert (replies[0].input_tokens, replies[0].output_tokens) == (11, 7)
    assert replay.num_drifted == 0


def test_another_question_than_the_recorded_one_is_counted(tmp_path):
    path = tmp_path / "replies.json"
    with misbehave.serve(misbehave.answer("{}")) as server:
        ask(recording_client(server, path), "measured 3.1 ms")
    replay = RecordedClient.from_file(path)
    ask(replay, "measured 3.2 ms")
    assert replay.num_drifted == 1


def test_a_recording_holds_neither_key_nor_question_nor_secret(tmp_path):
    path, secret = tmp_path / "replies.json", "sk-" + "a1B2" * 8
    with misbehave.serve(misbehave.answer(json.dumps({"a": [KEY, secret]}))) as server:
        ask(recording_client(server, path), "a private question")
    text = path.read_text()
    for hidden in (KEY, secret, "a private question"):
        assert hidden not in text
    assert text.count("[redacted]") == 2


def test_each_reply_is_on_disk_before_the_next_question(tmp_path):
    path = tmp_path / "replies.json"
    with misbehave.serve(misbehave.answer('{"a": 1}'), misbehave.error(401)) as server:
        client = recording_client(server, path)
        ask(client)
        with pytest.raises(LLMRefusalError):
            ask(client)
    assert len(json.loads(path.read_text())["replies"]) == 1


def test_a_recording_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with misbehave.serve(misbehave.answer("{}")) as server, pytest.raises(UsageError, match=r"replies\.json"):
        ask(recording_client(server, tmp_path / "taken" / "replies.json"))


@pytest.mark.parametrize(
    "document",
    [
        {"schema_version": "agnitra.replies.v9", "model": "m", "replies": []},
        {"schema_version": "agnitra.replies.v1", "replies": []},
        {"schema_version": "agnitra.replies.v1", "model": "m", "replies": [{"text": 7, "model": "m"}]},
        {"schema_version": "agnitra.replies.v1", "model": "m", "replies": [{"text": "x", "model": "m", "y": 1}]},
    ],
    ids=str,
)
def test_a_foreign_or_damaged_recording_is_a_usage_error(tmp_path, document):
    path = tmp_path / "replies.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=r"replies\.json"):
        RecordedClient.from_file(path)
