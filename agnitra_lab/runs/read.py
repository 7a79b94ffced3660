"""Reading runs back: what is there, whether it is whole, and which is the latest. Listing never raises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from agnitra_lab.contracts.report import Report
from agnitra_lab.contracts.run import Category, Manifest, RunSummary
from agnitra_lab.errors import AgnitraError, RunStoreError, UsageError
from agnitra_lab.runs import layout
from agnitra_lab.runs.atomic import store_error
from agnitra_lab.runs.store import describe_file

MAX_SUMMARY_BYTES = 64 * 2**20
_MAX_DEPTH = layout.MAX_TOPIC_SEGMENTS + 2
# What people and tools leave beside runs without meaning harm.
_EXPECTED_STRAYS = {"README.md", "latest"}


@dataclass(frozen=True)
class RunEntry:
    """One run, or one thing that should not be there, in one category.

    Attributes:
        run_id: name of the directory.
        category: where it was found.
        topic: from its summary, else the folder's path.
        status: complete; incomplete (no manifest: killed, or still running); damaged.
        generated_at: UTC from its summary, None when that cannot be read.
        path: the directory.
        reason: why it is not complete, in words.
    """

    run_id: str
    category: Category
    topic: str
    status: Literal["complete", "incomplete", "damaged"]
    generated_at: str | None
    path: Path
    reason: str | None = None


def list_runs(root: Path | str = layout.DEFAULT_ROOT) -> list[RunEntry]:
    """List every run under `root`, newest first. Whatever cannot be read is listed as damaged with the reason."""
    entries = [entry for category in layout.CATEGORIES for entry in _entries(Path(root), category)]
    return sorted(entries, key=_age, reverse=True)


def latest(root: Path | str, category: Category, topic: str) -> RunEntry | None:
    """Newest complete run of a topic in a category, None when there is none."""
    folder = Path(root) / category / layout.safe_topic(topic)
    here = (entry for entry in _entries(Path(root), category) if entry.path.parent == folder)
    return max((entry for entry in here if entry.status == "complete"), key=_age, default=None)


def find_report(root: Path | str, run: str | None = None) -> tuple[RunEntry, Report]:
    """Read the report of a finished run of the loop.

    Args:
        root: folder of the runs.
        run: run id, or the run's directory; None for the newest.

    Raises:
        UsageError: there is no such run, or its report is not one.
        RunStoreError: its report cannot be read.
    """
    entries = [entry for entry in list_runs(root) if entry.category == "reports" and entry.status == "complete"]
    # Only a run of the whole loop has a report; one that stopped after the suggestions is complete without it.
    finished = [entry for entry in entries if (entry.path / layout.REPORT_FILE).is_file()]
    if run is not None:
        finished = [entry for entry in finished if entry.run_id == run or entry.path.resolve() == Path(run).resolve()]
    if not finished:
        what = f"No finished run {run!r} under {root}." if run else f"No finished run under {root}."
        raise UsageError(what, hint="List them: agnitra runs. Make one: agnitra demo")
    file = finished[0].path / layout.REPORT_FILE
    try:
        return finished[0], Report.from_json(file.read_bytes())
    except OSError as error:
        raise store_error(error, file) from error


def load_summary(path: Path | str) -> RunSummary:
    """Read the summary of a run.

    Args:
        path: the run's directory, or its summary.json.

    Raises:
        RunStoreError: when there is none, or it is not one.
    """
    file = Path(path)
    if file.is_dir():
        file = file / layout.SUMMARY_FILE
    try:
        return RunSummary.from_json(_read_bytes(file))
    except RunStoreError:
        raise
    except AgnitraError as error:
        raise RunStoreError(f"{file} cannot be read as a run summary. {error.message}") from error


def load_manifest(path: Path | str) -> Manifest:
    """Read the manifest of a run directory.

    Raises:
        RunStoreError: when there is none, or it is not one.
    """
    file = Path(path) / layout.MANIFEST_FILE
    try:
        return Manifest.from_json(_read_bytes(file))
    except RunStoreError:
        raise
    except AgnitraError as error:
        raise RunStoreError(f"{file} cannot be read as a manifest. {error.message}") from error


def verify(path: Path | str) -> tuple[str, ...]:
    """Compare a run's files with its manifest, byte for byte.

    Returns:
        One sentence for each problem; empty when the run is whole.
    """
    directory = Path(path)
    try:
        manifest = load_manifest(directory)
        load_summary(directory)
    except RunStoreError as error:
        return (error.message,)
    problems = [] if manifest.run_id == directory.name else [f"the manifest is of run {manifest.run_id}"]
    for entry in manifest.files:
        problem = _size_problem(directory, entry.path, entry.size_bytes)
        if problem is None and describe_file(directory / entry.path, directory).sha256 != entry.sha256:
            problem = f"{entry.path} has changed: its sha256 differs from the manifest"
        problems += [problem] if problem else []
    listed = {entry.path for entry in manifest.files} | {layout.MANIFEST_FILE}
    present = (item.relative_to(directory).as_posix() for item in directory.rglob("*") if item.is_file())
    problems += [f"{name} is not in the manifest" for name in sorted(set(present) - listed)]
    return tuple(problems)


def _entries(root: Path, category: Category) -> Iterator[RunEntry]:
    for path in _candidates(root / category, _MAX_DEPTH):
        yield _entry(path, category, folder_topic=path.parent.relative_to(root / category).as_posix())


def _candidates(folder: Path, depth: int) -> Iterator[Path]:
    """Run directories below `folder`, and whatever else lies where only runs and topics should."""
    try:
        children = sorted(folder.iterdir())
    except OSError:
        return
    for child in children:
        if child.name.startswith(".") or child.name in _EXPECTED_STRAYS:
            continue
        is_topic = child.is_dir() and not child.is_symlink() and not layout.is_run_id(child.name)
        if not is_topic or depth == 1:
            yield child
            continue
        below = list(_candidates(child, depth - 1))
        if any(layout.is_run_id(path.name) for path in below):
            yield from below
        elif below:
            yield child  # one line for a foreign folder, however much is in it


def _entry(path: Path, category: Category, *, folder_topic: str) -> RunEntry:
    topic, generated_at = folder_topic, None
    status: Literal["complete", "incomplete", "damaged"]
    reason: str | None
    try:
        status, reason = _status(path)
        if status != "damaged" and (path / layout.SUMMARY_FILE).exists():
            meta = load_summary(path).meta
            topic, generated_at = meta.topic, meta.generated_at
    except RunStoreError as error:
        status, reason = "damaged", error.message
    except OSError as error:
        status, reason = "damaged", error.strerror or type(error).__name__
    return RunEntry(path.name, category, topic, status, generated_at, path, reason)


def _status(path: Path) -> tuple[Literal["complete", "incomplete", "damaged"], str | None]:
    if path.is_symlink() or not path.is_dir():
        return "damaged", "not a run directory"
    if not layout.is_run_id(path.name):
        return "damaged", "not a run directory: its name is not a run id"
    if not (path / layout.MANIFEST_FILE).exists():
        return "incomplete", "no manifest: the run was cut short, or is still going on"
    manifest = load_manifest(path)
    if manifest.run_id != path.name:
        return "damaged", f"the manifest is of run {manifest.run_id}"
    summary = load_summary(path)
    if summary.meta.run_id != path.name:
        return "damaged", f"the summary is of run {summary.meta.run_id}"
    problems = [_size_problem(path, entry.path, entry.size_bytes) for entry in manifest.files]
    problem = next((problem for problem in problems if problem), None)
    return ("damaged", problem) if problem else ("complete", None)


def _size_problem(directory: Path, relative_path: str, size_bytes: int) -> str | None:
    parts = PurePosixPath(relative_path)
    if parts.is_absolute() or ".." in parts.parts:
        return f"{relative_path} in the manifest points out of the run"
    file = directory / relative_path
    if file.is_symlink() or not file.is_file():
        return f"{relative_path} is missing"
    actual = file.stat().st_size
    return None if actual == size_bytes else f"{relative_path} has {actual} bytes, the manifest says {size_bytes}"


def _read_bytes(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_SUMMARY_BYTES:
            raise RunStoreError(f"{file} is larger than {MAX_SUMMARY_BYTES} bytes, so it is not a record of a run.")
        return file.read_bytes()
    except OSError as error:
        raise RunStoreError(
            f"Cannot read {file}: {error.strerror or type(error).__name__}.",
            hint="Name a run directory under artifacts/.",
        ) from error


def _age(entry: RunEntry) -> tuple[str, str, str]:
    stamp = entry.run_id[:15] if layout.is_run_id(entry.run_id) else ""
    return stamp, entry.generated_at or "", entry.run_id
