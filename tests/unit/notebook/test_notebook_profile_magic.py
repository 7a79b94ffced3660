from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.errors import RunStoreError, UsageError
from agnitra_lab.notebook import profiling
from agnitra_lab.runs.read import list_runs, verify


def test_the_telemetry_of_the_cell_is_in_the_namespace(modelled):
    modelled.ok("%%agnitra_profile --name 'my step'\ny = model(x)")
    record = modelled["agnitra_telemetry"].record
    assert record.name == "my step"
    assert record.bottleneck is not None
    assert {event.op for event in record.events} >= {"aten::addmm"}


def test_the_body_runs_exactly_once(shell):
    shell.ok("calls = []")
    shell.ok("%%agnitra_profile\ncalls.append(1)")
    assert shell["calls"] == [1]


def test_repeat_runs_the_body_that_often_and_returns_the_last_value(shell):
    shell.ok("calls = []")
    ran = shell.ok("%%agnitra_profile --repeat 3\ncalls.append(1)\nlen(calls)")
    assert shell["calls"] == [1, 1, 1]
    assert ran.value == 3


def test_a_profile_is_filed_as_a_complete_run_whose_path_the_card_tells(modelled):
    ran = modelled.ok("%%agnitra_profile --name step\nmodel(x);")
    (entry,) = list_runs("artifacts")
    assert (entry.category, entry.topic, entry.status) == ("profiles", "step", "complete")
    assert verify(entry.path) == ()
    assert f"{entry.path}/telemetry.json" in ran.cards[0]
    TelemetryRecord.from_json((entry.path / "telemetry.json").read_text())


def test_out_holds_the_same_telemetry(modelled):
    modelled.ok("%%agnitra_profile --out here/it/is\nmodel(x);")
    (entry,) = list_runs("artifacts")
    written = json.loads(Path("here/it/is/telemetry.json").read_text())
    assert written == json.loads((entry.path / "telemetry.json").read_text())
    assert Path("here/it/is/events.parquet").stat().st_size > 0


def test_a_workload_gives_the_cell_its_tokens_per_second(modelled):
    modelled.ok(
        "from agnitra_lab import Workload\nw = Workload('w', model, (x,), items_per_call=7, item_unit='tokens')"
    )
    ran = modelled.ok("%%agnitra_profile --workload w\nmodel(x);")
    record = modelled["agnitra_telemetry"].record
    assert (record.workload, record.items_per_call, record.item_unit) == ("w", 7, "tokens")
    assert record.tokens_per_second == pytest.approx(7 / (record.wall_ms / 1e3))
    assert "7 tokens a run" in ran.cards[0]


def test_a_workload_of_images_has_no_tokens_per_second(modelled):
    modelled.ok(
        "from agnitra_lab import Workload\nw = Workload('w', model, (x,), items_per_call=2, item_unit='images')"
    )
    modelled.ok("%%agnitra_profile --workload w\nmodel(x);")
    assert modelled["agnitra_telemetry"].record.tokens_per_second is None


def test_times_of_a_repeated_body_are_those_of_one_run(modelled):
    modelled.ok("%%agnitra_profile --repeat 3\nmodel(x);")
    events = modelled["agnitra_telemetry"].record.events
    assert [event.num_calls for event in events if event.op == "aten::addmm" and event.module_path == "0"] == [1]


def test_a_failed_cell_shows_what_ran_and_is_no_run(modelled):
    ran = modelled.run("%%agnitra_profile\ny = model(x)\nraise ValueError('after the model')")
    assert isinstance(ran.error, ValueError)
    assert "The code raised ValueError" in ran.cards[0]
    assert modelled["agnitra_telemetry"].record.bottleneck is not None
    assert list_runs("artifacts") == []


def test_the_files_that_were_asked_for_are_written_of_a_failed_cell_too(modelled):
    modelled.run("%%agnitra_profile --out out --trace t.json\ny = model(x)\nraise ValueError")
    assert json.loads(Path("out/telemetry.json").read_text())["bottleneck"] is not None
    assert json.loads(Path("t.json").read_text())["traceEvents"]


def test_a_failed_repetition_keeps_what_ran_before_it(modelled):
    modelled.ok("calls = []")
    ran = modelled.run(
        "%%agnitra_profile --repeat 5\ncalls.append(1)\ny = model(x)\nif len(calls) == 2: raise ValueError('second')"
    )
    assert (str(ran.error), modelled["calls"]) == ("second", [1, 1])
    assert modelled["agnitra_telemetry"].record.bottleneck is not None


