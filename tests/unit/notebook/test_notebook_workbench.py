from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from workbench_models import QUICK, Chain, Chatty, Moody, Sleeper, Small, Stubborn

from agnitra_lab.contracts.report import STAGES
from agnitra_lab.errors import AgnitraError, RunStoreError, UsageError
from agnitra_lab.notebook import tables
from agnitra_lab.notebook.job import Job
from agnitra_lab.notebook.workbench import Workbench
from agnitra_lab.runs.read import list_runs

X = torch.ones(4)


# A test that waits for a step waits for a compiler, on a machine that others use too.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run whose candidate is kept."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("finished")
    made = Workbench(Chain().eval(), torch.randn(4, 4), name="chain", artifacts=folder, **QUICK)
    made.run_all()
    return made


@pytest.fixture
def make(tmp_path):
    def made(model, inputs=X, **settings):
        return Workbench(model, inputs, artifacts=tmp_path / "artifacts", **{**QUICK, **settings})

    return made


def statuses(workbench):
    return [step.status for step in workbench.steps]


def test_nothing_runs_and_nothing_is_filed_before_the_first_step(make, tmp_path):
    workbench = make(Small(), torch.ones(2, 512))
    assert statuses(workbench) == ["waiting"] * 7
    assert (workbench.run, workbench.telemetry, workbench.comparison, workbench.result) == (None,) * 4
    assert workbench.suggestions.empty and workbench.trials.empty and workbench.candidates.empty
    assert list(tmp_path.iterdir()) == []


def test_run_all_ends_as_optimize_does(finished):
    assert [step.stage for step in finished.steps] == list(STAGES)
    assert all(step.has_ended for step in finished.steps)
    assert finished.comparison == finished.report.comparison
    assert finished.winner == finished.report.winner == "torch.compile", finished.candidates["reason"].tolist()
    assert {entry.status for entry in list_runs(finished.settings.artifacts)} == {"complete"}
    assert finished.run.run_id == finished.report.run_id
    assert [point.headline for point in finished.report.checkpoints[:6]] == [
        step.headline for step in list(finished.steps)[:6]
    ]
    torch.testing.assert_close(finished.model(X), finished.workload.model(X))


def test_the_frames_have_their_columns_whatever_has_run(finished, make):
    for workbench in (finished, make(Small())):
        assert tuple(workbench.suggestions.columns) == tables.SUGGESTION_COLUMNS
        assert tuple(workbench.trials.columns) == tables.TRIAL_COLUMNS
        assert tuple(workbench.candidates.columns) == tables.CANDIDATE_COLUMNS
    assert finished.candidates["status"].tolist() == ["kept"]


def test_rolling_back_proves_itself_and_runs_the_original(finished):
    proof = finished.rollback()
    assert proof.is_restored and finished.proof is proof
    assert not finished.can_rollback
    assert torch.equal(finished.model(X), finished.workload.model(X))


def test_steps_run_one_at_a_time_and_a_redo_keeps_what_came_before(make):
    workbench = make(Small(), torch.ones(2, 512))
    workbench.run_next()
    telemetry, run = workbench.telemetry, workbench.run
    assert statuses(workbench) == ["done"] + ["waiting"] * 6
    workbench.run_next()
    workbench.redo("suggest", suggest="llm", llm_base_url="http://127.0.0.1:9", llm_model="none")
    assert statuses(workbench)[:3] == ["done", "fallback", "waiting"]
    assert workbench.telemetry is telemetry
    assert workbench.proposal.fallback is not None
    # The pass that was replaced leaves nothing behind; the one that replaces it holds the profile as well.
    assert not run.directory("reports").exists()
    assert (workbench.run.directory("profiles") / "telemetry.json").is_file()
    assert [entry.run_id for entry in list_runs(workbench.settings.artifacts) if entry.category == "reports"] == [
        workbench.run.run_id
    ]


def test_a_setting_that_an_ended_step_has_read_begins_again_there(make):
    workbench = make(Small(), torch.ones(2, 512))
    workbench.run_next()
    workbench.run_next()
    workbench.run_next(suggest="auto")
    assert statuses(workbench)[:3] == ["done", "done", "waiting"]
    workbench.run_next(sampler="random")
    assert statuses(workbench)[2] in ("done", "skipped")
    assert workbench.settings.sampler == "random"


