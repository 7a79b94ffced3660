"""The ledger of a search: an append-only JSONL file from which a search goes on after a kill at any byte.

    line 1       the header: which space, kernel, device, versions, sampler and seed these lines belong to
    other lines  the events, in order: ask, tell, attach, final

Each line is written in one piece and synced before the search goes on. A tail without a line end is a write that a
kill cut off: it is moved to `<ledger>.torn` and the search goes on before it. Anything else that cannot be read, or a
header of another search, is refused, and the file is left as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field, TypeAdapter, ValidationError

from agnitra_lab.contracts.base import Contract, first_problem
from agnitra_lab.contracts.search import Trial
from agnitra_lab.errors import LedgerError

try:
    import fcntl
except ImportError:  # Windows has no fcntl: there, two searches on one ledger are not told apart.
    fcntl = None  # type: ignore[assignment]


class LedgerHeader(Contract):
    """What a ledger's events belong to. A search goes on from a ledger only where all of it is the same."""

    event: Literal["header"] = "header"
    schema_version: Literal["agnitra.search_ledger.v1"] = "agnitra.search_ledger.v1"
    template: str
    shape: tuple[int, ...]
    dtype: str
    space_sha256: str
    kernel_sha256: str
    device: str
    versions: dict[str, str]
    sampler: str
    seed: int
    context_sha256: str
    """Of the seeds, siblings, hints and facts that the sampler began with."""


class Asked(Contract):
    """The sampler was asked for `num` configs and gave these."""

    event: Literal["ask"] = "ask"
    num: int
    keys: tuple[str, ...]
    is_polish: bool = False


class Told(Contract):
    """A config that was asked for was measured."""

    event: Literal["tell"] = "tell"
    trial: Trial


class Attached(Contract):
    """A foreign result came in."""

    event: Literal["attach"] = "attach"
    trial: Trial


class FinalMeasured(Contract):
    """A finalist was measured again."""

    event: Literal["final"] = "final"
    trial: Trial


Event = Asked | Told | Attached | FinalMeasured
_EVENTS: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


class Ledger:
    """One search's file, locked for as long as it is open.

    Attributes:
        path: of the file.
        events: what it held when it was opened.
        num_torn_bytes: cut off at its end by a kill, and moved aside.
    """

    def __init__(self, path: str | Path, header: LedgerHeader) -> None:
        """Open a ledger, or begin one.

        Raises:
            LedgerError: where it belongs to another search, is corrupt, in use, or cannot be read or written.
        """
        self.path = Path(path)
        self.events: tuple[Event, ...] = ()
        self.num_torn_bytes = 0
        self._file = _opened(self.path)
        try:
            _lock(self._file, self.path)
            self._begin(header)
        except BaseException:
            self._file.close()
            raise

    def append(self, event: Event) -> None:
        """Write one event and wait until it is on the disk.

        Raises:
            LedgerError: when the disk refuses.
        """
        self._write(_line(event))

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, header: LedgerHeader) -> None:
        content = self._file.read()
        whole, _, torn = content.rpartition(b"\n")
        if not whole:
            # Only this search's own header, cut short, may be written over: everything else is somebody's file.
            if not _line(header).startswith(torn):
                raise _foreign(self.path, "it does not begin with a ledger's header")
        else:
            lines = whole.split(b"\n")
            _check_header(lines[0], header, self.path)
            self.events = tuple(_events(lines[1:], self.path))
        if torn:
            self._set_aside(torn, len(content) - len(torn))
        if not whole:
            self._write(_line(header))

    def _set_aside(self, torn: bytes, start: int) -> None:
        try:
            with self.path.with_name(self.path.name + ".torn").open("ab") as aside:
                aside.write(torn + b"\n")
                aside.flush()
                os.fsync(aside.fileno())
            self._file.truncate(start)
            self._file.seek(start)
        except OSError as error:
            raise LedgerError(f"The ledger {self.path} cannot be repaired: {error.strerror or error}.") from error
        self.num_torn_bytes = len(torn)

    def _write(self, line: bytes) -> None:
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except (OSError, ValueError) as error:
            raise LedgerError(
                f"The ledger {self.path} cannot be written: {error}.", hint="What it holds can be searched on from."
            ) from error


def read(path: str | Path) -> tuple[LedgerHeader, tuple[Event, ...]]:
    """Read a ledger that may be in use; a torn tail is left out.

    Raises:
        LedgerError: for a file that is no ledger, or is corrupt.
    """
    path = Path(path)
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
    except OSError as error:
        raise LedgerError(f"The ledger {path} cannot be read: {error.strerror or error}.") from error
    lines = whole.split(b"\n")
    try:
        header = LedgerHeader.model_validate_json(lines[0])
    except ValidationError as error:
        raise _foreign(path, f"its header: {first_problem(error)}") from error
    return header, tuple(_events(lines[1:], path))


def _opened(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    except OSError as error:
        raise LedgerError(f"The ledger {path} cannot be opened: {error.strerror or error}.") from error


def _lock(file: BinaryIO, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise LedgerError(
            f"Another search is writing the ledger {path}.", hint="Wait for it, or give this search its own file."
        ) from error


def _check_header(line: bytes, expected: LedgerHeader, path: Path) -> None:
    try:
        found = LedgerHeader.model_validate_json(line)
    except ValidationError as error:
        raise _foreign(path, f"its header: {first_problem(error)}") from error
    here: Mapping[str, Any] = expected.model_dump()
    there: Mapping[str, Any] = found.model_dump()
    other = [name for name in here if here[name] != there[name]]
    if other:
        name = other[0]
        raise _foreign(path, f"{name} is {there[name]!r} there and {here[name]!r} here")


def _foreign(path: Path, why: str) -> LedgerError:
    return LedgerError(
        f"The ledger {path} belongs to another search: {why}.",
        hint="It was left as it is; name another file, or attach its results.",
    )


def _events(lines: list[bytes], path: Path) -> Iterator[Event]:
    for number, line in enumerate(lines, 2):
        try:
            yield _EVENTS.validate_json(line)
        except ValidationError as error:
            raise LedgerError(
                f"The ledger {path} is corrupt at line {number}: {first_problem(error)}.",
                hint="It was left as it is; the lines before that one are whole.",
            ) from error


def _line(record: Contract) -> bytes:
    return json.dumps(record.model_dump(mode="json"), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
