"""When a declined request is sent again: the statuses that pass by themselves, and what Retry-After says."""

from __future__ import annotations

import math
import time
from email.utils import parsedate_to_datetime

MAX_REPEATS = 2
PAUSE_S = 0.25
"""Before the one repeat of a request whose server does not say how long to wait."""
_PASSING = frozenset((408, 409, 429, 500, 502, 503, 504))
_LONGEST_S = 86_400.0


def retry_after_s(header: str | None) -> float | None:
    """Read a Retry-After header (seconds or an HTTP date); None for none, or for one that says nothing usable."""
    if header is None or len(header) > 100:
        return None
    try:
        wait_s = float(header)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, OSError):
            return None
    return min(max(wait_s, 0.0), _LONGEST_S) if math.isfinite(wait_s) else None


def wait_before_repeat_s(status: int, asked_s: float | None, num_repeats: int) -> float | None:
    """Return the seconds to wait before a declined request is sent again, or None when it is not.

    Args:
        status: HTTP status of the answer.
        asked_s: what the server's Retry-After says.
        num_repeats: how often this request was repeated already.
    """
    if status not in _PASSING or num_repeats >= MAX_REPEATS:
        return None
    if asked_s is not None:
        return asked_s
    # A server that names no time is tried once more: its answer is not worth the deadline of the presets.
    return PAUSE_S if num_repeats == 0 else None
