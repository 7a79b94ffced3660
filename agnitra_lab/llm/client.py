"""The chat client: one question, one answer, one total deadline, and typed errors that never hold the key."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from agnitra_lab.errors import LLMAnswerError, LLMError, LLMRefusalError
from agnitra_lab.llm import strict_json
from agnitra_lab.llm.deadline import Deadline, run_within
from agnitra_lab.llm.dialect import Dialect
from agnitra_lab.llm.exchange import MAX_BODY_BYTES, Exchange, HttpAnswer
from agnitra_lab.llm.reply import Message, Reply
from agnitra_lab.llm.retrying import wait_before_repeat_s
from agnitra_lab.llm.settings import LLMSettings
from agnitra_lab.optional import require
from agnitra_lab.redact import REDACTED, redact_text

MAX_DETAIL_CHARS = 300

_HINTS = {
    401: "Check the API key.",
    403: "Check the API key and what it may use.",
    404: "Check the base URL and the model name (AGNITRA_LLM_BASE_URL, AGNITRA_LLM_MODEL).",
    429: "The server is over its rate or quota.",
}


class ChatClient:
    """Asks an OpenAI-compatible server. Holds no connection between calls and is safe to share between threads.

    What a server was found to accept (its kind of structured output, its name for the token limit) is remembered, so
    that only the first question of a conversation pays for finding it out.
    """

    def __init__(self, settings: LLMSettings) -> None:
        self.settings = settings
        self._dialect = Dialect()

    def complete(self, messages: Sequence[Message], *, schema_name: str, json_schema: Mapping[str, Any]) -> Reply:
        """Ask once and return the answer's text.

        A server that refuses the JSON schema (HTTP 400 or 422) is asked for any JSON object, then without
        `response_format`; one that is over its rate or fails in passing is asked again after the time that it names.
        All of it lies inside the one deadline.

        Args:
            messages: the conversation, in order.
            schema_name: what the server calls the schema.
            json_schema: the schema that the answer is asked to follow; nothing here relies on its being followed.

        Raises:
            LLMTimeoutError: no complete answer within `settings.deadline_s` in total.
            LLMRefusalError: no connection, an HTTP status other than 200, a refusal, a filter, no choice; or a key that
                plain http would carry over a public network.
            LLMAnswerError: a body that is no chat completion, or larger than 1 MiB.
            MissingError: the openai package is not installed.
        """
        if self.settings.is_key_exposed:
            raise LLMRefusalError(
                f"The API key would cross the network to {self.settings.origin} in the clear; nothing was sent.",
                hint="Use https, or leave the key out.",
            )
        # Its import takes a second or two, once: not the server's time.
        require("openai", purpose="to ask a language model")
        deadline = Deadline(self.settings.deadline_s)
        schema = {"name": schema_name, "schema": dict(json_schema), "strict": True}
        try:
            answer = self._answer(messages, schema, deadline)
            if answer.status != 200:
                raise _declined(answer)
            return self._reply(answer, deadline)
        except LLMError as error:
            raise type(error)(self._public(error.message), hint=error.hint) from None

    def _answer(self, messages: Sequence[Message], schema: Mapping[str, Any], deadline: Deadline) -> HttpAnswer:
        """Ask in the dialect that is known, and step down from what the server refuses."""
        dialect = self._dialect
        while True:
            answer = self._post(messages, dialect.options(schema, self.settings.max_output_tokens), deadline)
            simpler = dialect.simpler(_error_message(answer.body) or "") if answer.status in (400, 422) else None
            if simpler is None:
                break
            dialect = simpler
        if answer.status == 200:
            self._dialect = dialect
        return answer

    def _post(self, messages: Sequence[Message], options: Mapping[str, Any], deadline: Deadline) -> HttpAnswer:
        num_repeats = 0
        while True:
            if deadline.remaining_s <= 0:
                raise deadline.expired()
            exchange = Exchange(self.settings, read_timeout_s=deadline.remaining_s)
            post = partial(exchange.post, messages, options)
            answer = run_within(deadline, post, cut=exchange.connection.cut)
            wait_s = wait_before_repeat_s(answer.status, answer.retry_after_s, num_repeats)
            if wait_s is None or wait_s >= deadline.remaining_s:
                return answer
            time.sleep(wait_s)
            num_repeats += 1

    def _reply(self, answer: HttpAnswer, deadline: Deadline) -> Reply:
        completion = strict_json.read(answer.body, max_chars=MAX_BODY_BYTES, max_depth=64)
        if not isinstance(completion, dict):
            raise LLMAnswerError("The answer is JSON and no chat completion (an object was expected).")
        usage = completion.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        model = completion.get("model")
        return Reply(
            text=self._without_key(_content(completion)),
            model=self._public(model) if isinstance(model, str) and model else self.settings.model,
            wall_ms=deadline.elapsed_ms,
            input_tokens=_token_count(usage.get("prompt_tokens")),
            output_tokens=_token_count(usage.get("completion_tokens")),
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self.settings.api_key, REDACTED) if self.settings.api_key else text

    def _public(self, text: str) -> str:
        """Return `text` without the key (a server may echo it), on one line and bounded."""
        text = " ".join(redact_text(self._without_key(text)).split())
        text = "".join(character for character in text if character.isprintable())
        return text if len(text) <= MAX_DETAIL_CHARS else text[: MAX_DETAIL_CHARS - 3] + "..."


def _declined(answer: HttpAnswer) -> LLMRefusalError:
    if 300 <= answer.status < 400:
        return LLMRefusalError(
            f"The server redirects (HTTP {answer.status}); redirects are not followed, so that the key stays with "
            "its origin.",
            hint="Give the address that it redirects to as the base URL.",
        )
    said = _error_message(answer.body)
    hint = _HINTS.get(answer.status)
    if answer.retry_after_s is not None:
        hint = f"{hint or 'The server is busy.'} It asks to wait {answer.retry_after_s:.3g} s, past this deadline."
    return LLMRefusalError(f"The server answered HTTP {answer.status}{': ' + said if said else ''}.", hint=hint)


def _error_message(body: bytes) -> str | None:
    """Return the message of an OpenAI-style error body, if it is one. An HTML error page says nothing to a reader."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message.strip().rstrip(".") if isinstance(message, str) else None


def _content(completion: dict[str, Any]) -> str:
    if completion.get("error"):
        said = _error_message(json.dumps({"error": completion["error"]}).encode())
        raise LLMRefusalError(f"The server answered with an error: {said or 'no message'}.")
    choices = completion.get("choices")
    if not isinstance(choices, list):
        raise LLMAnswerError("The answer is JSON and no chat completion (it has no list of choices).")
    if not choices:
        raise LLMRefusalError("The server answered with an empty list of choices.")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise LLMAnswerError("The answer's first choice has no message.")
    if message.get("refusal"):
        raise LLMRefusalError(f"The model refused: {message['refusal']}")
    if choice.get("finish_reason") == "content_filter":
        raise LLMRefusalError("The server's content filter withheld the answer.")
    if choice.get("finish_reason") == "length":
        raise LLMAnswerError("The model reached its token limit before the end of its answer.")
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise LLMAnswerError("The model's message is empty.")
    return content


def _token_count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
