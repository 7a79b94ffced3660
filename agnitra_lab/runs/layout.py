"""Where a run lives: every path under `artifacts/` is defined here and nowhere else.

    <root>/<category>/<topic>/<run_id>/{summary.json, run.md, manifest.json, ...}

One run has the same `run_id` under every category that it writes to.
"""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from agnitra_lab.contracts.run import RUN_ID_PATTERN, Category, Kind

DEFAULT_ROOT = Path("artifacts")
CATEGORIES: tuple[Category, ...] = get_args(Category)
PRIMARY_CATEGORY: Category = "reports"

SUMMARY_FILE = "summary.json"
MARKDOWN_FILE = "run.md"
MANIFEST_FILE = "manifest.json"
EVENTS_FILE = "events.jsonl"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
TEMPORARY_PREFIX = ".partial-"

KINDS: dict[Category, Kind] = {
    "baseline": "baseline",
    "bench": "bench",
    "perf": "perf",
    "profiles": "profile",
    "certs": "certs",
    "cmaes": "cmaes",
    "vis": "report",
    "reports": "report",
    "regressions": "report",
}
"""What `meta.kind` says in each category: the layout has fewer kinds than folders."""

MAX_TAG_LENGTH = 40
MAX_SEGMENT_LENGTH = 64
MAX_TOPIC_SEGMENTS = 4
_RUN_ID = re.compile(RUN_ID_PATTERN.removeprefix("^").removesuffix("$"), re.ASCII)
_WINDOWS_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


def run_id(tag: str) -> str:
    """Draw a run id, `YYYYMMDD_HHMMSS_<tag>_<4 hex>` in UTC.

    Args:
        tag: a short word; what is not [A-Za-z0-9.-] becomes "-".
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
    return f"{stamp}_{safe_tag(tag)}_{secrets.token_hex(2)}"


def is_run_id(name: str) -> bool:
    """Whether a folder name is a run id."""
    return _RUN_ID.fullmatch(name) is not None


def safe_tag(tag: str) -> str:
    """Reduce a tag to [A-Za-z0-9.-], at most 40 characters; "run" when nothing is left."""
    return _reduce(tag, "A-Za-z0-9.", MAX_TAG_LENGTH) or "run"


def safe_topic(topic: str) -> str:
    """Reduce a topic to a relative folder path that stays where it is put.

    Slashes of either kind make sub-folders ("demos/tropical"); other characters outside [A-Za-z0-9._-] become "-",
    so that "demo:llama-decode" is the folder "demo-llama-decode".
    """
    segments = [_safe_segment(part) for part in re.split(r"[/\\]", topic)]
    kept = [segment for segment in segments if segment][:MAX_TOPIC_SEGMENTS]
    return "/".join(kept) or "untitled"


def run_directory(root: Path, category: Category, topic: str, run_id: str) -> Path:
    """Path of one run in one category.

    Raises:
        ValueError: when `run_id` is not a run id, which is a defect of the caller.
    """
    if not is_run_id(run_id):
        raise ValueError(f"not a run id: {run_id!r}; expected YYYYMMDD_HHMMSS_<tag>")
    return root / category / safe_topic(topic) / run_id


def _safe_segment(part: str) -> str:
    segment = _reduce(part, "A-Za-z0-9._", MAX_SEGMENT_LENGTH)
    # A topic that looks like a run would be listed as one; a device name cannot be a folder on Windows.
    if is_run_id(segment) or _WINDOWS_DEVICES.fullmatch(segment):
        return f"topic-{segment}"[:MAX_SEGMENT_LENGTH].rstrip(".-_")
    return segment


def _reduce(text: str, allowed: str, max_length: int) -> str:
    return re.sub(rf"[^{allowed}]+", "-", text).strip(".-_")[:max_length].strip(".-_")
