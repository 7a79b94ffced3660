"""The profile card and the rollback card: the report's visual language, limited to what an untrusted notebook keeps.

Inline styles and real elements only: JupyterLab's sanitizer drops style sheets, scripts, inline SVG, ids, flex and gap.
"""

from __future__ import annotations

import json

from agnitra_lab.contracts.patch import RollbackProof
from agnitra_lab.contracts.telemetry import GpuTelemetry, OpEvent, TelemetryRecord
from agnitra_lab.redact import redact
from agnitra_lab.report import numbers, palette
from agnitra_lab.report.html import Html, join, tag

MAX_OPS = 8
_OUTSIDE = "outside the graph"

_SANS = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"
_BLOCK = (
    f"background:{palette.SURFACE};color:{palette.TEXT};{_SANS};font-size:14px;line-height:1.5;padding:24px 28px;"
    "border-radius:14px;max-width:1040px;box-sizing:border-box;overflow-x:auto"
)
_PANEL = f"background:{palette.PANEL};border:1px solid {palette.GRID};border-radius:10px;box-sizing:border-box"
_METRIC = (
    f"{_PANEL};padding:12px 16px;display:inline-block;vertical-align:top;min-width:168px;height:112px;"
    "margin:0 1% 12px 0;overflow:hidden"
)
_SECTION = f"{_PANEL};padding:16px 20px;margin:0 0 12px 0;overflow-x:auto"
_MUTED = f"color:{palette.MUTED}"
_CAPTION = f"caption-side:top;text-align:left;color:{palette.TEXT};font-size:15px;font-weight:600;padding:0 0 8px 0"
_TABLE = f"border-collapse:collapse;width:100%;margin:0;background:{palette.PANEL};color:{palette.TEXT};font-size:13px"
_CELL = (
    f"background:{palette.PANEL};color:{palette.TEXT};border:none;border-top:1px solid {palette.GRID};"
    "padding:7px 14px 7px 0;vertical-align:top"
)
_QUIET_CELL = _CELL.replace(palette.TEXT, palette.MUTED)
_HEAD = f"background:{palette.PANEL};{_MUTED};border:none;font-weight:500;padding:0 14px 6px 0"
_TITLE = f"color:{palette.TEXT};{_SANS};font-size:21px;font-weight:600;line-height:1.3;margin:0 0 16px 0"

# JupyterLab lays tables out by their first row, and its sanitizer drops every style that would break a long name: so
# columns have widths, and names are cut in the middle (the text version has them whole).
_MAX_CELL = 32
_OP_COLUMNS = (
    ("Op", "left", "32%"),
    ("Self time", "right", "13%"),
    ("Share", "left", "21%"),
    ("Calls", "right", "8%"),
    ("Where", "left", "26%"),
)

Tile = tuple[str, str, str]


def profile_card_html(record: TelemetryRecord, filed: str | None = None) -> str:
    """Render a profile as one block of HTML for `display_data`.

    Args:
        record: the telemetry; it is redacted first.
        filed: where it was filed, as a sentence; None when it was not.
    """
    record = _redacted(record)
    notes, tiles = _notes(record), _tiles(record)
    return tag(
        "div",
        _kicker(["profile", record.name, record.device.name if record.device else None]),
        tag("h1", bottleneck_sentence(record), style=_TITLE),
        join(_tile(*tile, width=f"{100 / len(tiles) - 1.2:.1f}%") for tile in tiles),
        tag("div", _ops_table(record), style=_SECTION) if record.events else None,
        *(tag("p", note, style=f"{_MUTED};margin:0 0 4px 0;font-size:13px") for note in notes),
        tag("p", filed, style=f"{_MUTED};margin:8px 0 0 0;font-size:12px") if filed else None,
        style=_BLOCK,
    )


def profile_card_text(record: TelemetryRecord, filed: str | None = None) -> str:
    """Render a profile as plain text: short lines in reading order, for terminals and screen readers."""
    record = _redacted(record)
    lines = [f"Agnitra Lab profile: {record.name or 'unnamed'}", bottleneck_sentence(record), ""]
    lines += [f"{label}: {value} ({note})." if note else f"{label}: {value}." for label, value, note in _tiles(record)]
    if record.events:
        lines += ["", "Top ops by self time:"]
        lines += [
            f"{event.op}, {numbers.milliseconds(event.latency_ms)}, {numbers.share(event.share)}, "
            f"{_calls(event)}, {_place(event)}."
            for event in record.events[:MAX_OPS]
        ]
    lines += ["", *_notes(record), *([filed] if filed else [])]
    return "\n".join(numbers.plain_text(line) for line in lines).rstrip() + "\n"


