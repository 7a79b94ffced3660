"""The rounds over real HTTP: whatever a server does, the presets are there, the reason is stated, the time is kept."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kernel_samples import begin, choice, landscape, measured, ranked_by_truth, site_of

from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.settings import LLMSettings
from agnitra_lab.suggest.budget import Limits
from agnitra_lab.suggest.kernel_presets import ranked
from agnitra_lab.suggest.rounds import Rounds

sys.path.insert(0, str(Path(__file__).parents[1] / "llm"))
import llm_server as misbehave

RECORDED = landscape()
SITE = site_of(RECORDED)
PRESETS = ranked(SITE.space, RECORDED.recorded.device)
NEW = [config for config in ranked_by_truth(RECORDED) if config not in PRESETS]
KEY = "canary-KEY-0123456789abcdef"
GOOD = choice(SITE, NEW[0].params)
MARGIN_S = 5.0
"""A loaded machine may be slow; a server that is waited for without a deadline holds on for 30 s."""


def answer(*items: Any) -> Any:
    return misbehave.answer(json.dumps({"suggestions": list(items)}))


def rounds_with(server: misbehave.MisbehavingServer, deadline_s: float = 10.0, **limits: Any) -> Rounds:
    client = ChatClient(LLMSettings(server.base_url, KEY, "m", deadline_s))
    return begin(client, SITE, limits=Limits(**limits))


@pytest.fixture(scope="module", autouse=True)
def _client_library() -> None:
    pytest.importorskip("openai")


def half_a_reply(responder: misbehave.Responder) -> None:
    """A chunked stream that ends in the middle of the answer."""
    body = misbehave.completion(json.dumps({"suggestions": [GOOD]}))[:80]
    responder.raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(body), body))


def huge(responder: misbehave.Responder) -> None:
    misbehave.respond(200, misbehave.completion("x" * (4 << 20)))(responder)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (misbehave.answer("I would use bigger blocks."), "malformed"),
        (misbehave.answer("<html><body>Sign in</body></html>"), "malformed"),
        (misbehave.respond(200, b"<html></html>", content_type="text/html"), "malformed"),
        (misbehave.answer(json.dumps({"suggestions": [{**GOOD, "expected_latency_ms": float("nan")}]})), "malformed"),
        (answer(choice(SITE, {name: float("inf") for name in GOOD["params"]})), "malformed"),
        (answer(choice(SITE, dict.fromkeys(GOOD["params"], 10**9))), "out_of_range"),
        (answer(choice(SITE, {"tile": 1, "warps": 2})), "out_of_range"),
        (answer({"idea": "larger blocks"}), "malformed"),
        (misbehave.answer('{"configs": []}'), "malformed"),
        (misbehave.answer('{"suggestions": []}'), "malformed"),
        (misbehave.answer(""), "malformed"),
        (misbehave.respond(200, b""), "malformed"),
        (misbehave.respond(200, b'{"choices": []}'), "refusal"),
        (half_a_reply, "refusal"),
        (misbehave.close_mid_body, "refusal"),
        (misbehave.answer('{"suggestions": [{"act', finish_reason="length"), "malformed"),
        (misbehave.drip_body, "timeout"),
        (misbehave.drip_headers, "timeout"),
        (misbehave.stall_before_headers, "timeout"),
        (misbehave.error(401, f"Incorrect API key provided: {KEY}"), "refusal"),
        (misbehave.respond(429, b"{}", retry_after="600"), "refusal"),
        (misbehave.error(500), "refusal"),
        (misbehave.error(502), "refusal"),
        (huge, "malformed"),
        (misbehave.endless_body, "malformed"),
    ],
)
def test_a_server_of_no_use_leaves_the_presets_and_its_reason_within_the_deadline(behaviour, reason):
    deadline_s = 0.5 if reason == "timeout" else 10.0
    with misbehave.serve(behaviour) as server:
        rounds = rounds_with(server, deadline_s)
        started_s = time.monotonic()
        made = rounds.ask()
        took_s = time.monotonic() - started_s
    assert took_s < deadline_s + MARGIN_S
    assert [suggestion.config for suggestion in made.suggestions] == list(PRESETS)
    proposal = rounds.proposal
    assert (proposal.source, proposal.fallback.reason, proposal.stopped_because) == ("preset", reason, "error")
    assert KEY not in proposal.to_json()
    assert proposal.fallback.banner.isprintable()


def test_a_dead_endpoint_leaves_the_presets_at_once():
    with misbehave.serve() as gone:
        pass
    rounds = rounds_with(gone)
    started_s = time.monotonic()
    made = rounds.ask()
    assert time.monotonic() - started_s < MARGIN_S
    assert [suggestion.config for suggestion in made.suggestions] == list(PRESETS)
    assert rounds.fallback.reason == "refusal"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_another_origin_takes_no_key_with_it(status):
    with misbehave.serve(answer(GOOD)) as other:
        location = f"{other.base_url}/chat/completions"
        with misbehave.serve(misbehave.respond(status, b"", location=location)) as server:
            rounds = rounds_with(server)
            rounds.ask()
        assert other.seen == []
    assert rounds.fallback.reason == "refusal"
    assert "redirect" in rounds.fallback.detail


def test_a_busy_server_is_waited_for_inside_the_deadline():
    with misbehave.serve(misbehave.respond(429, b"{}", retry_after="0.2"), answer(GOOD)) as server:
        rounds = rounds_with(server)
        made = rounds.ask()
    assert rounds.fallback is None
    assert made.suggestions[-1].config == NEW[0]


def test_good_choices_among_bad_ones_are_taken_and_the_bad_ones_counted():
    bad = [choice(SITE, dict.fromkeys(GOOD["params"], 10**9)), "prose", {**GOOD, "shell": "rm"}, choice(SITE, {})]
    with misbehave.serve(answer(*bad, GOOD)) as server:
        rounds = rounds_with(server)
        made = rounds.ask()
    assert made.suggestions[-1].config == NEW[0]
    assert [item.reason for item in made.rejected] == ["outside_space", "not_an_object", "unknown_key", "outside_space"]


@pytest.mark.parametrize("refused", ["json_schema", "json_schema and json_object"])
def test_a_server_without_structured_output_holds_the_whole_conversation(refused):
    refusals = [misbehave.error(400, f"{refused} not supported")] * len(refused.split(" and "))
    fenced = misbehave.answer(f"```json\n{json.dumps({'suggestions': [choice(SITE, NEW[40].params)]})}\n```")
    with misbehave.serve(*refusals, fenced, answer(GOOD)) as server:
        rounds = rounds_with(server, configs_per_round=4)
        while (made := rounds.ask()) is not None:
            rounds.tell(SITE.key, measured(RECORDED, [s.config for s in made.suggestions if s.config]))
        num_asked = len(server.seen)
    # The format is found out once, in the first round.
    assert num_asked == len(refusals) + 2
    assert {NEW[40].key(), NEW[0].key()} <= {config.key() for config in rounds.proposal.configs_for(SITE.key)}


def test_a_later_failure_keeps_what_earlier_rounds_gave():
    with misbehave.serve(answer(choice(SITE, NEW[40].params)), misbehave.error(401)) as server:
        rounds = rounds_with(server)
        while (made := rounds.ask()) is not None:
            rounds.tell(SITE.key, measured(RECORDED, [s.config for s in made.suggestions if s.config]))
    proposal = rounds.proposal
    assert (proposal.source, proposal.fallback, proposal.stopped_because) == ("llm", None, "error")
    assert "HTTP 401" in proposal.rounds[1].error
    assert NEW[40] in proposal.configs_for(SITE.key)
