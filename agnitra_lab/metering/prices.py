"""The price book: what a GPU hour is assumed to cost, dated, append-only, and with its source said."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal

from agnitra_lab.errors import UsageError

DEFAULT_DEVICE = "default"


@dataclass(frozen=True)
class Price:
    """One line of the book.

    Attributes:
        effective: first day on which it holds.
        device: device slug, or "default" for every device without a line of its own.
        usd_per_gpu_hour: price of one hour of one device.
        source: where the figure comes from.
    """

    effective: date
    device: str
    usd_per_gpu_hour: Decimal
    source: str


PRICE_BOOK: tuple[Price, ...] = (
    # A changed price is a new line: past bills must recompute from the line that held on their day.
    Price(date(2025, 1, 1), DEFAULT_DEVICE, Decimal("2.50"), "list price assumption"),
)


def price_of(device: str = DEFAULT_DEVICE, *, on: date | None = None, book: tuple[Price, ...] = PRICE_BOOK) -> Price:
    """Find the price of a device on a day.

    Args:
        device: device slug such as "nvidia-h200"; a device without a line takes the default's.
        on: the day; today by default.
        book: lines in any order.

    Raises:
        UsageError: when the book has no line that holds on that day.
    """
    day = on or date.today()
    for slug in (device, DEFAULT_DEVICE):
        lines = [line for line in book if line.device == slug and line.effective <= day]
        if lines:
            return max(lines, key=lambda line: line.effective)
    raise UsageError(
        f"No price per GPU hour is known for {device!r} on {day}.", hint="Give one with price_per_gpu_hour."
    )
