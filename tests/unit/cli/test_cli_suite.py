"""`agnitra suite list`, and suite targets from the shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

from agnitra_lab.workloads.suite import SUITE


def agnitra(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from agnitra_lab.cli import main; main()", *arguments],
        capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **environment},
    )  # fmt: skip


def test_the_json_list_has_every_workload_with_its_full_size(tmp_path: Path) -> None:
    done = agnitra("suite", "list", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == list(SUITE)
    first = rows[0]
    assert first == {
        "name": "llama-1b-decode", "family": "language", "phase": "decode", "item_unit": "tokens",
        "items_per_call": 1, "num_parameters": 1_100_048_384,
    }  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_the_table_shows_whole_names_even_where_it_is_narrow(tmp_path: Path) -> None:
    done = agnitra("suite", "list", cwd=tmp_path, COLUMNS="60")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in SUITE)
    assert "1.10B" in done.stdout


def test_an_unknown_suite_workload_is_one_line_with_the_known_ones(tmp_path: Path) -> None:
    done = agnitra("profile", "suite:gpt-5", cwd=tmp_path)
    assert done.returncode == 2
    assert "qwen-qk-norm-prefill" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_suite_without_a_command_says_what_there_is(tmp_path: Path) -> None:
    done = agnitra("suite", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "list" in done.stdout
