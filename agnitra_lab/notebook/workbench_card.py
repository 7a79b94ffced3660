"""The card of a workbench: where its seven steps stand and what each produced, in one block of HTML or plain text.

It needs no kernel and no script: what stands here is what a reader of the saved notebook has.
"""

from __future__ import annotations

from collections.abc import Sequence

from agnitra_lab.contracts.report import STAGES
from agnitra_lab.notebook import cards, workbench_sections
from agnitra_lab.notebook.artifact_files import ArtifactFile
from agnitra_lab.notebook.cards import Column, Table
from agnitra_lab.notebook.findings import Findings
from agnitra_lab.notebook.steps import MARKS, WORDS, Status, Step
from agnitra_lab.redact import redact_text
from agnitra_lab.report import numbers, palette
from agnitra_lab.report.html import Child, Html, tag

_COLUMNS = (Column("Step", 15), Column("State", 19), Column("Time", 10, is_number=True), Column("What it found", 56))
_COLOURS: dict[Status, str] = {"failed": palette.WARNING, "cancelled": palette.WARNING, "running": palette.ACCENT}
_MAX_FILES = 5
_KERNEL_GONE = (
    "This card needs no kernel. The buttons do: where they are gone or do nothing, run the cell again; "
    "%agnitra_report {run_id} shows the finished run again."
)


def workbench_card_html(known: Findings, files: Sequence[ArtifactFile] = (), problem: str | None = None) -> Html:
    """Render the card.

    Args:
        known: the workbench.
        files: of its run.
        problem: of the files, such as that somebody deleted them.
    """
    panels = [(stage, workbench_sections.panel(known, stage)) for stage in reversed(STAGES)]
    rollback = workbench_sections.rollback_panel(known)
    return cards.block(
        cards.kicker(["workbench", known.workload.name, known.device_name]),
        cards.title(_title(known), palette.WARNING if _stopped(known) else palette.TEXT),
        cards.section(cards.table(Table(None, _COLUMNS, [_row(step) for step in known.steps]))),
        _stop_note(known),
        tag("p", problem, style=f"color:{palette.WARNING};margin:0 0 12px 0;font-size:13px") if problem else None,
        cards.section(rollback) if rollback else None,
        # The newest first: what was just produced is what one looks for.
        *(cards.section(cards.details_open(_heading(stage), made)) for stage, made in panels if made is not None),
        _printed(known),
        _files(files),
        cards.paragraph(_KERNEL_GONE.format(run_id=known.run.run_id), top=8) if known.result and known.run else None,
    )


def workbench_card_text(known: Findings, files: Sequence[ArtifactFile] = ()) -> str:
    """Render the card as plain text: short lines in reading order."""
    lines = [f"Agnitra Lab workbench: {known.workload.name}", _title(known), ""]
    for step in known.steps:
        taken = f" in {numbers.seconds(step.wall_s)}" if step.wall_s is not None else ""
        lines.append(f"{step.stage}: {WORDS[step.status]}{taken}{f'. {step.headline}' if step.headline else ''}")
    if known.comparison is not None:
        lines += ["", *(f"{label}: {text}." for label, text in workbench_sections.verdict_facts(known.comparison))]
    lines += ["", *(f"{file.name}: {file.path} ({file.size_bytes:,} bytes)" for file in files[:_MAX_FILES])]
    return "\n".join(numbers.plain_text(redact_text(line)) for line in lines).rstrip() + "\n"


def files_table(files: Sequence[ArtifactFile]) -> Html:
    """The run's JSON files: links for front ends that open files, paths, sizes and sums for all."""
    columns = (Column("File", 24), Column("On disk", 46), Column("Bytes", 12, is_number=True), Column("sha256", 18))
    rows: list[tuple[Child, ...]] = [
        (file.name, _link(redact_text(str(file.path))), f"{file.size_bytes:,}", file.sha256[:12])
        for file in files[:_MAX_FILES]
    ]
    return cards.table(Table("JSON artifacts", columns, rows))


def _link(path: str) -> Html:
    if path.startswith(("/", "~")):
        return cards.breakable(path)
    return tag("a", cards.breakable(path), href=path, style=f"color:{palette.ACCENT}")


def _title(known: Findings) -> str:
    stopped = _stopped(known)
    if stopped is not None:
        return f"{stopped.stage.capitalize()} {WORDS[stopped.status]}: {stopped.headline}"
    if known.proof is not None:
        return "Rolled back: the original runs again." if known.proof.is_restored else "The original is NOT restored."
    running = known.steps.current
    if running is not None:
        return f"Running {running.stage}."
    if known.report is not None:
        return known.report.headline
    following = known.steps.following
    return f"{known.steps.num_ended} of {len(STAGES)} steps have ended. Next: {following}."


def _stopped(known: Findings) -> Step | None:
    return next((step for step in known.steps if step.status in ("failed", "cancelled")), None)


def _stop_note(known: Findings) -> Html | None:
    stopped = _stopped(known)
    if stopped is None:
        return None
    kept = [step.stage for step in known.steps if step.has_ended]
    before = f"What came before stays ({', '.join(kept)}). " if kept else ""
    return cards.paragraph(
        f"{before}The notebook goes on as usual; run {stopped.stage} again, with other options if you like.", bottom=12
    )


def _row(step: Step) -> tuple[Child, ...]:
    state = tag(
        "span", f"{MARKS[step.status]} {WORDS[step.status]}", style=f"color:{_COLOURS.get(step.status, palette.TEXT)}"
    )
    return step.stage, state, numbers.seconds(step.wall_s) if step.wall_s is not None else "", step.headline


def _heading(stage: str) -> str:
    return f"{STAGES.index(stage) + 1}  {stage}"  # type: ignore[arg-type]


def _printed(known: Findings) -> Html | None:
    made = workbench_sections.printed_panel(known)
    return cards.section(made) if made is not None else None


def _files(files: Sequence[ArtifactFile]) -> Html | None:
    if not files:
        return None
    num_left = len(files) - _MAX_FILES
    more = cards.paragraph(f"{num_left} more beside them.", top=6) if num_left > 0 else None
    return cards.section(files_table(files), more)
