"""What OpenAI-compatible servers differ in: kinds of structured output, and the name of the limit on output tokens.

OpenAI, vLLM and Ollama take a JSON schema; older servers and some proxies only "any JSON object", or nothing of the
kind, and say so with HTTP 400 or 422. OpenAI calls the limit `max_completion_tokens`, older servers `max_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

FORMATS = ("json_schema", "json_object", "text")
LIMIT_NAMES = ("max_completion_tokens", "max_tokens")


@dataclass(frozen=True)
class Dialect:
    """One way of asking.

    Attributes:
        answer_format: one of FORMATS; "text" sends no `response_format` at all.
        limit_name: one of LIMIT_NAMES.
    """

    answer_format: str = FORMATS[0]
    limit_name: str = LIMIT_NAMES[0]

    def options(self, schema: Mapping[str, Any], max_output_tokens: int | None) -> dict[str, Any]:
        """Return the fields of a request beside model and messages."""
        options: dict[str, Any] = {}
        if self.answer_format == "json_schema":
            options["response_format"] = {"type": "json_schema", "json_schema": dict(schema)}
        elif self.answer_format == "json_object":
            options["response_format"] = {"type": "json_object"}
        if max_output_tokens is not None:
            options[self.limit_name] = max_output_tokens
        return options

    def simpler(self, complaint: str) -> Dialect | None:
        """Return what to try after a refusal, None when nothing simpler is left.

        Args:
            complaint: the server's message; a named limit is taken at its word, everything else is taken for the
                format, which no two servers refuse in the same words.
        """
        if self.limit_name in complaint and self.limit_name != LIMIT_NAMES[-1]:
            return replace(self, limit_name=LIMIT_NAMES[-1])
        position = FORMATS.index(self.answer_format)
        return replace(self, answer_format=FORMATS[position + 1]) if position + 1 < len(FORMATS) else None
