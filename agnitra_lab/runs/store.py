"""The only writer of `artifacts/`: exclusive directories, atomic redacted files, and a manifest that comes last.

A run that was killed at any point has no manifest, so it reads as incomplete and is never taken for a finished one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from agnitra_lab.contracts.base import Contract
from agnitra_lab.contracts.events import Event
from agnitra_lab.contracts.run import Category, FileEntry, Manifest, RunSummary
from agnitra_lab.errors import RunStoreError
from agnitra_lab.redact import redact, redact_text
from agnitra_lab.runs import layout
from agnitra_lab.runs.atomic import ELSEWHERE_HINT, append_line, store_error, sync_directory, write_atomically

MAX_ATTEMPTS = 64
"""Draws of a run id before giving up; with 65536 suffixes a second one is rare already."""


class RunStore:
    """The artifacts folder of a project."""

    def __init__(self, root: Path | str = layout.DEFAULT_ROOT, *, draw_run_id: Callable[[str], str] = layout.run_id):
        """Remember the folder; nothing is touched until a run is created.

        Args:
            root: the artifacts folder; it need not exist.
            draw_run_id: tag -> run id.
        """
        self.root = Path(root)
        self._draw_run_id = draw_run_id

    def check_writable(self) -> None:
        """Find out before any measuring whether runs can be written, and leave nothing behind.

        Raises:
            RunStoreError: when the folder, or the nearest one that exists above it, cannot take a file.
        """
        try:
            existing = next(path for path in (self.root, *self.root.absolute().parents) if os.path.lexists(path))
            places = [self.root / category for category in layout.CATEGORIES]
            for place in (existing, *(place for place in places if os.path.lexists(place))):
                if not place.is_dir():
                    raise RunStoreError(f"{place} is not a folder, so no run can be written.", hint=ELSEWHERE_HINT)
                with tempfile.NamedTemporaryFile(prefix=layout.TEMPORARY_PREFIX, dir=place):
                    pass
        except OSError as error:
            raise store_error(error, self.root) from error

    def create(self, tag: str, topic: str, *, category: Category = layout.PRIMARY_CATEGORY) -> Run:
        """Reserve a run id by making its directory in one category, exclusively.

        Args:
            tag: short word in the run id.
            topic: what was run, such as "demo:llama-decode".
            category: where the events go and what reserves the id; other categories are opened on first use.

        Raises:
            RunStoreError: when the folder cannot be made.
        """
        for _ in range(MAX_ATTEMPTS):
            run_id = self._draw_run_id(tag)
            try:
                if self._is_used(run_id, topic):
                    continue
                return Run(self.root, run_id, topic, category)
            except FileExistsError:  # another process was quicker
                continue
            except OSError as error:
                raise store_error(error, self.root) from error
        raise RunStoreError(
            f"No free run id under {self.root} after {MAX_ATTEMPTS} draws for the tag {layout.safe_tag(tag)!r}.",
            hint=ELSEWHERE_HINT,
        )

    def reopen(self, run_id: str, topic: str, *, category: Category = layout.PRIMARY_CATEGORY) -> Run:
        """Go on with a run of an earlier process. Its manifest goes, so that it reads as incomplete until `finish`.

        Args:
            run_id: an id under `root`.
            topic, category: as they were given to `create`.

        Raises:
            RunStoreError: when there is no such run, or its folder cannot be written.
        """
        place = layout.run_directory(self.root, category, topic, run_id)
        if not place.is_dir():
            raise RunStoreError(f"There is no run at {place}.", hint="List them: agnitra runs")
        try:
            (place / layout.MANIFEST_FILE).unlink(missing_ok=True)
            sync_directory(place)
        except OSError as error:
            raise store_error(error, place) from error
        return Run(self.root, run_id, topic, category, is_new=False)

    def _is_used(self, run_id: str, topic: str) -> bool:
        return any(layout.run_directory(self.root, name, topic, run_id).exists() for name in layout.CATEGORIES)


class Run:
    """One run: the same id under every category that it writes to. `RunStore.create` makes it."""

    def __init__(self, root: Path, run_id: str, topic: str, primary: Category, *, is_new: bool = True) -> None:
        """Claim the id by making the directory of the primary category; it is there already where `is_new` is False.

        Raises:
            FileExistsError: when the id is taken there.
        """
        self.root = root
        self.run_id = run_id
        self.topic = topic
        self.primary = primary
        self._directories: dict[Category, Path] = {}
        self._finished: set[Category] = set()
        if is_new:
            self._claim(primary)
        else:
            self._directories[primary] = layout.run_directory(root, primary, topic, run_id)

    def directory(self, category: Category) -> Path:
        """Directory of this run in a category, made on first use.

        Raises:
            RunStoreError: when it cannot be made, or another run has this id there.
        """
        if category not in self._directories:
            try:
                self._claim(category)
            except OSError as error:
                place = layout.run_directory(self.root, category, self.topic, self.run_id)
                raise store_error(error, place) from error
        return self._directories[category]

    def _claim(self, category: Category) -> None:
        path = layout.run_directory(self.root, category, self.topic, self.run_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()  # exclusive: FileExistsError when the id is taken
        self._directories[category] = path

    def write_text(self, category: Category, relative_path: str, content: str) -> Path:
        """Write a text file, redacted. JSON stays JSON: its strings are redacted one by one."""
        redacted = _redact_json_text(content) if relative_path.endswith(".json") else redact_text(content)
        return self._write(category, relative_path, redacted.encode("utf-8", errors="replace"))

    def write_json(self, category: Category, relative_path: str, content: Contract | Any) -> Path:
        """Write a contract, or any JSON-like value, redacted."""
        value = content.model_dump(mode="json") if isinstance(content, Contract) else content
        text = json.dumps(redact(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return self._write(category, relative_path, text.encode("utf-8", errors="replace"))

    def write_bytes(self, category: Category, relative_path: str, content: bytes) -> Path:
        """Write a file as it is, unless it is text: then as `write_text` does."""
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            return self._write(category, relative_path, content)
        return self.write_text(category, relative_path, text)

    def append_event(self, event: Event) -> Path:
        """Append one line to events.jsonl of the primary category, durable when this returns."""
        self._refuse_finished(self.primary)
        path = self.directory(self.primary) / layout.EVENTS_FILE
        append_line(path, json.dumps(redact(event.model_dump(mode="json")), ensure_ascii=False).encode())
        return path

    def links(self, category: Category) -> dict[str, str]:
        """Category -> path of this run's other directories, relative to its directory in `category`."""
        here = self.directory(category)
        return {
            other: Path(os.path.relpath(path, here)).as_posix()
            for other, path in sorted(self._directories.items())
            if other != category
        }

    def finish(self, category: Category, summary: RunSummary, markdown: str) -> Path:
        """Write summary.json and run.md, then the manifest of every file: from here on the run reads as complete.

        Args:
            category: which of the run's directories.
            summary: what to file; links to the run's other directories are added to its meta.
            markdown: the text of run.md.

        Raises:
            RunStoreError: when a file cannot be written, or the category was finished before.
        """
        here = self.directory(category)
        meta = summary.meta.model_copy(update={"links": {**self.links(category), **summary.meta.links}})
        self.write_json(category, layout.SUMMARY_FILE, summary.model_copy(update={"meta": meta}))
        self.write_text(category, layout.MARKDOWN_FILE, markdown)
        manifest = Manifest(run_id=self.run_id, files=tuple(_file_entries(here)))
        path = self.write_json(category, layout.MANIFEST_FILE, manifest)
        self._finished.add(category)
        return path

    def finish_all(self, summaries: Mapping[Category, tuple[RunSummary, str]]) -> dict[Category, Path]:
        """Finish several categories so that each links to all others; the primary one comes last.

        Args:
            summaries: category -> (summary, text of run.md).

        Returns:
            Category -> directory.
        """
        for category in summaries:
            self.directory(category)
        for category in sorted(summaries, key=lambda name: name == self.primary):
            self.finish(category, *summaries[category])
        return {category: self.directory(category) for category in summaries}

    @property
    def is_there(self) -> bool:
        """Whether all of its directories still stand: somebody may have deleted one."""
        return all(path.is_dir() for path in self._directories.values())

    def discard(self) -> None:
        """Take away a run of which nothing is finished, as when another pass replaces it. A finished one stays.

        Raises:
            RunStoreError: when a directory cannot be removed.
        """
        if self._finished:
            return
        for path in self._directories.values():
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise store_error(error, path) from error

    def _write(self, category: Category, relative_path: str, content: bytes) -> Path:
        self._refuse_finished(category)
        path = _inside(self.directory(category), relative_path)
        write_atomically(path, content)
        return path

    def _refuse_finished(self, category: Category) -> None:
        if category in self._finished:
            raise RunStoreError(
                f"{category} of run {self.run_id} is finished and its manifest is written.",
                hint="Write every file before finish().",
            )


