"""The report as Markdown, for pull requests and run.md: the same figures, in tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from agnitra_lab.contracts.report import Report
from agnitra_lab.report import metrics, sections
from agnitra_lab.report.clean import redacted_report


def to_markdown(report: Report) -> str:
    """Write the report as Markdown; all text is escaped."""
    report = redacted_report(report)
    cards = metrics.metric_cards(report)
    rival = sections.head_to_head(report)
    notes = [text for text in (sections.banner(report), sections.advice(report)) if text]
    blocks = [
        f"# {_escape(report.title)}",
        f"**{_escape(report.headline)}**",
        *([_escape(rival)] if rival else []),
        *(f"> {_escape(note)}" for note in notes),
        _rows(("Metric", "Value", "Before", "Change", "Note"), [_metric_row(card) for card in cards]),
        _table(sections.candidate_table(report)),
        _facts("What backs this verdict", sections.proof_facts(report)),
        f"## Bottleneck\n\n{_escape(sections.bottleneck_sentence(report))}",
        _table(sections.ops_table(report)),
        *(_table(table) for table in sections.region_tables(report)),
        _table(sections.checkpoint_table(report)),
        _facts("Agent notes", sections.agent_notes(report)),
        _table(sections.suggestion_table(report)),
        _table(sections.patch_table(report)),
        _facts("Usage event", sections.usage_facts(report)),
        _facts("This run", sections.run_facts(report)),
    ]
    return "\n\n".join(blocks) + "\n"


def _metric_row(card: metrics.Metric) -> tuple[str, ...]:
    before = card.baseline if card.candidate else None
    return card.label, card.value, before or "", card.change or "", card.note


def _table(table: sections.Table) -> str:
    rows = _rows(table.columns, table.rows, table.numeric) if table.rows else ""
    return "\n\n".join(part for part in (f"## {_escape(table.caption)}", rows, _escape(table.note or "")) if part)


def _facts(title: str, facts: sections.Facts) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {_escape(label)}: {_escape(value)}" for label, value in facts)


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: frozenset[int] = frozenset()) -> str:
    rule = "|".join(" ---: " if index in numeric else " --- " for index in range(len(columns)))
    lines = [f"| {' | '.join(columns)} |", f"|{rule}|"]
    lines += [f"| {' | '.join(_escape(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _escape(text: str) -> str:
    flat = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", flat)
