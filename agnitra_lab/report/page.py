"""The report as one HTML file: opens from disk, offline, with no request; readable with scripts off."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from agnitra_lab.contracts.report import Report
from agnitra_lab.report import figures, metrics, sections, svg
from agnitra_lab.report.clean import redacted_report
from agnitra_lab.report.html import Html, join, tag
from agnitra_lab.report.page_style import BUTTONS_SCRIPT, CHARTS_SCRIPT, STYLE

_ALTERNATIVES = {
    "latency": "Median latency of baseline and candidate; the numbers are in the table of candidates.",
    "candidates": "Speed-up of every measured candidate; the numbers are in the table of candidates.",
    "ops": "Ops by share of self time; the numbers are in the table of top ops.",
    "search": "Best kernel time of each search; the numbers are in the report's JSON.",
}


def page_html(report: Report, *, has_live_charts: bool = True) -> str:
    """Render the report as a self-contained HTML document.

    Args:
        report: the finished run; it is redacted first.
        has_live_charts: whether Plotly is inlined (about 5 MB); without it the charts are static pictures.
    """
    report = redacted_report(report)
    scripts = [BUTTONS_SCRIPT]
    if has_live_charts:
        from plotly.offline import get_plotlyjs

        scripts += [get_plotlyjs(), CHARTS_SCRIPT]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(scripts)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="dark"),
        tag("title", f"{report.title}: {report.headline}"),
        tag("style", Html(STYLE)),
    )
    body = tag(
        "body",
        tag("a", "Skip to the JSON artifacts", href="#artifacts", class_="skip"),
        _main(report),
        _figure_values(report) if has_live_charts else None,
        *(tag("script", Html(script)) for script in scripts),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _policy(scripts: list[str]) -> str:
    """Allow these scripts and nothing else: no request, no script that came in with a name or an answer."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'"


def _main(report: Report) -> Html:
    return tag(
        "main",
        _header(report),
        tag("ul", *(_metric(metric) for metric in metrics.metric_cards(report)), class_="metrics"),
        tag("section", *(_figure(report, name) for name in figures.figure_names(report)), class_="two"),
        _panel(_table(sections.candidate_table(report))),
        tag(
            "section",
            _plain_panel(_facts("What backs this verdict", sections.proof_facts(report))),
            _plain_panel(_facts("Agent notes", sections.agent_notes(report))),
            class_="two",
        ),
        _panel(
            tag("h2", "Bottleneck"),
            tag("p", sections.bottleneck_sentence(report), class_="lead"),
            _table(sections.ops_table(report)),
        ),
        *(_panel(_table(table)) for table in sections.region_tables(report)),
        _panel(_table(sections.checkpoint_table(report))),
        _panel(_table(sections.suggestion_table(report))),
        _panel(_table(sections.patch_table(report))),
        tag(
            "section",
            _plain_panel(_facts("Usage event", sections.usage_facts(report))),
            _plain_panel(_facts("This run", sections.run_facts(report))),
            class_="two",
        ),
        _artifacts(report),
        tag("footer", "Made by Agnitra Lab. Every number on this page is in report.json."),
    )


def _header(report: Report) -> Html:
    verdict, rival = sections.verdict(report), sections.head_to_head(report)
    advice, banner = sections.advice(report), sections.banner(report)
    return tag(
        "header",
        tag("p", tag("strong", "Agnitra Lab"), f" · {sections.kicker(report)}", class_="brand"),
        tag("span", sections.VERDICT_WORDS[verdict], class_=f"pill {verdict}"),
        tag("h1", report.headline),
        tag("p", rival, class_="rival") if rival else None,
        tag("p", advice, class_="lead") if advice else None,
        tag("p", tag("strong", "Note: "), banner, class_="banner") if banner else None,
    )


def _metric(metric: metrics.Metric) -> Html:
    return tag(
        "li",
        tag("p", metric.label, class_="label"),
        tag("p", metric.value, class_="value" if len(metric.value) <= 9 else "value long"),
        *(tag("p", line) for line in metrics.change_lines(metric)),
        tag("p", metric.note, class_="note"),
        class_=metric.state,
    )


def _figure(report: Report, name: str) -> Html:
    _, draw_static = figures.FIGURES[name]
    picture = tag("img", src=svg.data_uri(draw_static(report)), alt=_ALTERNATIVES[name], class_="static")
    return tag("figure", picture, id=f"figure-{name}", class_="panel")


def _figure_values(report: Report) -> Html:
    values: dict[str, Any] = {}
    for name in figures.figure_names(report):
        draw, _ = figures.FIGURES[name]
        values[name] = {**draw(report), "config": figures.CONFIG}
    # Inside a script element only "<" can end the element; in JSON it may be written as an escape.
    text = json.dumps(values).replace("<", "\\u003c")
    return tag("script", Html(text), type="application/json", id="figures")


def _panel(*children: Html | None) -> Html:
    return tag("section", *children, class_="panel")


def _plain_panel(*children: Html | None) -> Html:
    return tag("div", *children, class_="panel")


def _table(table: sections.Table) -> Html:
    if not table.rows:
        return join([tag("h2", table.caption), tag("p", table.note or "Nothing to list.", class_="note")])
    head = tag(
        "tr",
        *(tag("th", name, scope="col", class_=_class(table, index)) for index, name in enumerate(table.columns)),
    )
    body = tag("tbody", *(_row(table, index) for index in range(len(table.rows))))
    element = tag("table", tag("caption", table.caption), tag("thead", head), body)
    note = tag("p", table.note, class_="note") if table.note else None
    # A region that scrolls must be reachable by keyboard.
    return join([tag("div", element, class_="scroll", tabindex="0", role="region", aria_label=table.caption), note])


def _row(table: sections.Table, index: int) -> Html:
    first, *others = table.rows[index]
    cells = (tag("td", cell, class_=_class(table, column)) for column, cell in enumerate(others, start=1))
    return tag("tr", tag("th", first, scope="row"), *cells, class_="kept" if index == table.emphasised else None)


def _class(table: sections.Table, column: int) -> str | None:
    return "number" if column in table.numeric else None


def _facts(title: str, facts: sections.Facts) -> Html:
    pairs = (join([tag("dt", label), tag("dd", value)]) for label, value in facts)
    return join([tag("h2", title), tag("dl", *pairs)])


def _artifacts(report: Report) -> Html:
    return tag(
        "section",
        tag("h2", "JSON artifacts"),
        *(_artifact(*artifact) for artifact in sections.json_artifacts(report)),
        tag("output", id="status"),
        id="artifacts",
        class_="panel",
        tabindex="-1",
    )


def _artifact(title: str, file_name: str, text: str) -> Html:
    source = f"json-{file_name.partition('.')[0]}"

    def button(act: str, label: str) -> Html:
        return tag("button", label, type="button", data_act=act, data_source=source, data_file=file_name,
                   aria_label=f"{label} {file_name}")  # fmt: skip

    return tag(
        "div",
        tag(
            "details",
            tag("summary", f"{title} ", tag("span", file_name)),
            tag("pre", text, id=source, tabindex="0"),
        ),
        button("copy", "Copy"),
        button("download", "Download"),
        class_="artifact",
    )
