"""One HTTP exchange with an OpenAI-compatible server: bounded in bytes, followed nowhere, reported without the key."""

from __future__ import annotations

import importlib
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agnitra_lab.errors import LLMAnswerError, LLMError, LLMRefusalError, LLMTimeoutError
from agnitra_lab.llm.deadline import Connection
from agnitra_lab.llm.reply import Message
from agnitra_lab.llm.retrying import retry_after_s
from agnitra_lab.llm.settings import NO_KEY, LLMSettings
from agnitra_lab.optional import require

MAX_BODY_BYTES = 1 << 20
MAX_ERROR_BODY_BYTES = 1 << 14


@dataclass(frozen=True)
class HttpAnswer:
    """Status and body of one response; an error's body is cut at MAX_ERROR_BODY_BYTES.

    Attributes:
        retry_after_s: how long the server asks to wait before the next request, None when it does not say.
    """

    status: int
    body: bytes
    retry_after_s: float | None = None


class Exchange:
    """One request and its response, over a connection that can be cut from another thread."""

    def __init__(self, settings: LLMSettings, *, read_timeout_s: float) -> None:
        self.connection = Connection()
        self._settings = settings
        self._read_timeout_s = read_timeout_s
        self._declined: HttpAnswer | None = None

    def post(self, messages: Sequence[Message], options: Mapping[str, Any]) -> HttpAnswer:
        """Send one chat completion request and read its response.

        Args:
            messages: the conversation.
            options: further fields of the request, such as `response_format`.

        Raises:
            MissingError: the openai package is not installed.
            LLMTimeoutError: the server was silent for `read_timeout_s`.
            LLMRefusalError: no connection, or one that broke.
            LLMAnswerError: a body over MAX_BODY_BYTES, or compressed.
        """
        openai = require("openai", purpose="to ask a language model")
        # openai 3 is built on httpx2 and openai 2 on httpx: take the one that its own client class comes from.
        transport = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
        question: dict[str, Any] = {"model": self._settings.model, "messages": [dict(item) for item in messages]}
        question |= options
        try:
            with (
                self._http_client(openai) as http_client,
                self._api_client(openai, http_client).chat.completions.with_streaming_response.create(
                    **question
                ) as response,
            ):
                return HttpAnswer(response.status_code, _read_body(response.http_response))
        except LLMError:
            raise
        except (openai.OpenAIError, transport.HTTPError, transport.StreamError, ssl.SSLError, OSError) as error:
            if self._declined is not None:
                return self._declined
            raise self._broken(error, (openai.APITimeoutError, transport.TimeoutException)) from None

    def _http_client(self, openai: Any) -> Any:
        return openai.DefaultHttpxClient(
            follow_redirects=False,
            timeout=max(self._read_timeout_s, 0.001),
            # A proxy of the environment sees a plain http request with its key; through https it sees a tunnel.
            trust_env=self._settings.base_url.startswith("https:"),
            event_hooks={"request": [self._watch], "response": [self._stop_unless_ok]},
        )

    def _api_client(self, openai: Any, http_client: Any) -> Any:
        client = openai.OpenAI(
            api_key=self._settings.api_key or NO_KEY,
            base_url=self._settings.base_url,
            max_retries=0,
            http_client=http_client,
            default_headers={"Accept-Encoding": "identity"},
        )
        # Read from OPENAI_ORG_ID and OPENAI_PROJECT_ID for whatever server is asked: identity for another origin.
        client.organization = client.project = None
        return client

    def _watch(self, request: Any) -> None:
        request.extensions = {**request.extensions, "trace": self.connection.trace}

    def _stop_unless_ok(self, response: Any) -> None:
        """Keep a response that is no answer (redirects too), before the client reads its body without a bound."""
        if response.status_code == 200:
            return
        wait_s = retry_after_s(response.headers.get("retry-after"))
        self._declined = HttpAnswer(response.status_code, _first_bytes(response, MAX_ERROR_BODY_BYTES), wait_s)
        raise ConnectionAbortedError(f"HTTP {response.status_code}")

    def _broken(self, error: Exception, timeouts: tuple[type[Exception], ...]) -> LLMError:
        if isinstance(error, timeouts):
            return LLMTimeoutError(f"{self._settings.origin} was silent for {self._read_timeout_s:.3g} s.")
        cause = error.__cause__ or error
        return LLMRefusalError(f"No answer from {self._settings.origin}: {type(cause).__name__} ({cause}).")


def _read_body(response: Any) -> bytes:
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        # A compressed megabyte can hold a gigabyte; none was asked for.
        raise LLMAnswerError("The server compressed its answer, which was not asked for.")
    body = _first_bytes(response, MAX_BODY_BYTES + 1)
    if len(body) > MAX_BODY_BYTES:
        raise LLMAnswerError(f"The answer is larger than {MAX_BODY_BYTES} bytes.")
    return body


def _first_bytes(response: Any, max_bytes: int) -> bytes:
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) >= max_bytes:
            break
    return bytes(body[:max_bytes])
