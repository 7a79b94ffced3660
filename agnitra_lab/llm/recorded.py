"""Recorded replies: `RecordingClient` writes what a model answered, `RecordedClient` answers from it, so that tests
and tutorials run the real path without a server.

A recording is one JSON file: {"schema_version", "model", "origin", "replies": [{"prompt_sha256", "text", ...}]}. Its
short form, for writing by hand, is {"model", "replies"} with texts or the JSON objects that they are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from agnitra_lab.contracts.base import Contract, Count, NonNegative
from agnitra_lab.errors import LLMRefusalError, UsageError
from agnitra_lab.llm.files import write_document
from agnitra_lab.llm.questions import prompt_sha256
from agnitra_lab.llm.reply import LanguageModel, Message, Reply


class RecordedReply(Contract):
    """One answer of a recording. The question is there as a digest alone."""

    text: str
    model: str
    prompt_sha256: str | None = None
    wall_ms: NonNegative = 0.0
    input_tokens: Count | None = None
    output_tokens: Count | None = None


class Recording(Contract):
    """A conversation's replies, in order."""

    schema_version: Literal["agnitra.replies.v1"] = "agnitra.replies.v1"
    model: str
    origin: str | None = None
    replies: tuple[RecordedReply, ...]


class RecordedClient:
    """Gives its replies in order, one a question, whatever is asked.

    Attributes:
        model: the name that the replies carry; says that they are recorded.
        questions: the messages of every call, in order.
        num_drifted: questions that were not the ones recorded: the measured figures in a prompt differ each time.
    """

    def __init__(self, replies: Sequence[str | Mapping[str, Any]], *, model: str = "recorded") -> None:
        """Take the replies: the answer's text, or the JSON object that it is."""
        self.model = model
        self.questions: list[list[dict[str, str]]] = []
        self.num_drifted = 0
        texts = [reply if isinstance(reply, str) else json.dumps(reply) for reply in replies]
        self._replies = [RecordedReply(text=text, model=model) for text in texts]

    @classmethod
    def from_file(cls, path: str | Path) -> RecordedClient:
        """Read a recording, in its long or its short form.

        Raises:
            UsageError: the file cannot be read or is no such object.
        """
        name = Path(path).name
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"The recording {name} cannot be read: {error}.") from error
        if isinstance(document, dict) and "schema_version" in document:
            return cls._from_recording(name, document)
        replies = document.get("replies") if isinstance(document, dict) else None
        if not isinstance(replies, list) or not all(isinstance(reply, (str, dict)) for reply in replies):
            raise UsageError(
                f"The recording {name} has no list of replies.", hint='Expected {"model": ..., "replies": [...]}'
            )
        model = document.get("model", "recorded")
        return cls(replies, model=model if isinstance(model, str) else "recorded")

    @classmethod
    def _from_recording(cls, name: str, document: dict[str, Any]) -> RecordedClient:
        try:
            recording = Recording.from_json(json.dumps(document))
        except UsageError as error:
            raise UsageError(f"The recording {name} cannot be read: {error.message}") from error
        # Whoever reads the name shall see that nobody was asked.
        model = recording.model if recording.model.startswith("recorded") else f"recorded:{recording.model}"
        client = cls((), model=model)
        client._replies = list(recording.replies)
        return client

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
        reply = self._replies[index]
        if reply.prompt_sha256 is not None and reply.prompt_sha256 != prompt_sha256(messages, json_schema):
            self.num_drifted += 1
        wall_ms = max((time.perf_counter() - started_s) * 1e3, 1e-6)
        return Reply(reply.text, self.model, wall_ms, reply.input_tokens, reply.output_tokens, source="recording")


class RecordingClient:
    """Passes every question on and writes the replies down: the whole file after each, redacted."""

    def __init__(self, client: LanguageModel, path: str | Path, *, model: str, origin: str | None = None) -> None:
        """Begin a recording.

        Args:
            client: who answers.
            path: the file to write; one that exists is begun anew.
            model: the model that is asked, for the file's head.
            origin: the server, for the file's head.
        """
        self._client = client
        self._path = Path(path)
        self._recording = Recording(model=model, origin=origin, replies=())

    def complete(self, messages: Sequence[Message], *, schema_name: str, json_schema: Mapping[str, Any]) -> Reply:
        """Ask, write the reply down, and return it.

        Raises:
            LLMError: whatever the client raises; what failed is not recorded.
            UsageError: the file cannot be written.
        """
        reply = self._client.complete(messages, schema_name=schema_name, json_schema=json_schema)
        entry = RecordedReply(
            text=reply.text, model=reply.model, prompt_sha256=prompt_sha256(messages, json_schema),
            wall_ms=round(reply.wall_ms, 3), input_tokens=reply.input_tokens, output_tokens=reply.output_tokens,
        )  # fmt: skip
        self._recording = self._recording.model_copy(update={"replies": (*self._recording.replies, entry)})
        try:
            write_document(self._path, self._recording.model_dump(mode="json"))
        except OSError as error:
            raise UsageError(f"The recording {self._path.name} cannot be written: {error.strerror}.") from error
        return reply
