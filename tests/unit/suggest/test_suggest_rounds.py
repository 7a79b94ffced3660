"""The rounds: presets first, measured feedback between questions, an end when gains fade or a budget is spent."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from kernel_samples import ROOT, begin, choice, landscape, measured, ranked_by_truth, site_of, space_of
from suggest_samples import CPU, decoder_profile, decoder_record, suggestion_json

from agnitra_lab.contracts.suggestion import Proposal
from agnitra_lab.errors import LLMTimeoutError, UsageError
from agnitra_lab.llm.recorded import RecordedClient
from agnitra_lab.suggest.budget import Limits, prices_from
from agnitra_lab.suggest.kernel_presets import ranked
from agnitra_lab.suggest.rounds import Rounds
from agnitra_lab.suggest.sites import KernelSite

RECORDED = landscape()
SITE = site_of(RECORDED)
PRESETS = ranked(SITE.space, RECORDED.recorded.device)
BY_TRUTH = [config for config in ranked_by_truth(RECORDED) if config not in PRESETS]
"""What a model can add to the presets, the fastest first."""
SMALL = {"configs_per_round": 4}


def answers(*rounds) -> RecordedClient:
    """A model that proposes these configs, round by round."""
    return RecordedClient(
        [{"suggestions": [choice(SITE, config.params) for config in configs]} for configs in rounds], model="tester"
    )


def facts_of(client: RecordedClient, index: int) -> dict:
    return json.loads(client.questions[index][1]["content"])


def converse(rounds: Rounds) -> Proposal:
    """Ask, measure on the recording, tell, until nothing more is asked."""
    while (made := rounds.ask()) is not None:
        configs = [suggestion.config for suggestion in made.suggestions if suggestion.config is not None]
        rounds.tell(SITE.key, measured(RECORDED, configs))
    return rounds.proposal


def test_without_a_model_there_is_one_round_of_presets_and_no_question():
    rounds = begin(None, SITE)
    made = rounds.ask()
    assert made is not None
    assert [s.config for s in made.suggestions] == list(ranked(SITE.space, RECORDED.recorded.device))
    assert all(s.source == "preset:kernel_rules/rms_norm" for s in made.suggestions)
    rounds.tell(SITE.key, measured(RECORDED, BY_TRUTH[:2]))
    assert rounds.ask() is None
    assert (rounds.proposal.stopped_because, rounds.proposal.usage) == ("no_model", None)


def test_the_models_configs_follow_the_presets_and_repeat_none():
    rounds = begin(answers([PRESETS[0], *BY_TRUTH[:2]]), SITE, limits=Limits(**SMALL))
    made = rounds.ask()
    assert [s.config for s in made.suggestions] == [*PRESETS[:4], *BY_TRUTH[:2]]
    assert [item.reason for item in made.rejected] == ["repeated"]
    assert made.num_proposed == 3


def test_a_second_question_holds_what_was_measured_and_what_was_dropped():
    slow, fast = BY_TRUTH[40:42], BY_TRUTH[:2]
    client = answers([*slow, slow[0]], fast)
    rounds = begin(client, SITE, limits=Limits(**SMALL))
    made = rounds.ask()
    rounds.tell(SITE.key, measured(RECORDED, [s.config for s in made.suggestions if s.config]))
    rounds.ask()
    first, second = facts_of(client, 0), facts_of(client, 1)
    assert "measured_here" not in first["kernel_sites"][0]
    here = second["kernel_sites"][0]["measured_here"]
    assert here["num_measured"] == 6
    best = min(RECORDED.measure(s.config) for s in made.suggestions if s.config) * 1e3
    assert here["best_us"] == pytest.approx(best, rel=1e-3)
    assert set(here["best_over_best_by_value"]) <= set(SITE.space.params)
    assert second["earlier_rounds"]["num_dropped_by_reason"] == {"repeated": 1}


def test_what_stays_the_same_is_the_common_beginning_of_all_questions():
    client = answers(BY_TRUTH[40:42], BY_TRUTH[:2])
    converse(begin(client, SITE, limits=Limits(**SMALL)))
    first, second = (question[1]["content"] for question in client.questions[:2])
    assert client.questions[0][0] == client.questions[1][0]
    same = next(i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    assert same > first.index('"kernel_sites"')


def test_failures_are_told_by_class_with_an_example():
    client = answers(BY_TRUTH[40:42], BY_TRUTH[:1])
    rounds = begin(client, SITE, limits=Limits(**SMALL))
    rounds.ask()
    (trial,) = measured(RECORDED, BY_TRUTH[50:51])
    failed = trial.model_copy(
        update={"latency_ms": None, "status": "failed", "detail": "OutOfResources: shared memory"}
    )
    rounds.tell(SITE.key, [failed, failed])
    rounds.ask()
    (said,) = facts_of(client, 1)["kernel_sites"][0]["measured_here"]["failures"]
    assert (said["class"], said["count"], said["example"]) == ("OutOfResources", 2, BY_TRUTH[50].params)


def test_rounds_end_when_the_last_one_gained_nothing():
    client = answers(BY_TRUTH[:2], BY_TRUTH[40:42], BY_TRUTH[42:44], BY_TRUTH[44:46])
    proposal = converse(begin(client, SITE, limits=Limits(**SMALL)))
    assert proposal.stopped_because == "gains_faded"
    assert len(client.questions) == 2


def test_rounds_that_keep_gaining_end_at_the_limit():
    client = answers(*([BY_TRUTH[index]] for index in (55, 40, 20, 5, 0)))
    rounds = begin(client, SITE, limits=Limits(max_rounds=4, min_gain=0.0, **SMALL))
    while (made := rounds.ask()) is not None:
        # Only the model's own, so that each round is better than the one before.
        rounds.tell(SITE.key, measured(RECORDED, [s.config for s in made.suggestions if s.source.startswith("llm:")]))
    assert rounds.proposal.stopped_because == "rounds"
    assert len(client.questions) == 4
    before = [made.best_latency_ms.get(SITE.key) for made in rounds.proposal.rounds]
    assert before[0] is None
    assert before[1] > before[2] > before[3]


def test_a_model_that_only_repeats_the_presets_is_no_failure_and_is_asked_again():
    client = answers(PRESETS[:2], BY_TRUTH[:2])
    proposal = converse(begin(client, SITE, limits=Limits(**SMALL)))
    assert (proposal.fallback, proposal.rounds[0].error) == (None, None)
    assert [item.reason for item in proposal.rounds[0].rejected] == ["repeated"] * 2
    assert BY_TRUTH[0] in proposal.configs_for(SITE.key)


def test_nothing_told_is_no_reason_to_ask_again():
    client = answers(BY_TRUTH[:2], BY_TRUTH[2:4])
    rounds = begin(client, SITE)
    rounds.ask()
    assert rounds.ask() is None
    assert rounds.stopped_because == "no_feedback"


@pytest.mark.parametrize("text", ["I would rather not.", "<html>502</html>", '{"suggestions": [NaN]}', "{", '{"a": 1}'])
def test_a_useless_first_answer_leaves_the_presets_and_says_why(text):
    rounds = begin(RecordedClient([text]), SITE)
    made = rounds.ask()
    assert [s.source.partition(":")[0] for s in made.suggestions] == ["preset"] * 8
    assert made.error is not None
    rounds.tell(SITE.key, measured(RECORDED, BY_TRUTH[:1]))
    assert rounds.ask() is None
    proposal = rounds.proposal
    assert (proposal.source, proposal.fallback.reason, proposal.stopped_because) == ("preset", "malformed", "error")


def test_a_useless_later_answer_keeps_what_the_first_one_gave():
    client = RecordedClient([json.dumps({"suggestions": [choice(SITE, BY_TRUTH[0].params)]}), "prose"])
    proposal = converse(begin(client, SITE, limits=Limits(**SMALL)))
    assert (proposal.source, proposal.fallback, proposal.stopped_because) == ("llm", None, "error")
    assert proposal.rounds[1].error is not None
    assert BY_TRUTH[0] in proposal.configs_for(SITE.key)


def test_a_round_counts_its_tokens_and_a_replayed_reply_costs_nothing():
    class Counting(RecordedClient):
        def complete(self, messages, **schema):
            reply = super().complete(messages, **schema)
            return type(reply)(reply.text, reply.model, 5.0, 1_000_000, 500_000, source="server")

    configs = [{"suggestions": [choice(SITE, BY_TRUTH[0].params)]}]
    prices = prices_from("0.15/0.60", "given by the user")
    paid, replayed = (begin(kind(configs), SITE, limits=Limits(prices=prices)) for kind in (Counting, RecordedClient))
    paid.ask(), replayed.ask()
    assert (paid.proposal.usage.input_tokens, paid.proposal.usage.cost_usd) == (1_000_000, Decimal("0.45"))
    assert paid.proposal.rounds[0].usage == paid.proposal.usage
    usage = replayed.proposal.usage
    assert (usage.num_questions, usage.num_replayed, usage.input_tokens, usage.cost_usd) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_tokens": 100}, "token_budget"),
        ({"max_cost_usd": Decimal("0.000001"), "prices": prices_from("1/1", "x")}, "cost_budget"),
    ],
)
def test_a_budget_that_allows_no_question_leaves_the_presets(limits, reason):
    client = answers(BY_TRUTH[:1])
    rounds = begin(client, SITE, limits=Limits(**limits))
    made = rounds.ask()
    assert client.questions == []
    assert made.suggestions
    assert (rounds.stopped_because, rounds.fallback.reason) == (reason, "budget")


def test_a_question_without_an_answer_is_counted_at_its_upper_bound():
    class Silent:
        def complete(self, messages, **schema):
            raise LLMTimeoutError("no complete answer within 1 s.")

    rounds = begin(Silent(), SITE, limits=Limits(max_output_tokens=100))
    rounds.ask()
    usage = rounds.proposal.usage
    assert usage.is_estimated
    assert usage.output_tokens == 100
    assert usage.input_tokens > 500


def test_a_budget_holds_over_all_rounds_together():
    client = answers(*([config] for config in (BY_TRUTH[40], BY_TRUTH[20], BY_TRUTH[0])))
    served = type("Served", (), {})()

    def complete(messages, **schema):
        reply = client.complete(messages, **schema)
        return type(reply)(reply.text, reply.model, 5.0, 4_000, 500, source="server")

    served.complete = complete
    limits = Limits(max_tokens=12_000, max_output_tokens=1_000, min_gain=0.0, **SMALL)
    rounds = begin(served, SITE, limits=limits)
    converse(rounds)
    usage = rounds.proposal.usage
    assert usage.input_tokens + usage.output_tokens <= 12_000
    assert rounds.stopped_because in ("token_budget", "gains_faded")


def test_a_cost_budget_without_a_price_is_refused_with_what_to_give():
    with pytest.raises(UsageError, match="never guessed"):
        Limits(max_cost_usd=Decimal(1))


@pytest.mark.parametrize("text", ["", "0.15", "a/b", "1/-2", "nan/1", "1/2/3", "inf/0"])
def test_a_price_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="USD per million"):
        prices_from(text, "x")


@pytest.mark.parametrize("given", [{"max_rounds": 0}, {"configs_per_round": 0}, {"min_gain": 1.0}, {"max_tokens": 0}])
def test_limits_that_no_run_could_keep_are_refused(given):
    with pytest.raises(UsageError):
        Limits(**given)


def test_rewrites_are_asked_for_beside_configs_and_their_outcomes_are_told():
    client = RecordedClient(
        [
            {"suggestions": [suggestion_json("max_autotune"), choice(SITE, BY_TRUTH[0].params)]},
            {"suggestions": [suggestion_json("qkv_concat")]},
        ]
    )
    rounds = begin(client, SITE)
    rounds.ask()
    rounds.tell(SITE.key, measured(RECORDED, BY_TRUTH[:1]))
    rounds.tell_actions({"max_autotune": "1.08x of eager, kept", "no_such_action": "ignored"})
    rounds.ask()
    assert facts_of(client, 1)["earlier_rounds"]["measured_actions"] == {"max_autotune": "1.08x of eager, kept"}
    llm = [s.action for s in rounds.proposal.suggestions if s.source.startswith("llm:")]
    assert {"max_autotune", "qkv_concat", "rms_norm"} <= set(llm)


def test_what_an_earlier_run_measured_stands_in_the_first_question():
    client = answers(BY_TRUTH[:1])
    rounds = begin(client, SITE)
    rounds.tell_actions({"max_autotune": "rejected, 0.98x of eager (slower)"})
    rounds.ask()
    told = facts_of(client, 0)["earlier_rounds"]
    assert told["measured_actions"] == {"max_autotune": "rejected, 0.98x of eager (slower)"}


def test_a_space_of_a_template_that_no_action_names_is_left_alone():
    unknown = KernelSite(space_of("someones_own", [{"TILE": 4, "num_warps": 2}]))
    made = begin(None, unknown, SITE).ask()
    assert {suggestion.site for suggestion in made.suggestions} == {SITE.key}


def test_a_site_of_a_recording_is_asked_about_on_a_cpu_and_proposes_no_kernel_for_it():
    client = RecordedClient([{"suggestions": [choice(SITE, BY_TRUTH[0].params), suggestion_json("freezing")]}])
    rounds = Rounds(decoder_record(), decoder_profile(), CPU, sites=(SITE,), client=client)
    made = rounds.ask()
    assert BY_TRUTH[0] in rounds.proposal.configs_for(SITE.key)
    assert made.measured_on == {SITE.key: "recorded: NVIDIA H200"}
    # The rule of thumb for the interpreter would be of no use for an H200's recording.
    assert made.suggestions[0].config == ranked(SITE.space, RECORDED.recorded.device)[0]
    assert "rms_norm" not in [suggestion.action for suggestion in rounds.proposal.suggestions]


def test_the_prompt_stays_small_with_many_large_spaces():
    client = answers(BY_TRUTH[:1])
    sites = [site_of(landscape(name)) for name in (
        "rms_norm__1x2048", "rms_norm__4096x2048", "rms_norm__16384x4096", "swiglu__1x5632", "swiglu__4096x5632",
    )]  # fmt: skip
    rounds = begin(client, *sites)
    rounds.ask()
    for site in sites:
        rounds.tell(
            site.key, measured(landscape(site.key.split("/")[0] + "__" + site.key.split("/")[1]), site.space.configs)
        )
    rounds.ask()
    assert sum(len(message["content"]) for message in client.questions[-1]) < 24_000


def test_a_proposal_with_rounds_comes_back_from_its_json():
    client = answers([*BY_TRUTH[:2], BY_TRUTH[0]], BY_TRUTH[4:5])
    proposal = converse(begin(client, SITE, limits=Limits(prices=prices_from("1/2", "x"), **SMALL)))
    assert Proposal.from_json(proposal.to_json()) == proposal


def test_the_answers_text_stands_once_with_its_round():
    proposal = converse(begin(answers(BY_TRUTH[:4]), SITE, limits=Limits(max_rounds=1)))
    assert proposal.rounds[0].raw_text is not None
    assert all(s.raw_text is None for s in proposal.rounds[0].suggestions)


def test_the_replies_for_the_tutorials_choose_only_what_is_valid():
    sites = [site_of(landscape(name)) for name in ("swiglu__1x5632", "rms_norm__1x2048")]
    client = RecordedClient.from_file(ROOT / "fixtures" / "replies" / "llama_decode.json")
    rounds = begin(client, *sites, limits=Limits(**SMALL))
    while (made := rounds.ask()) is not None:
        assert (made.error, made.rejected) == (None, ())
        for site in sites:
            configs = [s.config for s in made.suggestions if s.site == site.key]
            rounds.tell(site.key, measured(landscape("__".join(site.key.split("/")[:2])), configs))
    assert len(rounds.rounds) == 2
    assert rounds.proposal.model == "recorded:written-by-hand"
