"""Who is asked, by the settings of a run: recordings before servers, keys for their origin, budgets with prices."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from agnitra_lab.errors import UsageError
from agnitra_lab.llm.cache import CachedClient
from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.recorded import RecordedClient, RecordingClient
from agnitra_lab.loop.language_model import PRICE_VARIABLE, client_of, limits_of
from agnitra_lab.loop.settings import Settings

URL = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("AGNITRA_LLM_BASE_URL", "AGNITRA_LLM_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL", PRICE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, type(None)),
        ({"llm_base_url": URL}, CachedClient),
        ({"llm_base_url": URL, "is_llm_cached": False}, ChatClient),
        ({"llm_base_url": URL, "suggest": "preset"}, type(None)),
        ({"llm_base_url": URL, "llm_record": "replies.json"}, RecordingClient),
    ],
    ids=str,
)
def test_the_settings_choose_the_client(settings, kind):
    assert type(client_of(Settings(**settings))) is kind


def test_a_recording_is_asked_before_any_server(tmp_path):
    path = tmp_path / "replies.json"
    path.write_text(json.dumps({"model": "recorded", "replies": ["{}"]}))
    assert type(client_of(Settings(llm_base_url=URL, llm_replies=path))) is RecordedClient


def test_the_environments_key_stays_with_its_own_origin(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment-key")
    assert client_of(Settings(llm_base_url=URL)).settings.api_key is None
    assert client_of(Settings()).settings.origin == "https://api.openai.com:443"


def test_a_budget_limits_each_answer_at_the_server_too():
    assert limits_of(Settings()).max_output_tokens is None
    assert limits_of(Settings(llm_max_tokens=3_000)).max_output_tokens == 3_000
    client = client_of(Settings(llm_base_url=URL, llm_max_tokens=3_000, is_llm_cached=False))
    assert client.settings.max_output_tokens == 3_000


def test_prices_come_from_the_call_else_from_the_environment_else_from_nowhere(monkeypatch):
    assert limits_of(Settings()).prices is None
    monkeypatch.setenv(PRICE_VARIABLE, "1/2")
    assert limits_of(Settings()).prices.source == PRICE_VARIABLE
    prices = limits_of(Settings(llm_price="0.15/0.60")).prices
    assert (prices.output_usd_per_million, prices.source) == (Decimal("0.60"), "given by the user")


def test_presets_and_rounds_leave_the_sampler_some_of_its_measurements():
    for max_trials in (6, 12, 24, 100):
        limits = limits_of(Settings(max_trials=max_trials))
        assert 2 <= limits.configs_per_round <= max(2, max_trials // 6)


@pytest.mark.parametrize("cost", ["much", "nan", "inf", "0", "-1"])
def test_a_cost_budget_that_is_none_is_refused(cost):
    with pytest.raises(UsageError):
        limits_of(Settings(llm_max_cost_usd=cost, llm_price="1/1"))


def test_what_is_written_down_of_the_settings_holds_no_key_and_no_path():
    public = Settings(llm_api_key="sk-secret", llm_record="/home/somebody/replies.json").public()
    assert "sk-secret" not in repr(public)
    assert "somebody" not in repr(public)
