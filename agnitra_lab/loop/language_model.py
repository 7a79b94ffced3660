"""Who is asked for suggestions, and what asking may take: the settings of a run as a client and limits."""

from __future__ import annotations

import os
from decimal import Decimal, InvalidOperation

from agnitra_lab.contracts.suggestion import TokenPrices
from agnitra_lab.errors import UsageError
from agnitra_lab.llm.cache import CachedClient
from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.recorded import RecordedClient, RecordingClient
from agnitra_lab.llm.reply import LanguageModel
from agnitra_lab.llm.settings import resolve
from agnitra_lab.loop.settings import Settings
from agnitra_lab.suggest.budget import Limits, prices_from

PRICE_VARIABLE = "AGNITRA_LLM_PRICE"
_MOST_OUTPUT_TOKENS = 8_192
_ROUNDS_OF_A_SEARCH = 6


def client_of(settings: Settings) -> LanguageModel | None:
    """Return the language model of a run: recorded replies, else the server that is configured, else None.

    Raises:
        UsageError: a recording that cannot be read, or a server that cannot be asked.
    """
    if settings.suggest == "preset":
        return None
    if settings.llm_replies is not None:
        return RecordedClient.from_file(settings.llm_replies)
    resolved = resolve(
        settings.llm_base_url, settings.llm_api_key, settings.llm_model, settings.llm_deadline_s,
        max_output_tokens=limits_of(settings).max_output_tokens,
    )  # fmt: skip
    if resolved is None:
        return None
    asked = ChatClient(resolved)
    # What is being recorded shall come from the server, and not from an earlier run.
    if settings.llm_record is not None:
        return RecordingClient(asked, settings.llm_record, model=resolved.model, origin=resolved.origin)
    return CachedClient(asked) if settings.is_llm_cached else asked


def limits_of(settings: Settings) -> Limits:
    """Return what the rounds of a run may take. A budget of tokens or money also limits each answer at the server.

    Raises:
        UsageError: limits that no run could keep, or a cost budget without a price.
    """
    cost = settings.llm_max_cost_usd
    is_limited = cost is not None or settings.llm_max_tokens is not None
    most = min(_MOST_OUTPUT_TOKENS, settings.llm_max_tokens or _MOST_OUTPUT_TOKENS)
    return Limits(
        max_rounds=settings.llm_rounds,
        # Presets and the rounds together leave the sampler some of its measurements.
        configs_per_round=max(2, min(8, settings.max_trials // _ROUNDS_OF_A_SEARCH)),
        max_tokens=settings.llm_max_tokens,
        max_cost_usd=None if cost is None else _usd(cost),
        max_output_tokens=most if is_limited else None,
        prices=_prices(settings),
    )


def _prices(settings: Settings) -> TokenPrices | None:
    if settings.llm_price:
        return prices_from(settings.llm_price, "given by the user")
    configured = os.environ.get(PRICE_VARIABLE, "").strip()
    return prices_from(configured, PRICE_VARIABLE) if configured else None


def _usd(value: Decimal | str) -> Decimal:
    try:
        amount = Decimal(value)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite():
        raise UsageError(f"llm_max_cost_usd is {value!r}.", hint="Expected a decimal number, such as 0.05.")
    return amount
