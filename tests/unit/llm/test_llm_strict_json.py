"""Strict JSON: what is read is what `json` reads, less what no JSON document may hold."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.errors import LLMAnswerError
from agnitra_lab.llm import strict_json

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=15,
)


@given(documents)
@settings(deadline=None)
def test_reading_what_was_written_gives_it_back(document):
    text = json.dumps(document)
    assert strict_json.read(text, max_chars=10**6) == document
    assert strict_json.read(text.encode(), max_chars=10**6) == document


@given(st.binary(max_size=100) | st.text(max_size=100))
@settings(deadline=None)
def test_anything_is_read_or_gives_the_typed_error(text):
    try:
        strict_json.read(text, max_chars=50, max_depth=4)
    except LLMAnswerError as error:
        assert len(str(error)) < 300


@pytest.mark.parametrize(
    "text",
    ["", " \n", "NaN", "[Infinity]", '{"a": -Infinity}', '{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', b"\xff", "[1,]",
     '"\\ud800"', '{"\\udfff": 1}', "1" * 5000, "{'a': 1}", "\ufeff{}"],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_what_no_json_document_may_hold_is_refused(text):
    with pytest.raises(LLMAnswerError):
        strict_json.read(text, max_chars=10**6)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_is_read_to_its_limit_and_no_further(opening, closing):
    def nested(depth: int) -> str:
        return opening * (depth - 1) + "[]" + closing * (depth - 1)

    strict_json.read(nested(8), max_chars=10**6, max_depth=8)
    for depth in (9, 5_000, 200_000):
        with pytest.raises(LLMAnswerError, match="deeper than 8"):
            strict_json.read(nested(depth), max_chars=10**7, max_depth=8)


def test_length_is_read_to_its_limit_and_no_further():
    strict_json.read('"' + "x" * 8 + '"', max_chars=10)
    with pytest.raises(LLMAnswerError, match="at most 10"):
        strict_json.read('"' + "x" * 9 + '"', max_chars=10)
