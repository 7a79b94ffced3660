"""The report card for a notebook: one self-painted block of plain HTML, and the same as plain text.

Inline styles and real elements only, limited to what JupyterLab's sanitizer keeps in an untrusted notebook (no style
sheet, script, inline SVG, id, flex or gap); charts are data-URI images with a text alternative, and every number in
them is in a table as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from agnitra_lab.contracts.report import Report
from agnitra_lab.report import metrics, numbers, palette, sections, svg
from agnitra_lab.report.clean import redacted_report
from agnitra_lab.report.html import Html, escape, join, tag

_SANS = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"
_MONO = "font-family:ui-monospace,'SF Mono',Menlo,Consolas,monospace"
_BLOCK = (
    f"background:{palette.SURFACE};color:{palette.TEXT};{_SANS};font-size:14px;line-height:1.5;"
    "padding:28px;border-radius:14px;max-width:1040px;box-sizing:border-box;overflow-x:auto"
)
_PANEL = f"background:{palette.PANEL};border:1px solid {palette.GRID};border-radius:10px;box-sizing:border-box"
_SECTION = f"{_PANEL};padding:18px 20px;margin:0 0 14px 0;overflow-x:auto"
_METRIC = (
    f"{_PANEL};padding:14px 14px 12px 14px;display:inline-block;vertical-align:top;width:19.2%;min-width:132px;"
    "min-height:190px"
)
_CHART = f"{_PANEL};padding:16px 18px;display:inline-block;vertical-align:top;width:49.5%;min-width:290px"
_MUTED = f"color:{palette.MUTED}"
_H2 = f"color:{palette.TEXT};{_SANS};font-size:15px;font-weight:600;margin:0 0 10px 0;line-height:1.4"
_CAPTION = f"caption-side:top;text-align:left;color:{palette.TEXT};font-size:15px;font-weight:600;padding:0 0 8px 0"
# JupyterLab lays tables out by their first row and its sanitizer drops the styles that would break a long name: so
# columns have widths, a narrow panel scrolls, and words longer than their column are cut (the text has them whole).
_MIN_TABLE_WIDTH = 720
_BOLD_WIDTH, _CHARACTER_WIDTH = 8.0, 7.0
_CELL_SPACING = 14
_MAX_WORD = 44
_TABLE = f"border-collapse:collapse;width:100%;background:{palette.PANEL};color:{palette.TEXT};font-size:13px"
# Front ends stripe rows and paint them on hover; a row with a background of its own is left alone.
_ROW = f"background:{palette.PANEL};border-top:1px solid {palette.GRID}"
_HEAD_ROW = f"background:{palette.PANEL}"
# A card has some two hundred cells, and a notebook may grow by 60 kB for one: a cell says its side, and no more. Front
# ends pad cells alike; what they align differs.
_HEAD = f"color:{palette.MUTED};font-weight:500"
_SUMMARY = f"cursor:pointer;color:{palette.ACCENT};font-weight:600;padding:4px 0"
_PRE = (
    f"background:{palette.SURFACE};color:{palette.TEXT};{_MONO};font-size:12px;line-height:1.45;padding:14px;"
    "border-radius:8px;margin:8px 0 0 0;max-height:360px;overflow:auto;white-space:pre"
)
_MAX_FILES, _SHOWN_DIGITS = 5, 12
_STATE_COLOURS = {
    "better": palette.ACCENT,
    "unchanged": palette.TEXT,
    "worse": palette.WARNING,
    "observed": palette.TEXT,
    "absent": palette.MUTED,
}

File = tuple[str, str, int, str]
"""Name, path, size in bytes and sha256 of an artifact."""


def card_html(report: Report, files: Sequence[File] = ()) -> str:
    """Render the card as one block of HTML for `display_data`.

    Args:
        report: the finished run; it is redacted first.
        files: its JSON files on disk.
    """
    report = redacted_report(report)
    return tag(
        "div",
        _header(report),
        _banner(report),
        _side_by_side([_metric(metric) for metric in metrics.metric_cards(report)], _METRIC),
        _charts(report),
        _section(_table(sections.candidate_table(report))),
        _section(_facts("What backs this verdict", sections.proof_facts(report))),
        _section(
            tag("h2", "Bottleneck", style=_H2),
            tag("p", sections.bottleneck_sentence(report), style="margin:0 0 16px 0"),
            _table(sections.ops_table(report)),
        ),
        *(_section(_table(table)) for table in sections.region_tables(report)),
        _section(_table(sections.checkpoint_table(report))),
        _section(
            _facts("Agent notes", sections.agent_notes(report)), _table(sections.suggestion_table(report), top=True)
        ),
        _section(_table(sections.patch_table(report))),
        _section(_facts("Usage event", sections.usage_facts(report))),
        _section(_facts("This run", sections.run_facts(report))),
        _section(_artifacts(report, files)),
        style=_BLOCK,
    )


def card_text(report: Report, files: Sequence[File] = ()) -> str:
    """Render the card as plain text: short lines in reading order, for terminals and screen readers.

    Args:
        report: the finished run; it is redacted first.
        files: its JSON files on disk.
    """
    report = redacted_report(report)
    lines = [f"Agnitra Lab report: {report.title}", report.headline]
    lines += [
        text for text in (sections.head_to_head(report), sections.banner(report), sections.advice(report)) if text
    ]
    lines += ["", *(metric_line(metric) for metric in metrics.metric_cards(report))]
    for facts in (
        sections.proof_facts(report),
        sections.agent_notes(report),
        sections.usage_facts(report),
        sections.run_facts(report),
    ):
        lines += ["", *(f"{label}: {value}." for label, value in facts)]
    lines += ["", sections.bottleneck_sentence(report)]
    for table in (
        sections.candidate_table(report), *sections.region_tables(report), sections.checkpoint_table(report)
    ):  # fmt: skip
        lines += ["", f"{table.caption}:"]
        lines += [", ".join(cell.rstrip(".") for cell in row if cell) + "." for row in table.rows]
    lines += ["", *(f"{name}: {path}, {size_bytes:,} bytes." for name, path, size_bytes, _ in files[:_MAX_FILES])]
    return "\n".join(numbers.plain_text(line) for line in lines).rstrip() + "\n"


def metric_line(metric: metrics.Metric) -> str:
    """One metric as a sentence: value, what it was before, the change, the note."""
    before = f", from {metric.baseline}" if metric.baseline and metric.candidate else ""
    change = f", {metric.change}" if metric.change else ""
    return f"{metric.label}: {metric.value}{before}{change} ({metric.note})."


def _header(report: Report) -> Html:
    verdict = sections.verdict(report)
    colour = palette.ACCENT if verdict == "faster" else palette.WARNING
    pill = f"background:{colour};color:{palette.SURFACE};border-radius:99px;padding:3px 12px;font-size:12px"
    title = f"color:{palette.TEXT};{_SANS};font-size:24px;font-weight:600;line-height:1.3;margin:0 0 18px 0"
    brand = tag("strong", "Agnitra Lab", style=f"color:{palette.ACCENT}")
    advice, rival = sections.advice(report), sections.head_to_head(report)
    return join(
        [
            tag(
                "p",
                brand,
                f" · {sections.kicker(report)}",
                style=f"{_MUTED};margin:0 0 12px 0",
            ),
            tag("p", tag("strong", sections.VERDICT_WORDS[verdict], style=pill), style="margin:0 0 10px 0"),
            tag("h1", _breakable(report.headline, _MAX_WORD), style=title),
            tag("p", rival, style="margin:-8px 0 18px 0") if rival else None,
            tag("p", advice, style=f"{_MUTED};margin:-8px 0 18px 0") if advice else None,
        ]
    )


def _banner(report: Report) -> Html | None:
    text = sections.banner(report)
    if text is None:
        return None
    warning = f"border-left:4px solid {palette.WARNING};color:{palette.WARNING}"
    return tag("p", tag("strong", "Note: "), text, style=f"{_PANEL};{warning};padding:10px 16px;margin:0 0 14px 0")


def _metric(metric: metrics.Metric) -> Html:
    """The inside of one metric card."""
    size = "24px" if len(metric.value) <= 9 else "16px"
    colour = _STATE_COLOURS[metric.state]
    value_style = f"color:{colour};font-size:{size};font-weight:600;margin:0 0 4px 0;line-height:1.25"
    return join(
        [
            tag("p", metric.label, style=f"{_MUTED};font-size:12px;font-weight:500;margin:0 0 8px 0"),
            tag("p", metric.value, style=value_style),
            *(tag("p", line, style="margin:0;font-size:13px") for line in metrics.change_lines(metric)),
            tag(
                "p",
                numbers.shortened(metric.note, 90),
                style=f"{_MUTED};margin:6px 0 0 0;font-size:12px;line-height:1.4",
            ),
        ]
    )


def _charts(report: Report) -> Html:
    comparison = report.comparison
    before, after = comparison.baseline_latency.latency_ms_p50, comparison.candidate_latency.latency_ms_p50
    latency_alt = (
        f"Bar chart of median latency: {comparison.baseline} {numbers.milliseconds(before)}, "
        f"{comparison.candidate} {numbers.milliseconds(after)}."
    )
    pictures = [(svg.latency_chart(report), latency_alt)]
    if report.telemetry.events:
        pictures.append((svg.ops_chart(report), f"Bar chart of the top ops. {sections.bottleneck_sentence(report)}"))
    images = [tag("img", src=svg.data_uri(picture), alt=alt, style="width:100%") for picture, alt in pictures]
    return _side_by_side(images, _CHART)


def _side_by_side(children: list[Html], style: str) -> Html:
    """Boxes in a row that wraps. Without flex and gap, the space between them is a margin of all but the last."""
    last = len(children) - 1
    boxes = (
        tag("div", child, style=f"{style};margin:{'0 0 14px 0' if index == last else '0 1% 14px 0'}")
        for index, child in enumerate(children)
    )
    return tag("div", *boxes)


def _section(*children: Html | None) -> Html:
    return tag("div", *children, style=_SECTION)


def _table(table: sections.Table, *, top: bool = False) -> Html:
    note = tag("p", table.note, style=f"{_MUTED};font-size:12px;margin:10px 0 0 0") if table.note else None
    parts = [tag("caption", table.caption, style=_CAPTION)]
    if table.rows:
        head = (_head(table, index) for index in range(len(table.columns)))
        parts.append(tag("thead", tag("tr", *head, style=_HEAD_ROW)))
        parts.append(tag("tbody", *(_row(table, index) for index in range(len(table.rows)))))
    margin = "18px 0 0 0" if top else "0"
    return join([tag("table", *parts, style=f"{_TABLE};min-width:{_MIN_TABLE_WIDTH}px;margin:{margin}"), note])


def _head(table: sections.Table, index: int) -> Html:
    style = f"{_HEAD};{_alignment(table, index)};width:{table.widths[index]}%"
    return tag("th", table.columns[index], scope="col", style=style)


def _row(table: sections.Table, index: int) -> Html:
    first, *others = table.rows[index]
    colour = f";color:{palette.ACCENT}" if index == table.emphasised else ""
    cells = (
        tag(
            "td",
            _fitted(table, column, cell),
            style=f"{_alignment(table, column)}{colour if column == 1 else ''}",
        )
        for column, cell in enumerate(others, start=1)
    )
    name = tag("th", _fitted(table, 0, first), scope="row", style=f"text-align:left{colour}")
    return tag("tr", name, *cells, style=_ROW)


def _fitted(table: sections.Table, column: int, text: str) -> Html:
    """A cell's text: words cut to the column, and a number kept on one line, apart from the interval after it."""
    width = _MIN_TABLE_WIDTH * table.widths[column] / 100 - _CELL_SPACING
    if column not in table.numeric:
        return _breakable(text, int(width / (_CHARACTER_WIDTH if column else _BOLD_WIDTH)))
    number, bracket, rest = text.partition(" [")
    parts = [number, f"{bracket.strip()}{rest}"] if bracket else [number]
    spans = [tag("span", part, style="white-space:nowrap") for part in parts]
    return join([spans[0], *(join([" ", span]) for span in spans[1:])])


