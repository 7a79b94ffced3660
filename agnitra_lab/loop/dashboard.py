"""The artifacts folder -> the dashboard's record: runs, comparisons, suite, searches and profiles, as the shell has
them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agnitra_lab.contracts.run import RunSummary
from agnitra_lab.contracts.search import SearchResult
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.errors import AgnitraError, RunStoreError, UsageError
from agnitra_lab.loop import suite_table
from agnitra_lab.loop.dashboard_layers import layer_profile
from agnitra_lab.redact import redact
from agnitra_lab.report.dashboard import dashboard_page
from agnitra_lab.report.dashboard_record import (
    Dashboard,
    LayerProfile,
    PairRow,
    RunRow,
    SearchCurve,
    SuiteGroup,
)
from agnitra_lab.runs import layout, provenance
from agnitra_lab.runs.atomic import write_atomically
from agnitra_lab.runs.read import RunEntry, list_runs, load_summary
from agnitra_lab.runs.regressions import compare_runs, device_name, figure_rules, figures_of

TELEMETRY_FILE = "telemetry.json"
TRIALS_FOLDER = "trials"
# One optimisation files the same comparison twice: under reports it stands with its price.
_PAIRED = tuple(category for category in layout.CATEGORIES if category != layout.PRIMARY_CATEGORY)

_Read = list[tuple[RunEntry, RunSummary]]


def collect_dashboard(artifacts: Path | str = layout.DEFAULT_ROOT) -> Dashboard:
    """Read everything under an artifacts folder.

    Args:
        artifacts: folder of the runs.

    Returns:
        The record. What is incomplete, damaged or cannot be read is in it as such; nothing there makes it fail.

    Raises:
        UsageError: there is no such folder.
    """
    root = Path(artifacts)
    if not root.is_dir():
        raise UsageError(f"No folder {root}.", hint="Make a run first: agnitra demo")
    warnings: list[str] = []
    entries = list_runs(root)
    read = list(_summaries(entries, warnings))
    groups, suite_warnings = suite_table.collect(root)
    found = Dashboard(
        artifacts=str(root),
        generated_at=provenance.utc_now(),
        runs=_run_rows(entries, read),
        pairs=_pairs(read),
        suite=tuple(
            SuiteGroup(
                device=group.device, scale=group.scale, figures=group.figures,
                workloads=tuple(suite_table.row(filed) for filed in group.filed),
            )
            for group in groups
        ),
        searches=tuple(_searches(read, warnings)),
        layers=tuple(_layers(read, warnings)),
        rules=figure_rules(),
        warnings=tuple(dict.fromkeys([*warnings, *suite_warnings])),
    )  # fmt: skip
    return _redacted(found)


def write_dashboard(record: Dashboard, path: Path | str) -> Path:
    """Write the dashboard as one HTML file that opens offline.

    Args:
        record: from `collect_dashboard`.
        path: of the file; folders above it are made.

    Returns:
        The path.

    Raises:
        UsageError: it names a folder, or no HTML file.
        RunStoreError: it cannot be written; a file that was there is as it was.
    """
    file = Path(path)
    if file.suffix.lower() not in (".html", ".htm") or file.is_dir():
        raise UsageError(f"--out is {str(file)!r}.", hint="Expected a file such as dashboard.html.")
    try:
        write_atomically(file, dashboard_page(record).encode())
    except RunStoreError as error:
        raise RunStoreError(error.message, hint="Choose another file with --out FILE.") from error
    return file


def _summaries(entries: Sequence[RunEntry], warnings: list[str]) -> Iterator[tuple[RunEntry, RunSummary]]:
    """The summaries of complete runs: figures of others are not to be trusted."""
    for entry in entries:
        if entry.status == "complete":
            try:
                yield entry, load_summary(entry.path)
            except AgnitraError as error:
                warnings.append(error.message)


def _run_rows(entries: Sequence[RunEntry], read: _Read) -> tuple[RunRow, ...]:
    summaries = {entry.path: summary for entry, summary in read}
    return tuple(_run_row(entry, summaries.get(entry.path)) for entry in entries)


def _run_row(entry: RunEntry, summary: RunSummary | None) -> RunRow:
    known: dict[str, Any] = {}
    if summary is not None:
        values = summary.results.model_dump()
        words = {name: value for name, value in values.items() if isinstance(value, (str, bool))}
        known = {
            "device": device_name(summary),
            "commit": summary.meta.git.commit_full,
            "is_dirty": summary.meta.git.dirty,
            "command": summary.meta.command,
            "figures": {**words, **figures_of(summary.results)},
        }
    return RunRow(
        run_id=entry.run_id, category=entry.category, topic=entry.topic, status=entry.status, path=str(entry.path),
        generated_at=entry.generated_at, reason=entry.reason, **known,
    )  # fmt: skip


def _pairs(read: _Read) -> tuple[PairRow, ...]:
    """The newest run of each topic against the one before it, where they share a device and a workload's settings."""
    series: dict[tuple[str, str, str, str], _Read] = {}
    for entry, summary in read:
        if entry.category in _PAIRED:
            workload = json.dumps(summary.meta.config.get("workload"), sort_keys=True)
            key = (entry.category, entry.topic, device_name(summary), workload)
            series.setdefault(key, []).append((entry, summary))
    rows = []
    for (category, topic, device, _), runs in series.items():
        if len(runs) < 2:
            continue
        (newest, candidate), (previous, baseline) = runs[0], runs[1]
        found = compare_runs(baseline, candidate)
        if found.metrics:
            rows.append(
                PairRow(
                    category=category, topic=topic, device=device, baseline_path=str(previous.path),
                    candidate_path=str(newest.path), found=found,
                )
            )  # fmt: skip
    return tuple(sorted(rows, key=lambda row: (row.found.verdict != "regressed", row.topic, row.category)))


def _searches(read: _Read, warnings: list[str]) -> Iterator[SearchCurve]:
    for entry, _ in read:
        if entry.category != "cmaes":
            continue
        for file in sorted((entry.path / TRIALS_FOLDER).glob("*.json")):
            try:
                search = SearchResult.from_json(file.read_bytes())
            except (AgnitraError, OSError) as error:
                warnings.append(f"{file} is left out: {getattr(error, 'message', error)}")
                continue
            yield SearchCurve(
                run_id=entry.run_id, topic=entry.topic, template=search.space_template, shape=search.shape,
                dtype=search.dtype, sampler=search.sampler, measured_on=search.measured_on,
                num_configs=search.num_configs, stopped_because=search.stopped_because,
                latencies_ms=tuple(trial.latency_ms for trial in search.trials),
                best_latency_ms=search.best.latency_ms if search.best else None,
                best_config=search.best.config.key() if search.best else None,
            )  # fmt: skip


def _layers(read: _Read, warnings: list[str]) -> Iterator[LayerProfile]:
    for entry, summary in read:
        file = entry.path / TELEMETRY_FILE
        if entry.category != "profiles" or not file.is_file():
            continue
        try:
            record = TelemetryRecord.from_json(file.read_bytes())
            profile = layer_profile(record, entry.path, run_id=entry.run_id, topic=entry.topic)
        except (AgnitraError, OSError) as error:
            warnings.append(f"{file} is left out: {getattr(error, 'message', error)}")
            continue
        if profile is not None:
            yield profile.model_copy(update={"device": device_name(summary)})


def _redacted(found: Dashboard) -> Dashboard:
    value = found.model_dump(mode="json")
    redacted = redact(value)
    return found if redacted == value else Dashboard.from_json(json.dumps(redacted))
