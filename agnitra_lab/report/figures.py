"""Plotly figures of a report, as the plain JSON that plotly.js draws. Their values are the report's own, unrounded.

Plotly's own figure objects are not used: importing and filling them takes 1 s of a run (two cores of a Xeon), for
checks that the tests make once. Nor are its renderers: they import nbformat, whose schema library builds some 38
grammars at import (3 to 12 s), and they cannot be changed without changing the user's own figures.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from agnitra_lab.contracts.report import Report
from agnitra_lab.report import numbers, palette, sections, svg
from agnitra_lab.report.clean import redacted_report

PLOTLY_MIME = "application/vnd.plotly.v1+json"
CONFIG = {"displayModeBar": False, "responsive": True}
# Bars of the two sides differ in pattern as well as in colour.
# Upright stripes: JupyterLab keeps a PNG of each chart in the notebook, and slanted ones triple its size.
_HATCH = {"fgcolor": palette.PANEL, "shape": "|", "size": 10, "solidity": 0.4}
_PADDING = 24
_MAX_OPS = 8
_MAX_NAME = 34
_MAX_LEGEND = 48

Figure = dict[str, Any]
"""What plotly.js takes: `data` and `layout`, plain JSON values."""


def agnitra_template() -> dict[str, Any]:
    """The "agnitra" look as a plain template, applied to each figure and never made the default."""
    axis = {
        "gridcolor": palette.GRID,
        "zerolinecolor": palette.GRID,
        "linecolor": palette.EDGE,
        "tickfont": {"color": palette.MUTED},
        "title": {"font": {"color": palette.MUTED, "size": 12}},
        "automargin": True,
        "ticks": "outside",
        "ticklen": 8,
        "tickcolor": palette.PANEL,
    }
    return {
        "layout": {
            "paper_bgcolor": palette.PANEL,
            "plot_bgcolor": palette.PANEL,
            "font": {
                "color": palette.TEXT,
                "size": 13,
                "family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif",
            },
            "title": {
                "font": {"size": 15, "color": palette.TEXT},
                "x": 0,
                "pad": {"l": _PADDING, "t": 18},
                "xref": "container",
                "y": 1,
                "yanchor": "top",
                "yref": "container",
            },
            "xaxis": axis,
            "yaxis": axis,
            "colorway": [palette.CANDIDATE, palette.BASELINE, palette.SECONDARY, palette.WARNING],
            "margin": {"l": _PADDING, "r": 96, "t": 56, "b": 48},
            "hoverlabel": {"font": {"color": palette.TEXT}, "bgcolor": palette.SURFACE, "bordercolor": palette.EDGE},
            "legend": {"font": {"color": palette.MUTED}, "orientation": "h", "y": -0.26, "yanchor": "top"},
            "showlegend": False,
            "bargap": 0.4,
        }
    }


def latency_figure(report: Report) -> Figure:
    """Baseline against candidate: medians, printed values, p20 to p80 whiskers."""
    comparison = report.comparison
    sides = (
        (comparison.candidate, comparison.candidate_latency, palette.CANDIDATE, None),
        (comparison.baseline, comparison.baseline_latency, palette.BASELINE, _HATCH),
    )
    figure = _bars_figure("Latency, median with p20 to p80", "ms", [name for name, *_ in sides])
    for row, (_, latency, colour, pattern) in enumerate(sides):
        marker = {"color": colour, **({"pattern": pattern} if pattern else {})}
        _add_bar(figure, row, latency.latency_ms_p50, numbers.milliseconds(latency.latency_ms_p50), marker)
        _add_whisker(figure, row, latency.latency_ms_p20, latency.latency_ms_p80, "%{x:.4g} ms")
    return figure


def ops_figure(report: Report) -> Figure:
    """The ops with the largest share of the self time."""
    events = sorted(report.telemetry.events, key=lambda event: event.share)[-_MAX_OPS:]
    names = [numbers.op_label(event) for event in events]
    figure = _bars_figure("Top ops by share of self time", "share of self time", names)
    for row, event in enumerate(events):
        _add_bar(figure, row, event.share, numbers.share(event.share), {"color": palette.SECONDARY})
    figure["layout"]["xaxis"]["tickformat"] = ".0%"
    return figure


def candidates_figure(report: Report) -> Figure:
    """Speed-up of every measured candidate with its interval; 1 is the baseline."""
    measured = [(row, row.comparison) for row in reversed(sections.ranked(report)) if row.comparison is not None]
    title = f"Speed-up over {_label(report.comparison.baseline)}"
    figure = _bars_figure(title, "times as fast", [candidate.name for candidate, _ in measured])
    for row, (candidate, comparison) in enumerate(measured):
        speedup = comparison.speedup
        colour = palette.CANDIDATE if candidate.status == "kept" else palette.MUTED
        _add_bar(figure, row, speedup.median, numbers.times(speedup.median), {"color": colour})
        _add_whisker(figure, row, speedup.low, speedup.high, "%{x:.3f}×")
    figure["layout"]["shapes"] = [
        {
            "line": {"color": palette.TEXT, "dash": "dot", "width": 1}, "type": "line", "x0": 1, "x1": 1, "xref": "x",
            "y0": 0, "y1": 1, "yref": "y domain",
        }
    ]  # fmt: skip
    return figure


def search_figure(report: Report) -> Figure:
    """Best kernel time so far against the trial, one line for each search."""
    figure = _figure("Kernel search: best so far", x_title="trial", num_rows=_MAX_OPS)
    figure["layout"]["yaxis"] = {"title": {"text": "ms", "standoff": 12}}
    dashes = ("solid", "dash", "dot", "dashdot")
    for index, search in enumerate(report.searches):
        name = _label(f"{search.space_template} by {search.sampler}, {search.measured_on}", _MAX_LEGEND)
        measured = [(trial.index, trial.latency_ms) for trial in search.trials if trial.latency_ms is not None]
        best_so_far = [min(latency for _, latency in measured[: end + 1]) for end in range(len(measured))]
        line = {
            "hovertemplate": "trial %{x}: %{y:.4g} ms<extra></extra>",
            "line": {"dash": dashes[index % len(dashes)], "shape": "hv", "width": 3}, "mode": "lines", "name": name,
            "x": [position for position, _ in measured], "y": best_so_far, "type": "scatter",
        }  # fmt: skip
        points = {
            "hovertemplate": "trial %{x}: %{y:.4g} ms<extra></extra>", "legendgroup": "trials",
            "marker": {"color": palette.MUTED, "size": 7, "symbol": "circle-open"}, "mode": "markers",
            "name": "every trial", "showlegend": index == 0, "x": [position for position, _ in measured],
            "y": [latency for _, latency in measured], "type": "scatter",
        }  # fmt: skip
        figure["data"] += [line, points]
    figure["layout"] |= {"margin": {"r": _PADDING}, "showlegend": True}
    return figure


FIGURES: dict[str, tuple[Callable[[Report], Figure], Callable[[Report], str]]] = {
    "latency": (latency_figure, svg.latency_chart),
    "candidates": (candidates_figure, svg.candidates_chart),
    "ops": (ops_figure, svg.ops_chart),
    "search": (search_figure, svg.search_chart),
}
"""Name -> (Plotly figure, the same as static SVG)."""


def figure_names(report: Report) -> tuple[str, ...]:
    """The figures that this report has something to show in."""
    has = {"latency": True, "candidates": bool(report.candidates), "ops": bool(report.telemetry.events)}
    has["search"] = any(trial.latency_ms for search in report.searches for trial in search.trials)
    return tuple(name for name in FIGURES if has[name])


def to_bundle(figure: Figure, static_svg: str, text: str) -> dict[str, Any]:
    """Build the mime bundle of a figure by hand, for `display(bundle, raw=True)`.

    Args:
        figure: what plotly.js draws.
        static_svg: the picture for front ends that show no Plotly.
        text: what a screen reader or a terminal gets.
    """
    return {PLOTLY_MIME: {**figure, "config": CONFIG}, "image/svg+xml": static_svg, "text/plain": text}


def small_latency_bundle(report: Report) -> dict[str, Any]:
    """The A/B of a notebook's card, as small as it can be.

    JupyterLab writes its JSON line by line into the notebook, and adds a PNG of what it drew.
    """
    report = redacted_report(report)
    comparison = report.comparison
    sides = (
        (comparison.candidate, comparison.candidate_latency, palette.CANDIDATE, None),
        (comparison.baseline, comparison.baseline_latency, palette.BASELINE, _HATCH),
    )
    bars = [
        {
            "type": "bar", "orientation": "h", "x": [latency.latency_ms_p50],
            "y": [f"{_label(name)}<br><b>{numbers.milliseconds(latency.latency_ms_p50)}</b>"],
            "marker": {"color": colour, **({"pattern": pattern} if pattern else {})},
            "error_x": {
                "type": "data", "symmetric": False, "color": palette.TEXT,
                "array": [latency.latency_ms_p80 - latency.latency_ms_p50],
                "arrayminus": [latency.latency_ms_p50 - latency.latency_ms_p20],
            },
            "hovertemplate": "%{x:.4g} ms<extra></extra>",
        }
        for name, latency, colour, pattern in sides
    ]  # fmt: skip
    layout = {
        "height": 132, "showlegend": False, "bargap": 0.35, "paper_bgcolor": palette.PANEL,
        "plot_bgcolor": palette.PANEL, "margin": {"l": _PADDING, "r": _PADDING, "t": 14, "b": 14},
        "font": {"color": palette.TEXT, "size": 12, "family": "system-ui, sans-serif"},
        "xaxis": {"showticklabels": False, "gridcolor": palette.GRID, "zerolinecolor": palette.GRID},
        "yaxis": {"automargin": True},
    }  # fmt: skip
    text = f"Chart: latency, median with p20 to p80. {_latency_sentence(report)}"
    return {
        PLOTLY_MIME: {"data": bars, "layout": layout, "config": CONFIG},
        "image/svg+xml": svg.latency_chart(report),
        "text/plain": text,
    }


def _latency_sentence(report: Report) -> str:
    comparison = report.comparison
    sides = (
        (comparison.baseline, comparison.baseline_latency.latency_ms_p50),
        (comparison.candidate, comparison.candidate_latency.latency_ms_p50),
    )
    return ", ".join(f"{name} {numbers.milliseconds(value)}" for name, value in sides) + "."


def report_bundles(report: Report) -> dict[str, dict[str, Any]]:
    """Name -> mime bundle of every figure that the report has something to show in."""
    report = redacted_report(report)
    bundles = {}
    for name in figure_names(report):
        draw, draw_static = FIGURES[name]
        figure = draw(report)
        bundles[name] = to_bundle(figure, draw_static(report), f"Chart: {figure['layout']['title']['text']}.")
    return bundles


@lru_cache(maxsize=1)
def _template_json() -> str:
    """Plotly's own template with ours laid over it, as JSON: each figure has a copy that may be changed."""
    theirs = json.loads(pkgutil.get_data("plotly", "package_data/templates/plotly.json") or "{}")
    laid = _laid_over({"data": theirs.get("data", {}), "layout": theirs.get("layout", {})}, agnitra_template())
    return json.dumps(laid)


