from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from agnitra_lab.errors import UsageError
from agnitra_lab.runs.read import list_runs


def _report_factory():
    path = Path(__file__).parents[1] / "report" / "report_factory.py"
    spec = importlib.util.spec_from_file_location("report_factory_of_the_notebook_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_result(verdict="faster"):
    """A real result over a real patch that compiles nothing, with a report of made figures."""
    import torch

    from agnitra_lab.contracts.workload import Workload
    from agnitra_lab.loop.result import Result
    from agnitra_lab.patch.install import eager
    from agnitra_lab.profiler.telemetry import Telemetry
    from agnitra_lab.runs.store import RunStore

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
    workload = Workload("mlp", model, (torch.ones(2, 4),))
    report = _report_factory().make_report("cpu", verdict)
    run = RunStore("artifacts").create("optimize", "mlp")
    patch = eager(workload) if verdict == "faster" else None
    return Result(report, run, Telemetry(report.telemetry), workload, patch)


@pytest.fixture
def finished(shell):
    shell.ip.user_ns["result"] = make_result()
    return shell


def test_a_result_shows_its_card_and_its_text(finished):
    card, chart = finished.ok("result").bundles
    assert set(card) == {"text/html", "text/plain"}
    assert set(chart) == {"application/vnd.plotly.v1+json", "image/svg+xml", "text/plain"}
    assert finished["result"].report.headline in card["text/plain"]


def test_a_result_that_its_cell_has_shown_is_not_shown_again(finished):
    magics = finished.ip.magics_manager.registry["AgnitraMagics"]
    finished.ip.user_ns["show"] = magics.display.card_of
    assert len(finished.ok("show(result)\nresult").cards) == 1
    assert len(finished.ok("result").cards) == 1


def test_a_shown_value_is_still_the_value_of_the_cell(finished):
    assert finished.ok("result").value is finished["result"]


def test_rollback_shows_and_returns_the_proof_once(finished):
    ran = finished.ok("%agnitra_rollback result")
    assert ran.value.is_restored
    (card,) = ran.cards
    assert "The original is restored, bit for bit." in card
    assert ran.value.state_sha256[:16] in card


def test_rollback_can_be_assigned_and_takes_the_last_result_by_default(finished):
    finished.ip.user_ns["agnitra_result"] = finished["result"]
    ran = finished.ok("proof = %agnitra_rollback")
    assert len(ran.cards) == 1
    assert finished["proof"].outputs_equal


def test_rollback_of_a_kept_original_says_that_there_is_nothing_to_do(shell):
    shell.ip.user_ns["result"] = make_result("no_change")
    ran = shell.run("%agnitra_rollback result")
    assert isinstance(ran.error, UsageError)
    assert ran.text.strip() == "UsageError: Nothing to roll back: the original model was kept."


def test_rollback_of_something_else_names_its_type(shell):
    assert "'3' is a int. Expected what %agnitra_optimize returned." in shell.run("%agnitra_rollback 3").text


def test_the_switch_turns_cards_off_and_on(modelled):
    modelled.ip.user_ns["result"] = make_result()
    modelled.ok("%agnitra_display off")
    assert modelled.ok("%%agnitra_profile\nmodel(x)").cards == []
    (bundle,) = modelled.ok("result").bundles
    assert bundle["text/plain"].startswith("<agnitra_lab.Result")
    modelled.ok("%agnitra_display on")
    assert len(modelled.ok("%%agnitra_profile\nmodel(x)").cards) == 1


def test_with_cards_off_a_profile_still_tells_its_path(modelled):
    modelled.ok("%agnitra_display off")
    text = modelled.ok("%%agnitra_profile\nmodel(x);").text
    (entry,) = list_runs("artifacts")
    assert text.strip() == f"Telemetry: {entry.path}/telemetry.json"


def test_the_environment_turns_cards_off(modelled, monkeypatch):
    monkeypatch.setenv("AGNITRA_DISPLAY", "off")
    modelled.ok("%unload_ext agnitra_lab")
    modelled.ok("%load_ext agnitra_lab")
    assert modelled.ok("%%agnitra_profile\nmodel(x)").cards == []


def test_the_switch_takes_two_words(shell):
    assert "%agnitra_display takes on or off (or static), got 'maybe'" in shell.run("%agnitra_display maybe").text


def test_telemetry_shows_its_card(modelled):
    modelled.ok("%%agnitra_profile\nmodel(x);")
    formatted, _ = modelled.ip.display_formatter.format(modelled["agnitra_telemetry"])
    modelled.ip.display_formatter.active_types = ["text/html", "text/plain"]
    formatted, _ = modelled.ip.display_formatter.format(modelled["agnitra_telemetry"])
    assert "Top nodes by self time" in formatted["text/html"]


def test_runs_are_a_frame_with_fixed_columns(modelled):
    columns = ["run_id", "category", "topic", "status", "generated_at", "path"]
    assert list(modelled.ok("%agnitra_runs").value.columns) == columns
    modelled.ok("%%agnitra_profile --name step\nmodel(x);")
    frame = modelled.ok("%agnitra_runs").value
    assert frame[["category", "topic", "status"]].values.tolist() == [["profiles", "step", "complete"]]


def test_a_report_of_no_run_says_how_to_make_one(shell):
    text = shell.run("%agnitra_report").text
    assert "No finished run under artifacts." in text
    assert "agnitra demo" in text
    assert "No finished run 'x' under elsewhere." in shell.run("%agnitra_report x --artifacts elsewhere").text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Expected a model and its inputs, got none."),
        ("model x y z", "Expected a model and its inputs, got 'model x y z'."),
        ("model nowhere", "'nowhere' cannot be evaluated: NameError"),
        ("model x --suggest oracle", "invalid choice: 'oracle'"),
        ("model x --budget", "expected one argument"),
        ("model x --budget 0", "budget_s is 0.0."),
        ("x x", "The model must be callable, got Tensor."),
        ("model 'text'", "does not run on its inputs"),
        ("demo:nope", "Unknown demo 'nope'."),
    ],
)
def test_a_wrong_line_is_one_line_of_error_and_leaves_no_run(modelled, line, message):
    ran = modelled.run(f"%agnitra_optimize {line}")
    assert isinstance(ran.error, UsageError)
    assert message in ran.text
    assert ran.text.count("\n") <= 1
    assert list_runs("artifacts") == []


