"""run.md: what ran, why, the key numbers as a table, and how to run it again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from agnitra_lab.contracts.run import RunSummary

MAX_LISTED_ROWS = 40


def run_markdown(summary: RunSummary, why: str) -> str:
    """Write run.md.

    Args:
        summary: what summary.json holds.
        why: one sentence on what was run and why.
    """
    meta = summary.meta
    device = meta.device if isinstance(meta.device, str) else f"{meta.device.name} ({meta.device.type})"
    figures = summary.results.model_dump(mode="json", exclude_none=True)
    sections = [
        f"# {escape(meta.topic)} · {meta.kind} · {meta.run_id}",
        escape(why),
        "## Key numbers",
        _figure_table(figures),
        *(_row_table(name, rows) for name, rows in figures.items() if _is_row_list(rows)),
        "## Where it ran",
        table(("fact", "value"), _facts(summary, device)),
        "## Run it again",
        f"```\n{_fence_safe(meta.command)}\n```",
    ]
    if meta.links:
        links = "\n".join(f"- [{escape(name)}]({path}/run.md)" for name, path in sorted(meta.links.items()))
        sections += ["## The same run elsewhere", links]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(header: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; cells are escaped."""
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(escape(_text(cell)) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Make text inert in Markdown: one line, and none of the characters that start markup or HTML."""
    flat = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
    return re.sub(r"([\\`*\[\]<>|#~])", r"\\\1", flat)


def _facts(summary: RunSummary, device: str) -> list[tuple[str, Any]]:
    meta = summary.meta
    commit = meta.git.commit_full or "not in a git checkout"
    state = "" if meta.git.dirty is None else (" (dirty)" if meta.git.dirty else " (clean)")
    seeds = meta.seed if meta.seed is not None else ", ".join(f"{k}={v}" for k, v in (meta.seeds or {}).items())
    versions = ", ".join(f"{name} {version}" for name, version in sorted(meta.versions.items()))
    return [
        ("device", device),
        ("commit", f"{commit}{state}"),
        ("seed", seeds),
        ("generated at", meta.generated_at),
        ("python", meta.python.version),
        *([("versions", versions)] if versions else []),
    ]


def _figure_table(figures: Mapping[str, Any]) -> str:
    rows = [(name, value) for name, value in figures.items() if not _is_row_list(value)]
    return table(("figure", "value"), rows) if rows else "No figures of its own."


def _row_table(name: str, rows: list[dict[str, Any]]) -> str:
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    shown = [[row.get(column, "") for column in columns] for row in rows[:MAX_LISTED_ROWS]]
    more = len(rows) - len(shown)
    note = f"\n\n{more} more in summary.json." if more else ""
    return f"### {escape(name)}\n\n{table(columns, shown)}{note}"


def _is_row_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return str(value)


def _fence_safe(command: str) -> str:
    return re.sub(r"`{3,}", "``", command).replace("\r", " ")
