"""Long suites of this folder run in part: every n-th test, the same ones each time, with all of them on request."""

import os
import zlib

import pytest

EVERY = int(os.environ.get("AGNITRA_EVERY_NTH", "1"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first test of each function, and every n-th of the others by a hash of their names."""
    if EVERY == 1:
        return
    seen: set[str] = set()
    kept, left_out = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        is_kept = function not in seen or zlib.crc32(item.nodeid.encode()) % EVERY == 0
        seen.add(function)
        (kept if is_kept else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
