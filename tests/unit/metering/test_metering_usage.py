"""The usage event: the seed's figures to the digit, and a bill that recomputes from its own lines."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.contracts.usage import UsageEvent
from agnitra_lab.errors import UsageError
from agnitra_lab.metering.usage import usage_event

SEED: dict[str, Any] = {
    "project_id": "proj-demo",
    "model_name": "tinyllama",
    "tokens_processed": 262144,
    "baseline_tokens_per_sec": 3149.0,
    "optimized_tokens_per_sec": 4168.0,
    "baseline_latency_ms": 83.2,
    "optimized_latency_ms": 62.9,
    "price_per_gpu_hour": Decimal("2.50"),
    "success_fee_rate": Decimal("0.20"),
    "metadata": {"stage_notes": "baseline_vs_optimized"},
}
rates = st.floats(min_value=1e-3, max_value=1e9)
amounts = st.decimals(min_value=0, max_value=1000, places=4)
shares = st.decimals(min_value=0, max_value=1, places=4)


def test_the_seeds_figures_come_out_to_the_digit() -> None:
    found = json.loads(usage_event(**SEED).to_json())
    assert found == {
        "project_id": "proj-demo",
        "model_name": "tinyllama",
        "tokens_processed": 262144,
        "baseline_latency_ms": 83.2,
        "optimized_latency_ms": 62.9,
        "baseline_tokens_per_sec": 3149.0,
        "optimized_tokens_per_sec": 4168.0,
        "gpu_hours_before": 0.0231,
        "gpu_hours_after": 0.0175,
        "gpu_hours_saved": 0.0056,
        "performance_uplift_pct": 32.4,
        "cost_before": 0.0578,
        "cost_after": 0.0437,
        "cost_savings": 0.0141,
        "usage_charge": 0.0437,
        "success_fee": 0.0028,
        "total_billable": 0.0465,
        "currency": "USD",
        "metadata": {"stage_notes": "baseline_vs_optimized"},
        "schema_version": "agnitra.usage.v1",
    }


@given(tokens=st.integers(min_value=0, max_value=10**12), before=rates, after=rates, price=amounts, fee_rate=shares)
def test_a_bills_parts_sum_to_its_totals(
    tokens: int, before: float, after: float, price: Decimal, fee_rate: Decimal
) -> None:
    event = usage_event(
        **SEED
        | {
            "tokens_processed": tokens,
            "baseline_tokens_per_sec": before,
            "optimized_tokens_per_sec": after,
            "price_per_gpu_hour": price,
            "success_fee_rate": fee_rate,
        }
    )
    assert event.total_billable == event.usage_charge + event.success_fee
    assert event.cost_savings == event.cost_before - event.cost_after
    assert event.gpu_hours_saved == event.gpu_hours_before - event.gpu_hours_after
    assert 0 <= event.success_fee <= max(event.cost_savings, 0)


@given(before=rates, after=rates, price=amounts)
def test_the_customer_never_pays_more_than_before_when_the_run_got_faster(
    before: float, after: float, price: Decimal
) -> None:
    slow, fast = sorted((before, after))
    event = usage_event(
        **SEED | {"baseline_tokens_per_sec": slow, "optimized_tokens_per_sec": fast, "price_per_gpu_hour": price}
    )
    assert event.total_billable <= event.cost_before


def test_a_regression_bears_no_fee_and_its_saving_is_negative() -> None:
    event = usage_event(**SEED | {"baseline_tokens_per_sec": 4168.0, "optimized_tokens_per_sec": 3149.0})
    assert event.success_fee == 0
    assert event.cost_savings == Decimal("-0.0141")
    assert event.total_billable == event.usage_charge


def test_halves_round_to_the_even_neighbour() -> None:
    # 0.36 tokens/s for 1 hour's worth of tokens at 0.00025 and 0.00035 a GPU hour.
    for price, rounded in (("0.00025", "0.0002"), ("0.00035", "0.0004")):
        event = usage_event(
            **SEED
            | {
                "tokens_processed": 3600,
                "baseline_tokens_per_sec": 1,
                "optimized_tokens_per_sec": 1,
                "price_per_gpu_hour": Decimal(price),
            }
        )
        assert event.cost_before == Decimal(rounded)


@pytest.mark.parametrize(
    "field",
    ["baseline_tokens_per_sec", "optimized_tokens_per_sec", "baseline_latency_ms", "optimized_latency_ms"],
)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf, True, Decimal("NaN"), "4168", 1e300])
def test_an_impossible_rate_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        usage_event(**SEED | {field: value})


@pytest.mark.parametrize("field", ["price_per_gpu_hour", "success_fee_rate"])
@pytest.mark.parametrize("value", [0.2, Decimal("-0.01"), Decimal("NaN"), Decimal("Infinity"), True])
def test_money_enters_exactly_or_not_at_all(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        usage_event(**SEED | {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("success_fee_rate", Decimal("20")),
        ("tokens_processed", -1),
        ("tokens_processed", 1.5),
        ("currency", "usd"),
        ("project_id", ""),
    ],
)
def test_other_wrong_values_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        usage_event(**SEED | {field: value})


def test_an_event_survives_json() -> None:
    event = usage_event(**SEED)
    assert UsageEvent.from_json(event.to_json()).to_json() == event.to_json()
