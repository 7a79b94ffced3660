"""The dashboard's card for a notebook: plain HTML with inline styles, limited to what JupyterLab's sanitizer keeps."""

from __future__ import annotations

from pathlib import Path

from agnitra_lab.report import dashboard_sections as sections
from agnitra_lab.report import palette
from agnitra_lab.report.dashboard_record import Dashboard
from agnitra_lab.report.html import Html, tag

MAX_RUNS = 8
_BLOCK = (
    f"background:{palette.SURFACE};color:{palette.TEXT};font-family:system-ui,-apple-system,'Segoe UI',sans-serif;"
    "font-size:14px;line-height:1.5;padding:24px;border-radius:14px;max-width:1040px;box-sizing:border-box;"
    "overflow-x:auto"
)
_TILE = (
    f"background:{palette.PANEL};border:1px solid {palette.GRID};border-radius:10px;padding:12px 14px;"
    "display:inline-block;vertical-align:top;width:31.5%;min-width:170px;min-height:128px;margin:0 1% 12px 0;"
    "box-sizing:border-box"
)
_MUTED = f"color:{palette.MUTED}"
_TABLE = (
    f"border-collapse:collapse;width:100%;min-width:720px;background:{palette.PANEL};color:{palette.TEXT};"
    "font-size:13px;margin:0 0 14px 0"
)
_CAPTION = f"caption-side:top;text-align:left;color:{palette.TEXT};font-size:15px;font-weight:600;padding:6px 0"
_ROW = f"background:{palette.PANEL};border-top:1px solid {palette.GRID}"
_CELL = "padding:7px 12px;vertical-align:top;text-align:left"
_COLOURS = {"better": palette.ACCENT, "worse": palette.WARNING, "unchanged": palette.TEXT}
_RUN_COLUMNS = ("Run", "Made (UTC)", "Status", "Device", "Key figure")
_PAIR_COLUMNS = ("Figure", "Baseline", "Candidate", "Change", "Verdict")


def dashboard_card_html(record: Dashboard, path: Path | None) -> Html:
    """Render the card.

    Args:
        record: what is under the artifacts folder.
        path: the HTML file that has the rest, None when none was written.
    """
    heading = f"color:{palette.TEXT};font-size:20px;font-weight:600;margin:0 0 14px 0;line-height:1.3"
    brand = tag("strong", "Agnitra Lab", style=f"color:{palette.ACCENT}")
    return tag(
        "div",
        tag("p", brand, f" · {record.artifacts}", style=f"{_MUTED};margin:0 0 4px 0"),
        tag("h2", "What has been run, and what it came to", style=heading),
        tag("div", *(_tile(tile) for tile in sections.tiles(record))),
        _table("Newest runs", _RUN_COLUMNS, _run_rows(record)),
        _table("Newest run of each topic against the one before it", _PAIR_COLUMNS, _pair_rows(record)),
        tag("p", _where(path), style=f"{_MUTED};margin:0"),
        style=_BLOCK,
    )


def dashboard_card_text(record: Dashboard, path: Path | None) -> str:
    """Render the card as plain text: short lines in reading order."""
    lines = [f"Agnitra Lab dashboard of {record.artifacts}"]
    lines += [f"{tile.label}: {tile.value} ({tile.note.rstrip('.')})." for tile in sections.tiles(record)]
    for caption, rows in (("Newest runs", _run_rows(record)), ("Regressions", _pair_rows(record))):
        if not rows:
            continue
        lines += ["", f"{caption}:", *(", ".join(cell for cell in row if cell) + "." for row in rows)]
    return "\n".join([*lines, "", _where(path)]) + "\n"


def _where(path: Path | None) -> str:
    if path is None:
        return "The whole dashboard as one file: agnitra dashboard"
    return f"The whole dashboard, with drill-down and comparisons, is in {path}."


def _tile(tile: sections.Tile) -> Html:
    value = f"color:{_COLOURS[tile.state]};font-size:22px;font-weight:600;margin:2px 0;line-height:1.25"
    return tag(
        "div",
        tag("p", tile.label, style=f"{_MUTED};font-size:12px;margin:0"),
        tag("p", tile.value, style=value),
        tag("p", tile.note, style=f"{_MUTED};font-size:12px;line-height:1.4;margin:0"),
        style=_TILE,
    )


def _run_rows(record: Dashboard) -> list[tuple[str, ...]]:
    return [
        (f"{group.lead.topic} ({group.run_id})", sections.short_time(group.lead), group.status,
         group.lead.device or "", group.figure)
        for group in sections.run_groups(record.runs)[:MAX_RUNS]
    ]  # fmt: skip


def _pair_rows(record: Dashboard) -> list[tuple[str, ...]]:
    return [
        (f"{pair.topic} ({pair.category}): {change.metric}", sections.general(change.baseline),
         sections.general(change.candidate),
         "-" if change.relative_change is None else f"{change.relative_change:+.1%}",
         change.verdict.replace("_", " "))
        for pair in record.pairs
        for change in pair.found.metrics
    ]  # fmt: skip


def _table(caption: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Html | None:
    if not rows:
        return None
    head = (tag("th", name, scope="col", style=f"{_CELL};{_MUTED};font-weight:500") for name in columns)
    body = (
        tag(
            "tr",
            tag("th", row[0], scope="row", style=f"{_CELL};font-weight:600"),
            *(tag("td", cell, style=_CELL) for cell in row[1:]),
            style=_ROW,
        )
        for row in rows
    )
    return tag(
        "table",
        tag("caption", caption, style=_CAPTION),
        tag("thead", tag("tr", *head, style=f"background:{palette.PANEL}")),
        tag("tbody", *body),
        style=_TABLE,
    )
