"""Reply files: written whole or not at all, without credentials, readable by their owner alone."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from agnitra_lab.redact import redact_text


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document under a temporary name and rename it; every text in it is redacted.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A reply may quote the profile that it was asked about: mkstemp's files are their owner's alone.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(_redacted(document), file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _redacted(value: Any) -> Any:
    """Redact every string by its text. Not by the names of keys: a reply's own words are the model's."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {redact_text(str(key)): _redacted(item) for key, item in value.items()}
    return [_redacted(item) for item in value] if isinstance(value, list) else value
