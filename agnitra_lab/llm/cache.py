"""Replies kept on disk: the same question to the same model at the same origin is asked, and paid for, once.

    <folder>/<key>.json    one reply; the key is a digest of model, origin, messages and schema

A question's text is not kept. A file that cannot be read is set aside under its own name with `.unreadable` behind it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from agnitra_lab.contracts.base import Contract, Count
from agnitra_lab.errors import LLMAnswerError, UsageError
from agnitra_lab.llm import strict_json
from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.exchange import MAX_BODY_BYTES
from agnitra_lab.llm.files import write_document
from agnitra_lab.llm.questions import prompt_sha256, reply_key
from agnitra_lab.llm.reply import Message, Reply

FOLDER_VARIABLE = "AGNITRA_CACHE_DIR"
MAX_REPLIES = 1_000


class CachedReply(Contract):
    """One reply as it lies on disk."""

    schema_version: Literal["agnitra.reply.v1"] = "agnitra.reply.v1"
    key: str
    asked_model: str
    origin: str
    prompt_sha256: str
    text: Annotated[str, Field(min_length=1, max_length=MAX_BODY_BYTES)]
    model: str
    input_tokens: Count | None = None
    output_tokens: Count | None = None


def default_folder() -> Path:
    """Return the folder of cached replies: below AGNITRA_CACHE_DIR, else below the cache folder of the platform."""
    given = os.environ.get(FOLDER_VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(given) if given else cache / "agnitra_lab") / "replies"


class CachedClient:
    """Answers from the folder where it can, else asks and keeps the reply.

    Attributes:
        num_hits: questions that were answered from the folder.
        num_unreadable: files that were set aside.
    """

    def __init__(self, client: ChatClient, folder: str | Path | None = None) -> None:
        self.settings = client.settings
        self.num_hits = 0
        self.num_unreadable = 0
        self._client = client
        self._folder = default_folder() if folder is None else Path(folder)

    def complete(self, messages: Sequence[Message], *, schema_name: str, json_schema: Mapping[str, Any]) -> Reply:
        """Answer like the client inside, from the folder where the question was asked before.

        A reply that is no JSON document is not kept: the next run may be luckier. A folder that cannot be written
        costs the next run its question, and nothing else.
        """
        started_s = time.perf_counter()
        prompt = prompt_sha256(messages, json_schema)
        key = reply_key(model=self.settings.model, origin=self.settings.origin, prompt=prompt)
        kept = self._read(key)
        if kept is not None:
            self.num_hits += 1
            wall_ms = max((time.perf_counter() - started_s) * 1e3, 1e-6)
            return Reply(kept.text, kept.model, wall_ms, kept.input_tokens, kept.output_tokens, source="cache")
        reply = self._client.complete(messages, schema_name=schema_name, json_schema=json_schema)
        if _is_document(reply.text):
            self._keep(key, prompt, reply)
        return reply

    def _read(self, key: str) -> CachedReply | None:
        path = self._path(key)
        try:
            kept = CachedReply.from_json(path.read_bytes())
        except OSError:
            return None
        except UsageError:
            kept = None
        if kept is None or kept.key != key or not _is_document(kept.text):
            self.num_unreadable += 1
            with contextlib.suppress(OSError):
                path.replace(path.with_name(path.name + ".unreadable"))
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return kept

    def _keep(self, key: str, prompt: str, reply: Reply) -> None:
        kept = CachedReply(
            key=key, asked_model=self.settings.model, origin=self.settings.origin, prompt_sha256=prompt,
            text=reply.text, model=reply.model, input_tokens=reply.input_tokens, output_tokens=reply.output_tokens,
        )  # fmt: skip
        with contextlib.suppress(OSError):
            write_document(self._path(key), kept.model_dump(mode="json"))
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        kept = list(self._folder.glob("*.json"))
        if len(kept) <= MAX_REPLIES:
            return
        used: dict[Path, float] = {}
        for path in kept:
            with contextlib.suppress(OSError):
                used[path] = path.stat().st_mtime
        for path in sorted(used, key=lambda item: used[item])[: len(kept) - MAX_REPLIES]:
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"


def _is_document(text: str) -> bool:
    try:
        return isinstance(strict_json.read(strict_json.unwrap(text), max_chars=MAX_BODY_BYTES), dict)
    except LLMAnswerError:
        return False