def test_a_search_is_done_again_with_another_sampler(tmp_path):
    from agnitra_lab.workloads.demos import demo

    settings = {**QUICK, "sampler": "rl", "max_trials": 5, "budget_s": 60.0}
    workbench = Workbench(demo("llama-decode", scale="small"), artifacts=tmp_path, **settings)
    seen = []
    workbench.listen(lambda is_step: seen.append(len(workbench.live_trials)))
    for _ in range(3):
        workbench.run_next()
    assert set(workbench.trials["sampler"]) == {"rl"}
    assert max(seen) >= 5
    workbench.redo("refine", sampler="random", max_trials=3)
    assert set(workbench.trials["sampler"]) == {"random"}
    assert workbench.trials.groupby("template").size().max() <= 3
    workbench.run_next()
    assert [kernel.source for kernel in workbench.kernels]


def test_only_accepted_suggestions_are_taken_up(make):
    workbench = make(Small(), torch.ones(2, 512))
    workbench.run_next()
    workbench.run_next()
    first, *others = workbench.suggestions["action"]
    workbench.run_next(accept=(first,))
    assert workbench.suggestions.set_index("action")["is_accepted"].to_dict() == {
        first: True, **dict.fromkeys(others, False)
    }  # fmt: skip
    with pytest.raises(UsageError, match="accept names 'warp_drive', which is no action"):
        workbench.run_next(accept=("warp_drive",))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda workbench: workbench.redo("fly"), "There is no step 'fly'"),
        (lambda workbench: workbench.redo("patch"), "profile comes first"),
        (lambda workbench: workbench.run_next(sampler="guess"), "sampler is 'guess'"),
        (lambda workbench: workbench.run_next(speed=11), "Unknown settings: speed"),
        (lambda workbench: workbench.rollback(), "Nothing to roll back: the report comes first"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(make, act, message):
    workbench = make(Small())
    with pytest.raises(UsageError, match=message):
        act(workbench)
    assert statuses(workbench) == ["waiting"] * 7


def test_a_model_that_does_not_take_its_inputs_fails_the_first_step_in_words(make):
    workbench = make(Small(), torch.ones(3))
    with pytest.raises(UsageError, match="Small does not run on its inputs"):
        workbench.run_next()
    step = workbench.steps["profile"]
    assert step.status == "failed" and "RuntimeError" in step.headline
    assert workbench.run is None


def test_a_model_that_raises_in_the_middle_fails_its_step_and_can_be_mended(make):
    model = Moody()
    workbench = make(model)
    with pytest.raises(Exception, match="the sensor is"):
        workbench.run_next()
    assert workbench.steps["profile"].status == "failed"
    assert "unplugged" in workbench.steps["profile"].headline
    model.is_mended = True
    workbench.run_next()
    assert workbench.steps["profile"].status == "done"
    assert workbench.error is None


def test_cancel_ends_a_step_and_the_step_can_be_run_again(make):
    model = Sleeper()
    workbench = make(model)
    workbench.run_next(wait=False)
    assert model.begun.wait(20)
    assert workbench.cancel()
    assert workbench.steps["profile"].status == "cancelled" and not workbench.is_busy
    assert not workbench.cancel()
    model.num_pauses = 1
    workbench.run_next()
    assert workbench.steps["profile"].status == "done"


def test_cancel_does_not_wait_for_a_call_that_nothing_interrupts_but_the_next_step_does(make):
    model = Stubborn(pause_s=5.0)
    workbench = make(model)
    workbench.run_next(wait=False)
    assert model.begun.wait(20)
    started_s = time.monotonic()
    workbench.cancel()
    assert time.monotonic() - started_s < 4.0
    assert workbench.steps["profile"].status == "cancelled" and not workbench.is_busy
    model.pause_s = 0.0
    told = []
    workbench.listen(lambda is_step: told.append(workbench.progress[1]))
    workbench.run_next()
    assert any("waiting for" in line for line in told)
    assert workbench.steps["profile"].status == "done"


def test_a_step_that_takes_too_long_is_cancelled_and_says_so(make):
    workbench = make(Sleeper(), deadline_s=1.0)
    with pytest.raises(AgnitraError, match="it took longer than 1 s, the deadline of a step"):
        workbench.run_next()
    assert workbench.steps["profile"].status == "cancelled"


def test_an_interrupt_of_a_cell_that_waits_cancels_the_step(make, monkeypatch):
    model = Sleeper()
    workbench = make(model)

    patience = Job.wait

    def impatience(job, timeout_s=None):
        if timeout_s is not None or threading.current_thread() is not threading.main_thread():
            return patience(job, timeout_s)
        assert model.begun.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "wait", impatience)
    with pytest.raises(KeyboardInterrupt):
        workbench.run_next()
    assert workbench.steps["profile"].status == "cancelled"
    assert workbench.steps["profile"].headline == "stopped by an interrupt"


