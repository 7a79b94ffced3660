"""The dashboard's pictures as inline SVG: their colours are the surface's, and a table beside each has its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from agnitra_lab.contracts.search import SearchResult
from agnitra_lab.report import numbers
from agnitra_lab.report.dashboard_palette import DARK
from agnitra_lab.report.dashboard_record import SearchCurve, SuiteGroup
from agnitra_lab.report.dashboard_sections import RunGroup, best_so_far, microseconds, short_time
from agnitra_lab.report.html import Html, escape

MAX_TIMELINE_RUNS = 120
_LANES = ("reports", "bench", "perf", "profiles", "cmaes", "certs", "baseline", "vis", "regressions")
_LANE_HEIGHT, _LANE_LEFT, _TOP = 26, 92, 46
_MIN_STEP, _MAX_STEP, _WIDTH = 13.0, 52.0, 1180.0
_CURVE_WIDTH, _CURVE_HEIGHT, _CURVE_LEFT = 300.0, 132.0, 60.0


def timeline(groups: Sequence[RunGroup]) -> Html:
    """Runs in the order of their making, oldest first: a lane for each category, a mark for each directory."""
    shown = list(reversed(groups[:MAX_TIMELINE_RUNS]))
    lanes = [lane for lane in _LANES if any(row.category == lane for group in shown for row in group.rows)]
    step = min(max((_WIDTH - _LANE_LEFT) / max(len(shown), 1), _MIN_STEP), _MAX_STEP)
    width, height = max(_LANE_LEFT + step * len(shown) + 10, 420.0), _TOP + _LANE_HEIGHT * len(lanes) + 6
    parts = [
        f'<text class="m" x="0" y="{_TOP + _LANE_HEIGHT * place + 18}" font-size="13">{escape(lane)}</text>'
        f'<path d="M{_LANE_LEFT} {_TOP + _LANE_HEIGHT * place + 13.5}H{width - 4:.0f}" stroke="var(--grid)"/>'
        for place, lane in enumerate(lanes)
    ]
    parts += _days(shown, step, height)
    for column, group in enumerate(shown):
        x = _LANE_LEFT + step * (column + 0.5)
        rows = [row for row in group.rows if row.category in lanes]
        ys = [_TOP + _LANE_HEIGHT * lanes.index(row.category) + 13.5 for row in rows]
        if len(ys) > 1:
            parts.append(f'<path d="M{x:.1f} {min(ys)}V{max(ys)}" stroke="var(--edge)"/>')
        title = f"{group.lead.topic}, {short_time(group.lead)}, {group.lead.device or group.status}"
        marks = "".join(_mark(row.status, row.device, x, y) for row, y in zip(rows, ys, strict=True))
        figure = f": {group.figure}" if group.figure else ""
        parts.append(f"<g><title>{escape(title + figure)}</title>{marks}</g>")
    return _svg(width, height, "Runs over time; the table of runs has the same.", parts)


def suite_chart(group: SuiteGroup) -> Html:
    """Speed-ups over the best baseline with their intervals, on a logarithmic axis around 1."""
    rows: list[dict[str, Any]] = [dict(row) for row in group.workloads if "speedup_vs_best" in row]
    values = [float(row[key]) for row in rows for key in ("speedup_vs_best_low", "speedup_vs_best_high")]
    low, high = min([0.8, *values]), max([1.6, *values])
    left, right, row_height = 210.0, 1010.0, 27.0

    def x(value: float) -> float:
        return left + (right - left) * math.log(value / low) / math.log(high / low)

    height = 34 + row_height * len(rows)
    ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= tick <= high]
    parts = [
        f'<path d="M{x(tick):.1f} 22V{height:.0f}" stroke="var(--{"edge" if tick == 1 else "grid"})"/>'
        f'<text class="m" x="{x(tick):.1f}" y="14" font-size="12" text-anchor="middle">{tick:g}×</text>'
        for tick in ticks
    ]
    parts += [_suite_bar(row, 28 + row_height * place, x) for place, row in enumerate(rows)]
    label = f"Speed-up over the best baseline on {group.device}; the table below has the numbers."
    return _svg(1180, height, label, parts)


def search_chart(search: SearchCurve) -> Html:
    """Each measurement of a search as a dot, and the fastest so far as a line, on a logarithmic axis."""
    measured = [latency for latency in search.latencies_ms if latency is not None]
    if not measured:
        return Html("")
    low, high = min(measured), max(max(measured), min(measured) * 1.05)
    right, top, bottom = _CURVE_WIDTH - 8, 10.0, _CURVE_HEIGHT - 22

    def x(place: float) -> float:
        return _CURVE_LEFT + (right - _CURVE_LEFT) * place / max(len(search.latencies_ms) - 1, 1)

    def y(latency: float) -> float:
        return bottom - (bottom - top) * math.log(latency / low) / math.log(high / low)

    parts = [
        f'<path d="M{_CURVE_LEFT} {y(value):.1f}H{right}" stroke="var(--grid)"/>'
        f'<text class="m" x="{_CURVE_LEFT - 6}" y="{y(value) + 4:.1f}" font-size="12" text-anchor="end">'
        f"{value * 1e3:.3g} us</text>"
        for value in (low, high)
    ]
    parts += [
        f'<circle cx="{x(place):.1f}" cy="{y(latency):.1f}" r="2.6" fill="none" stroke="var(--baseline)"/>'
        if latency is not None
        else f'<path d="M{x(place) - 3:.1f} {bottom - 3}l6 6m0-6l-6 6" stroke="var(--warning)"/>'
        for place, latency in enumerate(search.latencies_ms)
    ]
    parts.append(
        f'<path d="{_steps(best_so_far(search), x, y)}" stroke="var(--accent)" stroke-width="2.2" fill="none"/>'
    )
    parts.append(
        f'<text class="m" x="{_CURVE_LEFT}" y="{_CURVE_HEIGHT - 5}" font-size="12">measurement 1</text>'
        f'<text class="m" x="{right}" y="{_CURVE_HEIGHT - 5}" font-size="12" text-anchor="end">'
        f"{len(search.latencies_ms)}</text>"
    )
    label = f"Search of {search.template}: best {microseconds(search.best_latency_ms)}; the table has the numbers."
    return _svg(_CURVE_WIDTH, _CURVE_HEIGHT, label, parts)


def search_picture(found: SearchResult) -> dict[str, str]:
    """A finished search as a mime bundle for a notebook: the dashboard's picture on a surface of its own."""
    curve = SearchCurve(
        run_id="", topic="", template=found.space_template, shape=found.shape, dtype=found.dtype,
        sampler=found.sampler, measured_on=found.measured_on, num_configs=found.num_configs,
        stopped_because=found.stopped_because, latencies_ms=tuple(trial.latency_ms for trial in found.trials),
        best_latency_ms=found.best.latency_ms if found.best else None,
        best_config=found.best.config.key() if found.best else None,
    )  # fmt: skip
    text = (
        f"Search of {found.space_template}, {found.measured_on}: best {microseconds(curve.best_latency_ms)} after "
        f"{len(found.trials)} of {found.num_configs} configs"
    )
    return {"image/svg+xml": _painted(search_chart(curve)), "text/plain": text}