@pytest.mark.parametrize(
    ("kind", "note"), [("KeyboardInterrupt", "The code was interrupted"), ("SystemExit", "The code raised SystemExit")]
)
def test_an_exception_that_ends_the_cell_keeps_what_ran(modelled, kind, note):
    ran = modelled.run(f"%%agnitra_profile\ny = model(x)\nraise {kind}")
    assert modelled["agnitra_telemetry"].record.bottleneck is not None
    assert note in ran.cards[0]


def test_an_interrupted_cell_has_no_rate_of_whole_runs(modelled):
    modelled.ok(
        "from agnitra_lab import Workload\nw = Workload('w', model, (x,), items_per_call=7, item_unit='tokens')"
    )
    modelled.run("%%agnitra_profile --workload w\nmodel(x)\nraise KeyboardInterrupt")
    assert modelled["agnitra_telemetry"].record.tokens_per_second is None


def test_a_trace_is_written_where_it_was_asked_for_and_the_card_tells_where(modelled):
    ran = modelled.ok("%%agnitra_profile --trace deep/inside/trace.json\nmodel(x);")
    assert json.loads(Path("deep/inside/trace.json").read_text())["traceEvents"]
    assert "Chrome trace: deep/inside/trace.json" in ran.cards[0]


def test_memory_is_recorded_when_it_is_asked_for(modelled):
    modelled.ok("%%agnitra_profile\ny = model(x)")
    assert len(modelled["agnitra_telemetry"].memory) == 0
    modelled.ok("%%agnitra_profile --memory\ny = model(x)")
    assert len(modelled["agnitra_telemetry"].memory) > 0


def test_a_trace_past_the_budget_says_how_much_was_kept(modelled):
    ran = modelled.ok("%%agnitra_profile --max-events 10\nfor _ in range(5): y = model(x)")
    assert modelled["agnitra_telemetry"].record.num_events == 10
    assert re.search(r"first 10\b", ran.cards[0])


def test_a_cell_that_launches_nothing_says_so(shell):
    ran = shell.ok("%%agnitra_profile\ntotal = sum(range(10))")
    assert "No op ran in this cell" in ran.cards[0]
    assert shell["agnitra_telemetry"].record.bottleneck is None


def test_a_cell_of_comments_says_that_it_holds_no_code(shell):
    ran = shell.ok("%%agnitra_profile\n# later")
    assert "The cell holds no code" in ran.cards[0]


def test_an_empty_cell_is_refused_in_one_line(shell):
    ran = shell.run("%%agnitra_profile")
    assert not ran.success
    assert "cell body is empty" in ran.text and ran.text.strip().count("\n") == 0


def test_a_syntax_error_names_its_place_in_the_cell_and_nothing_runs(shell):
    ran = shell.run("%%agnitra_profile\nhas_run = True\nx = = 1")
    assert isinstance(ran.error, SyntaxError)
    assert ran.error.lineno == 3
    assert "line 3" in ran.text and "compilerop" not in ran.text
    assert "has_run" not in shell


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--bogus 1", "unrecognized arguments: --bogus"),
        ("--repeat 0", "--repeat is 0"),
        ("--repeat many", "invalid int value: 'many'"),
        ("--max-events 0", "--max-events is 0"),
        ("--trace .", "--trace is '.'"),
        ("--trace trace.txt", "--trace is 'trace.txt'"),
        ("--workload nothing_here", "'nothing_here' cannot be evaluated: NameError"),
        ("--workload demo:nope", "Unknown demo 'nope'"),
    ],
)
def test_a_wrong_option_is_one_line_and_the_body_does_not_run(shell, line, message):
    ran = shell.run(f"%%agnitra_profile {line}\nhas_run = True")
    assert isinstance(ran.error, UsageError)
    assert message in ran.text
    assert ran.text.count("\n") <= 1
    assert "has_run" not in shell


def test_a_top_level_await_is_refused_before_anything_runs(shell):
    ran = shell.run("%%agnitra_profile\nhas_run = True\nimport asyncio\nawait asyncio.sleep(0)")
    assert "awaits at top level; nothing was run" in ran.text
    assert "has_run" not in shell


def test_an_await_inside_a_function_is_none_of_our_business(shell):
    assert shell.ok("%%agnitra_profile\nasync def later():\n    await other()\nlater.__name__").value == "later"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_found_before_the_body_runs(shell, tmp_path):
    tmp_path.chmod(0o500)
    ran = shell.run("%%agnitra_profile\nhas_run = True")
    tmp_path.chmod(0o700)
    assert isinstance(ran.error, RunStoreError)
    assert "has_run" not in shell


