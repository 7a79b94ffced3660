"""Static bar charts as SVG text: what shows where no script runs, in cards, previews and printed pages."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from agnitra_lab.contracts.report import Report
from agnitra_lab.report import numbers, palette, sections
from agnitra_lab.report.html import Html, escape

WIDTH = 480
_MARGIN = 4
_ROW_HEIGHT = 46.0
_NUM_ROWS = 4
"""Fewer bars than this share the same height, so that charts side by side line up."""
_TITLE_HEIGHT = 32.0
_LABEL_HEIGHT = 32.0
_FONT = "system-ui,-apple-system,Segoe UI,Roboto,sans-serif"
_MAX_LABEL = 40


@dataclass(frozen=True)
class Bar:
    """One horizontal bar.

    Attributes:
        label: name on its left.
        value: its length.
        text: the value as written on its right.
        colour: "#RRGGBB".
        low: start of the interval's whisker; None for no whisker.
        high: end of it.
        is_hatched: pattern beside colour, so that the two sides of a comparison differ without colour.
    """

    label: str
    value: float
    text: str
    colour: str
    low: float | None = None
    high: float | None = None
    is_hatched: bool = False


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Draw horizontal bars with labels and interval whiskers, 480 units wide."""
    row_height = _ROW_HEIGHT * max(_NUM_ROWS / max(len(bars), 1), 1.0)
    height = _TITLE_HEIGHT + _ROW_HEIGHT * max(len(bars), _NUM_ROWS)
    longest = max((max(bar.value, bar.high or 0.0) for bar in bars), default=0.0) or 1.0
    scale = (WIDTH - 2 * _MARGIN) / longest
    rows = [_row(bar, _TITLE_HEIGHT + row_height * index, row_height, scale) for index, bar in enumerate(bars)]
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
        f'font-family="{_FONT}"><title>{escape(title)}</title>'
        '<defs><pattern id="h" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="6" height="6" fill="{palette.BASELINE}"/>'
        f'<rect width="2.4" height="6" fill="{palette.PANEL}"/></pattern></defs>'
        f'<text x="{_MARGIN}" y="16" font-size="14.5" font-weight="600" fill="{palette.MUTED}">{escape(title)}</text>'
        f"{''.join(rows)}</svg>"
    )


def latency_chart(report: Report) -> str:
    """Baseline against candidate: medians with the p20 to p80 whisker."""
    comparison = report.comparison
    sides = (
        (comparison.baseline, comparison.baseline_latency, palette.BASELINE, True),
        (comparison.candidate, comparison.candidate_latency, palette.CANDIDATE, False),
    )
    bars = [
        Bar(
            name, latency.latency_ms_p50, numbers.milliseconds(latency.latency_ms_p50), colour,
            latency.latency_ms_p20, latency.latency_ms_p80, is_hatched,
        )
        for name, latency, colour, is_hatched in sides
    ]  # fmt: skip
    return bar_chart("Latency, median with p20 to p80", bars)


def ops_chart(report: Report, *, max_ops: int = 4) -> str:
    """The ops with the largest share of the self time."""
    events = sorted(report.telemetry.events, key=lambda event: event.share, reverse=True)[:max_ops]
    bars = [
        Bar(numbers.op_label(event), event.share, numbers.share(event.share), palette.SECONDARY) for event in events
    ]
    return bar_chart("Top ops, share of self time", bars)


def candidates_chart(report: Report) -> str:
    """Speed-ups of the measured candidates with their intervals."""
    bars = [
        Bar(
            candidate.name, comparison.speedup.median, numbers.times(comparison.speedup.median),
            palette.CANDIDATE if candidate.status == "kept" else palette.MUTED,
            comparison.speedup.low, comparison.speedup.high,
        )
        for candidate in sections.ranked(report)
        if (comparison := candidate.comparison) is not None
    ]  # fmt: skip
    return bar_chart("Speed-up with its interval", bars)


def search_chart(report: Report) -> str:
    """The best kernel time of each search."""
    bars = [
        Bar(f"{search.space_template} ({search.sampler})", best, numbers.milliseconds(best), palette.SECONDARY)
        for search in report.searches
        if search.best is not None and (best := search.best.latency_ms) is not None
    ]
    return bar_chart("Best kernel found by each search", bars)


def data_uri(svg: str) -> Html:
    """The picture as an address that needs no request."""
    return Html(f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}")


def _row(bar: Bar, top: float, row_height: float, scale: float) -> str:
    length = max(bar.value * scale, 1.0)
    fill = "url(#h)" if bar.is_hatched else bar.colour
    bar_top, bar_height = top + 23, min(row_height - _LABEL_HEIGHT, 40.0)
    return (
        f'<text x="{_MARGIN}" y="{top + 15}" font-size="16" fill="{palette.TEXT}">'
        f"{escape(numbers.shortened(numbers.plain_text(bar.label), _MAX_LABEL))}</text>"
        f'<text x="{WIDTH - _MARGIN}" y="{top + 15}" font-size="16" font-weight="600" text-anchor="end" '
        f'fill="{palette.TEXT}">{escape(bar.text)}</text>'
        f'<rect x="{_MARGIN}" y="{bar_top}" width="{WIDTH - 2 * _MARGIN}" height="{bar_height:.0f}" rx="3" '
        f'fill="{palette.GRID}" opacity="0.5"/>'
        f'<rect x="{_MARGIN}" y="{bar_top}" width="{length:.1f}" height="{bar_height:.0f}" rx="3" fill="{fill}"/>'
        f"{_whisker(bar, bar_top + bar_height / 2, scale)}"
    )


def _whisker(bar: Bar, middle: float, scale: float) -> str:
    if bar.low is None or bar.high is None:
        return ""
    left, right = _MARGIN + bar.low * scale, _MARGIN + bar.high * scale
    path = f"M{left:.1f} {middle - 5}v10M{left:.1f} {middle}H{right:.1f}M{right:.1f} {middle - 5}v10"
    # A dark outline keeps the whisker visible on the bar's own colour.
    return (
        f'<path d="{path}" stroke="{palette.SURFACE}" stroke-width="4.5" fill="none"/>'
        f'<path d="{path}" stroke="{palette.TEXT}" stroke-width="1.8" fill="none"/>'
    )
