"""The ledger: an append-only JSONL file that holds each event once and loses nothing to a crash.

Flow of one append: lock -> set a torn tail aside -> look for the id -> write one line -> fsync -> unlock.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agnitra_lab.contracts.base import Contract
from agnitra_lab.errors import RunStoreError, UsageError
from agnitra_lab.redact import redact


@dataclass(frozen=True)
class Appended:
    """What an append did.

    Attributes:
        is_new: False when the ledger already held the event.
        num_set_aside: torn tails that were moved to the `.torn` file beside the ledger, 0 or 1.
    """

    is_new: bool
    num_set_aside: int = 0


def append(path: Path, event: Contract, *, event_id: str) -> Appended:
    """Append an event, unless the ledger holds its id already.

    Args:
        path: the ledger; made with its folder when absent.
        event: what to file.
        event_id: the same for every retry of the same event, so that a retry after a crash bills nothing twice.

    Returns:
        Whether the event is new. When this returns, the line has reached the disk.

    Raises:
        UsageError: on an empty id, or when the id is held by an event with other content.
        RunStoreError: when the file cannot be written.
    """
    if not event_id:
        raise UsageError("event_id is empty, expected an id that is the same for every retry.")
    record = redact({"event_id": event_id, "event": event.model_dump(mode="json")})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as descriptor:
            return _append_locked(descriptor, path, record)
    except OSError as error:
        raise RunStoreError(
            f"The ledger {path} cannot be written ({error.strerror or error}).",
            hint="Check the folder's permissions and free space; the event was not filed.",
        ) from error


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records {"event_id", "event"} in order; an absent ledger is empty, an unreadable line is skipped."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := _parse(line)) is not None]


def _append_locked(descriptor: int, path: Path, record: dict[str, Any]) -> Appended:
    num_set_aside = _mend_tail(descriptor, path)
    known = next((found for found in read(path) if found["event_id"] == record["event_id"]), None)
    if known is not None:
        if known["event"] != record["event"]:
            raise UsageError(
                f"The ledger {path} holds {record['event_id']!r} with other content.",
                hint="File a correction under an id of its own; nothing was changed.",
            )
        return Appended(is_new=False, num_set_aside=num_set_aside)
    line = json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False).encode() + b"\n"
    size_bytes = os.fstat(descriptor).st_size
    try:
        _write(descriptor, line)
    except OSError:
        # Half a line on a full disk would be the next reader's torn tail.
        os.ftruncate(descriptor, size_bytes)
        raise
    os.fsync(descriptor)
    _sync_folder(path.parent)
    return Appended(is_new=True, num_set_aside=num_set_aside)


def _mend_tail(descriptor: int, path: Path) -> int:
    """End a complete last line, or move a torn one aside, byte for byte."""
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    tail = content[start:]
    if not tail:
        return 0
    if _parse(tail) is not None:
        _write(descriptor, b"\n")
        return 0
    with path.with_name(path.name + ".torn").open("ab") as torn:
        torn.write(tail + b"\n")
        torn.flush()
        os.fsync(torn.fileno())
    os.ftruncate(descriptor, start)
    return 1


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("event_id"), str) and "event" in record
    return record if is_record else None


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
