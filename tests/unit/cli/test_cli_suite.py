"""`agnitra suite`: list, run, table, and suite targets from the shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agnitra_lab.workloads.suite import SUITE

sys.path.insert(0, str(Path(__file__).parents[1] / "loop"))
from suite_results import done, failed, file_run, inexact


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "gpt-5"), "qwen-qk-norm-prefill"),
        (("run", "--shard", "5"), "Expected I/N"),
        (("run", "--scale", "huge"), "tiny, small, full"),
        (("run", "--modes", "fastest"), "max-autotune"),
        (("run", "--device", "cpu", "--jobs", "2"), "on a CPU"),
        (("run", "--device", "tpu"), "tpu"),
        (("run", "--resume", "latest"), "agnitra suite run"),
        (("table",), "agnitra suite run"),
        (("table", "20260101_000000_suite_0000"), "agnitra runs"),
    ],
)
def test_a_wrong_use_is_one_line_with_what_to_do(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    shown = agnitra("suite", *arguments, cwd=tmp_path)
    assert shown.returncode == 2, shown.stderr
    assert message in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("summary.json"))


def test_a_device_that_is_not_there_is_exit_code_3(tmp_path: Path) -> None:
    shown = agnitra("suite", "run", "--device", "cuda", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert shown.returncode == 3, shown.stderr
    assert "CUDA" in shown.stderr


@pytest.fixture
def filed(tmp_path: Path) -> Path:
    """Two good results, one with a failed baseline, one that computes something else, and a file cut short."""
    run = file_run(
        tmp_path / "artifacts", done("bert", 1.2), done("vit", 0.9, failed_mode=True),
        done("lstm", 1.5, is_equivalent=False), failed("gru"),
    )  # fmt: skip
    (run / "workloads" / "gru.json").write_text('{"workload"')
    return tmp_path


def test_the_table_shows_the_figures_and_names_what_is_wrong(filed: Path) -> None:
    shown = agnitra("suite", "table", cwd=filed, COLUMNS="60")
    assert shown.returncode == 0, shown.stderr
    for text in ("NVIDIA H200", "1.200x", "1.188 to 1.212", "worst 0.900x (vit)", "1 below 0.98", "NOT EQUIVALENT"):
        assert text in shown.stdout, text
    assert "vit: max-autotune failed and is not in the contest: OutOfMemoryError" in shown.stdout
    assert "lstm: not equivalent: half of it is zero" in shown.stdout
    assert "gru.json is damaged and skipped" in shown.stderr


def test_a_best_baseline_of_other_values_is_marked(tmp_path: Path) -> None:
    file_run(tmp_path / "artifacts", inexact("bert"))
    shown = agnitra("suite", "table", cwd=tmp_path)
    assert "default *" in shown.stdout
    assert "bert: default is not equivalent: half of it is zero" in shown.stdout
    assert "1 of these best baselines give other values than eager (marked *)" in shown.stdout
    assert "worst 2.000x, 0 below 0.98" in shown.stdout


def test_the_json_has_the_same_figures_by_name(filed: Path) -> None:
    shown = agnitra("suite", "table", "--json", "--device", "h200", cwd=filed)
    assert shown.returncode == 0, shown.stderr
    (group,) = json.loads(shown.stdout)["groups"]
    assert group["speedup_vs_best_worst"] == 0.9
    assert group["num_below_0_98"] == 1
    assert group["speedup_vs_best_geomean"] == pytest.approx((1.2 * 0.9) ** 0.5)
    assert group["share_at_least_1_15"] == pytest.approx(1 / 3)
    assert [row["workload"] for row in group["workloads"]] == ["bert", "vit", "lstm"]
    assert group["workloads"][0]["default_latency_ms_p50"] == 1.2