def _painted(picture: Html) -> str:
    """A picture that needs no style sheet: the dark surface's colours in place of its variables."""
    drawn = re.sub(r"var\(--(\w+)\)", lambda name: DARK[name[1]], picture)
    drawn = drawn.replace('class="m"', f'fill="{DARK["muted"]}"')
    opening, closing, rest = drawn.partition(">")
    namespace = 'xmlns="http://www.w3.org/2000/svg" font-family="system-ui,sans-serif"'
    opening = opening.replace("<svg", f"<svg {namespace}", 1).replace(
        f'width="{_CURVE_WIDTH:.0f}" height="{_CURVE_HEIGHT:.0f}"', f'width="{1.5 * _CURVE_WIDTH:.0f}"'
    )
    return f'{opening}{closing}<rect width="100%" height="100%" rx="6" fill="{DARK["panel"]}"/>{rest}'


def _steps(best: Sequence[float | None], x: Any, y: Any) -> str:
    path = ""
    for place, latency in enumerate(best):
        if latency is not None:
            path += f"H{x(place):.1f}V{y(latency):.1f}" if path else f"M{x(place):.1f} {y(latency):.1f}"
    return path


def _suite_bar(row: Mapping[str, Any], top: float, x: Any) -> str:
    ratio, low, high = (float(row[f"speedup_vs_best{end}"]) for end in ("", "_low", "_high"))
    start, end = sorted((x(1.0), x(ratio)))
    is_slower = ratio < 1.0
    # Colour is not the only sign: a bar below 1 runs to the left of the axis, and is an outline.
    fill = 'fill="none" stroke="var(--warning)"' if is_slower else 'fill="var(--accent)"'
    middle = top + 9
    whisker = f"M{x(low):.1f} {middle}H{x(high):.1f}M{x(low):.1f} {middle - 4}v8M{x(high):.1f} {middle - 4}v8"
    equivalent = "" if row.get("is_equivalent") else ", NOT EQUIVALENT"
    text = f"{ratio:.3f}x over {row.get('best_baseline', '')}{equivalent}"
    return (
        f'<text x="200" y="{top + 14}" font-size="13.5" text-anchor="end">'
        f"{escape(numbers.shortened(str(row['workload']), 28))}</text>"
        f'<rect x="{start:.1f}" y="{top + 2}" width="{max(end - start, 1.5):.1f}" height="14" rx="2" {fill}/>'
        f'<path d="{whisker}" stroke="var(--panel)" stroke-width="4" fill="none"/>'
        f'<path d="{whisker}" stroke="var(--text)" stroke-width="1.6" fill="none"/>'
        f'<text x="{max(x(high), x(1.0)) + 8:.1f}" y="{top + 14}" font-size="13">{escape(text)}</text>'
    )


def _days(shown: Sequence[RunGroup], step: float, height: float) -> list[str]:
    parts, column, free_from = [], 0, 0.0
    for day, members in groupby(shown, key=lambda group: short_time(group.lead)[:10]):
        x = _LANE_LEFT + step * column
        parts.append(f'<path d="M{x:.1f} 22V{height - 4:.0f}" stroke="var(--grid)" stroke-dasharray="3 4"/>')
        if x >= free_from:
            parts.append(f'<text class="m" x="{x + 4:.1f}" y="32" font-size="12.5">{escape(day or "undated")}</text>')
            free_from = x + 84
        column += len(list(members))
    return parts


def _mark(status: str, device: str | None, x: float, y: float) -> str:
    """Shape tells status and device, beside colour: dot CUDA, square CPU or none, cross not complete."""
    if status != "complete":
        return f'<path d="M{x - 5:.1f} {y - 5}l10 10m0-10l-10 10" stroke="var(--warning)" stroke-width="2.4"/>'
    if device and ("NVIDIA" in device or "AMD Instinct" in device):
        return f'<circle cx="{x:.1f}" cy="{y}" r="5.5" fill="var(--accent)"/>'
    outline = 'fill="var(--panel)" stroke="var(--baseline)" stroke-width="2.2"'
    return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5}" width="9" height="9" {outline}/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> Html:
    return Html(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
