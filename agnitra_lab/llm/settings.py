"""Which server to ask, and the rule that a key goes only to the origin that it was given for."""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from agnitra_lab.errors import UsageError

OPENAI_BASE_URL = "https://api.openai.com/v1"
DEFAULT_MODEL = "gpt-4o-mini"
DEFAULT_DEADLINE_S = 20.0
NO_KEY = "not-needed"
"""Sent where no key is known: local servers want the header and ignore its value."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class LLMSettings:
    """One language-model server and how long to wait for it.

    Attributes:
        base_url: the server's API root, such as "http://localhost:11434/v1".
        api_key: the key for this origin; None for servers that need none. Not part of the repr.
        model: the model's name on that server.
        deadline_s: total time for one answer, from the question to the last byte.
        max_output_tokens: limit that the server is given; None leaves it to the server.
    """

    base_url: str
    api_key: str | None = field(repr=False)
    model: str
    deadline_s: float = DEFAULT_DEADLINE_S
    max_output_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise UsageError(f"max_output_tokens is {self.max_output_tokens}; expected at least 1.")
        if not (math.isfinite(self.deadline_s) and 0 < self.deadline_s <= 3600):
            raise UsageError(f"deadline_s is {self.deadline_s}; expected seconds above 0 and at most 3600.")
        _split(self.base_url)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UsageError("The language model's API key holds characters that no HTTP header can carry.")

    @property
    def origin(self) -> str:
        """Scheme, host and port: what a key is bound to."""
        return _origin(self.base_url)

    @property
    def is_key_exposed(self) -> bool:
        """Whether the key would cross a public network in the clear; such a question is not asked."""
        parts = _split(self.base_url)
        return self.api_key is not None and parts.scheme == "http" and not _is_nearby(parts.hostname or "")


@dataclass(frozen=True)
class _Configured:
    """One server as one family of environment variables names it."""

    base_url: str
    api_key: str | None = field(repr=False)
    model: str | None


def resolve(
    base_url: str | None = None,
    api_key: str | None = None,
    model: str | None = None,
    deadline_s: float | None = None,
    max_output_tokens: int | None = None,
    env: Mapping[str, str] | None = None,
) -> LLMSettings | None:
    """Find the server to ask: from the call, else AGNITRA_LLM_*, else OPENAI_*.

    A key of the environment is used only with the origin that its own family names (AGNITRA_LLM_API_KEY with
    AGNITRA_LLM_BASE_URL; OPENAI_API_KEY with OPENAI_BASE_URL, by default api.openai.com).

    Args:
        base_url: API root of an OpenAI-compatible server.
        api_key: key for it.
        model: model name; else AGNITRA_LLM_MODEL, else OPENAI_MODEL, else DEFAULT_MODEL.
        deadline_s: total seconds for one answer.
        max_output_tokens: limit on one answer's tokens, None for the server's own.
        env: the environment, os.environ when None.

    Returns:
        The settings, or None when neither the call nor the environment names a server or a usable key.

    Raises:
        UsageError: a URL that is not http(s) or carries a password, a key that cannot be a header, a deadline out of
            range.
    """
    env = os.environ if env is None else env
    configured = _from_environment(env)
    chosen = _choose(_clean(base_url), _clean(api_key), configured)
    if chosen is None:
        return None
    return LLMSettings(
        base_url=chosen.base_url,
        api_key=chosen.api_key,
        model=_clean(model) or _clean(env.get("AGNITRA_LLM_MODEL")) or chosen.model or DEFAULT_MODEL,
        deadline_s=DEFAULT_DEADLINE_S if deadline_s is None else float(deadline_s),
        max_output_tokens=max_output_tokens,
    )


def _from_environment(env: Mapping[str, str]) -> list[_Configured]:
    configured = []
    own_url = _clean(env.get("AGNITRA_LLM_BASE_URL"))
    if own_url:
        own_key, own_model = _clean(env.get("AGNITRA_LLM_API_KEY")), _clean(env.get("AGNITRA_LLM_MODEL"))
        configured.append(_Configured(own_url, own_key, own_model))
    openai_url, openai_key = _clean(env.get("OPENAI_BASE_URL")), _clean(env.get("OPENAI_API_KEY"))
    if openai_url or openai_key:
        openai_model = _clean(env.get("OPENAI_MODEL"))
        configured.append(_Configured(openai_url or OPENAI_BASE_URL, openai_key, openai_model))
    return configured


def _choose(base_url: str | None, api_key: str | None, configured: list[_Configured]) -> _Configured | None:
    if base_url is not None:
        same_origin = next((item for item in configured if _origin(item.base_url) == _origin(base_url)), None)
        if same_origin is None:
            return _Configured(base_url, api_key, None)
        return _Configured(base_url, api_key or same_origin.api_key, same_origin.model)
    if configured:
        first = configured[0]
        return _Configured(first.base_url, api_key or first.api_key, first.model)
    return _Configured(OPENAI_BASE_URL, api_key, None) if api_key else None


def _clean(value: str | None) -> str | None:
    return (value or "").strip() or None


def _split(url: str) -> SplitResult:
    """Split an API root, refusing what cannot be one. The URL is not quoted back: it may hold a password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UsageError("The language model's base_url is not a URL.", hint="Give http(s)://HOST[:PORT]/v1") from error
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise UsageError(
            "The language model's base_url is not an http(s) URL with a host.", hint="Give http(s)://HOST[:PORT]/v1"
        )
    if parts.username is not None or parts.password is not None:
        raise UsageError("The language model's base_url carries a user name or password.", hint="Use the API key.")
    if parts.query or parts.fragment:
        raise UsageError("The language model's base_url carries a query or a fragment.", hint="Give the root alone.")
    return parts


def _origin(url: str) -> str:
    parts = _split(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or _DEFAULT_PORTS[parts.scheme]}"


def _is_nearby(host: str) -> bool:
    """Whether a host is this machine or its private network, where plain http is the custom."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal"))
    return address.is_loopback or (address.is_private and not address.is_link_local)
