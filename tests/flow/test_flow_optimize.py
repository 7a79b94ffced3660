"""The whole loop on the CPU: what it gives, what it files, and what is left when it does not finish."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import agnitra_lab
from agnitra_lab.contracts import PUBLISHED, Report
from agnitra_lab.errors import UsageError
from agnitra_lab.runs.read import list_runs, verify

ROOT = Path(__file__).parents[2]
MLP = ROOT / "fixtures" / "models" / "mlp.py"
STAGES = ["profile", "suggest", "refine", "generate", "patch", "benchmark", "report"]


def make_model() -> tuple[nn.Module, tuple[torch.Tensor]]:
    from agnitra_lab.workloads.target import resolve

    workload = resolve(f"{MLP}:build")
    return workload.model, workload.args


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("run")
    model, inputs = make_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = agnitra_lab.optimize(
        model, inputs, name="mlp", suggest="preset", budget_s=60, timing_s=1.0, artifacts=folder / "artifacts"
    )
    return result, model, inputs, state, folder / "artifacts"


def test_every_stage_leaves_a_checkpoint_in_order(finished) -> None:
    result, *_ = finished
    assert [point.stage for point in result.report.checkpoints] == STAGES


def test_the_drop_in_computes_what_the_model_computes(finished) -> None:
    result, model, inputs, *_ = finished
    with torch.no_grad():
        torch.testing.assert_close(result.model(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)


def test_the_kept_candidate_is_never_slower_than_eager(finished) -> None:
    report = finished[0].report
    kept = [candidate for candidate in report.candidates if candidate.status == "kept"]
    assert [candidate.name for candidate in kept] == ([report.winner] if report.winner != "eager" else [])
    assert all(candidate.comparison.speedup.low > 1.0 for candidate in kept)


def test_eager_and_the_compile_modes_were_in_the_contest(finished) -> None:
    report = finished[0].report
    assert report.comparison.baseline == "eager"
    names = {candidate.name for candidate in report.candidates}
    assert "torch.compile" in names
    # Tuned is whichever of the cheap ones was the fastest.
    assert {"torch.compile:max-autotune", "agnitra:max-autotune"} & names


def test_each_run_directory_is_complete_and_unchanged_since(finished) -> None:
    entries = list_runs(finished[-1])
    assert {entry.category for entry in entries} == {"profiles", "perf", "certs", "bench", "reports"} | (
        {"cmaes"} if finished[0].report.searches else set()
    )
    assert {entry.run_id for entry in entries} == {finished[0].report.run_id}
    for entry in entries:
        assert entry.status == "complete", entry.reason
        assert verify(entry.path) == ()


def test_the_filed_json_validates_against_its_contracts(finished) -> None:
    result, *_, artifacts = finished
    reports = artifacts / "reports" / "mlp" / result.report.run_id
    assert Report.from_json((reports / "report.json").read_text()) == result.report
    for name, contract in (("usage_event", "usage"), ("suggestions", "proposal"), ("summary", "summary")):
        PUBLISHED[contract].from_json((reports / f"{name}.json").read_text())
    telemetry = artifacts / "profiles" / "mlp" / result.report.run_id / "telemetry.json"
    record = PUBLISHED["telemetry"].from_json(telemetry.read_text())
    assert (telemetry.parent / record.parquet).is_file()
    # The report leaves out what the profile's own card draws.
    left_out = {"parquet": None, "nodes": (), "hotspots": (), "timeline": None}
    assert record.model_copy(update=left_out) == result.report.telemetry
    assert record.nodes


def test_the_events_tell_the_run_from_start_to_bill(finished) -> None:
    result, *_ = finished
    lines = (result.json_path.parent / "events.jsonl").read_text().splitlines()
    names = [PUBLISHED["event"].from_json(line).event for line in lines]
    assert names[0] == "run.started"
    assert names.count("stage.completed") == len(STAGES)
    assert names[-2:] == ["usage.attach", "optimization.completed"]


def test_nothing_is_saved_where_nothing_was_kept(finished) -> None:
    report = finished[0].report
    assert (report.usage.gpu_hours_saved == 0) == (report.usage.gpu_hours_before == report.usage.gpu_hours_after)
    if report.winner == "eager":
        assert report.usage.success_fee == 0


def test_no_machine_path_or_home_folder_is_filed(finished) -> None:
    home = str(Path.home())
    for path in finished[-1].rglob("*.json"):
        text = path.read_text()
        assert home not in text, path
        assert sys.prefix not in text, path


def test_rolling_back_restores_the_original_bit_for_bit(finished) -> None:
    result, model, inputs, state, _ = finished
    if result.report.winner == "eager":
        with pytest.raises(UsageError, match="original model was kept"):
            result.rollback()
        return
    proof = result.rollback()
    assert proof.is_restored, proof.detail
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(result.model(*inputs), model(*inputs))


def test_an_unknown_setting_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="budgets"):
        agnitra_lab.optimize(*make_model(), budgets=3, artifacts=tmp_path / "artifacts")
    assert not list(tmp_path.iterdir())


def test_inputs_that_the_model_does_not_take_are_refused_before_a_run_is_made(tmp_path: Path) -> None:
    model, _ = make_model()
    with pytest.raises(UsageError, match=r"does not run on its inputs: RuntimeError"):
        agnitra_lab.optimize(model, (torch.randn(2, 63),), artifacts=tmp_path / "artifacts")
    assert not list(tmp_path.iterdir())


def test_comparing_a_model_with_itself_is_no_change_or_noise_but_never_wrong() -> None:
    model, inputs = make_model()
    comparison = agnitra_lab.compare(model, model, inputs, budget_s=1.0)
    assert comparison.equivalence.is_equivalent
    assert comparison.equivalence.match_share == 1.0


def test_a_cell_without_a_model_is_profiled_once() -> None:
    calls = []
    telemetry = agnitra_lab.profile(lambda: calls.append(torch.ones(8).sum()))
    assert len(calls) == 1
    assert telemetry.record.bottleneck is not None


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_a_failure_at_a_stage_leaves_a_run_that_reads_as_incomplete(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agnitra_lab.loop import Optimization, Settings
    from agnitra_lab.workloads.adopt import as_workload

    loop = Optimization(as_workload(*make_model()), Settings(suggest="preset", artifacts=tmp_path))

    def fail() -> None:
        raise RuntimeError("planted")

    for name in STAGES[: STAGES.index(stage)]:
        if name in ("patch", "benchmark"):
            monkeypatch.setattr(loop, name, lambda: None)
        getattr(loop, name)()
    monkeypatch.setattr(loop, stage, fail)
    with pytest.raises(RuntimeError, match="planted"):
        getattr(loop, stage)()
    assert [entry.status for entry in list_runs(tmp_path)] == ["incomplete"] * len(list_runs(tmp_path))
    assert list_runs(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process of its own")
def test_an_interrupt_in_the_middle_is_exit_code_130_and_no_finished_run(tmp_path: Path) -> None:
    code = "from agnitra_lab.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "optimize", f"{MLP}:build", "--suggest", "preset"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("artifacts/profiles/*/*/telemetry.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        errors = _interrupted(process, deadline + 120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1].startswith("agnitra: Cancelled.")
    assert {entry.status for entry in list_runs(tmp_path / "artifacts")} == {"incomplete"}


def _interrupted(process: subprocess.Popen[str], deadline: float) -> str:
    """Press Ctrl-C until the process ends: CPython loses one that comes within a callback of its import system."""
    while True:
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=15)[1]
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise


def test_a_dead_language_model_is_replaced_by_presets_with_a_banner_and_an_event(tmp_path: Path) -> None:
    from agnitra_lab.loop import Optimization, Settings
    from agnitra_lab.workloads.adopt import as_workload

    settings = Settings(
        suggest="llm", llm_base_url="http://127.0.0.1:9/v1", llm_model="m", llm_deadline_s=3.0,
        llm_api_key="sk-test-key-that-must-not-leak", artifacts=tmp_path,
    )  # fmt: skip
    loop = Optimization(as_workload(*make_model()), settings)
    loop.profile()
    proposal = loop.suggest()
    assert proposal.source == "preset"
    assert proposal.fallback is not None
    assert loop.checkpoints[-1].status == "fallback"
    events = [json.loads(line) for line in next(tmp_path.rglob("events.jsonl")).read_text().splitlines()]
    assert "optimization.fallback" in [event["event"] for event in events]
    loop.finish_early()
    assert {entry.status for entry in list_runs(tmp_path)} == {"complete"}
    assert not any(
        "must-not-leak" in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()
    )
