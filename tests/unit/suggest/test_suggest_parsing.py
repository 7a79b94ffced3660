"""The parser of untrusted answers: it gives suggestions within the contract or one typed error, whatever the text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from suggest_samples import suggestion_json

from agnitra_lab.contracts.suggestion import Suggestion
from agnitra_lab.errors import LLMAnswerError
from agnitra_lab.suggest import parsing
from agnitra_lab.suggest.answer_schema import answer_schema
from agnitra_lab.suggest.parsing import MAX_ANSWER_CHARS, MAX_RAW_CHARS, MAX_SUGGESTIONS, InvalidAnswerError


def parse(text: str, *, model: str) -> tuple[Suggestion, ...]:
    return parsing.parse(text, model=model).suggestions


def answer(*items) -> str:
    return json.dumps({"suggestions": list(items)})


def kind_of(text: str) -> str:
    with pytest.raises(InvalidAnswerError) as caught:
        parse(text, model="m")
    assert isinstance(caught.value, LLMAnswerError)
    assert len(str(caught.value)) < 600
    return caught.value.kind


def test_a_valid_answer_becomes_suggestions_with_the_models_name_and_the_raw_text():
    text = answer(
        suggestion_json("swiglu", block_size=1024, tile_shape=[1, 512], unroll_factor=2, num_warps=8, num_stages=3),
        suggestion_json("freezing"),
    )
    first, second = parse(text, model="some-model")
    assert (first.action, first.block_size, first.tile_shape, first.unroll_factor) == ("swiglu", 1024, (1, 512), 2)
    assert (first.num_warps, first.num_stages) == (8, 3)
    assert (second.action, second.block_size, second.source) == ("freezing", None, "llm:some-model")
    assert first.raw_text == text


@pytest.mark.parametrize(
    "wrap",
    [
        "```json\n{}\n```",
        "```\n{}\n```",
        "  \n```JSON\r\n{}\r\n```\n",
        "<think>\n{{maybe}}\n</think>\n{}",
        "<think>x</think>```json\n{}\n```",
        "\ufeff{}",
    ],
)
def test_one_fence_or_one_reasoning_block_around_the_document_is_taken_off(wrap):
    body = answer(suggestion_json())
    assert len(parse(wrap.replace("{}", body, 1), model="m")) == 1


def test_the_seeds_own_fields_are_accepted_and_what_they_claim_is_replaced():
    text = answer(suggestion_json(source="preset:launch_gaps", raw_text="forged"))
    (suggestion,) = parse(text, model="m")
    assert suggestion.source == "llm:m"
    assert suggestion.raw_text == text


def test_kernel_fields_may_be_left_out():
    item = {key: value for key, value in suggestion_json().items() if value is not None}
    (suggestion,) = parse(answer(item), model="m")
    assert suggestion.block_size is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "I would merge the projections.",
        "<html><body>502</body></html>",
        "[]",
        "null",
        "7",
        '"text"',
        "{}",
        '{"suggestions": []}',
        '{"suggestions": {}}',
        '{"suggestions": [7]}',
        '{"suggestions": [{}]}',
        '{"suggestions": [], "note": "x"}',
        answer(suggestion_json())[:-3],
        answer(suggestion_json()) + answer(suggestion_json()),
        "Here you are:\n```json\n" + answer(suggestion_json()) + "\n```",
        "```json\n" + answer(suggestion_json()),
        answer(suggestion_json(command="rm -rf /")),
        answer(suggestion_json(node="q_proj")),
        answer(suggestion_json(block_size="1024")),
        answer(suggestion_json(block_size=1024.0)),
        answer(suggestion_json(block_size=True)),
        answer(suggestion_json(tile_shape=[1, 2, 3])),
        answer(suggestion_json(tile_shape="1x2")),
        answer(suggestion_json(expected_latency_ms="9.0")),
        answer(suggestion_json(expected_latency_ms=None)),
        answer(suggestion_json(expected_latency_ms=True)),
        answer(suggestion_json(rationale="")),
        answer(suggestion_json(rationale=7)),
        answer(suggestion_json(action=["freezing"])),
        answer({key: value for key, value in suggestion_json().items() if key != "rationale"}),
        answer(suggestion_json(expected_latency_ms=float("nan"))),
        answer(suggestion_json(expected_latency_ms=float("inf"))),
        answer(suggestion_json(rationale="lone \ud800 surrogate")),
        answer(suggestion_json()).replace('"action"', '"rationale": "first", "action"'),
        answer(suggestion_json()).replace("8.5", "1" * 5000),
        "[" * 100_000,
        '{"suggestions":' * 50_000,
        '{"suggestions": ' + "[" * 40 + "]" * 40 + "}",
        answer(suggestion_json(rationale="x" * MAX_ANSWER_CHARS)),
    ],
    ids=lambda text: repr(text[:40]),
)
def test_text_that_is_not_the_asked_document_is_malformed(text):
    assert kind_of(text) == "malformed"


@pytest.mark.parametrize(
    "changes",
    [
        {"expected_latency_ms": 1e9},
        {"expected_latency_ms": 0},
        {"expected_latency_ms": -1.5},
        {"target_latency_ms": 3_600_001.0},
        {"block_size": 15},
        {"block_size": 100},
        {"block_size": 131072},
        {"block_size": 2**80},
        {"tile_shape": [0, 16]},
        {"tile_shape": [1, 65537]},
        {"unroll_factor": 17},
        {"num_warps": 3},
        {"num_stages": 9},
        {"action": "rewrite_everything"},
        {"action": ""},
        {"rationale": "x" * 2001},
    ],
    ids=str,
)
def test_a_value_of_the_right_type_outside_its_range_is_out_of_range(changes):
    assert kind_of(answer(suggestion_json(**changes))) == "out_of_range"


def test_a_number_too_large_for_a_float_is_out_of_range():
    assert kind_of(answer(suggestion_json()).replace("8.5", "1e999")) == "out_of_range"


def test_more_suggestions_than_are_read_is_out_of_range():
    assert kind_of(answer(*[suggestion_json()] * (MAX_SUGGESTIONS + 1))) == "out_of_range"


def test_one_bad_suggestion_is_counted_with_its_reason_and_costs_no_other():
    read = parsing.parse(
        answer(suggestion_json(num_warps=5), suggestion_json(), 7, suggestion_json(shell="x"), suggestion_json("fly")),
        model="m",
    )
    assert [item.action for item in read.suggestions] == ["freezing"]
    assert [(item.position, item.reason) for item in read.rejected] == [
        (0, "bad_field"), (2, "not_an_object"), (3, "unknown_key"), (4, "unknown_action"),
    ]  # fmt: skip
    assert read.num_proposed == 5


def test_the_same_suggestion_twice_is_one_and_the_repeat_is_counted():
    read = parsing.parse(answer(suggestion_json(), suggestion_json(rationale="Again.")), model="m")
    assert len(read.suggestions) == 1
    assert [item.reason for item in read.rejected] == ["repeated"]


def test_a_key_in_the_answer_is_redacted_from_the_raw_text_and_the_rationale():
    secret = "sk-" + "a1B2" * 8
    (suggestion,) = parse(answer(suggestion_json(rationale=f"use {secret} now")), model="m")
    assert secret not in suggestion.to_json()
    assert "[redacted]" in suggestion.rationale


def test_the_raw_text_is_cut():
    items = [suggestion_json("swiglu", num_warps=1, num_stages=n, rationale="x" * 1000) for n in range(1, 9)]
    (suggestion, *_) = parse(answer(*items), model="m")
    assert suggestion.raw_text is not None
    assert len(suggestion.raw_text) == MAX_RAW_CHARS


def test_control_and_direction_characters_are_dropped_from_what_is_shown():
    (suggestion,) = parse(answer(suggestion_json(rationale="a\x1b[31m\u202eb\nc")), model="m\x07\u202e" + "x" * 500)
    assert suggestion.rationale == "a[31mb c"
    assert suggestion.source == "llm:m" + "x" * 99


def test_the_sent_schema_is_closed_and_names_only_the_given_actions():
    schema = answer_schema(("freezing",))
    item = schema["properties"]["suggestions"]["items"]
    assert schema["additionalProperties"] is item["additionalProperties"] is False
    assert item["properties"]["action"]["enum"] == ["freezing"]
    assert set(item["required"]) == set(item["properties"])
    json.dumps(schema)


def test_every_field_of_the_sent_schema_is_one_of_the_contract():
    item = answer_schema()["properties"]["suggestions"]["items"]
    assert set(item["properties"]) <= set(Suggestion.model_fields)


def integer_range(name: str) -> tuple[int, int]:
    schema = answer_schema()["properties"]["suggestions"]["items"]["properties"][name]["anyOf"][0]
    schema = schema.get("items", schema)
    return schema["minimum"], schema["maximum"]


@pytest.mark.parametrize("name", ["block_size", "unroll_factor", "num_stages", "tile_shape"])
def test_the_sent_ranges_are_the_ranges_that_are_read(name):
    def item(value: int):
        return suggestion_json("swiglu", **{name: [value, value] if name == "tile_shape" else value})

    low, high = integer_range(name)
    assert len(parse(answer(item(low), item(high)), model="m")) == 2
    assert kind_of(answer(item(low - 1))) == "out_of_range"
    assert kind_of(answer(item(high + 1))) == "out_of_range"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)
near_items = st.fixed_dictionaries(
    {}, optional={name: json_values | st.just(value) for name, value in suggestion_json().items()} | {"x": json_values}
)


def parses_or_raises_the_typed_error(text: str) -> None:
    try:
        suggestions = parse(text, model="m")
    except InvalidAnswerError as error:
        assert error.kind in ("malformed", "out_of_range")
    else:
        assert suggestions
        assert all(Suggestion.from_json(item.to_json()) == item for item in suggestions)


@given(st.text(alphabet=st.characters(), max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_text_gives_suggestions_or_the_typed_error(text):
    parses_or_raises_the_typed_error(text)


@given(json_values)
@settings(max_examples=150, deadline=None)
def test_any_json_gives_suggestions_or_the_typed_error(value):
    parses_or_raises_the_typed_error(json.dumps(value))


@given(st.lists(near_items, max_size=3), st.text(max_size=8), st.text(max_size=8))
@settings(max_examples=200, deadline=None)
def test_anything_near_the_schema_gives_suggestions_or_the_typed_error(items, before, after):
    parses_or_raises_the_typed_error(before + json.dumps({"suggestions": items}) + after)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_valid_answer_with_one_character_changed_gives_suggestions_or_the_typed_error(data):
    text = answer(suggestion_json("swiglu", block_size=64, tile_shape=[1, 64]))
    position = data.draw(st.integers(0, len(text) - 1))
    parses_or_raises_the_typed_error(text[:position] + data.draw(st.characters()) + text[position + 1 :])
