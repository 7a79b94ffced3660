"""Runs the conformance suite of the templates in a process where Triton interprets its kernels on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SUITE = Path(__file__).with_name("templates_in_interpreter.py")


@pytest.mark.slow
def test_every_template_agrees_with_fp64_and_every_planted_bug_is_caught() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(SUITE), "-q", "-p", "no:cacheprovider", "--no-header"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) > 50
    assert "skipped" not in done.stdout