def _inside(directory: Path, relative_path: str) -> Path:
    parts = PurePosixPath(relative_path).parts
    is_plain = bool(parts) and not relative_path.startswith("/") and not {"..", "\0"} & set(parts)
    if not is_plain or "\\" in relative_path or "\0" in relative_path:
        raise RunStoreError(
            f"{relative_path!r} is not a path inside a run.",
            hint="Use a relative path with forward slashes and no '..'.",
        )
    path = directory.joinpath(*parts)
    # A symlink planted in the directory would lead a plain-looking path outside.
    if not path.resolve().is_relative_to(directory.resolve()):
        raise RunStoreError(f"{relative_path!r} leads out of the run through a link.", hint="Remove the link.")
    return path


def _redact_json_text(content: str) -> str:
    try:
        value = json.loads(content)
    except ValueError:
        return redact_text(content)
    redacted = redact(value)
    return content if redacted == value else json.dumps(redacted, indent=2, ensure_ascii=False) + "\n"


def _file_entries(directory: Path) -> list[FileEntry]:
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    kept = (path for path in files if not path.name.startswith(layout.TEMPORARY_PREFIX))
    return [describe_file(path, directory) for path in sorted(kept) if path != directory / layout.MANIFEST_FILE]


def describe_file(path: Path, directory: Path) -> FileEntry:
    """Name, size and sha256 of a file as a manifest lists them."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size_bytes = path.stat().st_size
    except OSError as error:
        raise store_error(error, path) from error
    return FileEntry(path=path.relative_to(directory).as_posix(), size_bytes=size_bytes, sha256=digest)
