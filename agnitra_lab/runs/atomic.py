"""Files that are either whole or absent: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

from agnitra_lab.errors import RunStoreError
from agnitra_lab.runs.layout import TEMPORARY_PREFIX

ELSEWHERE_HINT = "Choose another folder with --artifacts DIR."


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any point, sees the old state or the new one and nothing between.

    Raises:
        RunStoreError: when the file system refuses.

    Source: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014 (temporary file, fsync, rename, fsync
        of the folder).
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise store_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: bytes) -> None:
    """Append one line with a single write, so that lines of concurrent writers never mix, and sync it.

    Raises:
        RunStoreError: when the file system refuses or takes a part of the line only.
    """
    payload = line.rstrip(b"\n") + b"\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            num_written = os.write(descriptor, payload)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise store_error(error, path) from error
    if num_written != len(payload):
        raise RunStoreError(f"Only {num_written} of {len(payload)} bytes fit into {path}.", hint=ELSEWHERE_HINT)


def sync_directory(path: Path) -> None:
    """Make the names in a folder durable; a no-op where folders cannot be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not sync folders; the rename is still atomic there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def store_error(error: OSError, path: Path) -> RunStoreError:
    """Say in one line what the file system refused, and where."""
    what = error.strerror or type(error).__name__
    return RunStoreError(f"Cannot write {path}: {what}.", hint=ELSEWHERE_HINT)