def _laid_over(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        name: _laid_over(under[name], value) if isinstance(value, dict) and isinstance(under.get(name), dict) else value
        for name, value in over.items()
    }
    return {**under, **both}


def _figure(title: str, *, x_title: str, num_rows: int) -> Figure:
    layout = {
        "template": json.loads(_template_json()),
        "title": {"text": title},
        "xaxis": {"title": {"text": x_title}},
        "height": 118 + 36 * max(num_rows, 3),
    }
    return {"data": [], "layout": layout}


def _bars_figure(title: str, x_title: str, names: Sequence[str]) -> Figure:
    """A figure with one row for each name, first name at the bottom. Rows are told apart by position: two ops may
    have one name, and shortened names may coincide."""
    figure = _figure(title, x_title=x_title, num_rows=len(names))
    rows = [_row_key(row) for row in range(len(names))]
    # A blank title is what keeps the longest name off the edge: an automatic margin is as wide as the labels.
    figure["layout"]["yaxis"] = {
        "title": {"font": {"size": 14}, "text": " ", "standoff": 4}, "type": "category", "tickmode": "array",
        "tickvals": rows, "ticktext": [_label(name) for name in names],
    }  # fmt: skip
    return figure


def _add_bar(figure: Figure, row: int, value: float, text: str, marker: dict[str, Any]) -> None:
    """A bar, and its value printed in the right margin, where no whisker runs through it."""
    key = _row_key(row)
    bar = {
        "hovertemplate": f"{text}<extra></extra>", "marker": marker, "orientation": "h", "x": [value], "y": [key],
        "type": "bar",
    }  # fmt: skip
    figure["data"].append(bar)
    note = {
        "font": {"size": 13}, "showarrow": False, "text": f"<b>{text}</b>", "x": 1.02, "xanchor": "left",
        "xref": "paper", "y": key,
    }  # fmt: skip
    figure["layout"].setdefault("annotations", []).append(note)


def _add_whisker(figure: Figure, row: int, low: float, high: float, number: str) -> None:
    whisker = {
        "hovertemplate": f"{number}<extra></extra>", "line": {"color": palette.TEXT, "width": 2},
        "marker": {"color": palette.TEXT, "line": {"width": 2}, "size": 12, "symbol": "line-ns-open"},
        "mode": "lines+markers", "x": [low, high], "y": [_row_key(row)] * 2, "type": "scatter",
    }  # fmt: skip
    figure["data"].append(whisker)


def _row_key(row: int) -> str:
    return f"row {row}"


def _label(name: str, length: int = _MAX_NAME) -> str:
    """A name that Plotly shows as it is: its labels interpret a subset of HTML and %{...}."""
    text = numbers.shortened(numbers.plain_text(name), length)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
