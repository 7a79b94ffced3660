"""Settings: which server is asked, and that a key goes only to the origin that it was given for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.errors import LLMRefusalError, UsageError
from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.settings import DEFAULT_DEADLINE_S, DEFAULT_MODEL, OPENAI_BASE_URL, LLMSettings, resolve

OWN = {
    "AGNITRA_LLM_BASE_URL": "https://own.example/v1",
    "AGNITRA_LLM_API_KEY": "own-key",
    "AGNITRA_LLM_MODEL": "own-model",
}
OPENAI = {"OPENAI_BASE_URL": "https://proxy.example/v1", "OPENAI_API_KEY": "openai-key", "OPENAI_MODEL": "openai-model"}


def resolved(*args, env, **kwargs) -> LLMSettings:
    settings = resolve(*args, env=env, **kwargs)
    assert settings is not None
    return settings


def test_an_empty_environment_configures_nothing():
    assert resolve(env={}) is None
    assert resolve(env={"AGNITRA_LLM_BASE_URL": " ", "OPENAI_API_KEY": ""}) is None
    assert resolve(model="some-model", env={}) is None


def test_the_own_variables_come_before_those_of_openai():
    settings = resolved(env=OWN | OPENAI)
    assert (settings.base_url, settings.api_key, settings.model) == ("https://own.example/v1", "own-key", "own-model")


def test_the_variables_of_openai_serve_where_there_are_no_own():
    settings = resolved(env=OPENAI)
    assert (settings.base_url, settings.api_key, settings.model) == (
        "https://proxy.example/v1",
        "openai-key",
        "openai-model",
    )


def test_a_key_of_openai_alone_goes_to_openai():
    settings = resolved(env={"OPENAI_API_KEY": "openai-key"})
    assert (settings.base_url, settings.model) == (OPENAI_BASE_URL, DEFAULT_MODEL)


def test_an_own_key_without_its_url_goes_nowhere():
    assert resolve(env={"AGNITRA_LLM_API_KEY": "own-key"}) is None


def test_an_own_server_without_a_key_does_not_get_the_key_of_openai():
    settings = resolved(env={"AGNITRA_LLM_BASE_URL": "http://localhost:11434/v1"} | OPENAI)
    assert (settings.base_url, settings.api_key) == ("http://localhost:11434/v1", None)


def test_a_url_of_the_call_gets_no_key_of_the_environment_for_another_origin():
    settings = resolved("https://elsewhere.example/v1", env=OWN | OPENAI)
    assert (settings.base_url, settings.api_key) == ("https://elsewhere.example/v1", None)


@pytest.mark.parametrize(
    "url",
    [
        "http://own.example/v1",
        "https://own.example:8443/v1",
        "https://own.example.evil.test/v1",
        "https://evil.test/own.example",
    ],
)
def test_another_scheme_port_or_look_alike_host_is_another_origin(url):
    assert resolved(url, env=OWN).api_key is None


@pytest.mark.parametrize("url", ["https://own.example/v2", "https://OWN.example:443/v1/"])
def test_another_path_of_the_same_origin_gets_its_key(url):
    assert resolved(url, env=OWN).api_key == "own-key"


def test_what_the_call_gives_wins():
    settings = resolved("https://call.example/v1", "call-key", "call-model", 3.0, env=OWN | OPENAI)
    assert (settings.base_url, settings.api_key, settings.model, settings.deadline_s) == (
        "https://call.example/v1",
        "call-key",
        "call-model",
        3.0,
    )


def test_a_key_of_the_call_alone_goes_to_openai():
    assert resolved(api_key="call-key", env={}).base_url == OPENAI_BASE_URL


def test_the_deadline_is_twenty_seconds_unless_given():
    assert resolved(env=OWN).deadline_s == DEFAULT_DEADLINE_S == 20.0


def test_the_key_is_not_part_of_the_repr():
    assert "own-key" not in repr(resolved(env=OWN))


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host/v1",
        "https://",
        "file:///etc/passwd",
        "https://user:planted@host/v1",
        "https://host/v1?api_key=planted",
        "https://host:99999/v1",
        "https://[::1/v1",
        "not a url",
    ],
)
def test_a_url_that_is_no_api_root_is_a_usage_error_that_does_not_quote_it(url):
    with pytest.raises(UsageError) as caught:
        resolve(url, env={})
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("key", ["line\r\nX-Injected: 1", "schlüssel", "nul\x00"])
def test_a_key_that_no_header_can_carry_is_a_usage_error_that_does_not_quote_it(key):
    with pytest.raises(UsageError) as caught:
        resolve("https://host/v1", key, env={})
    assert key not in str(caught.value)


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_deadline_out_of_range_is_a_usage_error(deadline_s):
    with pytest.raises(UsageError, match="deadline"):
        resolve("https://host/v1", deadline_s=deadline_s, env={})


@pytest.mark.parametrize(
    ("url", "is_exposed"),
    [
        ("http://models.example/v1", True),
        ("http://8.8.8.8/v1", True),
        ("http://169.254.169.254/v1", True),
        ("https://models.example/v1", False),
        ("http://localhost:8000/v1", False),
        ("http://127.0.0.1:8000/v1", False),
        ("http://[::1]:8000/v1", False),
        ("http://10.0.0.7:8000/v1", False),
        ("http://ollama:11434/v1", False),
    ],
)
def test_a_key_is_exposed_by_plain_http_outside_the_private_network(url, is_exposed):
    assert resolved(url, "key", env={}).is_key_exposed == is_exposed
    assert not resolved(url, env={}).is_key_exposed


def test_a_question_that_would_expose_the_key_is_not_asked():
    client = ChatClient(LLMSettings("http://models.example/v1", "some-key", "m"))
    with pytest.raises(LLMRefusalError, match="nothing was sent"):
        client.complete([], schema_name="s", json_schema={})


hosts = st.sampled_from(["https://a.example/v1", "https://b.example/v1", "http://localhost:1/v1"])
maybe_host, maybe_key = st.none() | hosts, st.none() | st.just("key")


@given(call=maybe_host, own=maybe_host, own_key=maybe_key, openai=maybe_host, openai_key=maybe_key)
def test_no_combination_sends_a_key_to_an_origin_that_it_was_not_given_for(call, own, own_key, openai, openai_key):
    given_for: dict[str, str | None] = {}
    env = {}
    for name, url, key in (("AGNITRA_LLM", own, own_key), ("OPENAI", openai, openai_key)):
        if url:
            env[f"{name}_BASE_URL"] = url
        if key:
            env[f"{name}_API_KEY"] = f"{name}-{key}"
            given_for[f"{name}-{key}"] = url or (OPENAI_BASE_URL if name == "OPENAI" else None)
    settings = resolve(call, env=env)
    if settings is not None and settings.api_key is not None:
        assert settings.base_url == given_for[settings.api_key]
