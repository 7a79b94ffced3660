"""JSON as a closed format: what Python's parser lets pass (NaN, repeated keys, endless nesting) is an error here."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from agnitra_lab.errors import LLMAnswerError

MAX_DEPTH = 32

_FENCE = re.compile(r"```(?:json)?[ \t]*\r?\n(?P<body>.*?)\r?\n?```", re.DOTALL | re.IGNORECASE)
_THINKING = "</think>"


def unwrap(text: str) -> str:
    """Take the document out of what models put around it: a reasoning block before, one code fence around."""
    body = text.strip().removeprefix("\ufeff")
    if body.startswith("<think>") and _THINKING in body:
        body = body.partition(_THINKING)[2].strip()
    if body.startswith("```"):
        fenced = _FENCE.fullmatch(body)
        return fenced["body"] if fenced else body
    return body


def read(text: str | bytes, *, max_chars: int, max_depth: int = MAX_DEPTH) -> Any:
    """Parse untrusted JSON text.

    Args:
        text: the document; bytes are UTF-8.
        max_chars: longest document that is read.
        max_depth: deepest nesting of arrays and objects that is accepted.

    Raises:
        LLMAnswerError: not UTF-8, too long, not JSON, NaN or Infinity, a repeated key, a lone surrogate, too deep.
    """
    if not text.strip():
        raise LLMAnswerError("The answer is empty; a JSON document was expected.")
    if len(text) > max_chars:
        raise LLMAnswerError(f"The answer has {len(text)} characters; at most {max_chars} are read.")
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise LLMAnswerError(f"The answer nests deeper than {max_depth} levels.") from error
    except ValueError as error:  # covers JSONDecodeError, UnicodeDecodeError and integers of over 4300 digits
        raise LLMAnswerError(f"The answer is not a JSON document: {_brief(error)}.") from error
    _check_tree(value, max_depth)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        raise ValueError("an object names one key twice")
    return items


def _check_tree(value: Any, max_depth: int) -> None:
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if depth > max_depth and isinstance(item, (dict, list)):
            raise LLMAnswerError(f"The answer nests deeper than {max_depth} levels.")
        if isinstance(item, str):
            _check_encodable(item)
        elif isinstance(item, list):
            pending.extend((child, depth + 1) for child in item)
        elif isinstance(item, dict):
            for key in item:
                _check_encodable(key)
            pending.extend((child, depth + 1) for child in item.values())


def _check_encodable(text: str) -> None:
    # A lone surrogate parses, and fails much later: when the artifact that quotes it is written.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LLMAnswerError("The answer holds text that is not Unicode (a lone surrogate).") from error


def _brief(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({error.reason} at byte {error.start})"
    return str(error)[:120]
