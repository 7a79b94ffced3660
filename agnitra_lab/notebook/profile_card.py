"""The profile card: a telemetry record in, one block of HTML or plain text out, with the same numbers in both."""

from __future__ import annotations

import json
from collections.abc import Iterator

from agnitra_lab.contracts.device import DevicePeaks
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.notebook import cards, profile_panels
from agnitra_lab.notebook import profile_rows as rows
from agnitra_lab.notebook.cards import Table, Tile
from agnitra_lab.notebook.profile_icicle import build_icicle
from agnitra_lab.notebook.profile_roofline import build_roofline
from agnitra_lab.notebook.profile_sentences import bottleneck_sentence, gpu_sentence, notes
from agnitra_lab.redact import redact
from agnitra_lab.report import numbers
from agnitra_lab.report.html import Html, tag

_MAX_LABEL = 14
"""A note's first words up to a colon are its label when they are no longer than this."""

__all__ = ["bottleneck_sentence", "gpu_sentence", "profile_card_html", "profile_card_text"]


def profile_card_html(record: TelemetryRecord, filed: str | None = None, peaks: DevicePeaks | None = None) -> Html:
    """Render a profile as one block of HTML for `display_data`.

    Args:
        record: the telemetry; it is redacted first. What it does not hold is left out, and a note says how to get it.
        filed: where it was filed, as a sentence; None when it was not.
        peaks: ceilings measured on the device; by default the record's own.
    """
    record, peaks = _redacted(record), peaks or record.peaks
    return cards.block(
        cards.kicker(["profile", record.name, record.device.name if record.device else None]),
        cards.title(bottleneck_sentence(record, peaks)),
        cards.tiles(_tiles(record)),
        *profile_panels.panels(record, peaks),
        _notes(record, peaks),
        tag("p", filed, style=f"{cards.MUTED};margin:8px 0 0 0;font-size:12px") if filed else None,
    )


def profile_card_text(record: TelemetryRecord, filed: str | None = None, peaks: DevicePeaks | None = None) -> str:
    """Render a profile as plain text: short lines in reading order, for terminals and screen readers.

    Args:
        record: the telemetry; it is redacted first.
        filed: where it was filed, as a sentence; None when it was not.
        peaks: ceilings measured on the device; by default the record's own.
    """
    record, peaks = _redacted(record), peaks or record.peaks
    lines = [f"Agnitra Lab profile: {record.name or 'unnamed'}", bottleneck_sentence(record, peaks), ""]
    lines += [f"{label}: {value} ({note})." if note else f"{label}: {value}." for label, value, note in _tiles(record)]
    for heading, facts in _sections(record, peaks):
        if facts:
            lines += ["", f"{heading}:", *facts]
    lines += ["", *notes(record, peaks), *([filed] if filed else [])]
    return "\n".join(numbers.plain_text(line) for line in lines).rstrip() + "\n"


def _notes(record: TelemetryRecord, peaks: DevicePeaks | None) -> Html:
    lines = []
    for note in notes(record, peaks):
        label, colon, rest = note.partition(": ")
        is_labelled = bool(colon) and len(label) <= _MAX_LABEL
        lines.append(cards.paragraph(cards.label(f"{label}:"), f" {rest}") if is_labelled else cards.paragraph(note))
    return cards.section(cards.heading("Notes"), *lines)


def _sections(record: TelemetryRecord, peaks: DevicePeaks | None) -> Iterator[tuple[str, list[str]]]:
    """What the panels show, as headings with lines."""
    caption, shown = rows.top_rows(record, peaks)
    yield caption, [_top_line(row) for row in shown]
    yield (
        rows.OWNERS,
        [f"{owner.label}: {owner.text}{f' {owner.note}' if owner.note else ''}." for owner in rows.owner_rows(record)],
    )
    icicle = build_icicle(record)
    yield rows.ICICLE, _lines(rows.icicle_table(icicle) if icicle else None)
    roofline = build_roofline(record, peaks)
    if roofline is not None:
        yield rows.ROOFLINE, [f"Measured ceilings: {roofline.ceilings_text}.", *_lines(rows.roofline_table(roofline))]
    if record.timeline is not None:
        sentence = rows.timeline_sentence(record.timeline)
        yield rows.TIMELINE, [sentence] if sentence else []
    for table in (rows.phase_table(record), rows.memory_table(record)):
        yield (table.caption or "") if table else "", _lines(table)


def _top_line(row: rows.Row) -> str:
    allowed = f"what its {row.bound} allow" if row.bound else "what the roofline allows"
    limit = f"{row.limit} of {allowed}" if row.limit else None
    parts = (row.name, row.latency, numbers.share(row.share), rows.calls_text(row.calls), row.place, limit)
    return ", ".join(filter(None, (*parts, f"evidence: {row.method}" if row.method else None))) + "."


def _lines(table: Table | None) -> list[str]:
    """A table's rows as sentences: the name, then every head with its cell."""
    if table is None:
        return []
    heads = [column.head.lower() if column.head[1:2].islower() else column.head for column in table.columns[1:]]
    return [
        ", ".join([str(name), *(f"{head} {cell}" for head, cell in zip(heads, cells, strict=True) if cell)]) + "."
        for name, *cells in table.rows
    ]


def _tiles(record: TelemetryRecord) -> list[Tile]:
    wall_ms = record.wall_ms if record.wall_ms is not None else record.profiled_ms
    is_profiled = record.wall_ms is None or record.wall_ms == record.profiled_ms
    tiles = [("Wall time", numbers.milliseconds(wall_ms), "with the profiler on" if is_profiled else "one plain call")
             if wall_ms is not None else ("Wall time", numbers.ABSENT, "")]  # fmt: skip
    if record.total_self_ms is not None:
        share = record.attributed_share
        note = f"{numbers.share(share)} tied to graph nodes" if share is not None else ""
        if record.owners is not None:
            note = f"{rows.share_text(1 - record.owners.residual)} attributed"
        tiles.append(("Op time", numbers.milliseconds(record.total_self_ms), note))
    if record.tokens_per_second is not None:
        count = record.items_per_call or 0
        note = f"{count:,} token{'' if count == 1 else 's'} a run"
        tiles.append(("Tokens/s", numbers.rate(record.tokens_per_second), note))
    return [*tiles, _gpu_tile(record), _memory_tile(record)]


def _gpu_tile(record: TelemetryRecord) -> Tile:
    used = record.gpu.gpu_utilisation
    if used is None:
        return "GPU busy", numbers.ABSENT, "see the note below"
    return "GPU busy", numbers.share(used), "kernels over wall time"


def _memory_tile(record: TelemetryRecord) -> Tile:
    memory = record.memory
    if memory and memory.peak_memory_bytes is not None:
        is_gpu = record.device is not None and record.device.type == "cuda"
        where = "allocated on the GPU" if is_gpu else "allocated within one call"
        return "Peak memory", rows.mebibytes(memory.peak_memory_bytes), where
    if memory and memory.parameter_bytes is not None:
        return "Parameters", rows.mebibytes(memory.parameter_bytes), "of the modules that ran"
    return "Memory", numbers.ABSENT, "no module ran" if record.bottleneck else ""


def _redacted(record: TelemetryRecord) -> TelemetryRecord:
    value = record.model_dump(mode="json")
    redacted = redact(value)
    return record if redacted == value else TelemetryRecord.from_json(json.dumps(redacted))
