"""The roofline of the profile card: each node's rate over its intensity, under the ceilings measured on the device.

Source: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", 2009.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from agnitra_lab.contracts.device import DevicePeaks
from agnitra_lab.contracts.telemetry import NodeEvent, TelemetryRecord
from agnitra_lab.notebook import profile_pictures as draw
from agnitra_lab.notebook.profile_names import node_name
from agnitra_lab.report import numbers, palette

HEIGHT = 330
_TOP, _BOTTOM = 28, 44
_RIGHT = 2.0
_PLOT_HEIGHT = HEIGHT - _TOP - _BOTTOM
_PLOT_WIDTH = 100 - draw.GUTTER - _RIGHT
_NARROW_PX = 540
"""Labels are placed for a plot of this width; in a wider one they are further apart."""
_MAX_LABELS, _MAX_LABEL = 6, 24
_MIN_RADIUS, _MAX_RADIUS = 3.5, 11.0
_SAME_PERCENT, _SAME_PX = 1.5, 8.0
"""Dots that are closer than this look like one: the largest is named."""
_CHARACTER_PX = 6.8
_MIN_DECADES = 3

_Place = tuple[float, float]
"""Percent from the left, pixels from the top."""
_Box = tuple[float, float, float, float]
"""Left and right in percent, top and bottom in pixels."""


@dataclass(frozen=True)
class Roofline:
    """What the picture shows.

    Attributes:
        nodes: with an intensity and a rate, largest time first.
        copy_tflop_per_byte: slope of the left ceiling: TFLOP/s for one FLOP per byte.
        gemm_tflop_per_s: the flat ceiling, None where it was not measured.
        gemm_dtype: dtype it was measured in.
    """

    nodes: tuple[NodeEvent, ...]
    copy_tflop_per_byte: float
    gemm_tflop_per_s: float | None = None
    gemm_dtype: str | None = None

    @property
    def ridge_flop_per_byte(self) -> float | None:
        """Intensity at which the two ceilings meet."""
        return self.gemm_tflop_per_s / self.copy_tflop_per_byte if self.gemm_tflop_per_s else None

    def ceiling(self, intensity: float) -> float:
        """The lower of the two ceilings, in TFLOP/s."""
        return min(self.copy_tflop_per_byte * intensity, self.gemm_tflop_per_s or math.inf)

    @property
    def ceilings_text(self) -> str:
        """The measured ceilings with their units."""
        parts = [f"copy {self.copy_tflop_per_byte * 1e3:,.0f} GB/s"]
        if self.gemm_tflop_per_s:
            parts.append(f"matrix product {rate_text(self.gemm_tflop_per_s)} in {self.gemm_dtype or 'its dtype'}")
        return ", ".join(parts)


def roofline_nodes(record: TelemetryRecord) -> list[NodeEvent]:
    """The nodes that have a place in the picture: FLOPs, bytes and a time are known."""
    return [node for node in record.nodes if node.intensity_flop_per_byte and node.tflop_per_s]


def bound_of(node: NodeEvent, peaks: DevicePeaks | None) -> str | None:
    """What limits a node by its roofline: "bytes" or "FLOPs"; None where it takes ceilings that are not known."""
    if not node.flops or not node.bytes_moved:
        return "bytes" if node.bytes_moved else "FLOPs" if node.flops else None
    if peaks is None or not peaks.copy_bandwidth_gb_per_s:
        return None
    bytes_s = node.bytes_moved / (peaks.copy_bandwidth_gb_per_s * 1e9)
    flops_s = node.flops / (peaks.gemm_tflop_per_s * 1e12) if peaks.gemm_tflop_per_s else 0.0
    return "bytes" if bytes_s >= flops_s else "FLOPs"


def build_roofline(record: TelemetryRecord, peaks: DevicePeaks | None) -> Roofline | None:
    """Gather what the picture takes; None without a measured bandwidth or without nodes whose work is known."""
    nodes = sorted(roofline_nodes(record), key=lambda node: -node.latency_ms)
    if peaks is None or not peaks.copy_bandwidth_gb_per_s or not nodes:
        return None
    return Roofline(tuple(nodes), peaks.copy_bandwidth_gb_per_s / 1e3, peaks.gemm_tflop_per_s, peaks.gemm_dtype)


def roofline_picture(roofline: Roofline) -> str:
    """Draw nodes as dots, as large as their time, on logarithmic axes."""
    axes = _Axes.of(roofline)
    style = (
        f".g{{stroke:{palette.GRID}}}.b{{fill:{palette.SECONDARY}}}.f{{fill:{palette.BASELINE}}}"
        f"circle{{fill-opacity:.8;stroke:{palette.PANEL};stroke-width:1.2}}"
        f".c{{stroke-width:2;fill:none}}.h{{paint-order:stroke;stroke:{palette.PANEL};stroke-width:4}}"
    )
    body = "".join(
        (*_grid(axes, roofline), *_ceilings(axes, roofline), *_dots(axes, roofline), *_names(axes, roofline))
    )
    return draw.canvas(HEIGHT, body, style=style)


def rate_text(tflop_per_s: float) -> str:
    """A rate with its unit."""
    return f"{number_text(tflop_per_s)} TFLOP/s" if tflop_per_s >= 1 else f"{number_text(tflop_per_s * 1e3)} GFLOP/s"


def number_text(value: float) -> str:
    """A number with two or three digits and no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 1:
        return f"{value:.3g}"
    decimals = 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{decimals}f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class _Axes:
    """Decades that the axes span, and where a value stands."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @classmethod
    def of(cls, roofline: Roofline) -> _Axes:
        intensities = [node.intensity_flop_per_byte or 1.0 for node in roofline.nodes]
        rates = [node.tflop_per_s or 1.0 for node in roofline.nodes]
        ridge = roofline.ridge_flop_per_byte
        x_low = math.floor(math.log10(min(*intensities, ridge / 10 if ridge else intensities[0])) - 0.1)
        x_high = math.ceil(math.log10(max(*intensities, ridge * 3 if ridge else intensities[0])) + 0.1)
        x_high = max(x_high, x_low + _MIN_DECADES)
        top = max(*rates, roofline.ceiling(10.0**x_high))
        y_low = math.floor(math.log10(min(rates)) - 0.2)
        # Room above the flat ceiling for its name.
        y_high = max(math.log10(top) + 0.5, y_low + _MIN_DECADES)
        return cls(x_low, x_high, y_low, y_high)

    def x(self, intensity: float) -> float:
        """Percent of the picture's width."""
        position = (math.log10(intensity) - self.x_low) / (self.x_high - self.x_low)
        return draw.GUTTER + _PLOT_WIDTH * position

    def y(self, rate: float) -> float:
        """Pixels from the top."""
        position = (math.log10(rate) - self.y_low) / (self.y_high - self.y_low)
        return _TOP + _PLOT_HEIGHT * (1 - position)


