"""The usage event: what an optimisation saved and what it bills, exact and with one rounding rule."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from numbers import Integral
from typing import Any

from agnitra_lab.contracts.usage import UsageEvent
from agnitra_lab.errors import UsageError

_HOURS_AND_MONEY = Decimal("0.0001")
_RATES = Decimal("0.1")
_SECONDS_PER_HOUR = Decimal(3600)
_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)
# Outside these a figure is a slip of units, and 60 digits would no longer hold every quantity exactly enough.
_LARGEST, _SMALLEST = Decimal("1e18"), Decimal("1e-18")

Number = Decimal | int | float


def usage_event(
    *,
    project_id: str,
    model_name: str,
    tokens_processed: int,
    baseline_tokens_per_sec: Number,
    optimized_tokens_per_sec: Number,
    baseline_latency_ms: Number,
    optimized_latency_ms: Number,
    price_per_gpu_hour: Decimal,
    success_fee_rate: Decimal,
    currency: str = "USD",
    metadata: Mapping[str, str] | None = None,
) -> UsageEvent:
    """Compute the usage event of an optimisation.

    Hours and costs are rounded half to even, to four decimals, from unrounded quantities; savings, fee and total
    come from the published lines, so that a bill recomputes from its own. Rates and the uplift have one decimal.

    Args:
        project_id: whose bill; not empty.
        model_name: not empty.
        tokens_processed: tokens (or items) that the event covers, at least 0.
        baseline_tokens_per_sec: measured rate of the baseline, above 0.
        optimized_tokens_per_sec: measured rate of what was kept, above 0.
        baseline_latency_ms: measured, above 0.
        optimized_latency_ms: measured, above 0.
        price_per_gpu_hour: in `currency`, Decimal or int (a float has lost its exactness), at least 0.
        success_fee_rate: share of the saving, Decimal or int in [0, 1]; a regression bears no fee.
        currency: three capital letters.
        metadata: texts that travel with the event.

    Raises:
        UsageError: on a figure that is not finite, of the wrong sign or size, or not exact where money is concerned.
    """
    _check_texts(project_id, model_name, currency)
    tokens = _count("tokens_processed", tokens_processed)
    price, fee_rate = _money("price_per_gpu_hour", price_per_gpu_hour), _share("success_fee_rate", success_fee_rate)
    before_rate = _positive("baseline_tokens_per_sec", baseline_tokens_per_sec)
    after_rate = _positive("optimized_tokens_per_sec", optimized_tokens_per_sec)
    uplift = _EXACT.multiply(_EXACT.subtract(_EXACT.divide(after_rate, before_rate), Decimal(1)), Decimal(100))
    return UsageEvent(
        project_id=project_id,
        model_name=model_name,
        tokens_processed=tokens,
        baseline_latency_ms=_rounded(_positive("baseline_latency_ms", baseline_latency_ms), _RATES),
        optimized_latency_ms=_rounded(_positive("optimized_latency_ms", optimized_latency_ms), _RATES),
        baseline_tokens_per_sec=_rounded(before_rate, _RATES),
        optimized_tokens_per_sec=_rounded(after_rate, _RATES),
        performance_uplift_pct=_rounded(uplift, _RATES),
        **_bill(tokens, before_rate, after_rate, price, fee_rate),
        currency=currency,
        metadata=dict(metadata or {}),
    )


def _bill(tokens: int, before_rate: Decimal, after_rate: Decimal, price: Decimal, fee_rate: Decimal) -> dict[str, Any]:
    """Hours and money of the event: parts are rounded first, and sums are taken of the rounded parts."""
    exact_hours = [_hours(tokens, rate) for rate in (before_rate, after_rate)]
    hours_before, hours_after = (_rounded(hours) for hours in exact_hours)
    cost_before, cost_after = (_rounded(_EXACT.multiply(hours, price)) for hours in exact_hours)
    saving = _EXACT.subtract(cost_before, cost_after)
    fee = _rounded(_EXACT.multiply(max(saving, Decimal(0)), fee_rate))
    return {
        "gpu_hours_before": hours_before,
        "gpu_hours_after": hours_after,
        "gpu_hours_saved": _EXACT.subtract(hours_before, hours_after),
        "cost_before": cost_before,
        "cost_after": cost_after,
        "cost_savings": saving,
        "usage_charge": cost_after,
        "success_fee": fee,
        "total_billable": _EXACT.add(cost_after, fee),
    }


def _check_texts(project_id: str, model_name: str, currency: str) -> None:
    if not (len(currency) == 3 and currency.isascii() and currency.isalpha() and currency.isupper()):
        raise UsageError(f"currency is {currency!r}, expected three capital letters.", hint='For example "USD".')
    for name, text in (("project_id", project_id), ("model_name", model_name)):
        if not text:
            raise UsageError(f"{name} is empty, expected a name.")


def _share(name: str, value: Decimal) -> Decimal:
    share = _money(name, value)
    if share > 1:
        raise UsageError(f"{name} is {share}, expected a share of at most 1.", hint='20% is Decimal("0.20").')
    return share


def _hours(tokens: int, tokens_per_sec: Decimal) -> Decimal:
    return _EXACT.divide(Decimal(tokens), _EXACT.multiply(tokens_per_sec, _SECONDS_PER_HOUR))


def _rounded(value: Decimal, step: Decimal = _HOURS_AND_MONEY) -> Decimal:
    return value.quantize(step, context=_EXACT)


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value <= _LARGEST:
        raise UsageError(f"{name} is {value!r}, expected a whole number of at least 0.")
    return int(value)


def _positive(name: str, value: Number) -> Decimal:
    number = _decimal(name, value)
    if not _SMALLEST <= number <= _LARGEST:
        raise UsageError(f"{name} is {value!r}, expected a finite number above 0.")
    return number


def _money(name: str, value: Decimal) -> Decimal:
    if isinstance(value, float):
        raise UsageError(f"{name} is the float {value!r}, expected a Decimal.", hint=f'Write Decimal("{value!r}").')
    number = _decimal(name, value)
    if not 0 <= number <= _LARGEST:
        raise UsageError(f"{name} is {value!r}, expected a finite number of at least 0.")
    return number


def _decimal(name: str, value: Number) -> Decimal:
    """Read a number by its shortest decimal form: the float 62.9 means 62.9, not 62.89999999999999857891452848."""
    if isinstance(value, bool) or not isinstance(value, (Decimal, int, float)):
        raise UsageError(f"{name} is {value!r}, expected a number.")
    try:
        number = (
            value if isinstance(value, Decimal) else Decimal(repr(float(value)) if isinstance(value, float) else value)
        )
    except InvalidOperation as error:
        raise UsageError(f"{name} is {value!r}, expected a number.") from error
    if not number.is_finite():
        raise UsageError(f"{name} is {value!r}, expected a finite number.")
    return number