def test_a_file_where_the_folder_must_be_is_found_before_the_body_runs(shell):
    Path("taken").write_text("")
    ran = shell.run("%%agnitra_profile --out taken\nhas_run = True")
    assert isinstance(ran.error, RunStoreError)
    assert "has_run" not in shell


def test_a_profile_in_a_profile_runs_and_says_that_it_was_not_measured(modelled):
    ran = modelled.ok(
        "%%agnitra_profile\nip = get_ipython()\nip.run_cell_magic('agnitra_profile', '--name in', 'inner = model(x)')"
    )
    assert "inner" in modelled
    assert ["ran unprofiled" in card for card in ran.cards] == [True, False]
    assert modelled["agnitra_telemetry"].record.name == "cell"
    assert modelled["agnitra_telemetry"].record.bottleneck is not None


def test_a_call_of_profile_in_a_profiled_cell_runs_and_says_that_it_was_not_measured(modelled):
    modelled.ok("%%agnitra_profile\nimport agnitra_lab\ninner = agnitra_lab.profile(lambda: model(x))")
    assert any("ran unprofiled" in note for note in modelled["inner"].record.notes)
    assert modelled["inner"].value.shape == (2, 4)
    assert modelled["agnitra_telemetry"].record.bottleneck is not None


def test_a_profiler_left_running_by_an_earlier_cell_is_left_alone_and_named(modelled):
    modelled.ok("left = torch.profiler.profile(); left.start()")
    ran = modelled.ok("%%agnitra_profile\ny = model(x)\n'value'")
    modelled.ok("left.stop()")
    assert ran.value == "value"
    assert "ran unprofiled" in ran.cards[0]
    assert any(event.name == "aten::addmm" for event in modelled["left"].events())


def test_a_profiler_that_the_cell_starts_is_named_as_the_one_that_took_the_events(modelled):
    # It does not fail: it silently ends the profile that was running, whose events are gone.
    ran = modelled.ok("%%agnitra_profile\ny = model(x)\nwith torch.profiler.profile() as own: y = model(x)")
    assert any(event.name == "aten::addmm" for event in modelled["own"].events())
    assert any("profiler" in note for note in modelled["agnitra_telemetry"].record.notes)
    assert "No op ran" not in ran.cards[0]


class _BrokenBlock:
    """A capture that fails when it is left."""

    def __init__(self, **_):
        self.telemetry = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        raise RuntimeError("out of events")


def test_a_capture_that_breaks_costs_the_card_and_not_the_value(shell, monkeypatch):
    shell.ok("%%agnitra_profile\n1")
    monkeypatch.setattr(profiling, "capture_block", _BrokenBlock)
    ran = shell.ok("%%agnitra_profile\n40 + 2")
    assert ran.value == 42
    assert "no complete profile of this cell, which itself ran: RuntimeError: out of events" in ran.text
    assert shell["agnitra_telemetry"] is None  # rather than that of the cell before


def test_a_capture_that_breaks_does_not_hide_what_the_cell_raised(shell, monkeypatch):
    monkeypatch.setattr(profiling, "capture_block", _BrokenBlock)
    ran = shell.run("%%agnitra_profile\nraise LookupError('gone')")
    assert (type(ran.error), str(ran.error)) == (LookupError, "gone")


@pytest.mark.parametrize("interactivity", ["last_expr", "last_expr_or_assign", "all", "none"])
def test_the_interactivity_that_the_user_chose_applies(shell, interactivity):
    shell.ip.ast_node_interactivity = interactivity
    shown = []
    for first_line in ("# no magic", "%%agnitra_profile"):
        ran = shell.run(f"{first_line}\n'first'\nx = 4")
        shown.append((ran.success, ran.value, "'first'" in ran.text))
    assert shown[0] == shown[1]


def test_ast_transformers_of_the_shell_apply(shell):
    shell.ok(
        "import ast\n"
        "class Double(ast.NodeTransformer):\n"
        "    def visit_Constant(self, node):\n"
        "        return ast.copy_location(ast.Constant(node.value * 2), node) if node.value == 21 else node\n"
        "ip = get_ipython()\nip.ast_transformers.append(Double())"
    )
    assert shell.run("%%agnitra_profile\n21").value == 42


def test_future_statements_of_earlier_cells_apply(shell):
    shell.ok("from __future__ import annotations")
    shell.ok("%%agnitra_profile\ndef f(a: not_defined): ...\nf.__annotations__")
    assert shell["f"].__annotations__ == {"a": "not_defined"}