def _grid(axes: _Axes, roofline: Roofline) -> Iterator[str]:
    # A CPU's rates are easier to read in thousandths of a GPU's.
    unit, shift = ("TFLOP/s", 0) if (roofline.gemm_tflop_per_s or 1.0) >= 1 else ("GFLOP/s", 3)
    left, right = draw.percent(draw.GUTTER), draw.percent(100 - _RIGHT)
    bottom = _TOP + _PLOT_HEIGHT
    for power in range(math.ceil(axes.x_low), math.floor(axes.x_high) + 1):
        x = draw.percent(axes.x(10.0**power))
        yield f'<line class="g" x1="{x}" x2="{x}" y1="{_TOP}" y2="{bottom}"/>'
        # The last label would run out of a narrow picture if it were centred.
        yield draw.text(x, bottom + 17, _tick(power), "m e" if power == axes.x_high else "m i")
    for power in range(math.ceil(axes.y_low), math.floor(axes.y_high) + 1):
        y = axes.y(10.0**power)
        yield f'<line class="g" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield draw.text(draw.percent(draw.GUTTER - 0.8), y + 4, _tick(power + shift), "m e")
    yield draw.text(right, bottom + 36, "FLOP per byte", "e")
    yield draw.text("0", 12, unit)


def _tick(power: int) -> str:
    return number_text(10.0**power) if power >= -3 else f"1e{power}"


def _ceilings(axes: _Axes, roofline: Roofline) -> Iterator[str]:
    low = max(10.0**axes.x_low, 10.0**axes.y_low / roofline.copy_tflop_per_byte)
    ridge = roofline.ridge_flop_per_byte or 10.0**axes.x_high
    yield _line(axes, low, roofline.ceiling(low), ridge, roofline.ceiling(ridge), palette.SECONDARY)
    if roofline.gemm_tflop_per_s:
        peak = roofline.gemm_tflop_per_s
        yield _line(axes, ridge, peak, 10.0**axes.x_high, peak, palette.BASELINE)


