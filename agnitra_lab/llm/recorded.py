"""A language model that answers from recorded replies: tests and tutorials run the real path without a server."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agnitra_lab.errors import LLMRefusalError, UsageError
from agnitra_lab.llm.reply import Message, Reply


class RecordedClient:
    """Gives its replies in order, one a question, whatever is asked.

    Attributes:
        model: the name that the replies carry; says that they are recorded.
        questions: the messages of every call, in order.
    """

    def __init__(self, replies: Sequence[str | Mapping[str, Any]], *, model: str = "recorded") -> None:
        """Take the replies: the answer's text, or the JSON object that it is."""
        self.model = model
        self.questions: list[list[dict[str, str]]] = []
        self._replies = [reply if isinstance(reply, str) else json.dumps(reply) for reply in replies]

    @classmethod
    def from_file(cls, path: str | Path) -> RecordedClient:
        """Read a recording: a JSON object with `model` (a string) and `replies` (a list of strings or objects).

        Raises:
            UsageError: the file cannot be read or is no such object.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"The recording {Path(path).name} cannot be read: {error}.") from error
        replies = document.get("replies") if isinstance(document, dict) else None
        if not isinstance(replies, list) or not all(isinstance(reply, (str, dict)) for reply in replies):
            raise UsageError(
                f"The recording {Path(path).name} has no list of replies.",
                hint='Expected {"model": ..., "replies": [...]}',
            )
        model = document.get("model", "recorded")
        return cls(replies, model=model if isinstance(model, str) else "recorded")

    def complete(self, messages: Sequence[Message], *, schema_name: str, json_schema: Mapping[str, Any]) -> Reply:
        """Return the next reply.

        Raises:
            LLMRefusalError: every reply was given.
        """
        started_s = time.perf_counter()
        index = len(self.questions)
        self.questions.append([dict(message) for message in messages])
        if index >= len(self._replies):
            raise LLMRefusalError(f"The recording holds {len(self._replies)} replies; this is question {index + 1}.")
        wall_ms = (time.perf_counter() - started_s) * 1e3
        return Reply(text=self._replies[index], model=self.model, wall_ms=wall_ms)
