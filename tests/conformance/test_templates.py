"""Runs the conformance suites of the templates in a process where Triton interprets its kernels on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SUITES = {
    "cached_attention_in_interpreter.py": 20,
    "decode_in_interpreter.py": 10,
    "depthwise_in_interpreter.py": 12,
    "losses_in_interpreter.py": 8,
    "norms_in_interpreter.py": 10,
    "rows_in_interpreter.py": 10,
    "split_gemm_in_interpreter.py": 5,
    "templates_in_interpreter.py": 10,
}
"""File -> the number of tests that it passes at least."""
EVERY_NTH = os.environ.get("AGNITRA_EVERY_NTH", "16")
"""The interpreter takes minutes for each suite: one test in sixteen here, all of them with AGNITRA_EVERY_NTH=1."""


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_every_template_agrees_with_fp64_and_every_planted_bug_is_caught(suite: str) -> None:
    path = Path(__file__).with_name(suite)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider", "--no-header"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "AGNITRA_EVERY_NTH": EVERY_NTH},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) >= SUITES[suite]
    assert "skipped" not in done.stdout