def _line(axes: _Axes, x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return (
        f'<line class="c" stroke="{colour}" x1="{draw.percent(axes.x(x1))}" y1="{axes.y(y1):.1f}" '
        f'x2="{draw.percent(axes.x(x2))}" y2="{axes.y(y2):.1f}"/>'
    )


def _dots(axes: _Axes, roofline: Roofline) -> Iterator[str]:
    ridge = roofline.ridge_flop_per_byte
    shapes: dict[str, None] = {}
    for node in roofline.nodes:
        x, y = _place(axes, node)
        side = "f" if ridge and (node.intensity_flop_per_byte or 0.0) > ridge else "b"
        shape = f'<circle class="{side}" cx="{x:.1f}%" cy="{y:.0f}" r="{_radius(node, roofline):.0f}"/>'
        # Equal layers give equal dots: one stands for all.
        shapes[shape] = None
    yield from shapes


def _radius(node: NodeEvent, roofline: Roofline) -> float:
    longest = roofline.nodes[0].latency_ms or 1.0
    return _MIN_RADIUS + (_MAX_RADIUS - _MIN_RADIUS) * math.sqrt(node.latency_ms / longest)


def _names(axes: _Axes, roofline: Roofline) -> Iterator[str]:
    """Name the ceilings, and the largest nodes whose name covers no other name and no other dot."""
    taken = [_box(name, x, y, "e") for name, x, y in _ceiling_names(axes, roofline)]
    yield from (draw.text(draw.percent(x), y, name, "h e") for name, x, y in _ceiling_names(axes, roofline))
    dots = [_place(axes, node) for node in roofline.nodes]
    named: list[_Place] = []
    for node, dot in zip(roofline.nodes, dots, strict=True):
        if len(named) == _MAX_LABELS:
            return
        if any(_is_same(dot, other) for other in named):
            continue
        name = numbers.shortened(node_name(node.node, node.op), _MAX_LABEL)
        offset = _radius(node, roofline) + 5
        others = [_box_of(other) for other in dots if not _is_same(dot, other)]
        for side, shift in (("", offset), ("e", -offset)):
            box = _box(name, dot[0] + 100 * shift / _NARROW_PX, dot[1] + 4, side)
            if _is_inside(box) and not any(_overlap(box, other) for other in (*taken, *others)):
                taken.append(box)
                named.append(dot)
                yield draw.text(draw.percent(dot[0]), dot[1] + 4, name, f"h {side}".strip(), dx=shift)
                break


def _place(axes: _Axes, node: NodeEvent) -> _Place:
    return axes.x(node.intensity_flop_per_byte or 1.0), axes.y(node.tflop_per_s or 1.0)


def _is_same(one: _Place, two: _Place) -> bool:
    return abs(one[0] - two[0]) < _SAME_PERCENT and abs(one[1] - two[1]) < _SAME_PX


def _box_of(dot: _Place) -> _Box:
    width = 100 * _MIN_RADIUS / _NARROW_PX
    return dot[0] - width, dot[0] + width, dot[1] - _MIN_RADIUS, dot[1] + _MIN_RADIUS


def _ceiling_names(axes: _Axes, roofline: Roofline) -> Iterator[tuple[str, float, float]]:
    right = 100 - _RIGHT - 0.5
    if roofline.gemm_tflop_per_s:
        name = f"matrix product, {rate_text(roofline.gemm_tflop_per_s)}"
        yield name, right, axes.y(roofline.gemm_tflop_per_s) - 8
    # Above the slope, where no node can be.
    ridge = roofline.ridge_flop_per_byte or 10.0**axes.x_high
    middle = math.sqrt(max(10.0**axes.x_low, 10.0**axes.y_low / roofline.copy_tflop_per_byte) * ridge)
    yield (
        f"copy, {roofline.copy_tflop_per_byte * 1e3:,.0f} GB/s", axes.x(middle) - 1.5,
        axes.y(roofline.ceiling(middle)) - 8,
    )  # fmt: skip


def _box(name: str, x: float, y: float, side: str) -> _Box:
    """What a name covers in the narrow plot."""
    width = 100 * _CHARACTER_PX * len(name) / _NARROW_PX
    left = x - width if side == "e" else x
    return left, left + width, y - 13, y + 4


def _is_inside(box: _Box) -> bool:
    return box[0] >= draw.GUTTER and box[1] <= 100


def _overlap(one: _Box, two: _Box) -> bool:
    return one[0] < two[1] and two[0] < one[1] and one[2] < two[3] and two[2] < one[3]
