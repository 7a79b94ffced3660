"""What a model may choose: a valid config of a listed space. Everything else is counted with its reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import choice, landscape, site_of
from suggest_samples import suggestion_json

from agnitra_lab.suggest import parsing
from agnitra_lab.suggest.answer_schema import answer_schema
from agnitra_lab.suggest.parsing import Answer, Asked, InvalidAnswerError

NORM, GATE = site_of(landscape()), site_of(landscape("swiglu__4096x5632"))
GOOD = NORM.space.configs[3].params
POSSIBLE = ("rms_norm", "swiglu", "freezing", "max_autotune")


def read(*items: Any, **asked: Any) -> Answer:
    text = json.dumps({"suggestions": list(items)})
    return parsing.parse(text, model="m", asked=Asked(**{"possible": POSSIBLE, "sites": (NORM, GATE), **asked}))


def reason_of(item: Any, **asked: Any) -> str:
    """The reason why this item is not taken, beside one that is."""
    answer = read(item, suggestion_json("freezing"), **asked)
    assert [suggestion.action for suggestion in answer.suggestions] == ["freezing"]
    (rejected,) = answer.rejected
    assert len(rejected.detail) < 400
    return rejected.reason


def test_a_chosen_config_is_the_spaces_own_and_fills_the_seeds_fields():
    (suggestion,) = read(choice(NORM, GOOD)).suggestions
    assert suggestion.config is NORM.space.configs[3] or suggestion.config == NORM.space.configs[3]
    assert (suggestion.site, suggestion.template) == (NORM.key, "rms_norm")
    assert suggestion.block_size == GOOD["BLOCK_N"]
    assert suggestion.tile_shape == (GOOD["ROWS_PER_PROGRAM"], GOOD["BLOCK_N"])
    assert (suggestion.num_warps, suggestion.num_stages) == (GOOD["num_warps"], GOOD["num_stages"])


def test_rewrites_and_configs_stand_in_one_answer():
    answer = read(suggestion_json("max_autotune"), choice(NORM, GOOD), choice(GATE, GATE.space.configs[0].params))
    assert [suggestion.site for suggestion in answer.suggestions] == [None, NORM.key, GATE.key]


@pytest.mark.parametrize(
    "params",
    [
        {**GOOD, "BLOCK_N": 10**9},
        {**GOOD, "BLOCK_N": -1},
        {**GOOD, "BLOCK_N": 3000},
        {**GOOD, "num_warps": "8"},
        {**GOOD, "num_warps": 8.0},
        {**GOOD, "num_warps": True},
        {**GOOD, "num_warps": None},
        {**GOOD, "unroll": 4},
        {name: value for name, value in GOOD.items() if name != "num_warps"},
        {},
        None,
        [1, 2, 3, 4],
        "BLOCK_N=2048",
        {**GOOD, "BLOCK_N": 2**70},
    ],
    ids=str,
)
def test_params_that_are_no_valid_config_are_outside_the_space(params):
    assert reason_of(choice(NORM, params)) == "outside_space"


def test_a_point_of_the_grid_that_is_not_valid_is_outside_the_space():
    valid = {config.key() for config in NORM.space.configs}
    grid = {**GOOD, "ROWS_PER_PROGRAM": 16, "num_warps": 1}
    assert all(grid[name] in NORM.space.params[name] for name in grid)
    assert parsing.KernelConfig(template="rms_norm", params=grid).key() not in valid
    assert reason_of(choice(NORM, grid)) == "outside_space"


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (choice(NORM, GOOD, site="rms_norm/1x1/bfloat16"), "unknown_site"),
        (choice(NORM, GOOD, site=GATE.key), "unknown_site"),
        (choice(NORM, GOOD, site=7), "unknown_site"),
        ({**suggestion_json("max_autotune"), "site": NORM.key}, "unknown_site"),
        ({**suggestion_json("max_autotune"), "params": GOOD}, "unknown_site"),
        (choice(NORM, GOOD, action="cuda_graph"), "not_possible"),
        (choice(NORM, GOOD, action="conv9d"), "unknown_action"),
        (choice(NORM, GOOD, command="rm -rf /"), "unknown_key"),
        (choice(NORM, GOOD, expected_latency_ms=1e9), "bad_field"),
        (choice(NORM, GOOD, rationale=""), "bad_field"),
        ("rms_norm", "not_an_object"),
        (None, "not_an_object"),
    ],
    ids=str,
)
def test_each_slip_is_counted_by_its_own_name(item, reason):
    assert reason_of(item) == reason


def test_a_site_may_be_left_out_where_its_action_has_one_alone():
    (suggestion,) = read(choice(NORM, GOOD, site=None)).suggestions
    assert suggestion.site == NORM.key


def test_a_site_must_be_named_where_its_action_has_several():
    other = site_of(landscape("rms_norm__16384x4096"))
    assert reason_of(choice(NORM, GOOD, site=None), sites=(NORM, other)) == "unknown_site"


def test_what_was_proposed_or_measured_before_is_repeated():
    known = {(NORM.key, NORM.space.configs[3].key())}
    assert reason_of(choice(NORM, GOOD), known=known) == "repeated"


def test_a_site_takes_no_more_configs_than_were_asked_for():
    items = [choice(NORM, config.params) for config in NORM.space.configs[:5]]
    answer = read(*items, configs_per_site=3)
    assert len(answer.suggestions) == 3
    assert [(item.position, item.reason) for item in answer.rejected] == [(3, "over_limit"), (4, "over_limit")]


def test_an_answer_without_one_valid_choice_is_an_error_that_names_the_first():
    with pytest.raises(InvalidAnswerError, match=r"BLOCK_N=1000000000.*and 1 more") as caught:
        read(choice(NORM, {**GOOD, "BLOCK_N": 10**9}), choice(NORM, {**GOOD, "num_warps": 3}))
    assert caught.value.kind == "out_of_range"


def test_the_sent_schema_lists_what_each_parameter_may_be_and_nothing_else():
    item = answer_schema(POSSIBLE, (NORM, GATE))["properties"]["suggestions"]["items"]
    assert item["properties"]["site"]["anyOf"][0]["enum"] == [NORM.key, GATE.key]
    norm = item["properties"]["params"]["anyOf"][0]
    assert {name: tuple(p["enum"]) for name, p in norm["properties"].items()} == NORM.space.params
    assert set(item["required"]) == set(item["properties"])
    assert norm["additionalProperties"] is False


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
near_params = st.dictionaries(st.sampled_from([*GOOD, "x"]), values | st.sampled_from([1, 2, 4, 8, 1024, 2048]))


@given(st.lists(near_params | values, max_size=6))
@settings(max_examples=150, deadline=None)
def test_whatever_params_are_answered_every_taken_config_is_valid_and_the_counts_add_up(points):
    items = [choice(NORM, params) for params in points]
    try:
        answer = read(*items, suggestion_json("freezing"))
    except InvalidAnswerError:  # NaN spoils the document
        return
    assert all(s.config is None or s.config.key() in NORM.valid for s in answer.suggestions)
    assert len(answer.suggestions) + len(answer.rejected) == answer.num_proposed == len(points) + 1
