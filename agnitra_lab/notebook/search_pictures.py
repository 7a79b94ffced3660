"""The pictures of a kernel search: how it went, and which configs it tried.

As the profile's pictures they are drawn in percent of their width and pixels of their height. What a line means is in
its pattern and width as well as in its colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from agnitra_lab.contracts.search import Trial
from agnitra_lab.notebook.profile_pictures import canvas, percent, text
from agnitra_lab.notebook.search_facts import Searched
from agnitra_lab.report import numbers, palette
from agnitra_lab.report.dashboard_sections import microseconds

SEARCH_HEIGHT = 214
PARALLEL_HEIGHT = 240
MAX_CURVES = 3
_LEFT, _RIGHT = 11.0, 96.0
_TOP, _BOTTOM = 14.0, 150.0
_COLOURS = (palette.CANDIDATE, palette.SECONDARY, palette.BASELINE)
_DASHES = ("", "8 5", "2 4")
_MAX_LINES = 80
_MAX_AXES = 9
_AXIS_TOP, _AXIS_BOTTOM = 34.0, 196.0
_AXIS_LEFT, _AXIS_RIGHT = 5.0, 90.0
_MAX_NAME = 16
_BEST_SHARE = 0.25
# Numbers stand on the lines: a rim in the panel's colour keeps them readable.
_HALO = f"text{{paint-order:stroke;stroke:{palette.PANEL};stroke-width:4px}}"


def search_picture(searches: Sequence[Searched]) -> str:
    """Draw each search beside the optimum of its space, or beside its best where nobody knows that one.

    Every trial is a dot, the best so far a line, 1 the optimum; what is slower than `_ratio_cap` lies at the top edge.
    """
    shown = [search for search in searches[:MAX_CURVES] if search.best_ms]
    if not shown:
        return canvas(SEARCH_HEIGHT, text("0", 24, "Nothing measured yet.", "m"))
    curves = [_ratios(search) for search in shown]
    cap = math.log(_ratio_cap(curves))
    num_trials = max(map(len, curves))

    def x(index: int) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (index + 0.5) / num_trials

    def y(ratio: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * min(1.0, max(0.0, math.log(ratio)) / cap)

    are_known = [search.optimum_ms is not None for search in shown]
    base = "optimum" if all(are_known) else "best" if not any(are_known) else "opt./best"
    shapes = [text("0", y(1.0) + 4, base, "m"), text("0", y(math.exp(cap)) + 4, f"{math.exp(cap):.2f}× of it", "m")]
    shapes.append(_stretched(f"M{_LEFT} {_TOP:.0f}H{_RIGHT}", SEARCH_HEIGHT, palette.GRID, 1, ""))
    shapes.append(_stretched(f"M{_LEFT} {_BOTTOM:.0f}H{_RIGHT}", SEARCH_HEIGHT, palette.TEXT, 1.2, "1 4"))
    for index, ratios in enumerate(curves):
        shapes += _curve(index, ratios, x, y)
    last = num_trials - 1
    shapes += [text(percent(x(0)), SEARCH_HEIGHT - 44, "trial 1", "m i")]
    shapes += [text(percent(x(last)), SEARCH_HEIGHT - 44, f"{num_trials}", "m i")] if last else []
    legend = "dot: one config, at the top edge a slower one; line: the best so far, numbered as in the table"
    shapes.append(text(percent(_LEFT), SEARCH_HEIGHT - 24, legend, "m"))
    which = (
        "thin dotted line: the optimum, known because every config of the space was measured"
        if all(are_known)
        else "thin dotted line: the best that was found; nobody has measured the whole space"
    )
    shapes.append(text(percent(_LEFT), SEARCH_HEIGHT - 7, which, "m"))
    return canvas(SEARCH_HEIGHT, "".join(shapes))


def parallel_picture(trials: Sequence[Trial], names: Sequence[str]) -> str:
    """Draw each config as a line across its parameters to its time on the right.

    The best is thick, the best quarter solid, the others thin and dashed; a line that ends before the time failed.

    Args:
        trials: of one search; of more than `_MAX_LINES` the fastest.
        names: parameters from left to right; more than `_MAX_AXES` are cut.
    """
    axes = list(names[:_MAX_AXES])
    timed = sorted((trial for trial in trials if trial.latency_ms), key=lambda trial: trial.latency_ms or 0.0)
    failed = [trial for trial in trials if not trial.latency_ms]
    if not timed or not axes:
        return canvas(PARALLEL_HEIGHT, text("0", 24, "Nothing measured yet.", "m"))
    shown = timed[:_MAX_LINES]
    levels = {name: sorted({trial.config.params.get(name, 0) for trial in trials}) for name in axes}
    low, high = math.log(shown[0].latency_ms or 1.0), math.log(shown[-1].latency_ms or 1.0)
    step = (_AXIS_RIGHT - _AXIS_LEFT) / len(axes)
    num_best = max(1, round(_BEST_SHARE * len(timed)))

    def points(trial: Trial) -> str:
        heights = [_level_y(levels[name], trial.config.params.get(name, 0)) for name in axes]
        if trial.latency_ms:
            heights.append(_time_y(math.log(trial.latency_ms), low, high))
        places = " ".join(f"{_AXIS_LEFT + step * at:.1f} {height:.0f}" for at, height in enumerate(heights))
        return f"M{places}"

    shapes = [_upright(_AXIS_LEFT + step * at) for at in range(len(axes) + 1)]
    # What is drawn last lies on top: the best does.
    groups = (
        (failed[: _MAX_LINES // 4], palette.WARNING, 1.0, "1 5"),
        (shown[num_best:], palette.MUTED, 1.0, "5 4"),
        (shown[1:num_best], palette.SECONDARY, 1.6, ""),
        (shown[:1], palette.CANDIDATE, 3.5, ""),
    )
    shapes += [
        _stretched("".join(map(points, members)), PARALLEL_HEIGHT, colour, width, dash)
        for members, colour, width, dash in groups
        if members
    ]
    shapes += [_parameter_axis(name, levels[name], _AXIS_LEFT + step * at) for at, name in enumerate(axes)]
    shapes.append(_time_axis(shown, low, high))
    legend = "thick: the best; solid: the best quarter; dashed: the others"
    legend += "; dotted, without a time: failed" if failed else ""
    shapes.append(text(percent(_AXIS_LEFT), PARALLEL_HEIGHT - 14, legend, "m"))
    return canvas(PARALLEL_HEIGHT, "".join(shapes), style=_HALO)


def _ratios(search: Searched) -> list[float | None]:
    """Each trial's time over the optimum, or over the best where that is not known."""
    base = search.optimum_ms or search.best_ms or 1.0
    return [latency / base if latency else None for latency in search.latencies_ms]


