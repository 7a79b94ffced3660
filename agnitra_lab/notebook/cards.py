"""The look of a notebook's cards, limited to what an untrusted notebook keeps of an output.

Inline styles and real elements only: JupyterLab's sanitizer drops style sheets, scripts, inline SVG, ids, flex and gap.
Pictures are data-URI images with a text alternative, and their numbers stand in a table or a sentence as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agnitra_lab.report import numbers, palette
from agnitra_lab.report.html import Child, Html, join, tag
from agnitra_lab.report.svg import data_uri

_SANS = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"
_BLOCK = (
    f"background:{palette.SURFACE};color:{palette.TEXT};{_SANS};font-size:14px;line-height:1.5;padding:24px 28px;"
    "border-radius:14px;max-width:1040px;box-sizing:border-box;overflow-x:auto"
)
_PANEL = f"background:{palette.PANEL};border:1px solid {palette.GRID};border-radius:10px;box-sizing:border-box"
_METRIC = f"{_PANEL};padding:12px 10px;display:inline-block;vertical-align:top;min-width:116px;min-height:112px"
_SECTION = f"{_PANEL};padding:16px 20px;margin:0 0 12px 0;overflow-x:auto"
_VALUE = "font-weight:600;margin:0 0 4px 0;line-height:1.25"
MUTED = f"color:{palette.MUTED}"
_CAPTION = f"caption-side:top;text-align:left;color:{palette.TEXT};font-size:15px;font-weight:600;padding:0 0 8px 0"
_H2 = f"color:{palette.TEXT};{_SANS};font-size:15px;font-weight:600;margin:0 0 8px 0;line-height:1.5"
_TABLE = f"border-collapse:collapse;width:100%;margin:0;background:{palette.PANEL};color:{palette.TEXT};font-size:13px"
# Front ends stripe rows and paint them on hover; a row with a background of its own is left alone.
_ROW = f"background:{palette.PANEL};border-top:1px solid {palette.GRID}"
_HEAD_ROW = f"background:{palette.PANEL};{MUTED}"
# A notebook may grow by 60 kB for a card with its chart: a cell says its side, and no more. Front ends pad cells alike.
_HEAD = "font-weight:500"
_TITLE = f"{_SANS};font-size:21px;font-weight:600;line-height:1.3;margin:0 0 16px 0"
_SUMMARY = f"cursor:pointer;color:{palette.ACCENT};font-size:13px;padding:2px 0 6px 0"

_MAX_UNBROKEN, _MIN_PIECE = 24, 12

Tile = tuple[str, str, str]
"""Label, value, note."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        head: what stands above it.
        width_percent: of the table. JupyterLab lays tables out by their first row, so every column has one.
        is_number: whether its cells stand on the right, on one line.
    """

    head: str
    width_percent: int
    is_number: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row.

    Attributes:
        caption: what it shows; None where the line above it says so.
        columns: from left to right.
        rows: a cell for every column; plain text is escaped, and broken at its joints where it is long.
    """

    caption: str | None
    columns: Sequence[Column]
    rows: Sequence[Sequence[Child]]


def block(*children: Child) -> Html:
    """A whole card: it paints its own surface, whatever the front end's theme."""
    return tag("div", *children, style=_BLOCK)


def section(*children: Child) -> Html:
    """One panel of a card; what is too wide for it scrolls."""
    return tag("div", *children, style=_SECTION)


def kicker(parts: Iterable[str | None]) -> Html:
    """The small line above the title: the product, then what the card is of."""
    brand = tag("strong", "Agnitra Lab", style=f"color:{palette.ACCENT};letter-spacing:0.3px")
    return tag(
        "p", brand, "".join(f" · {part}" for part in parts if part), style=f"{MUTED};margin:0 0 8px 0;font-size:13px"
    )


def title(text: str, colour: str = palette.TEXT) -> Html:
    """The card's main sentence."""
    return tag("h1", breakable(text), style=f"{_TITLE};color:{colour}")


def heading(text: str) -> Html:
    """The name of a panel that has no table to carry it."""
    return tag("h2", text, style=_H2)


def paragraph(*children: Child, top: int = 0, bottom: int = 4) -> Html:
    """A quiet line of text; `top` and `bottom` are its margins in pixels."""
    return tag("p", *children, style=f"{MUTED};margin:{top}px 0 {bottom}px 0;font-size:13px")


def label(text: str) -> Html:
    """The first words of a line, which say what it is about."""
    return tag("strong", text, style=f"color:{palette.TEXT};font-weight:600")


