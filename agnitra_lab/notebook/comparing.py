"""The cards of comparisons: two callables in an A/B, or the figures of two finished runs."""

from __future__ import annotations

from pathlib import Path

from agnitra_lab.contracts.measurement import Comparison
from agnitra_lab.contracts.regressions import MetricChange, Regressions
from agnitra_lab.errors import UsageError
from agnitra_lab.notebook import cards, workbench_pictures
from agnitra_lab.notebook.cards import Column, Table
from agnitra_lab.notebook.workbench_sections import distribution_alt, latency_table, verdict_facts
from agnitra_lab.report import numbers, palette
from agnitra_lab.report.assemble import headline
from agnitra_lab.report.html import Html
from agnitra_lab.runs import layout
from agnitra_lab.runs.read import list_runs, load_summary
from agnitra_lab.runs.regressions import compare_runs

_COLUMNS = (
    Column("Figure", 34),
    Column("Baseline", 16, is_number=True),
    Column("Candidate", 16, is_number=True),
    Column("Change", 12, is_number=True),
    Column("Verdict", 22),
)


def comparison_card_html(comparison: Comparison) -> Html:
    """Render an A/B as one block of HTML."""
    is_faster = comparison.verdict == "faster"
    return cards.block(
        cards.kicker(["compare", comparison.workload]),
        cards.title(_sentence(comparison), palette.ACCENT if is_faster else palette.TEXT),
        cards.section(
            cards.picture(
                workbench_pictures.distribution_picture(comparison),
                distribution_alt(comparison),
                workbench_pictures.DISTRIBUTION_HEIGHT,
            ),
            cards.table(latency_table(comparison)),
            *(
                cards.paragraph(cards.label(f"{label}:"), f" {text}", top=4)
                for label, text in verdict_facts(comparison)
            ),
        ),
    )


def comparison_card_text(comparison: Comparison) -> str:
    """Render an A/B as plain text."""
    lines = [f"Agnitra Lab comparison: {comparison.workload}", _sentence(comparison), distribution_alt(comparison)]
    lines += [f"{label}: {text}." for label, text in verdict_facts(comparison)]
    return "\n".join(numbers.plain_text(line) for line in lines) + "\n"


def runs_card_html(found: Regressions) -> Html:
    """Render the comparison of two runs as one block of HTML."""
    rows = [_row(change) for change in found.metrics]
    colour = palette.WARNING if found.verdict == "regressed" else palette.TEXT
    return cards.block(
        cards.kicker(["compare", found.baseline_run_id, found.candidate_run_id]),
        cards.title(_runs_sentence(found), colour),
        cards.section(cards.table(Table(None, _COLUMNS, rows)))
        if rows
        else cards.paragraph("No figure stands in both."),
        cards.paragraph(found.note) if found.note else None,
    )


def runs_card_text(found: Regressions) -> str:
    """Render the comparison of two runs as plain text."""
    lines = [f"Agnitra Lab: {found.baseline_run_id} and {found.candidate_run_id}", _runs_sentence(found)]
    lines += [", ".join(filter(None, _row(change))) + "." for change in found.metrics]
    lines += [found.note] if found.note else []
    return "\n".join(numbers.plain_text(line) for line in lines) + "\n"


def two_runs(artifacts: Path | str, baseline: str, candidate: str) -> Regressions:
    """Compare the summaries of two runs.

    Args:
        artifacts: folder of the runs.
        baseline, candidate: run ids, or run directories.

    Raises:
        UsageError: there is no such run.
        RunStoreError: a summary cannot be read.
    """
    first, second = (_directory(artifacts, name) for name in (baseline, candidate))
    return compare_runs(load_summary(first), load_summary(second))


def is_run(word: str) -> bool:
    """Whether a word of a magic's line names a run: by its id, or by its directory."""
    return layout.is_run_id(word) or layout.is_run_id(Path(word).name)


def _directory(artifacts: Path | str, name: str) -> Path:
    if not layout.is_run_id(name):
        return Path(name)
    # A run of the loop lies in several categories; its whole story is in the report's.
    found = [entry for entry in list_runs(artifacts) if entry.run_id == name]
    if not found:
        raise UsageError(f"There is no run {name!r} under {artifacts}.", hint="List them: %agnitra_runs")
    return min(found, key=lambda entry: entry.category != layout.PRIMARY_CATEGORY).path


def _sentence(comparison: Comparison) -> str:
    return headline(comparison, comparison.candidate)


def _runs_sentence(found: Regressions) -> str:
    worse = [change.metric for change in found.metrics if change.verdict == "regressed"]
    if worse:
        return f"{len(worse)} of {len(found.metrics)} figures got worse: {', '.join(worse[:4])}."
    return f"None of {len(found.metrics)} figures got worse by more than it may."


def _row(change: MetricChange) -> tuple[str, str, str, str, str]:
    relative = f"{change.relative_change:+.1%}" if change.relative_change is not None else ""
    return (
        change.metric,
        _number(change.baseline),
        _number(change.candidate),
        relative,
        change.verdict.replace("_", " "),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"
