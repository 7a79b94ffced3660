"""The loop with a language model in it: its kernel configs are measured between questions and taught to the search."""

from __future__ import annotations

import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("openai")

from agnitra_lab.contracts.suggestion import Proposal
from agnitra_lab.errors import UsageError
from agnitra_lab.loop import Optimization, Settings
from agnitra_lab.refine import replay
from agnitra_lab.workloads.target import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "llm"))
import llm_server as misbehave

KEY = "canary-KEY-0123456789abcdef"


class Adviser:
    """A served model that reads its prompt: it proposes configs of each listed site, one invalid one, one rewrite."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []

    def __call__(self, responder: misbehave.Responder) -> None:
        asked = responder.server_state.seen[-1].body["messages"][1]["content"]
        facts = json.loads(asked)
        self.facts.append(facts)
        latencies = {"target_latency_ms": 8.0, "expected_latency_ms": 9.0}
        items: list[dict[str, Any]] = [
            {"action": "max_autotune", **latencies, "rationale": "Products lead.", "site": None, "params": None}
        ]
        for site in facts["kernel_sites"]:
            order, configs = _valid_of(site)
            start = 3 * (len(self.facts) - 1)
            chosen = [dict(zip(order, point, strict=True)) for point in configs[start : start + 3]]
            for params in [*chosen, dict.fromkeys(order, 10**9)]:
                items.append(
                    {"action": site["action"], **latencies, "rationale": "Try.", "site": site["site"], "params": params}
                )
        misbehave.answer(json.dumps({"suggestions": items}))(responder)


def _valid_of(site: dict[str, Any]) -> tuple[list[str], list[list[int]]]:
    """What the prompt lists; a large space is told by its bounds, and this model happens to know what lies in them."""
    if "valid" in site:
        return site["valid"]["order"], site["valid"]["configs"]
    template, shape, _ = site["site"].split("/")
    found = replay.nearest(template, tuple(map(int, shape.split("x"))))
    order = list(site["params"])
    return order, [[config.params[name] for name in order] for config in replay.load(found).space.configs[:30]]


@pytest.fixture(scope="module")
def workload():
    return resolve("demo:llama-decode@tiny")


def loop_of(workload: Any, folder: Path, **settings: Any) -> Optimization:
    return Optimization(workload, Settings(artifacts=folder / "artifacts", **settings))


def until_refined(loop: Optimization) -> Proposal:
    try:
        loop.profile()
        loop.suggest()
        loop.refine()
        return loop.proposal
    finally:
        loop.close()


def test_a_models_configs_are_measured_told_and_taught_to_the_search(workload, tmp_path, monkeypatch):
    monkeypatch.setenv("AGNITRA_CACHE_DIR", str(tmp_path / "cache"))
    adviser, recording = Adviser(), tmp_path / "replies.json"
    with misbehave.serve(adviser) as server:
        loop = loop_of(
            workload, tmp_path, suggest="llm", llm_base_url=server.base_url, llm_api_key=KEY, llm_model="m",
            llm_price="0.15/0.60", llm_record=recording, budget_s=60.0, max_trials=12,
        )  # fmt: skip
        proposal = until_refined(loop)

    # The second question is about what the first one's configs took.
    assert len(proposal.rounds) >= 2
    assert len(adviser.facts) == len(proposal.rounds)
    told = adviser.facts[1]["kernel_sites"]
    assert all(site["measured_here"]["num_measured"] > 0 for site in told)
    assert adviser.facts[0]["profile"]["peaks"]["copy_bandwidth_gb_per_s"] > 0
    assert all(on.startswith("recorded: NVIDIA H200") for on in proposal.rounds[0].measured_on.values())
    # What is not a valid config is counted, and the rewrite leads the proposal.
    reasons = {item.reason for item in proposal.rounds[0].rejected}
    assert "outside_space" in reasons
    assert (proposal.source, proposal.suggestions[0].action) == ("llm", "max_autotune")
    # The search begins with everything that was measured, and pays for none of it again.
    for search in loop.searches:
        site = f"{search.space_template}/{'x'.join(map(str, search.shape))}/{search.dtype}"
        asked = {config.key() for config in proposal.configs_for(site)}
        assert {trial.config.key() for trial in search.trials} & asked
        space = {c.key() for c in replay.load(replay.nearest(search.space_template, search.shape)).space.configs}
        assert {trial.config.key() for trial in search.trials} <= space
    # Tokens and cost are counted by the server's own figures and the given price.
    usage = proposal.usage
    assert (usage.input_tokens, usage.output_tokens) == (11 * len(proposal.rounds), 7 * len(proposal.rounds))
    assert usage.cost_usd == (usage.input_tokens * Decimal("0.15") + usage.output_tokens * Decimal("0.60")) / 10**6
    # Filed, with the key nowhere.
    filed = next((tmp_path / "artifacts").rglob("suggestions.json")).read_text()
    assert Proposal.from_json(filed).rounds == proposal.rounds
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()

    # The recording answers the same loop without a server.
    again = until_refined(
        loop_of(workload, tmp_path, suggest="llm", llm_replies=recording, budget_s=60.0, max_trials=12)
    )
    assert again.model == "recorded:m"
    assert {made.reply_source for made in again.rounds if made.error is None} == {"recording"}
    assert again.rounds[0].suggestions[-1].config == proposal.rounds[0].suggestions[-1].config
    assert again.usage.input_tokens == 0


def test_a_server_that_fails_leaves_a_search_from_the_presets(workload, tmp_path):
    with misbehave.serve(misbehave.error(401, f"bad key {KEY}")) as server:
        loop = loop_of(
            workload, tmp_path, suggest="llm", llm_base_url=server.base_url, llm_api_key=KEY, llm_model="m",
            max_trials=6, budget_s=60.0, is_llm_cached=False,
        )  # fmt: skip
        proposal = until_refined(loop)
        assert len(server.seen) == 1
    assert proposal.fallback.reason == "refusal"
    assert KEY not in proposal.to_json()
    assert loop.searches
    for search in loop.searches:
        site = f"{search.space_template}/{'x'.join(map(str, search.shape))}/{search.dtype}"
        presets = {config.key() for config in proposal.configs_for(site)}
        assert presets
        assert {trial.config.key() for trial in search.trials[: len(presets)]} == presets


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"llm_max_cost_usd": "0.05"}, "never guessed"),
        ({"llm_price": "cheap"}, "USD per million"),
        ({"llm_replies": "missing.json"}, r"missing\.json"),
        ({"llm_rounds": 0}, "rounds"),
        ({"llm_max_cost_usd": "much", "llm_price": "1/1"}, "llm_max_cost_usd"),
    ],
)
def test_settings_that_cannot_be_kept_are_known_before_anything_runs(workload, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        loop_of(workload, tmp_path, suggest="llm", **settings)
    assert not (tmp_path / "artifacts").exists() or not list((tmp_path / "artifacts").rglob("*.json"))


def test_the_shell_answers_from_a_recording_and_says_what_each_round_did(tmp_path, monkeypatch, capsys):
    from agnitra_lab.cli import app

    monkeypatch.setattr("agnitra_lab.cli.suggest_console._console.width", 200, raising=False)
    monkeypatch.setattr(sys, "argv", ["agnitra", "suggest"])
    replies = Path(__file__).parents[2] / "fixtures" / "replies" / "llama_decode.json"
    arguments = ["suggest", "demo:llama-decode@tiny", "--rounds", "4", "--llm-replies", str(replies), "--budget", "60"]
    assert app([*arguments, "--artifacts", str(tmp_path)], standalone_mode=False) == 0
    said = capsys.readouterr().out
    assert "llm:recorded:written-by-hand" in said
    assert "recorded: NVIDIA H200" in said
    assert "Round 2 (agnitra.suggest.v2): 4 proposed" in said
    assert "2 questions (2 from cache or recording), 0 tokens in and 0 out, no price given" in said
    assert "the last round gained nothing" in said
    assert "agnitra_lab" not in said