def test_a_second_workbench_waits_for_the_first_and_says_so(make):
    first, second = make(Sleeper(), name="first"), make(Small(), torch.ones(2, 512), name="second")
    first.run_next(wait=False)
    assert first.workload.model.begun.wait(20)
    told = []
    second.listen(lambda is_step: told.append(second.progress[1]))
    second.run_next(wait=False)
    assert not second.wait(0.5)
    first.cancel()
    assert second.wait(60)
    assert any("waiting for first to end its step" in line for line in told)
    assert second.steps["profile"].status == "done"


def test_one_workbench_runs_one_step_at_a_time(make):
    model = Sleeper()
    workbench = make(model)
    workbench.run_next(wait=False)
    with pytest.raises(UsageError, match=r"profile is running\. Wait for it, or cancel it"):
        workbench.run_next()
    workbench.cancel()


def test_a_deleted_run_folder_costs_nothing_that_is_known_and_the_next_step_files_it_again(make):
    workbench = make(Small(), torch.ones(2, 512))
    workbench.run_next()
    run_id = workbench.run.run_id
    shutil.rmtree(workbench.settings.artifacts)
    workbench.run_next()
    assert workbench.steps["suggest"].status == "done"
    assert workbench.run.run_id != run_id
    assert (workbench.run.directory("profiles") / "telemetry.json").is_file()


def test_what_the_model_prints_is_kept_and_comes_under_no_cell(make, capsys):
    workbench = make(Chatty())
    workbench.run_next()
    assert "called with (4,)" in workbench.printed
    assert capsys.readouterr().out == ""


def test_a_step_runs_under_the_torch_settings_of_its_owner(make):
    seen = []

    class Observer(torch.nn.Module):
        def forward(self, x):
            seen.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
            return x

    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        workbench = make(Observer())
    workbench.run_next()
    assert set(seen) == {(True, True)}


def test_a_null_result_claims_nothing(make):
    workbench = make(Small(), torch.ones(64, 512))
    workbench.run_all()
    if workbench.winner == "eager":
        assert workbench.report.headline.startswith("No change")
        assert float(workbench.report.usage.gpu_hours_saved) == 0.0
        assert not workbench.can_rollback
        with pytest.raises(UsageError, match="Nothing to roll back"):
            workbench.rollback()


def test_the_artifacts_folder_must_be_writable_before_anything_runs(tmp_path):
    Path(tmp_path / "file").write_text("")
    workbench = Workbench(Small(), torch.ones(2, 512), artifacts=tmp_path / "file", **QUICK)
    with pytest.raises(RunStoreError):
        workbench.run_next()
    assert workbench.steps["profile"].status == "failed"


def test_a_refusal_is_one_line_in_a_notebook_and_an_ordinary_error_elsewhere(make):
    workbench = make(Small(), torch.ones(2, 512))
    with pytest.raises(UsageError, match="the report comes first") as refused:
        workbench.rollback()
    assert refused.value._render_traceback_() == [f"UsageError: {refused.value}"]
    with pytest.raises(UsageError) as unknown:
        workbench.show_search(1)
    assert unknown.value._render_traceback_()[0].startswith("UsageError: There is no search 1. None has ended.")