def test_a_workbench_from_a_magic_is_shown_once_and_runs_nothing(modelled):
    ran = modelled.ok("%agnitra_workbench model x --name mlp --sampler none --budget 5")
    workbench = modelled["agnitra_workbench"]
    assert ran.value is workbench
    assert len(ran.cards) == 1
    assert (workbench.workload.name, workbench.settings.sampler, workbench.settings.budget_s) == ("mlp", None, 5.0)
    assert workbench.steps.num_ended == 0 and list_runs("artifacts") == []
    assert "%agnitra_workbench: argument --deadline" in modelled.run("%agnitra_workbench model x --deadline soon").text


def test_two_callables_are_compared_by_a_magic_and_by_the_same_words_as_in_python(modelled):
    ran = modelled.ok("comparison = %agnitra_compare model (lambda x: model(x)) x --name mlp --budget 0.2")
    comparison = modelled["comparison"]
    assert (comparison.workload, comparison.candidate) == ("mlp", "candidate")
    (card,) = ran.cards
    assert "Distribution of the latencies" in card and "Noise (A/A)" in card
    assert (
        "Expected a baseline, a candidate and their inputs, got 'model'" in modelled.run("%agnitra_compare model").text
    )


def test_two_runs_are_compared_by_their_ids(modelled):
    for _ in range(2):
        modelled.ok("%%agnitra_profile --name step\nmodel(x);")
    first, second = (entry.run_id for entry in list_runs("artifacts"))
    ran = modelled.ok(f"%agnitra_compare {first} {second}")
    assert (ran.value.baseline_run_id, ran.value.candidate_run_id) == (first, second)
    assert len(ran.cards) == 1
    missing = "20200101_000000_profile_0000"
    assert f"There is no run '{missing}' under artifacts." in modelled.run(f"%agnitra_compare {first} {missing}").text


def test_static_cards_come_without_buttons(finished):
    finished.ok("%agnitra_display static")
    assert len(finished.ok("result").bundles) == 2


@pytest.mark.slow
def test_the_whole_loop_from_a_magic(modelled):
    ran = modelled.ok("result = %agnitra_optimize model x --name mlp --suggest preset --sampler none --budget 1")
    result = modelled["result"]
    assert modelled["agnitra_result"] is result
    stages = [line.split()[0] for line in ran.text.splitlines() if line.strip()]
    assert [word for word in stages if word in _STAGES] == list(_STAGES)
    assert len(ran.cards) == 1
    assert result.report.headline in ran.bundles[0]["text/plain"]
    again = modelled.ok(f"%agnitra_report {result.report.run_id}")
    assert again.bundles == ran.bundles
    assert set(modelled.ok("%agnitra_runs").value["status"]) == {"complete"}
    value = modelled.ok("%agnitra_optimize model x --name mlp --suggest preset --sampler none --budget 1")
    assert value.value is modelled["agnitra_result"]
    assert len(value.cards) == 1
    silent = modelled.ok("agnitra_result;")
    assert silent.cards == []


_STAGES = ("profile", "suggest", "refine", "generate", "patch", "benchmark", "report")
