"""Names of questions: a digest that says whether two were the same, and keeps nothing of what was asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from agnitra_lab.llm.reply import Message


def prompt_sha256(messages: Sequence[Message], json_schema: Mapping[str, Any]) -> str:
    """Return the sha256, hex, of the messages and the schema that the answer was asked to follow."""
    question = [[dict(message) for message in messages], dict(json_schema)]
    return hashlib.sha256(_canonical(question)).hexdigest()


def reply_key(*, model: str, origin: str, prompt: str) -> str:
    """Return the name under which a reply is cached.

    Args:
        model: the model that was asked for.
        origin: scheme, host and port of the server.
        prompt: its `prompt_sha256`.
    """
    return hashlib.sha256(_canonical([model, origin, prompt])).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
