"""The small pictures of the profile card: owners as one bar, and host and device over the capture.

A picture is drawn in percent of its width and pixels of its height and has no view box: it fills its panel at any
width while its text keeps its size. Styles are the picture's own; a front end's sanitizer does not look inside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from agnitra_lab.contracts.telemetry import Timeline
from agnitra_lab.report import numbers, palette
from agnitra_lab.report.html import escape

OWNERS_HEIGHT = 26
GUTTER = 8.0
"""Percent of the width, on the left, for the names of rows and axes."""
_LANE_HEIGHT, _LANE_STEP = 52, 62
_MAX_BINS = 240
_NUM_TICKS = 5
_FONT = "system-ui,-apple-system,Segoe UI,Roboto,sans-serif"


def canvas(height: int, body: str, *, style: str = "", defs: str = "") -> str:
    """Wrap shapes into a picture.

    Args:
        height: in pixels.
        body: the shapes.
        style: rules for their classes.
        defs: patterns they are filled with.

    Returns:
        SVG text of full width.
    """
    rules = (
        f"text{{font:12px {_FONT};fill:{palette.TEXT}}}.m{{fill:{palette.MUTED}}}"
        f".e{{text-anchor:end}}.i{{text-anchor:middle}}{style}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="100%" height="{height}">'
        f"<style>{rules}</style>{f'<defs>{defs}</defs>' if defs else ''}{body}</svg>"
    )


def percent(value: float) -> str:
    """A coordinate or length in percent of the picture's width, to 0.01 (a tenth of a pixel)."""
    return f"{value:.2f}".rstrip("0").rstrip(".") + "%"


def text(x: str, y: float, content: str, classes: str = "", *, dx: float = 0.0) -> str:
    """A line of text, escaped.

    Args:
        x: coordinate, from `percent`.
        y: baseline in pixels.
        content: what it says.
        classes: "m" for muted, "e" to end and "i" to be centred at `x`, or a picture's own.
        dx: pixels to the right of `x`.
    """
    shift = f' dx="{dx:.0f}"' if dx else ""
    chosen = f' class="{classes}"' if classes else ""
    return f'<text x="{x}" y="{y:g}"{shift}{chosen}>{escape(content)}</text>'


def owners_bar(parts: Sequence[tuple[float, str]]) -> str:
    """Draw parts of a whole as one bar; the last part is hatched.

    Args:
        parts: (share, colour) from left to right.
    """
    total = sum(share for share, _ in parts) or 1.0
    shapes, left = [], 0.0
    for index, (share, colour) in enumerate(parts):
        width = 100 * share / total
        fill = "url(#h)" if index == len(parts) - 1 else colour
        if width:
            shapes.append(
                f'<rect x="{percent(left)}" width="{percent(width)}" height="{OWNERS_HEIGHT}" fill="{fill}"/>'
            )
        left += width
    hatch = (
        '<pattern id="h" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="7" height="7" fill="{palette.PANEL}"/><rect width="3" height="7" fill="{palette.MUTED}"/>'
        "</pattern>"
    )
    return canvas(OWNERS_HEIGHT, "".join(shapes), style=f"rect{{stroke:{palette.PANEL}}}", defs=hatch)


def timeline_picture(timeline: Timeline) -> str:
    """Draw host and device busy over the capture, one lane each."""
    lanes = [lane for lane in timeline_lanes(timeline) if lane[1]]
    num_bins = max(len(values) for _, values, _ in lanes)
    shapes = [_lane(index, *lane, num_bins) for index, lane in enumerate(lanes)]
    height = _LANE_STEP * len(lanes) + 28
    return canvas(height, "".join(shapes) + _time_axis(num_bins * timeline.bin_ms, _LANE_STEP * len(lanes)))


def timeline_height(timeline: Timeline) -> int:
    """Height of the timeline's picture in pixels: a capture without a GPU has one lane."""
    return _LANE_STEP * sum(bool(values) for _, values, _ in timeline_lanes(timeline)) + 28


def timeline_lanes(timeline: Timeline) -> list[tuple[str, tuple[float, ...], str]]:
    """The lanes of a timeline: name, share busy in each bin, colour."""
    return [
        ("host", timeline.host_busy, palette.SECONDARY),
        ("device", timeline.device_busy, palette.ACCENT),
    ]


def mean(values: Sequence[float]) -> float:
    """Mean of the bins: they are equally long."""
    return math.fsum(values) / len(values) if values else 0.0


def _lane(index: int, name: str, values: Sequence[float], colour: str, num_bins: int) -> str:
    top = _LANE_STEP * index
    bins = _thinned(values)
    heights = itertools.groupby(f"{100 - 100 * value:.0f}" for value in bins)
    outline = "".join(f"V{height}h{len(list(equal))}" for height, equal in heights)
    width = (100 - GUTTER) * len(values) / num_bins
    return (
        text("0", top + 24, name)
        + text("0", top + 40, numbers.share(mean(values)), "m")
        + f'<rect x="{percent(GUTTER)}" y="{top}" width="{percent(100 - GUTTER)}" height="{_LANE_HEIGHT}" rx="3" '
        f'fill="{palette.GRID}" opacity="0.45"/>'
        f'<svg x="{percent(GUTTER)}" y="{top}" width="{percent(width)}" height="{_LANE_HEIGHT}" '
        f'viewBox="0 0 {len(bins)} 100" preserveAspectRatio="none">'
        f'<path d="M0 100{outline}V100Z" fill="{colour}"/></svg>'
    )


def _thinned(values: Sequence[float]) -> list[float]:
    """At most `_MAX_BINS` bins: more than that is finer than the picture, and longer than the card may be."""
    step = math.ceil(len(values) / _MAX_BINS)
    return [mean(values[start : start + step]) for start in range(0, len(values), step)] if step > 1 else list(values)


def _time_axis(total_ms: float, top: float) -> str:
    step = _round_step(total_ms / _NUM_TICKS)
    ticks = [step * index for index in range(int(total_ms / step) + 1)] if step else [0.0]
    decimals = max(0, -math.floor(math.log10(step))) if step else 0
    shapes = []
    for time_ms in ticks:
        x = GUTTER + (100 - GUTTER) * time_ms / total_ms if total_ms else GUTTER
        shapes.append(
            f'<line x1="{percent(x)}" x2="{percent(x)}" y1="0" y2="{top - 2}" stroke="{palette.EDGE}" opacity="0.5"/>'
        )
        if x < 97:
            label = f"{time_ms:.{decimals}f}{' ms' if time_ms == 0 else ''}"
            shapes.append(text(percent(x), top + 14, label, "m"))
    return "".join(shapes)


def _round_step(step: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least `step`."""
    if step <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
