"""What asking a language model may take: rounds, tokens, money and waiting; and what it has taken so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from agnitra_lab.contracts.suggestion import LLMUsage, StopReason, TokenPrices
from agnitra_lab.errors import UsageError
from agnitra_lab.llm.reply import Reply

MAX_ROUNDS = 4
CONFIGS_PER_ROUND = 8
_MILLION = 1_000_000
# Texts of figures and field names have 2 to 4 characters a token in the common vocabularies; 2 is the upper bound that
# a budget is held by before the server's own count is known.
_CHARS_PER_TOKEN = 2
_DEFAULT_OUTPUT_TOKENS = 4_096


@dataclass(frozen=True)
class Limits:
    """What the rounds may take.

    Attributes:
        max_rounds: questions at most; 1 asks without measured feedback.
        configs_per_round: configs of one site that a round may add.
        min_gain: share by which a round must lower some site's best time for a next one to be asked.
        max_tokens: input and output tokens of all rounds together; None for no limit.
        max_cost_usd: of all rounds together; needs prices.
        max_wait_s: seconds of waiting for answers, all rounds together.
        max_output_tokens: what one answer is limited to at the server, as the client was told.
        prices: what tokens cost; None where nobody said, and then no cost is shown.
    """

    max_rounds: int = MAX_ROUNDS
    configs_per_round: int = CONFIGS_PER_ROUND
    min_gain: float = 0.01
    max_tokens: int | None = None
    max_cost_usd: Decimal | None = None
    max_wait_s: float | None = None
    max_output_tokens: int | None = None
    prices: TokenPrices | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.max_rounds <= 16 or not 1 <= self.configs_per_round <= 32:
            raise UsageError(
                f"{self.max_rounds} rounds of {self.configs_per_round} configs.",
                hint="Expected 1 to 16 rounds of 1 to 32 configs.",
            )
        if not 0 <= self.min_gain < 1:
            raise UsageError(f"min_gain is {self.min_gain}.", hint="Expected a share from 0 to 1.")
        for name in ("max_tokens", "max_cost_usd", "max_wait_s", "max_output_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value}.", hint="Expected a number above 0, or None for no limit.")
        if self.max_cost_usd is not None and self.prices is None:
            raise UsageError(
                "A cost budget for the language model needs its prices, which are never guessed.",
                hint="Give USD per million input and output tokens, such as --llm-price 0.15/0.60.",
            )


class Spending:
    """What the questions took, held against the limits before each of them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.usage = LLMUsage(cost_usd=None if limits.prices is None else Decimal(0))

    def why_not(self, messages: Sequence[Mapping[str, str]]) -> StopReason | None:
        """Say which budget one more question could break, or None.

        The question is counted at the upper bound of its tokens, so a budget is kept and not found to be broken.
        """
        limits, ceiling = self._limits, self._ceiling(messages)
        spent = self.usage.input_tokens + self.usage.output_tokens
        if limits.max_tokens is not None and spent + sum(ceiling) > limits.max_tokens:
            return "token_budget"
        if limits.max_cost_usd is not None and limits.prices is not None:
            spent_usd = self.usage.cost_usd or Decimal(0)
            if spent_usd + _cost_usd(*ceiling, limits.prices) > limits.max_cost_usd:
                return "cost_budget"
        if limits.max_wait_s is not None and self.usage.wait_ms >= limits.max_wait_s * 1e3:
            return "wait_budget"
        return None

    def add(self, messages: Sequence[Mapping[str, str]], reply: Reply | None, wait_ms: float) -> LLMUsage:
        """Count one question, answered or not, and return what it took alone."""
        is_replayed = reply is not None and reply.source != "server"
        bound = self._ceiling(messages)
        counted = (reply.input_tokens, reply.output_tokens) if reply is not None else (None, None)
        tokens = (
            (0, 0) if is_replayed else tuple(upper if n is None else n for n, upper in zip(counted, bound, strict=True))
        )
        prices = self._limits.prices
        one = LLMUsage(
            num_questions=1,
            num_replayed=int(is_replayed),
            input_tokens=tokens[0],
            output_tokens=tokens[1],
            is_estimated=not is_replayed and None in counted,
            cost_usd=None if prices is None else _cost_usd(tokens[0], tokens[1], prices),
            wait_ms=wait_ms,
        )
        self.usage = _sum(self.usage, one)
        return one

    def _ceiling(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, int]:
        num_chars = sum(len(message["content"]) for message in messages)
        return num_chars // _CHARS_PER_TOKEN + 16, self._limits.max_output_tokens or _DEFAULT_OUTPUT_TOKENS


def prices_from(text: str, source: str) -> TokenPrices:
    """Read "INPUT/OUTPUT", USD per million tokens.

    Raises:
        UsageError: anything else.
    """
    try:
        given, made = (Decimal(part.strip()) for part in text.split("/"))
        if not (given.is_finite() and made.is_finite() and min(given, made) >= 0):
            raise ValueError(text)
        return TokenPrices(input_usd_per_million=given, output_usd_per_million=made, source=source)
    except (ArithmeticError, ValueError) as error:
        raise UsageError(
            f"Not a price of tokens: {text[:40]!r}.",
            hint="Expected INPUT/OUTPUT in USD per million, such as 0.15/0.60.",
        ) from error


def _cost_usd(input_tokens: int, output_tokens: int, prices: TokenPrices) -> Decimal:
    return (input_tokens * prices.input_usd_per_million + output_tokens * prices.output_usd_per_million) / _MILLION


def _sum(all_before: LLMUsage, one: LLMUsage) -> LLMUsage:
    costs = (all_before.cost_usd, one.cost_usd)
    return LLMUsage(
        num_questions=all_before.num_questions + one.num_questions,
        num_replayed=all_before.num_replayed + one.num_replayed,
        input_tokens=all_before.input_tokens + one.input_tokens,
        output_tokens=all_before.output_tokens + one.output_tokens,
        is_estimated=all_before.is_estimated or one.is_estimated,
        cost_usd=None if None in costs else sum((cost for cost in costs if cost is not None), Decimal(0)),
        wait_ms=all_before.wait_ms + one.wait_ms,
    )
