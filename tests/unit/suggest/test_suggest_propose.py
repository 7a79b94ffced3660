"""The suggest stage: the model in front, presets behind it, and a stated reason whenever presets stand in."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from suggest_samples import CPU, CUDA, decoder_profile, decoder_record, profile, record, suggestion_json

from agnitra_lab.contracts.suggestion import Proposal
from agnitra_lab.errors import LLMAnswerError, LLMError, LLMRefusalError, LLMTimeoutError, MissingError
from agnitra_lab.llm.recorded import RecordedClient
from agnitra_lab.suggest.answer_schema import SCHEMA_NAME
from agnitra_lab.suggest.propose import propose


class Failing:
    """A model that always raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def complete(self, messages, *, schema_name, json_schema):
        raise self.error


def ask(client=None, *, device=CPU, **options) -> Proposal:
    return propose(decoder_record(), decoder_profile(), device, client=client, **options)


def reply(*items) -> dict:
    return {"suggestions": list(items)}


def actions_of(proposal: Proposal) -> list[str]:
    return [suggestion.action for suggestion in proposal.suggestions]


def test_without_a_model_presets_are_the_normal_case():
    proposal = ask()
    assert (proposal.source, proposal.model, proposal.fallback) == ("preset", None, None)
    assert proposal.suggestions
    assert all(suggestion.source.startswith("preset:") for suggestion in proposal.suggestions)


def test_a_model_that_was_asked_for_and_is_not_configured_is_a_fallback_that_says_what_to_set():
    proposal = ask(is_llm_requested=True)
    assert proposal.fallback is not None
    assert proposal.fallback.reason == "not_configured"
    assert "AGNITRA_LLM_BASE_URL" in proposal.fallback.banner
    assert proposal.suggestions == ask().suggestions


def test_the_models_suggestions_go_in_front_and_presets_fill_in_what_it_did_not_name():
    client = RecordedClient([reply(suggestion_json("max_autotune", expected_latency_ms=9.9))], model="tester")
    proposal = ask(client)
    assert (proposal.source, proposal.model, proposal.fallback) == ("llm", "tester", None)
    assert actions_of(proposal)[0] == "max_autotune"
    assert set(actions_of(proposal)) == set(actions_of(ask()))
    assert [suggestion.source.split(":")[0] for suggestion in proposal.suggestions] == [
        "llm",
        "preset",
        "preset",
        "preset",
    ]


def test_the_models_suggestions_are_ranked_by_what_it_expects():
    items = [
        suggestion_json("freezing", expected_latency_ms=9.0),
        suggestion_json("qkv_concat", expected_latency_ms=3.0),
    ]
    assert actions_of(ask(RecordedClient([reply(*items)])))[:2] == ["qkv_concat", "freezing"]


def test_the_same_suggestion_twice_is_proposed_once():
    proposal = ask(RecordedClient([reply(suggestion_json("freezing"), suggestion_json("freezing"))]))
    assert actions_of(proposal).count("freezing") == 1


def test_further_configs_of_one_action_push_no_other_action_out():
    kernel = {"tile_shape": [1, 64], "unroll_factor": 1, "num_warps": 4, "num_stages": 1}
    items = [suggestion_json("rms_norm", block_size=size, **kernel) for size in (64, 128, 256, 512, 1024, 2048, 4096)]
    proposal = ask(RecordedClient([reply(*items)]), device=CUDA)
    assert set(actions_of(ask(device=CUDA))) <= set(actions_of(proposal))
    assert len(proposal.suggestions) == len(set(actions_of(proposal))) + len(items) - 1


def test_actions_that_this_device_cannot_make_are_dropped():
    items = [suggestion_json("cuda_graph", expected_latency_ms=0.1), suggestion_json("freezing")]
    proposal = ask(RecordedClient([reply(*items)]))
    assert "cuda_graph" not in actions_of(proposal)
    assert actions_of(proposal)[0] == "freezing"


def test_actions_without_their_pattern_are_dropped():
    client = RecordedClient(
        [reply(suggestion_json("conv_bn_fold", expected_latency_ms=0.1), suggestion_json("freezing"))]
    )
    assert "conv_bn_fold" not in actions_of(ask(client))


def test_an_answer_of_impossible_actions_alone_is_out_of_range():
    proposal = ask(RecordedClient([reply(suggestion_json("cuda_graph"))]))
    assert proposal.source == "preset"
    assert proposal.fallback is not None
    assert proposal.fallback.reason == "out_of_range"
    assert "cuda_graph" in proposal.fallback.detail


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LLMTimeoutError("no complete answer within 20 s."), "timeout"),
        (LLMRefusalError("HTTP 429."), "refusal"),
        (LLMAnswerError("not a chat completion."), "malformed"),
        (LLMError("something else."), "malformed"),
        (MissingError("openai is needed."), "not_configured"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_each_failure_of_the_model_gives_presets_and_its_reason(error, reason):
    proposal = ask(Failing(error))
    assert proposal.source == "preset"
    assert proposal.suggestions == ask().suggestions
    assert proposal.fallback is not None
    assert (proposal.fallback.reason, proposal.fallback.detail) == (reason, str(error))
    assert proposal.fallback.wall_ms is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I would rather not.", "malformed"),
        (json.dumps(reply(suggestion_json(expected_latency_ms=1e9))), "out_of_range"),
        (json.dumps(reply(suggestion_json(shell="rm -rf /"))), "malformed"),
    ],
)
def test_each_invalid_answer_gives_presets_and_its_reason(text, reason):
    proposal = ask(RecordedClient([text]))
    assert proposal.suggestions == ask().suggestions
    assert proposal.fallback is not None
    assert proposal.fallback.reason == reason


def test_a_bug_in_a_client_is_not_hidden_as_a_fallback():
    with pytest.raises(ZeroDivisionError):
        ask(Failing(ZeroDivisionError("bug")))


def test_the_number_of_suggestions_is_bounded():
    assert len(ask(max_suggestions=2).suggestions) == 2


def test_an_empty_profile_gives_an_empty_proposal():
    assert propose(record(wall_ms=None), profile(), CPU).suggestions == ()


def test_the_question_names_the_schema_and_only_possible_actions():
    class Listening(Failing):
        def complete(self, messages, *, schema_name, json_schema):
            self.asked = (schema_name, json_schema)
            raise self.error

    client = Listening(LLMRefusalError("no."))
    ask(client)
    name, schema = client.asked
    assert name == SCHEMA_NAME
    allowed = schema["properties"]["suggestions"]["items"]["properties"]["action"]["enum"]
    assert allowed == ["sdpa_backend", "qkv_concat", "gate_up_concat", "freezing", "as_laid_out", "max_autotune"]


def test_a_proposal_round_trips_through_its_json():
    proposal = ask(RecordedClient([reply(suggestion_json("freezing"))]))
    assert Proposal.from_json(proposal.to_json()) == proposal


def test_importing_the_stage_loads_neither_torch_nor_the_client_library():
    program = (
        "import sys, agnitra_lab.suggest.propose, agnitra_lab.llm.client, agnitra_lab.llm.recorded;"
        "print([name for name in ('torch', 'triton', 'numpy', 'pandas', 'openai', 'httpx') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (finished.stdout.strip(), finished.stderr) == ("[]", "")
