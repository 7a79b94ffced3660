"""The one redactor: everything that leaves the process passes it (files, logs, events, notebook output)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

REDACTED = "[redacted]"

_SECRET_NAME = re.compile(r"(?i)(api[-_]?key|secret|token|passw(or)?d|authorization|credential|private[-_]?key)$")
_SECRET_TEXT = re.compile(
    r"""(?x)
      \b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}            # OpenAI, Anthropic and Stripe style
    | \bgh[pousr]_[A-Za-z0-9]{20,}                 # GitHub
    | \bhf_[A-Za-z0-9]{20,}                        # Hugging Face
    | \bAKIA[0-9A-Z]{16}\b                         # AWS access key id
    | \beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}         # JWT
    | (?i:bearer)\s+[A-Za-z0-9._~+/=-]{8,}
    """
)
# One of these stands at the start of whatever `_SECRET_TEXT` matches; so does "bearer", in any case.
_SECRET_STARTS = (
    "sk-", "pk-", "rk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "hf_", "AKIA", "eyJ",
)  # fmt: skip
_SECRET_FLAG = re.compile(r"(?i)(--?[\w-]*(?:api-?key|token|secret|password)[=\s]+)([^\s\"'<>&\\,]+)")
_URL_USERINFO = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@")
_AFTER_SCHEME = re.compile(r"://[^/\s@]+@")
# Names whose values count tokens of text, not credentials.
_TOKEN_COUNTS = re.compile(r"(?i)(num|input|output|total|max|prompt|completion|cached?)_?tokens?$|^tokens?$")


def _environment_secrets() -> list[str]:
    named = (value for name, value in os.environ.items() if _SECRET_NAME.search(name))
    return sorted({value for value in named if len(value) >= 8}, key=len, reverse=True)


def redact_text(text: str) -> str:
    """Replace credentials in `text`: known shapes, secret flags, URL user info, and the values of secret
    environment variables. The home folder becomes `~`, so that no account name leaves either."""
    return _redacted_text(text, _environment_secrets(), str(Path.home()))


def redact_texts(texts: Iterable[str]) -> list[str]:
    """Redact texts that have nothing to do with each other, as `redact_text` does each."""
    secrets, home = _environment_secrets(), str(Path.home())
    return [_redacted_text(text, secrets, home) for text in texts]


def redact(value: Any) -> Any:
    """Redact a JSON-like value: mappings by key name as well as by text; other leaves pass unchanged."""
    # Read once: a record has a thousand strings, and the environment took four fifths of the time.
    return _redacted(value, _environment_secrets(), str(Path.home()))


def _redacted_text(text: str, secrets: list[str], home: str) -> str:
    for value in secrets:
        text = text.replace(value, REDACTED)
    text = _SECRET_FLAG.sub(rf"\1{REDACTED}", text)
    # Both patterns look at every character: 1.3 s for a report with Plotly in it, where these look-ups take 0.05 s.
    if "bearer" in text.lower() or any(_SECRET_TEXT.match(text, at) for at in _places(text, *_SECRET_STARTS)):
        text = _SECRET_TEXT.sub(REDACTED, text)
    if any(_AFTER_SCHEME.match(text, at) for at in _places(text, "://")):
        text = _URL_USERINFO.sub(rf"\1{REDACTED}@", text)
    if len(home) > 1 and home in text:
        text = re.sub(rf"(?<![\w/.-]){re.escape(home)}(?=/|$|\W)", "~", text)
    return text


def _places(text: str, *marks: str) -> Iterator[int]:
    for mark in marks:
        at = text.find(mark)
        while at >= 0:
            yield at
            at = text.find(mark, at + 1)


def _redacted(value: Any, secrets: list[str], home: str) -> Any:
    if isinstance(value, str):
        return _redacted_text(value, secrets, home)
    if isinstance(value, dict):
        return {
            key: REDACTED if _is_secret_entry(str(key), item) else _redacted(item, secrets, home)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return _redacted_sequence(value, secrets, home)
    return value


def _is_secret_entry(key: str, item: Any) -> bool:
    return isinstance(item, str) and bool(_SECRET_NAME.search(key)) and not _TOKEN_COUNTS.search(key)


def _redacted_sequence(items: list[Any] | tuple[Any, ...], secrets: list[str], home: str) -> list[Any]:
    redacted: list[Any] = []
    after_flag = False
    for item in items:
        redacted.append(REDACTED if after_flag and isinstance(item, str) else _redacted(item, secrets, home))
        # `--api-key VALUE` in an argv list: the value stands in the next element.
        after_flag = isinstance(item, str) and item.startswith("-") and bool(_SECRET_NAME.search(item))
    return redacted
