"""From a language model's text to suggestions, or one typed error: the answer is untrusted, so every door is closed."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any, Literal

from pydantic import ValidationError

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.base import first_problem
from agnitra_lab.contracts.suggestion import Suggestion
from agnitra_lab.errors import LLMAnswerError
from agnitra_lab.llm import strict_json
from agnitra_lab.redact import redact_text

MAX_ANSWER_CHARS = 65_536
MAX_RAW_CHARS = 4_000
MAX_SUGGESTIONS = 16
MAX_MODEL_CHARS = 100
SCHEMA_NAME = "agnitra_suggestions"

_KERNEL_FIELDS = ("block_size", "tile_shape", "unroll_factor", "num_warps", "num_stages")
_ASKED_FIELDS = ("action", *_KERNEL_FIELDS, "target_latency_ms", "expected_latency_ms", "rationale")
# Part of the seed's record, but facts about the answer: accepted, and replaced by what is known here.
_IGNORED_FIELDS = ("source", "raw_text")
# A value of the right type outside its range; every other problem is one of form.
_RANGE_PROBLEMS = frozenset(
    (
        "greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "literal_error",
        "value_error", "string_too_long", "int_parsing_size",
    )
)  # fmt: skip
_STRICT_KEYWORDS = frozenset(
    ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems")
)
_FENCE = re.compile(r"```(?:json)?[ \t]*\r?\n(?P<body>.*?)\r?\n?```", re.DOTALL | re.IGNORECASE)
_THINKING = "</think>"


class InvalidAnswerError(LLMAnswerError):
    """An answer that cannot be used.

    Attributes:
        kind: "malformed" (not the JSON that was asked for) or "out_of_range" (it is, with a value out of its range).
    """

    def __init__(self, message: str, *, kind: Literal["malformed", "out_of_range"], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


def answer_schema(actions: tuple[str, ...] = tuple(ACTIONS)) -> dict[str, Any]:
    """Return the JSON schema that the model is asked to follow: closed, every field required, null where none applies.

    The ranges are those of the contract, in the subset of JSON Schema that strict servers take.

    Args:
        actions: the actions that may be chosen.
    """
    contract = Suggestion.model_json_schema()["properties"]
    fields = {name: _for_strict_servers(contract[name]) for name in _ASKED_FIELDS}
    fields["action"] = {"type": "string", "enum": list(actions)}
    item = {"type": "object", "properties": fields, "required": list(_ASKED_FIELDS), "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"suggestions": {"type": "array", "items": item}},
        "required": ["suggestions"],
        "additionalProperties": False,
    }


def _for_strict_servers(schema: dict[str, Any]) -> dict[str, Any]:
    """Say the same without `prefixItems` and the keywords of text, which strict servers refuse."""
    kept = {name: value for name, value in schema.items() if name in _STRICT_KEYWORDS}
    if "anyOf" in schema:
        kept["anyOf"] = [_for_strict_servers(choice) for choice in schema["anyOf"]]
    if "prefixItems" in schema:
        kept["items"] = _for_strict_servers(schema["prefixItems"][0])
    return kept


def parse(text: str, *, model: str) -> list[Suggestion]:
    """Read a model's answer: a JSON object {"suggestions": [...]}, bare or in one ```json fence.

    Args:
        text: the answer, untrusted.
        model: who answered; becomes the source "llm:<model>".

    Returns:
        1 to MAX_SUGGESTIONS suggestions in the answer's order, each with the answer as redacted `raw_text`.

    Raises:
        InvalidAnswerError: anything else. One bad suggestion spoils the answer: nothing is clamped or dropped quietly.
    """
    try:
        document = strict_json.read(_unwrap(text), max_chars=MAX_ANSWER_CHARS)
    except LLMAnswerError as error:
        raise InvalidAnswerError(error.message, kind="malformed") from error
    items = _items(document)
    raw_text = redact_text(text)[:MAX_RAW_CHARS]
    source = f"llm:{_printable(model)[:MAX_MODEL_CHARS] or 'unnamed'}"
    return [_read_suggestion(index, item, source, raw_text) for index, item in enumerate(items)]


def _unwrap(text: str) -> str:
    """Take the document out of what models put around it: a reasoning block before, one code fence around."""
    body = text.strip().removeprefix("\ufeff")
    if body.startswith("<think>") and _THINKING in body:
        body = body.partition(_THINKING)[2].strip()
    if body.startswith("```"):
        fenced = _FENCE.fullmatch(body)
        return fenced["body"] if fenced else body
    return body


def _items(document: Any) -> list[Any]:
    if not isinstance(document, dict) or set(document) != {"suggestions"}:
        raise _malformed('The answer must be an object with the one key "suggestions".')
    items = document["suggestions"]
    if not isinstance(items, list) or not items:
        raise _malformed('"suggestions" must be a list with at least one suggestion.')
    if len(items) > MAX_SUGGESTIONS:
        raise InvalidAnswerError(
            f"The answer holds {len(items)} suggestions; at most {MAX_SUGGESTIONS} are read.", kind="out_of_range"
        )
    return items


def _read_suggestion(index: int, item: Any, source: str, raw_text: str) -> Suggestion:
    if not isinstance(item, dict):
        raise _malformed(f"Suggestion {index} is not an object.")
    unknown = sorted(set(item) - {*_ASKED_FIELDS, *_IGNORED_FIELDS})
    if unknown:
        raise _malformed(f"Suggestion {index} has unknown keys: {_quote(', '.join(unknown))}.")
    fields = {**dict.fromkeys(_KERNEL_FIELDS), **{name: item[name] for name in _ASKED_FIELDS if name in item}}
    if isinstance(fields.get("rationale"), str):
        fields["rationale"] = _printable(redact_text(fields["rationale"])).strip()
    try:
        # JSON mode: strictness that knows arrays for tuples, and nothing else that Python would let pass.
        return Suggestion.model_validate_json(json.dumps({**fields, "source": source, "raw_text": raw_text}))
    except ValidationError as error:
        problems = {problem["type"] for problem in error.errors(include_url=False, include_input=False)}
        raise InvalidAnswerError(
            f"Suggestion {index} is not valid: {_quote(first_problem(error))}.",
            kind="out_of_range" if problems <= _RANGE_PROBLEMS else "malformed",
        ) from None


def _malformed(message: str) -> InvalidAnswerError:
    return InvalidAnswerError(message, kind="malformed")


def _quote(text: str) -> str:
    """Return untrusted text as one bounded, printable line."""
    line = _printable(redact_text(text))
    return line if len(line) <= 200 else line[:197] + "..."


def _printable(text: str) -> str:
    """Drop control and format characters: terminal escapes and right-to-left overrides end up on somebody's screen."""
    spaced = re.sub(r"\s+", " ", text)
    return "".join(character for character in spaced if unicodedata.category(character)[0] != "C")