def bottleneck_sentence(record: TelemetryRecord) -> str:
    """The bottleneck in one sentence."""
    top = record.bottleneck
    if top is None:
        return "No op ran in this cell, so there is no bottleneck."
    share = f", {numbers.share(top.share)} of the self time" if top.share is not None else ""
    where = f"module {top.module_path}" if top.module_path else f"node {top.node}" if top.node else None
    place = f", at {where}" if where else ""
    source = f" ({top.source})" if top.source else ""
    return f"{top.op} takes {numbers.milliseconds(top.latency_ms)}{share}{place}{source}."


def rollback_card_html(proof: RollbackProof) -> str:
    """Render the proof of a rollback as one block of HTML."""
    colour = palette.ACCENT if proof.is_restored else palette.WARNING
    rows = [
        tag(
            "tr",
            tag("th", label, scope="row", style=f"{_CELL};{_MUTED};text-align:left;font-weight:500;width:220px"),
            tag("td", value, style=f"{_CELL};text-align:left"),
        )
        for label, value in _proof_facts(proof)
    ]
    caption = tag("caption", "What was compared", style=_CAPTION)
    return tag(
        "div",
        _kicker(["rollback"]),
        tag("h1", _proof_sentence(proof), style=f"{_TITLE};color:{colour}"),
        tag("div", tag("table", caption, tag("tbody", *rows), style=_TABLE), style=f"{_SECTION};margin:0"),
        style=_BLOCK,
    )


def rollback_card_text(proof: RollbackProof) -> str:
    """Render the proof of a rollback as plain text."""
    lines = ["Agnitra Lab rollback", _proof_sentence(proof), ""]
    lines += [f"{label}: {value}." for label, value in _proof_facts(proof)]
    return "\n".join(numbers.plain_text(line) for line in lines) + "\n"


def gpu_sentence(gpu: GpuTelemetry) -> str:
    """What is known of the GPU, in one sentence."""
    if gpu.gpu_utilisation is None:
        reason = numbers.plain_text(gpu.reason or "the driver gave no reading")
        return f"GPU: {reason}."
    busy = f", {numbers.milliseconds(gpu.busy_ms)} of kernels" if gpu.busy_ms is not None else ""
    return f"GPU: busy {numbers.share(gpu.gpu_utilisation)} of the wall time{busy}."


def _tiles(record: TelemetryRecord) -> list[Tile]:
    wall_ms = record.wall_ms if record.wall_ms is not None else record.profiled_ms
    is_profiled = record.wall_ms is None or record.wall_ms == record.profiled_ms
    tiles = [("Wall time", numbers.milliseconds(wall_ms), "with the profiler on" if is_profiled else "one plain call")
             if wall_ms is not None else ("Wall time", numbers.ABSENT, "")]  # fmt: skip
    if record.total_self_ms is not None:
        share = record.attributed_share
        note = f"{numbers.share(share)} tied to graph nodes" if share is not None else ""
        tiles.append(("Op time", numbers.milliseconds(record.total_self_ms), note))
    if record.tokens_per_second is not None:
        count = record.items_per_call or 0
        note = f"{count:,} token{'' if count == 1 else 's'} a run"
        tiles.append(("Tokens/s", numbers.rate(record.tokens_per_second), note))
    tiles += [_gpu_tile(record), _memory_tile(record)]
    return tiles


def _gpu_tile(record: TelemetryRecord) -> Tile:
    used = record.gpu.gpu_utilisation
    if used is None:
        return "GPU utilisation", numbers.ABSENT, "see the note below"
    return "GPU utilisation", numbers.share(used), "kernels busy over wall time"


def _memory_tile(record: TelemetryRecord) -> Tile:
    memory = record.memory
    if memory and memory.peak_memory_bytes is not None:
        return "Peak memory", _mebibytes(memory.peak_memory_bytes), "allocated on the GPU"
    if memory and memory.parameter_bytes is not None:
        return "Parameters", _mebibytes(memory.parameter_bytes), "of the modules that ran"
    return "Memory", numbers.ABSENT, "no module ran" if record.bottleneck else ""


def _mebibytes(num_bytes: int) -> str:
    size = num_bytes / 2**20
    return f"{size:,.0f} MiB" if size >= 100 else f"{size:.2f} MiB"


def _notes(record: TelemetryRecord) -> list[str]:
    notes = [gpu_sentence(record.gpu)]
    if record.graph_note:
        notes.append(f"Graph: {record.graph_note.rstrip('.')}.")
    return [numbers.plain_text(note) for note in (*notes, *record.notes)]


