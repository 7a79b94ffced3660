"""The suggest stage over real HTTP: whatever the server does, the answer is a proposal, with the right reason."""

from __future__ import annotations

import json
from typing import Any

import llm_server as misbehave
import pytest

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import WorkloadProfile, WorkloadType
from agnitra_lab.contracts.suggestion import Proposal
from agnitra_lab.contracts.telemetry import Behavior, Bottleneck, GpuTelemetry, OpEvent, TelemetryRecord
from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.settings import LLMSettings
from agnitra_lab.suggest.propose import propose

CPU = DeviceInfo(type="cpu", name="A CPU")
PROFILE = WorkloadProfile(workload_type=WorkloadType.UNKNOWN, patterns=(), confidence=0.5)
RECORD = TelemetryRecord(
    bottleneck=Bottleneck(op="aten::addmm", latency_ms=8.0, shape=(64, 64)),
    events=(OpEvent(op="aten::addmm", latency_ms=8.0, cpu_ms=8.0, device_ms=None, num_calls=4, share=0.8),),
    gpu=GpuTelemetry(),
    behavior=Behavior(),
    wall_ms=10.0,
)
GOOD = {
    "action": "max_autotune",
    "block_size": None,
    "tile_shape": None,
    "unroll_factor": None,
    "num_warps": None,
    "num_stages": None,
    "target_latency_ms": 8.5,
    "expected_latency_ms": 9.0,
    "rationale": "aten::addmm takes 80% of the call.",
}


def content(**changes: Any) -> str:
    return json.dumps({"suggestions": [{**GOOD, **changes}]})


def ask(server: misbehave.MisbehavingServer, deadline_s: float = 10.0) -> Proposal:
    client = ChatClient(LLMSettings(server.base_url, None, "m", deadline_s))
    return propose(RECORD, PROFILE, CPU, client=client, is_llm_requested=True)


def test_a_good_answer_leads_the_proposal():
    with misbehave.serve(misbehave.answer(content())) as server:
        proposal = ask(server)
    assert (proposal.source, proposal.model, proposal.fallback) == ("llm", "served-model", None)
    assert [item.source for item in proposal.suggestions] == ["llm:served-model", "preset:packed_weights"]


def test_a_server_without_structured_output_still_gives_a_proposal():
    fenced = misbehave.answer(f"```json\n{content()}\n```")
    refusal = misbehave.error(400, "response_format")
    with misbehave.serve(refusal, refusal, fenced) as server:
        assert ask(server).source == "llm"


def test_nothing_but_the_prompt_is_sent():
    with misbehave.serve(misbehave.answer(content())) as server:
        ask(server)
    assert set(server.seen[0].body) == {"model", "messages", "response_format"}
    assert [message["role"] for message in server.seen[0].body["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (misbehave.stall_before_headers, "timeout"),
        (misbehave.stall_after_headers, "timeout"),
        (misbehave.drip_body, "timeout"),
        (misbehave.error(401), "refusal"),
        (misbehave.error(429), "refusal"),
        (misbehave.error(500), "refusal"),
        (misbehave.close_mid_body, "refusal"),
        (misbehave.answer(None, message={"role": "assistant", "content": None, "refusal": "no"}), "refusal"),
        (misbehave.respond(200, b'{"choices": []}'), "refusal"),
        (misbehave.respond(200, b"<html></html>", content_type="text/html"), "malformed"),
        (misbehave.answer("I would merge the projections."), "malformed"),
        (misbehave.answer("<b>merge</b>"), "malformed"),
        (misbehave.answer(content(expected_latency_ms=float("nan"))), "malformed"),
        (misbehave.answer(content(shell="rm -rf /")), "malformed"),
        (misbehave.answer(content(block_size="64")), "malformed"),
        (misbehave.answer("[" * 60_000), "malformed"),
        (misbehave.endless_body, "malformed"),
        (misbehave.answer(content(expected_latency_ms=1e9)), "out_of_range"),
        (misbehave.answer(content(block_size=100)), "out_of_range"),
        (misbehave.answer(content(action="format_disk")), "out_of_range"),
    ],
)
def test_each_misbehaviour_gives_presets_and_its_reason(behaviour, reason):
    with misbehave.serve(behaviour) as server:
        # Generous where the answer comes at once, so that only a stalled server meets its deadline.
        proposal = ask(server, deadline_s=0.6 if reason == "timeout" else 10.0)
    assert proposal.source == "preset"
    assert proposal.suggestions
    assert proposal.fallback is not None
    assert proposal.fallback.reason == reason
    assert proposal.fallback.banner.isprintable()
    assert Proposal.from_json(proposal.to_json()) == proposal
