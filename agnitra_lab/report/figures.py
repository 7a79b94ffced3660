"""Plotly figures of a report. The values in them are the report's own numbers, unrounded.

Plotly is imported inside the functions, and its renderers never: they import nbformat, whose schema library builds
some 38 grammars at import (3 to 12 s on two cores), and they cannot be changed without changing the user's own figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from agnitra_lab.contracts.report import Report
from agnitra_lab.report import numbers, palette, sections, svg
from agnitra_lab.report.clean import redacted_report

PLOTLY_MIME = "application/vnd.plotly.v1+json"
CONFIG = {"displayModeBar": False, "responsive": True}
# Bars of the two sides differ in pattern as well as in colour.
# Upright stripes: JupyterLab keeps a PNG of each chart in the notebook, and slanted ones triple its size.
_HATCH = {"shape": "|", "fgcolor": palette.PANEL, "size": 10, "solidity": 0.4}
_PADDING = 24
_MAX_OPS = 8
_MAX_NAME = 34
_MAX_LEGEND = 48


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
                "xref": "container",
                "pad": {"l": _PADDING, "t": 18},
                "y": 1,
                "yanchor": "top",
                "yref": "container",
            },
            "xaxis": axis,
            "yaxis": axis,
            "colorway": [palette.CANDIDATE, palette.BASELINE, palette.SECONDARY, palette.WARNING],
            "margin": {"l": _PADDING, "r": 96, "t": 56, "b": 48},
            "hoverlabel": {"bgcolor": palette.SURFACE, "font": {"color": palette.TEXT}, "bordercolor": palette.EDGE},
            "legend": {"orientation": "h", "y": -0.26, "yanchor": "top", "font": {"color": palette.MUTED}},
            "showlegend": False,
            "bargap": 0.4,
        }
    }


def latency_figure(report: Report) -> Any:
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


def ops_figure(report: Report) -> Any:
    """The ops with the largest share of the self time."""
    events = sorted(report.telemetry.events, key=lambda event: event.share)[-_MAX_OPS:]
    names = [numbers.op_label(event) for event in events]
    figure = _bars_figure("Top ops by share of self time", "share of self time", names)
    for row, event in enumerate(events):
        _add_bar(figure, row, event.share, numbers.share(event.share), {"color": palette.SECONDARY})
    figure.update_xaxes(tickformat=".0%")
    return figure


def candidates_figure(report: Report) -> Any:
    """Speed-up of every measured candidate with its interval; 1 is the baseline."""
    measured = [(row, row.comparison) for row in reversed(sections.ranked(report)) if row.comparison is not None]
    title = f"Speed-up over {_label(report.comparison.baseline)}"
    figure = _bars_figure(title, "times as fast", [candidate.name for candidate, _ in measured])
    for row, (candidate, comparison) in enumerate(measured):
        speedup = comparison.speedup
        colour = palette.CANDIDATE if candidate.status == "kept" else palette.MUTED
        _add_bar(figure, row, speedup.median, numbers.times(speedup.median), {"color": colour})
        _add_whisker(figure, row, speedup.low, speedup.high, "%{x:.3f}×")
    figure.add_vline(x=1, line={"color": palette.TEXT, "dash": "dot", "width": 1})
    return figure


def search_figure(report: Report) -> Any:
    """Best kernel time so far against the trial, one line for each search."""
    figure = _figure("Kernel search: best so far", x_title="trial", num_rows=_MAX_OPS)
    figure.update_yaxes(title_text="ms", title_standoff=12)
    dashes = ("solid", "dash", "dot", "dashdot")
    for index, search in enumerate(report.searches):
        name = _label(f"{search.space_template} by {search.sampler}, {search.measured_on}", _MAX_LEGEND)
        measured = [(trial.index, trial.latency_ms) for trial in search.trials if trial.latency_ms is not None]
        best_so_far = [min(latency for _, latency in measured[: end + 1]) for end in range(len(measured))]
        figure.add_scatter(
            x=[position for position, _ in measured], y=best_so_far, mode="lines", name=name,
            line={"shape": "hv", "width": 3, "dash": dashes[index % len(dashes)]},
            hovertemplate="trial %{x}: %{y:.4g} ms<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[position for position, _ in measured], y=[latency for _, latency in measured], mode="markers",
            name="every trial", legendgroup="trials", showlegend=index == 0,
            marker={"color": palette.MUTED, "size": 7, "symbol": "circle-open"},
            hovertemplate="trial %{x}: %{y:.4g} ms<extra></extra>",
        )  # fmt: skip
    figure.update_layout(showlegend=True, margin_r=_PADDING)
    return figure


FIGURES: dict[str, tuple[Callable[[Report], Any], Callable[[Report], str]]] = {
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


def to_bundle(figure: Any, static_svg: str, text: str) -> dict[str, Any]:
    """Build the mime bundle of a figure by hand, for `display(bundle, raw=True)`.

    Args:
        figure: a Plotly figure.
        static_svg: the picture for front ends that show no Plotly.
        text: what a screen reader or a terminal gets.
    """
    return {PLOTLY_MIME: {**plain_figure(figure), "config": CONFIG}, "image/svg+xml": static_svg, "text/plain": text}


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
        bundles[name] = to_bundle(figure, draw_static(report), f"Chart: {figure.layout.title.text}.")
    return bundles


def plain_figure(figure: Any) -> dict[str, Any]:
    """A figure's data and layout as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(figure.to_plotly_json(), default=list))
    return plain


def _figure(title: str, *, x_title: str, num_rows: int) -> Any:
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(
        template=agnitra_template(), title_text=title, height=118 + 36 * max(num_rows, 3), xaxis_title_text=x_title
    )
    return figure


def _bars_figure(title: str, x_title: str, names: Sequence[str]) -> Any:
    """A figure with one row for each name, first name at the bottom. Rows are told apart by position: two ops may
    have one name, and shortened names may coincide."""
    figure = _figure(title, x_title=x_title, num_rows=len(names))
    rows = [_row_key(row) for row in range(len(names))]
    # A blank title is what keeps the longest name off the edge: an automatic margin is as wide as the labels.
    figure.update_yaxes(title={"text": " ", "standoff": 4, "font": {"size": 14}})
    figure.update_yaxes(type="category", tickmode="array", tickvals=rows, ticktext=[_label(name) for name in names])
    return figure


def _add_bar(figure: Any, row: int, value: float, text: str, marker: dict[str, Any]) -> None:
    """A bar, and its value printed in the right margin, where no whisker runs through it."""
    key = _row_key(row)
    figure.add_bar(x=[value], y=[key], orientation="h", marker=marker, hovertemplate=f"{text}<extra></extra>")
    figure.add_annotation(
        xref="paper", x=1.02, y=key, text=f"<b>{text}</b>", xanchor="left", showarrow=False, font={"size": 13}
    )


def _add_whisker(figure: Any, row: int, low: float, high: float, number: str) -> None:
    figure.add_scatter(
        x=[low, high], y=[_row_key(row)] * 2, mode="lines+markers", line={"color": palette.TEXT, "width": 2},
        marker={"symbol": "line-ns-open", "size": 12, "color": palette.TEXT, "line": {"width": 2}},
        hovertemplate=f"{number}<extra></extra>",
    )  # fmt: skip


def _row_key(row: int) -> str:
    return f"row {row}"


def _label(name: str, length: int = _MAX_NAME) -> str:
    """A name that Plotly shows as it is: its labels interpret a subset of HTML and %{...}."""
    text = numbers.shortened(numbers.plain_text(name), length)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
