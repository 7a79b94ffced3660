"""The prompt: the measured facts are in it, and nothing that belongs to the user is."""

from __future__ import annotations

import json

from suggest_samples import CPU, CUDA, decoder_profile, decoder_record, event, pattern, profile, record

from agnitra_lab.contracts.telemetry import Bottleneck
from agnitra_lab.suggest import prompts


def facts_of(messages: list[dict[str, str]]) -> dict:
    return json.loads(messages[1]["content"])


def test_the_prompt_holds_version_device_shares_and_patterns():
    facts = facts_of(prompts.build(decoder_record(), decoder_profile(), CUDA))
    assert facts["prompt_version"] == prompts.PROMPT_VERSION
    assert facts["device"]["name"] == "NVIDIA H200"
    assert facts["profile"]["call_latency_ms"] == 10.0
    assert facts["profile"]["top_ops"][0] == {
        "op": "aten::addmm", "self_ms": 7.0, "share": 0.7, "num_calls": 4, "shape": [1, 2048],
    }  # fmt: skip
    assert facts["workload"]["patterns"] == {"transformer_attention": 1, "gated_mlp": 1, "rms_norm": 1}
    assert facts["workload"]["phase"] == "decode"


def test_only_actions_that_are_possible_here_are_offered():
    on_cpu = {action["name"] for action in facts_of(prompts.build(decoder_record(), decoder_profile(), CPU))["actions"]}
    assert on_cpu == {"sdpa_backend", "qkv_concat", "gate_up_concat", "freezing", "as_laid_out", "max_autotune"}


def test_names_paths_and_ranges_of_the_users_code_stay_out():
    bottleneck = Bottleneck(
        op="customer_churn_step", latency_ms=5.0, shape=(4,), node="secret_node", module_path="acme.model.layers",
        source="acme_private.py:12",
    )  # fmt: skip
    measured = record(
        event("customer_churn_step", 0.5, node="secret_node", module_path="acme.model.layers"),
        event("aten::mm", 0.3),
        bottleneck=bottleneck,
        name="acme-quarterly",
        workload="/home/someone/acme.py:build",
        notes=("/home/someone/notes",),
        graph_note="Traceback in /home/someone/acme.py",
        parquet="events-acme.parquet",
    )
    text = json.dumps(prompts.build(measured, profile(pattern("Acme Pattern!", "n")), CPU))
    for private in ("churn", "secret_node", "acme", "Acme", "someone", "/home"):
        assert private not in text
    assert '\\"other\\"' in text


def test_a_secret_in_a_device_name_is_redacted(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "planted-canary-value")
    device = CPU.model_copy(update={"name": "box planted-canary-value"})
    assert "planted-canary-value" not in json.dumps(prompts.build(decoder_record(), decoder_profile(), device))


def test_the_prompt_is_bounded_however_long_the_profile():
    measured = record(*[event(f"aten::op_{index}", 0.001, shape=(1, 2, 3)) for index in range(500)])
    messages = prompts.build(measured, decoder_profile(), CUDA)
    assert sum(len(message["content"]) for message in messages) < 12_000
    assert facts_of(messages)["profile"]["num_ops_not_shown"] == 500 - prompts.MAX_OPS


def test_the_same_profile_gives_the_same_prompt():
    first, second = (prompts.build(decoder_record(), decoder_profile(), CUDA) for _ in range(2))
    assert first == second
