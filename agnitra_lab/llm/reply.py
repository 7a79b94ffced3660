"""What asking a language model gives, and the one method that everything able to answer has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Message = Mapping[str, str]
"""One chat message: `role` and `content`."""


ReplySource = Literal["server", "cache", "recording"]


@dataclass(frozen=True)
class Reply:
    """One answer, as the server gave it.

    Attributes:
        text: the message's content, untrusted.
        model: the model that the server says answered, else the one that was asked for.
        wall_ms: host time from the question to the last byte of the answer.
        input_tokens: as the server counts them, None when it does not say.
        output_tokens: as the server counts them, None when it does not say.
        source: "server" (asked now, and paid for), "cache" or "recording".
    """

    text: str
    model: str
    wall_ms: float
    input_tokens: int | None = None
    output_tokens: int | None = None
    source: ReplySource = "server"


class LanguageModel(Protocol):
    """Something that answers: `ChatClient` over HTTP, `RecordedClient` from recorded replies, `CachedClient` and
    `RecordingClient` around another one."""

    def complete(self, messages: Sequence[Message], *, schema_name: str, json_schema: Mapping[str, Any]) -> Reply:
        """Answer `messages` with a JSON document of `json_schema`, or raise an LLMError."""
        ...