def tiles(given: Sequence[Tile]) -> Html:
    """The main figures side by side, in rows that wrap."""
    width = f"{101 / max(len(given), 1) - 1.03:.2f}%"
    last = len(given) - 1
    return join(_tile(*each, width=width, gap="0" if index == last else "1%") for index, each in enumerate(given))


def table(shown: Table) -> Html:
    """A table in HTML."""
    heads = (
        tag("th", column.head, scope="col", style=f"{_HEAD};{_side(column)};width:{column.width_percent}%")
        for column in shown.columns
    )
    return tag(
        "table",
        tag("caption", shown.caption, style=_CAPTION) if shown.caption else None,
        tag("thead", tag("tr", *heads, style=_HEAD_ROW)),
        tag("tbody", *(_row(shown.columns, row) for row in shown.rows)),
        style=_TABLE,
    )


def details(summary: str, *children: Child) -> Html:
    """Content that is folded away until asked for."""
    return tag("details", tag("summary", summary, style=_SUMMARY), *children, style="margin:6px 0 0 0")


def details_open(summary: str, *children: Child) -> Html:
    """Content that can be folded away."""
    heading = f"cursor:pointer;color:{palette.ACCENT};font-size:15px;font-weight:600;padding:0 0 8px 0"
    return tag("details", tag("summary", summary, style=heading), *children, open=True)


def picture(svg: str, alt: str, height: int) -> Html:
    """A picture as wide as its panel.

    Args:
        svg: drawn in percent of its width and pixels of its height, so that its text keeps its size.
        alt: what it shows, with its main number.
        height: in pixels.
    """
    return tag("img", src=data_uri(svg), alt=alt, style=f"display:block;width:100%;height:{height}px;margin:0")


def bar(share: float, width_px: float, colour: str) -> Html:
    """A bar that repeats the number beside it, and so needs no text of its own."""
    style = "display:inline-block;vertical-align:middle;height:8px;border-radius:4px"
    return tag("span", style=f"{style};background:{colour};width:{max(2.0, width_px * share):.0f}px")


def chip(colour: str) -> Html:
    """A small square that ties a legend's entry to its colour."""
    style = "display:inline-block;vertical-align:middle;width:11px;height:11px;border-radius:3px;margin:0 7px 0 0"
    return tag("span", style=f"{style};background:{colour}")


def breakable(text: str) -> Html:
    """Text whose long words may break at their joints (dot, slash, plus, dash, underscore), numbers never."""
    words = re.split(r"(\s+)", text)
    return join(piece for word in words for piece in _pieces(word))


def _pieces(word: str) -> list[Child]:
    if len(word) <= _MAX_UNBROKEN:
        return [word]
    joined = [""]
    for part in re.split(r"(?<=[./+_-])(?!(?<=\d\.)\d)(?=\w)", word):
        # A break every few letters would weigh more than the word.
        if len(joined[-1]) + len(part) <= _MIN_PIECE:
            joined[-1] += part
        else:
            joined.append(part)
    pieces: list[Child] = []
    for part in filter(None, joined):
        pieces += [tag("wbr"), part] if pieces else [part]
    return pieces


def _tile(label: str, value: str, note: str, *, width: str, gap: str) -> Html:
    is_absent = value == numbers.ABSENT
    colour, size = (palette.MUTED, "15px") if is_absent else (palette.TEXT, "19px")
    number, space, unit = (value, "", "") if is_absent else value.partition(" ")
    small = tag("span", f"{space}{unit}", style="font-size:12px") if unit else None
    return tag(
        "div",
        tag("p", label, style=f"{MUTED};font-size:12px;font-weight:500;margin:0 0 6px 0"),
        tag("p", number, small, style=f"color:{colour};font-size:{size};{_VALUE}"),
        tag("p", note, style=f"{MUTED};margin:0;font-size:12px;line-height:1.4"),
        style=f"{_METRIC};width:{width};margin:0 {gap} 12px 0",
    )


def _row(columns: Sequence[Column], cells: Sequence[Child]) -> Html:
    made = []
    for index, (column, cell) in enumerate(zip(columns, cells, strict=True)):
        content = cell if isinstance(cell, Html) or cell is None else breakable(cell)
        name, scope = ("th", "row") if index == 0 else ("td", None)
        made.append(tag(name, content, scope=scope, style=_side(column)))
    return tag("tr", *made, style=_ROW)


def _side(column: Column) -> str:
    return "text-align:right;white-space:nowrap" if column.is_number else "text-align:left"
