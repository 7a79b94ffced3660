"""Replies on disk: asked once for each model, origin and question; nothing secret in them; damage costs a question."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import llm_server as misbehave
import pytest

from agnitra_lab.errors import LLMRefusalError
from agnitra_lab.llm import cache
from agnitra_lab.llm.cache import CachedClient
from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.settings import LLMSettings

KEY = "canary-KEY-0123456789abcdef"
QUESTION = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object"}


def client_of(server, folder: Path, model: str = "m", key: str | None = KEY) -> CachedClient:
    return CachedClient(ChatClient(LLMSettings(server.base_url, key, model, 10.0)), folder)


def ask(client: CachedClient, text: str = "hello", schema=None):
    return client.complete([{"role": "user", "content": text}], schema_name="s", json_schema=schema or SCHEMA)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def test_the_same_question_is_asked_once_even_by_another_process_of_the_user(tmp_path):
    with misbehave.serve(misbehave.answer('{"a": 1}')) as server:
        first = ask(client_of(server, tmp_path))
        second = ask(client_of(server, tmp_path))
        assert len(server.seen) == 1
    assert (first.source, second.source) == ("server", "cache")
    assert (second.text, second.model, second.input_tokens, second.output_tokens) == ('{"a": 1}', "served-model", 11, 7)


def test_a_cached_reply_needs_no_server(tmp_path):
    with misbehave.serve(misbehave.answer('{"a": 1}')) as server:
        ask(client_of(server, tmp_path))
    assert ask(client_of(server, tmp_path)).source == "cache"


@pytest.mark.parametrize("change", ["model", "text", "schema", "origin"])
def test_another_model_question_schema_or_origin_is_another_reply(tmp_path, change):
    with misbehave.serve(misbehave.answer('{"a": 1}')) as server, misbehave.serve(misbehave.answer("{}")) as other:
        ask(client_of(server, tmp_path))
        asked = client_of(other if change == "origin" else server, tmp_path, "n" if change == "model" else "m")
        reply = ask(asked, "other" if change == "text" else "hello", {"type": "array"} if change == "schema" else None)
    assert reply.source == "server"
    assert len(files(tmp_path)) == 2


def test_another_path_of_the_same_origin_is_the_same_server(tmp_path):
    with misbehave.serve(misbehave.answer('{"a": 1}')) as server:
        ask(client_of(server, tmp_path))
        again = CachedClient(ChatClient(LLMSettings(server.base_url + "/", KEY, "m", 10.0)), tmp_path)
        assert ask(again).source == "cache"


def test_neither_key_nor_question_nor_secret_lies_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "environment-secret-value")
    secret = "sk-" + "a1B2" * 8
    said = json.dumps({"a": f"{KEY} {secret} environment-secret-value"})
    with misbehave.serve(misbehave.answer(said)) as server:
        ask(client_of(server, tmp_path), "a private question")
    text = files(tmp_path)[0].read_text()
    for hidden in (KEY, secret, "environment-secret-value", "a private question"):
        assert hidden not in text
    assert json.loads(json.loads(text)["text"])["a"].count("[redacted]") == 3


@pytest.mark.skipif(os.name != "posix", reason="needs permission bits")
def test_a_reply_is_readable_by_its_owner_alone(tmp_path):
    with misbehave.serve(misbehave.answer("{}")) as server:
        ask(client_of(server, tmp_path))
    assert stat.S_IMODE(files(tmp_path)[0].stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["I would rather not.", "{", "[1]"])
def test_a_reply_that_is_no_object_is_not_kept(tmp_path, text):
    with misbehave.serve(misbehave.answer(text)) as server:
        assert ask(client_of(server, tmp_path)).text == text
    assert files(tmp_path) == []


def test_a_refusal_is_not_kept(tmp_path):
    with misbehave.serve(misbehave.error(401)) as server, pytest.raises(LLMRefusalError):
        ask(client_of(server, tmp_path))
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"\xff\xfe", b'{"key": 1}', b"[" * 50_000, b"null"],
    ids=lambda damage: repr(damage[:8]),
)
def test_a_damaged_file_is_set_aside_byte_for_byte_and_the_question_asked_again(tmp_path, damage):
    with misbehave.serve(misbehave.answer('{"a": 1}')) as server:
        ask(client_of(server, tmp_path))
        (path,) = files(tmp_path)
        path.write_bytes(damage)
        again = client_of(server, tmp_path)
        assert ask(again).source == "server"
    assert again.num_unreadable == 1
    assert path.with_name(path.name + ".unreadable").read_bytes() == damage
    assert ask(again).source == "cache"


def test_a_file_under_the_name_of_another_question_is_no_reply_to_it(tmp_path):
    with misbehave.serve(misbehave.answer('{"a": 1}')) as server:
        client = client_of(server, tmp_path)
        ask(client, "one")
        (path,) = files(tmp_path)
        ask(client, "two")
        (other,) = [item for item in files(tmp_path) if item != path]
        other.write_bytes(path.read_bytes())
        assert ask(client, "two").source == "server"


def test_a_folder_that_cannot_be_written_costs_no_answer(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with misbehave.serve(misbehave.answer('{"a": 1}')) as server:
        assert ask(client_of(server, tmp_path / "taken" / "replies")).text == '{"a": 1}'


def test_the_folder_is_bounded_and_drops_what_was_not_used_longest(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MAX_REPLIES", 2)
    with misbehave.serve(misbehave.answer('{"a": 1}')) as server:
        client = client_of(server, tmp_path)
        for index, text in enumerate(("one", "two")):
            ask(client, text)
            for path in files(tmp_path):
                os.utime(path, (index, index)) if path.stat().st_mtime > 10 else None
        ask(client, "one")
        ask(client, "three")
        assert len(files(tmp_path)) == 2
        assert [ask(client, text).source for text in ("one", "three")] == ["cache", "cache"]


def test_the_users_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path))
    assert cache.default_folder() == tmp_path / "replies"
    monkeypatch.delenv(cache.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "agnitra_lab" / "replies"