def _breakable(text: str, length: int) -> Html:
    """Text that a line can break at its joints (`a+b`, `a/b`, `a-b`), in pieces of at most `length` characters."""
    pieces = (escape(numbers.shortened(piece, length)) for piece in re.split(r"(?<=[\s+/-])", text))
    return Html("".join(f"{piece}<wbr>" if piece[-1:] in ("+", "/") else piece for piece in pieces))


def _alignment(table: sections.Table, column: int) -> str:
    return "text-align:right" if column in table.numeric else "text-align:left"


def _facts(title: str, facts: sections.Facts) -> Html:
    label_style = f"{_HEAD};text-align:left;width:190px"
    rows = (
        tag(
            "tr",
            tag("th", label, scope="row", style=label_style),
            tag("td", _breakable(value, _MAX_WORD), style="text-align:left"),
            style=_ROW,
        )
        for label, value in facts
    )
    return tag("table", tag("caption", title, style=_CAPTION), tag("tbody", *rows), style=f"{_TABLE};margin:0")


def _artifacts(report: Report, files: Sequence[File]) -> Html:
    """Where the figures lie. The report's JSON is five times as long as the card, so it is named and not repeated."""
    rows = tuple((name, path, f"{size_bytes:,}", sha256[:_SHOWN_DIGITS]) for name, path, size_bytes, sha256 in files)
    note = (
        f"{len(rows) - _MAX_FILES} more beside them." if len(rows) > _MAX_FILES
        else None if rows
        else f"report.json and the others lie in the folder of run {report.run_id} under artifacts/reports."
    )  # fmt: skip
    table = sections.Table(
        "JSON artifacts, on disk", ("File", "Path", "Bytes", "sha256"), rows[:_MAX_FILES], frozenset({2}), note=note,
        widths=(20, 52, 11, 17),
    )  # fmt: skip
    return join([_table(table), _usage_json(report)])


def _usage_json(report: Report) -> Html:
    """The one artifact that is short enough to be copied from here, with no kernel and no script."""
    return tag(
        "details",
        tag("summary", "usage_event.json", style=_SUMMARY),
        tag("pre", report.usage.to_json(), style=_PRE),
    )
