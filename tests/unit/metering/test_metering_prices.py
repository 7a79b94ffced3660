"""The price book."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest

from agnitra_lab.errors import UsageError
from agnitra_lab.metering.prices import PRICE_BOOK, Price, price_of

BOOK = (
    Price(date(2025, 1, 1), "default", Decimal("2.50"), "list price assumption"),
    Price(date(2025, 6, 1), "default", Decimal("2.00"), "list price assumption"),
    Price(date(2025, 3, 1), "nvidia-h200", Decimal("4.00"), "list price assumption"),
)


def test_the_default_is_the_seeds_price_and_says_that_it_is_an_assumption() -> None:
    price = price_of()
    assert price.usd_per_gpu_hour == Decimal("2.50")
    assert price.source == "list price assumption"


@pytest.mark.parametrize(
    ("device", "day", "expected"),
    [
        ("default", date(2025, 5, 31), "2.50"),
        ("default", date(2025, 6, 1), "2.00"),
        ("nvidia-h200", date(2025, 2, 28), "2.50"),
        ("nvidia-h200", date(2026, 1, 1), "4.00"),
        ("unheard-of", date(2026, 1, 1), "2.00"),
    ],
)
def test_the_latest_line_that_holds_on_the_day_counts(device: str, day: date, expected: str) -> None:
    assert price_of(device, on=day, book=BOOK).usd_per_gpu_hour == Decimal(expected)


def test_a_day_before_the_book_began_has_no_price() -> None:
    with pytest.raises(UsageError, match="2024-12-31"):
        price_of(on=date(2024, 12, 31), book=BOOK)


def test_every_line_of_the_book_is_exact_and_has_a_source() -> None:
    assert all(isinstance(line.usd_per_gpu_hour, Decimal) and line.source for line in PRICE_BOOK)
