"""One real workload through the suite, in the process that it gets there, and its table from the shell."""

import json
from pathlib import Path

from agnitra_lab.loop.suite import SuiteSettings, run_suite
from agnitra_lab.loop.suite_table import best_exact


def test_a_real_workload_is_timed_on_all_sides_and_filed(tmp_path: Path) -> None:
    done = run_suite(
        SuiteSettings(
            names=("softmax-long-rows",), device="cpu", scale="tiny", modes=("default",), budget_s=1.0, timing_s=0.5,
            artifacts=tmp_path, command="agnitra suite run softmax-long-rows",
        )
    )  # fmt: skip
    (filed,) = done.filed
    result = filed.result
    assert (result.status, result.error) == ("done", None), result
    eager, default = result.baselines
    assert (eager.name, eager.compile_s, default.name, default.error) == ("eager", None, "default", None)
    assert eager.latency.num_samples == default.latency.num_samples == result.candidate.latency.num_samples >= 12
    assert default.compile_s > 0
    assert result.candidate.compile_s > 0
    assert result.is_equivalent
    assert result.candidate.equivalence.match_share == 1.0
    fastest = min(result.baselines, key=lambda side: side.latency.latency_ms_p50)
    assert result.best_baseline == best_exact(result.baselines).name == fastest.name
    assert result.speedup_vs_best.low <= result.speedup_vs_best.median <= result.speedup_vs_best.high
    assert result.noise.low <= result.noise.median <= result.noise.high
    assert result.winner in {"eager", *(row.name for row in result.candidates)}
    assert result.num_guard_misses == 0
    assert result.device.type == "cpu"
    assert result.waited_s < result.wall_s
    assert json.loads((done.directory / "summary.json").read_text())["meta"]["config"]["scale"] == "tiny"
    # Nothing but the run itself stays: the optimisation's own files and caches were scratch.
    assert [path.name for path in (tmp_path).iterdir()] == ["perf"]


def test_a_model_of_ones_own_is_held_against_the_same_baselines(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef mlp():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval(), (torch.ones(4, 8),)\n"
    )
    done = run_suite(
        SuiteSettings(
            names=(f"{tmp_path / 'mine.py'}:mlp",), device="cpu", modes=("default",), budget_s=1.0, timing_s=0.5,
            artifacts=tmp_path / "artifacts", command="agnitra suite run mine.py:mlp",
        )
    )  # fmt: skip
    (filed,) = done.filed
    result = filed.result
    assert (result.workload, result.family, result.scale, result.status) == ("mine:mlp", "own", "own", "done")
    assert [path.name for path in (done.directory / "workloads").iterdir()] == ["mine-mlp.json"]
    assert not done.left


def test_a_faster_baseline_that_computes_something_else_is_marked_and_held_apart(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        """import torch


class Hasty(torch.nn.Module):
    def forward(self, x):
        for _ in range(1 if torch.compiler.is_compiling() else 200):
            x = torch.sin(x) * 1.5 + 0.1
        return x


def hasty():
    return Hasty(), (torch.randn(512, 512),)
"""
    )
    done = run_suite(
        SuiteSettings(
            names=(f"{tmp_path / 'mine.py'}:hasty",), device="cpu", modes=("default",), budget_s=1.0, timing_s=0.5,
            artifacts=tmp_path / "artifacts", command="agnitra suite run mine.py:hasty",
        )
    )  # fmt: skip
    result = done.filed[0].result
    eager, default = result.baselines
    assert default.latency.latency_ms_p50 < eager.latency.latency_ms_p50
    assert not default.equivalence.is_equivalent
    assert (result.best_baseline, best_exact(result.baselines).name, result.winner) == ("default", "eager", "eager")
