"""The panels of the profile card in HTML: a picture or a bar each, with its numbers in a table or a sentence."""

from __future__ import annotations

from agnitra_lab.contracts.device import DevicePeaks
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.notebook import cards
from agnitra_lab.notebook import profile_rows as rows
from agnitra_lab.notebook.cards import Column, Table
from agnitra_lab.notebook.profile_icicle import LEVELS, build_icicle, icicle_picture
from agnitra_lab.notebook.profile_pictures import OWNERS_HEIGHT, owners_bar, timeline_height, timeline_picture
from agnitra_lab.notebook.profile_roofline import HEIGHT, build_roofline, roofline_picture
from agnitra_lab.report import numbers, palette
from agnitra_lab.report.html import Html, join, tag

# Longer names are cut in the middle: even broken at their joints they make a row too high. The text has them whole.
_MAX_NAME = 44
_BAR_PX = 50
_ABSENT = "–"
_TABLE_SUMMARY = "The same as a table"
_PLACE = f"{cards.MUTED};font-weight:400;font-size:12px"
_LEGEND_ENTRY = "display:inline-block;margin:0 16px 0 0;white-space:nowrap"


def panels(record: TelemetryRecord, peaks: DevicePeaks | None = None) -> list[Html]:
    """Build the panels that the record has numbers for, from the top nodes down to memory.

    Args:
        record: the telemetry, redacted.
        peaks: ceilings measured on the device; the roofline takes them.
    """
    made = (
        _top(record, peaks),
        _owners(record),
        _icicle(record),
        _roofline(record, peaks),
        _timeline(record),
        _memory(record),
    )
    return [panel for panel in made if panel is not None]


def _top(record: TelemetryRecord, peaks: DevicePeaks | None) -> Html | None:
    caption, shown = rows.top_rows(record, peaks)
    if not shown:
        return None
    largest = max(row.share for row in shown) or 1.0
    has_limit, has_method = any(row.limit for row in shown), any(row.method for row in shown)
    columns = [
        Column("Node" if record.nodes else "Op", 40),
        Column("Self time", 13, is_number=True),
        Column("Share", 16),
        Column("Calls", 6, is_number=True),
        *([Column("Of roofline", 13)] if has_limit else []),
        *([Column("Evidence", 12)] if has_method else []),
    ]
    cells = []
    for index, row in enumerate(shown):
        colour = palette.ACCENT if index == 0 else palette.SECONDARY
        cells.append([
            _name_and_place(row), row.latency, _share_bar(row.share, row.share / largest, colour), f"{row.calls:,}",
            *([_limit(row)] if has_limit else []), *([_quiet(row.method or _ABSENT)] if has_method else []),
        ])  # fmt: skip
    kind = "nodes" if record.nodes else "ops"
    has_more = len(record.nodes or record.events) > len(shown)
    rest = cards.paragraph(f"The other {kind} are in agnitra_telemetry.{kind}.", top=10, bottom=0) if has_more else None
    return cards.section(cards.table(Table(caption, columns, cells)), rest)


def _owners(record: TelemetryRecord) -> Html | None:
    owners = rows.owner_rows(record)
    if not owners:
        return None
    entries = [
        tag(
            "span",
            cards.chip(owner.colour),
            f"{owner.label} ",
            tag("strong", owner.text),
            _quiet(f" {owner.note}") if owner.note else None,
            style=_LEGEND_ENTRY,
        )
        for owner in owners
    ]
    alt = f"Bar of the self time: {', '.join(f'{owner.label.lower()} {owner.text}' for owner in owners)}."
    return cards.section(
        cards.heading(rows.OWNERS),
        cards.picture(owners_bar([(owner.share, owner.colour) for owner in owners]), alt, OWNERS_HEIGHT),
        tag("p", *entries, style="margin:10px 0 0 0;font-size:13px;line-height:1.9"),
    )


def _icicle(record: TelemetryRecord) -> Html | None:
    icicle = build_icicle(record)
    if icicle is None:
        return None
    first = icicle.modules[0]
    alt = (
        f"Icicle of {numbers.milliseconds(icicle.total_ms)} of self time by {', '.join(LEVELS[: icicle.num_levels])}; "
        f"the largest module, {first.label}, takes {numbers.share(first.time_ms / icicle.total_ms)}."
    )
    return cards.section(
        cards.heading(rows.ICICLE),
        cards.picture(icicle_picture(icicle), alt, icicle.height),
        _folded(rows.icicle_table(icicle)),
    )


def _roofline(record: TelemetryRecord, peaks: DevicePeaks | None) -> Html | None:
    roofline = build_roofline(record, peaks)
    if roofline is None:
        return None
    count = len(roofline.nodes)
    alt = f"Roofline of {count} node{'' if count == 1 else 's'} under the measured ceilings: {roofline.ceilings_text}."
    ceilings = f"Measured ceilings: {roofline.ceilings_text}. The larger a dot, the longer its node takes."
    return cards.section(
        cards.heading(rows.ROOFLINE),
        cards.picture(roofline_picture(roofline), alt, HEIGHT),
        cards.paragraph(ceilings, top=6, bottom=0),
        _folded(rows.roofline_table(roofline)),
    )


def _timeline(record: TelemetryRecord) -> Html | None:
    timeline, phases = record.timeline, rows.phase_table(record)
    sentence = rows.timeline_sentence(timeline) if timeline else None
    parts: list[Html] = []
    if timeline is not None and sentence:
        parts += [
            cards.heading(rows.TIMELINE),
            cards.picture(timeline_picture(timeline), sentence, timeline_height(timeline)),
            cards.paragraph(sentence, top=6, bottom=14 if phases else 0),
        ]
    if phases:
        parts.append(cards.table(phases))
    return cards.section(*parts) if parts else None


def _memory(record: TelemetryRecord) -> Html | None:
    held = rows.memory_table(record)
    return cards.section(cards.table(held)) if held else None


def _folded(table: Table) -> Html:
    cut = [[numbers.shortened(str(cell), _MAX_NAME) for cell in row] for row in table.rows]
    return cards.details(_TABLE_SUMMARY, cards.table(Table(None, table.columns, cut)))


def _name_and_place(row: rows.Row) -> Html:
    module, *others = row.place.split(" · ")
    # The separator goes to the next line with what follows it.
    rest = (join([" ", tag("span", f"· {other}", style="white-space:nowrap")]) for other in others)
    place = tag("span", cards.breakable(numbers.shortened(module, _MAX_NAME)), *rest, style=_PLACE)
    return join([cards.breakable(numbers.shortened(row.name, _MAX_NAME)), tag("br"), place])


def _share_bar(share: float, length: float, colour: str) -> Html:
    number = tag("span", numbers.share(share), style="display:inline-block;width:48px;padding:0 2px 0 0")
    return tag("span", number, cards.bar(length, _BAR_PX, colour), style="white-space:nowrap")


def _limit(row: rows.Row) -> str:
    return ", ".join(filter(None, (row.limit, row.bound))) or _ABSENT


def _quiet(text: str) -> Html:
    return tag("span", text, style=_PLACE)
