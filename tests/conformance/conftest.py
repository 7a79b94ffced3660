"""Long suites of this folder run in part: every n-th test, the same ones each time, with all of them on request."""

import os
import zlib

import pytest

EVERY = os.environ.get("AGNITRA_EVERY_NTH")
LONG = {
    "test_models_as_written.py": 16,
    "test_rewrites_batched.py": 3,
    "test_rewrites_layers.py": 6,
    "test_rewrites_losses.py": 4,
    "test_rewrites_pointwise.py": 4,
    "test_rewrites_weights.py": 4,
}
"""File -> n, where only a part of it runs unless AGNITRA_EVERY_NTH says how much."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first test of each function, and every n-th of the others by a hash of their names."""
    seen: set[str] = set()
    kept, left_out = [], []
    for item in items:
        every = int(EVERY) if EVERY is not None else LONG.get(item.path.name, 1)
        function = item.nodeid.partition("[")[0]
        is_kept = function not in seen or zlib.crc32(item.nodeid.encode()) % every == 0
        seen.add(function)
        (kept if is_kept else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
