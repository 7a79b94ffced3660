"""The JSON files of a run: what the card lists and the buttons copy and download, byte for byte as on disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from agnitra_lab.errors import RunStoreError, UsageError
from agnitra_lab.runs import layout

_FIRST = ("report.json", "telemetry.json", "suggestions.json", "usage_event.json")
_HINT = "Run the step again; a new run is filed."


@dataclass(frozen=True)
class ArtifactFile:
    """One file.

    Attributes:
        name: what it is called among those of its run, such as "report.json" or "bench/summary.json".
        path: where it lies.
        size_bytes: of the file.
        sha256: of its bytes, hex.
    """

    name: str
    path: Path
    size_bytes: int
    sha256: str


class RunFiles:
    """The JSON files of one run, under all of its categories."""

    def __init__(self, root: Path, topic: str, run_id: str) -> None:
        folders = ((name, layout.run_directory(root, name, topic, run_id)) for name in layout.CATEGORIES)
        self._folders = {str(name): folder for name, folder in folders}
        self._known: dict[Path, tuple[tuple[int, int], str]] = {}

    def all(self) -> tuple[ArtifactFile, ...]:
        """List them, the main ones first. What vanishes meanwhile is left out."""
        found = {}
        for category, folder in self._folders.items():
            for path in _json_below(folder):
                if path.is_symlink() or path.name == layout.MANIFEST_FILE or path.name.startswith("."):
                    continue
                is_main = path.parent == folder and path.name in _FIRST
                name = path.name if is_main else f"{category}/{path.relative_to(folder).as_posix()}"
                try:
                    found[name] = self._described(name, path)
                except OSError:
                    continue
        order = {name: index for index, name in enumerate(_FIRST)}
        return tuple(found[name] for name in sorted(found, key=lambda name: (order.get(name, len(order)), name)))

    def read(self, name: str) -> bytes:
        """Give the bytes of one of them.

        Raises:
            UsageError: no such file was listed.
            RunStoreError: it is no longer there, or cannot be read.
        """
        category, _, rest = name.partition("/")
        listed = next((file for file in self.all() if file.name == name), None)
        if listed is None:
            is_known = name in _FIRST or (bool(rest) and category in self._folders)
            if is_known:
                raise RunStoreError(f"{name} of this run is no longer on disk.", hint=_HINT)
            raise UsageError(f"This run has no file {name!r}.")
        try:
            return listed.path.read_bytes()
        except OSError as error:
            raise RunStoreError(f"{listed.path} cannot be read: {error.strerror}.", hint=_HINT) from error

    def missing(self) -> str | None:
        """Say that the run's folders are gone, as when somebody deleted them; None while one is there."""
        if any(folder.is_dir() for folder in self._folders.values()):
            return None
        return "The run's folder was deleted: the figures on this card are no longer on disk. " + _HINT

    def _described(self, name: str, path: Path) -> ArtifactFile:
        stat = path.stat()
        key = (stat.st_mtime_ns, stat.st_size)
        known = self._known.get(path)
        if known is None or known[0] != key:
            known = key, hashlib.sha256(path.read_bytes()).hexdigest()
            self._known[path] = known
        return ArtifactFile(name, path, stat.st_size, known[1])


def _json_below(folder: Path) -> list[Path]:
    """The JSON files of a folder that may be deleted while it is read."""
    try:
        return sorted(folder.rglob("*.json"))
    except OSError:
        return []