def _ratio_cap(curves: Sequence[Sequence[float | None]]) -> float:
    """The highest ratio that is drawn to scale: a few hopeless configs would squeeze all lines into one."""
    ratios = [ratio for curve in curves for ratio in curve if ratio]
    starts = [next((ratio for ratio in curve if ratio), 1.0) for curve in curves]
    return max(1.05, min(max(ratios), max(1.5, 1.1 * max(starts))))


def _curve(
    index: int, ratios: Sequence[float | None], x: Callable[[int], float], y: Callable[[float], float]
) -> list[str]:
    dots = "".join(f"M{x(at):.2f} {y(ratio):.0f}h0" for at, ratio in enumerate(ratios) if ratio)
    shapes = [_stretched(dots, SEARCH_HEIGHT, palette.MUTED, 7, "", ' stroke-linecap="round"')]
    shapes.append(_stretched(_best_so_far(ratios, x, y), SEARCH_HEIGHT, _COLOURS[index], 3, _DASHES[index]))
    best = min(ratio for ratio in ratios if ratio)
    # Searches that end at the same height still have a number each.
    return [*shapes, text(percent(_RIGHT), y(best) - 4, str(index + 1), dx=2 + 12 * index)]


def _parameter_axis(name: str, values: Sequence[int], x: float) -> str:
    parts = [text(percent(x), 14, numbers.shortened(numbers.plain_text(name), _MAX_NAME), "i")]
    # A label every 13 pixels is as many as can be read.
    every = max(1, math.ceil(len(values) * 13 / (_AXIS_BOTTOM - _AXIS_TOP)))
    parts += [
        text(percent(x), _level_y(values, value) + 4, str(value), "m", dx=5)
        for at, value in enumerate(values)
        if at % every == 0
    ]
    return "".join(parts)


def _time_axis(shown: Sequence[Trial], low: float, high: float) -> str:
    parts = [text(percent(_AXIS_RIGHT), 14, "time", "i")]
    ends = (shown[0], shown[-1]) if high > low else shown[:1]
    for trial in ends:
        at = _time_y(math.log(trial.latency_ms or 1.0), low, high)
        parts.append(text(percent(_AXIS_RIGHT), at + 4, microseconds(trial.latency_ms or 0.0), "m", dx=6))
    return "".join(parts)


def _upright(x: float) -> str:
    at = percent(x)
    return f'<line x1="{at}" x2="{at}" y1="{_AXIS_TOP:.0f}" y2="{_AXIS_BOTTOM:.0f}" stroke="{palette.EDGE}"/>'


def _level_y(values: Sequence[int], value: int) -> float:
    """Small values stand below; one value alone in the middle."""
    share = values.index(value) / (len(values) - 1) if len(values) > 1 else 0.5
    return _AXIS_BOTTOM - (_AXIS_BOTTOM - _AXIS_TOP) * share


def _time_y(value: float, low: float, high: float) -> float:
    """Short times stand below, as small values do."""
    share = (value - low) / (high - low) if high > low else 0.5
    return _AXIS_BOTTOM - (_AXIS_BOTTOM - _AXIS_TOP) * share


def _best_so_far(values: Sequence[float | None], x: Callable[[int], float], y: Callable[[float], float]) -> str:
    """The path of the best so far, from trial to trial."""
    best: float | None = None
    path = ""
    for index, value in enumerate(values):
        if value and (best is None or value < best):
            path += f"M{x(index):.2f} {y(value):.0f}" if best is None else f"H{x(index):.2f}V{y(value):.0f}"
            best = value
    return f"{path}H{x(len(values) - 1):.2f}"


def _stretched(path: str, height: int, colour: str, width: float, dash: str, more: str = "") -> str:
    """A path with x in percent of the picture and y in its pixels; the stroke keeps its width."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<svg width="100%" height="{height}" viewBox="0 0 100 {height}" preserveAspectRatio="none">'
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashes}{more} '
        'vector-effect="non-scaling-stroke"/></svg>'
    )
