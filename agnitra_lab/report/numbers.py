"""How numbers are written, the same on every surface. Rounding is for the eye: the JSON holds the full value."""

from __future__ import annotations

from decimal import Decimal

from agnitra_lab.contracts.telemetry import OpEvent

ABSENT = "not measured"


def milliseconds(value: float) -> str:
    """A time with its unit, to about four digits."""
    decimals = 1 if value >= 100 else 2 if value >= 1 else 4
    return f"{value:.{decimals}f} ms"


def seconds(value: float) -> str:
    """A stage's wall time."""
    return f"{value:.1f} s" if value >= 0.1 else f"{value:.3f} s"


def times(value: float) -> str:
    """A speed-up: 1.62×."""
    return f"{value:.2f}×"


def interval(low: float, high: float) -> str:
    """An interval of speed-ups: [1.58, 1.66]."""
    return f"[{low:.2f}, {high:.2f}]"


def rate(value: float) -> str:
    """Items a second, with thousands separated."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def share(value: float) -> str:
    """A share of one as a percentage with one decimal."""
    return f"{100 * value:.1f}%"


def exact_share(value: float) -> str:
    """A share that is never rounded up to 100%: 0.99998 is 99.998%."""
    text = f"{100 * value:.3f}".rstrip("0").rstrip(".")
    return ">99.999%" if text == "100" and value < 1 else f"{text}%"


def money(value: Decimal, currency: str) -> str:
    """An amount with four decimals and its currency."""
    return f"{value:.4f} {currency}"


def hours(value: Decimal) -> str:
    """GPU hours with four decimals."""
    return f"{value:.4f} h"


def scientific(value: float | None) -> str:
    """An error, in powers of ten."""
    return ABSENT if value is None else f"{value:.1e}"


def op_label(event: OpEvent) -> str:
    """An op and where it runs: one name alone stands for many ops."""
    return f"{event.op} · {event.module_path}" if event.module_path else event.op


def plain_text(value: str) -> str:
    """Text on one line without control characters: what a name or a model's answer becomes before it is shown."""
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def shortened(value: str, length: int) -> str:
    """Text of at most `length` characters, cut in the middle so that both ends can be told apart."""
    if len(value) <= length:
        return value
    head = (length - 1) * 2 // 3
    return f"{value[:head]}…{value[len(value) - (length - 1 - head) :]}"