def _tile(label: str, value: str, note: str, *, width: str) -> Html:
    colour = palette.MUTED if value == numbers.ABSENT else palette.TEXT
    size = "17px" if value == numbers.ABSENT else "22px"
    return tag(
        "div",
        tag("p", label, style=f"{_MUTED};font-size:12px;font-weight:500;margin:0 0 6px 0"),
        tag("p", value, style=f"color:{colour};font-size:{size};font-weight:600;margin:0 0 4px 0;line-height:1.25"),
        tag("p", note, style=f"{_MUTED};margin:0;font-size:12px;line-height:1.4"),
        style=f"{_METRIC};width:{width}",
    )


def _ops_table(record: TelemetryRecord) -> Html:
    shown = record.events[:MAX_OPS]
    largest = max((event.share for event in shown), default=0.0) or 1.0
    has_more = len(record.events) > len(shown)
    heads = [
        tag("th", text, scope="col", style=f"{_HEAD};text-align:{side};width:{width}")
        for text, side, width in _OP_COLUMNS
    ]
    rows = [_op_row(event, event.share / largest, is_first=index == 0) for index, event in enumerate(shown)]
    rest = "The other ops are in agnitra_telemetry.ops."
    return join(
        [
            tag(
                "table",
                tag("caption", "Top ops by self time", style=_CAPTION),
                tag("thead", tag("tr", *heads)),
                tag("tbody", *rows),
                style=_TABLE,
            ),
            tag("p", rest, style=f"{_MUTED};font-size:12px;margin:10px 0 0 0") if has_more else None,
        ]
    )


def _op_row(event: OpEvent, length: float, *, is_first: bool) -> Html:
    colour = palette.ACCENT if is_first else palette.SECONDARY
    # The bar repeats the number beside it, so it needs no text of its own.
    bar_style = (
        f"display:inline-block;vertical-align:middle;height:8px;border-radius:4px;background:{colour};"
        f"width:{max(2.0, 96 * length):.0f}px"
    )
    number = tag("span", numbers.share(event.share), style="display:inline-block;width:52px;padding:0 8px 0 0")
    left, right = f"{_CELL};text-align:left", f"{_CELL};text-align:right"
    return tag(
        "tr",
        tag("th", numbers.shortened(event.op, _MAX_CELL), scope="row", style=f"{left};font-weight:600"),
        tag("td", numbers.milliseconds(event.latency_ms), style=f"{right};white-space:nowrap"),
        tag("td", number, tag("span", style=bar_style), style=f"{left};white-space:nowrap"),
        tag("td", str(event.num_calls), style=right),
        tag(
            "td",
            numbers.shortened(_place(event), _MAX_CELL),
            style=f"{_QUIET_CELL};text-align:left",
        ),
    )


def _place(event: OpEvent) -> str:
    return event.module_path or event.node or _OUTSIDE


def _calls(event: OpEvent) -> str:
    return f"{event.num_calls} call{'' if event.num_calls == 1 else 's'}"


def _kicker(parts: list[str | None]) -> Html:
    return tag(
        "p",
        tag("strong", "Agnitra Lab", style=f"color:{palette.ACCENT};letter-spacing:0.3px"),
        "".join(f" · {part}" for part in parts if part),
        style=f"{_MUTED};margin:0 0 8px 0;font-size:13px",
    )


def _proof_sentence(proof: RollbackProof) -> str:
    return (
        "The original is restored, bit for bit." if proof.is_restored
        else f"The original was NOT restored: {proof.detail or 'see below'}."
    )  # fmt: skip


def _proof_facts(proof: RollbackProof) -> list[tuple[str, str]]:
    def same(is_equal: bool) -> str:
        return "the same" if is_equal else "DIFFERENT"

    facts = [
        ("Attributes", same(proof.attributes_equal)),
        ("Hooks", same(proof.hooks_equal)),
        ("Parameters and buffers", f"{same(proof.parameters_equal)}, {proof.num_parameters:,} parameters"),
        ("Outputs", same(proof.outputs_equal)),
        ("State sha256", proof.state_sha256[:16]),
    ]
    return [*facts, ("Detail", proof.detail)] if proof.detail else facts


def _redacted(record: TelemetryRecord) -> TelemetryRecord:
    value = record.model_dump(mode="json")
    redacted = redact(value)
    return record if redacted == value else TelemetryRecord.from_json(json.dumps(redacted))
