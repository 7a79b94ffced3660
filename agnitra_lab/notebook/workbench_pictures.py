"""The picture of an A/B: its two sides as distributions.

As the profile's pictures it is drawn in percent of its width and pixels of its height.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from agnitra_lab.contracts.measurement import Comparison, Latency
from agnitra_lab.notebook.profile_pictures import canvas, percent, text
from agnitra_lab.report import numbers, palette

DISTRIBUTION_HEIGHT = 184
_X_LEFT, _RIGHT = 20.0, 98.0
_LANE_HEIGHT, _LANE_STEP, _LANE_TOP = 54.0, 72.0, 8.0
# A quarter of the samples may lie within a tenth of their spread: what is denser than this is drawn as high as this.
_MAX_DENSITY = 3.0
_SHOWN_QUANTILE = 18
"""Index of 90% among the 21 quantiles: the slowest calls would squeeze all others into a line."""


def distribution_picture(comparison: Comparison) -> str:
    """Draw baseline (striped) above candidate (solid): the shape is the density of the samples, the line the median."""
    sides = (
        (comparison.baseline, comparison.baseline_latency, "url(#h)", palette.BASELINE),
        (comparison.candidate, comparison.candidate_latency, palette.CANDIDATE, palette.CANDIDATE),
    )
    shown = [_quantiles(latency) for _, latency, _, _ in sides]
    low, high = min(values[0] for values in shown), max(values[-1] for values in shown)
    span = (high - low) or 1.0
    densest = _usual_density(shown, span)
    shapes = []
    for lane, ((name, latency, fill, edge), values) in enumerate(zip(sides, shown, strict=True)):
        bottom = _LANE_TOP + _LANE_STEP * lane + _LANE_HEIGHT
        shapes += _lane(values, low, span, densest, bottom, fill, edge)
        at = percent(_x(latency.latency_ms_p50, low, span))
        shapes.append(
            f'<line x1="{at}" x2="{at}" y1="{bottom - _LANE_HEIGHT - 4:.0f}" y2="{bottom + 4:.0f}" '
            f'stroke="{palette.TEXT}" stroke-width="2"/>'
        )
        shapes.append(text("0", bottom - 30, numbers.shortened(numbers.plain_text(name), 22)))
        shapes.append(text("0", bottom - 12, numbers.milliseconds(latency.latency_ms_p50), "m"))
    foot = DISTRIBUTION_HEIGHT - 22
    for value, classes in ((low, "m"), ((low + high) / 2, "m i"), (high, "m e")):
        shapes.append(text(percent(_x(value, low, span)), foot, numbers.milliseconds(value), classes))
    shapes.append(text(percent(_X_LEFT), foot + 18, "line: median; up to the 90th percentile", "m"))
    hatch = (
        # In the lane's own space, where a unit of x is a percent of the width: only lying stripes stay what they are.
        '<pattern id="h" width="9" height="7" patternUnits="userSpaceOnUse">'
        f'<rect width="9" height="7" fill="{palette.PANEL}"/><rect width="9" height="4" fill="{palette.BASELINE}"/>'
        "</pattern>"
    )
    return canvas(DISTRIBUTION_HEIGHT, "".join(shapes), defs=hatch)


def _x(value: float, low: float, span: float) -> float:
    return _X_LEFT + (_RIGHT - _X_LEFT) * (value - low) / span


def _quantiles(latency: Latency) -> list[float]:
    """Quantiles up to 90%; of an older record the three that it has."""
    if len(latency.latency_ms_quantiles) > _SHOWN_QUANTILE:
        return list(latency.latency_ms_quantiles[: _SHOWN_QUANTILE + 1])
    return [latency.latency_ms_p20, latency.latency_ms_p50, latency.latency_ms_p80]


def _usual_density(sides: Sequence[Sequence[float]], span: float) -> float:
    gaps = (after - before for values in sides for before, after in itertools.pairwise(values))
    widths = sorted(max(gap, span / 400) for gap in gaps)
    return _MAX_DENSITY / (widths[len(widths) // 2] or 1.0)


def _lane(
    values: Sequence[float], low: float, span: float, densest: float, bottom: float, fill: str, edge: str
) -> list[str]:
    """Between two neighbouring quantiles lie equally many samples: the closer they are, the higher the bar."""
    outline = ""
    for before, after in itertools.pairwise(values):
        height = max(2.0, _LANE_HEIGHT * min(1.0, 1.0 / max(after - before, span / 400) / densest))
        left, width = _x(before, low, span), max(0.25, (_RIGHT - _X_LEFT) * (after - before) / span)
        outline += f"M{left:.2f} {bottom:.0f}v{-height:.0f}h{width:.2f}V{bottom:.0f}z"
    shapes = [
        f'<svg width="100%" height="{DISTRIBUTION_HEIGHT}" viewBox="0 0 100 {DISTRIBUTION_HEIGHT}" '
        f'preserveAspectRatio="none"><path d="{outline}" fill="{fill}" stroke="{edge}" '
        'vector-effect="non-scaling-stroke"/></svg>'
    ]
    shapes.append(
        f'<line x1="{percent(_X_LEFT)}" x2="{percent(_RIGHT)}" y1="{bottom:.0f}" y2="{bottom:.0f}" '
        f'stroke="{palette.EDGE}"/>'
    )
    return shapes
