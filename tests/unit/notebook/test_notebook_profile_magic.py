from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.errors import RunStoreError, UsageError
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


def test_a_failed_cell_shows_what_ran_and_files_nothing(modelled):
    ran = modelled.run("%%agnitra_profile\ny = model(x)\nraise ValueError('after the model')")
    assert isinstance(ran.error, ValueError)
    assert "The code raised ValueError" in ran.cards[0]
    assert modelled["agnitra_telemetry"].record.bottleneck is not None
    assert list_runs("artifacts") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--bogus 1", "unrecognized arguments: --bogus"),
        ("--repeat 0", "--repeat is 0"),
        ("--repeat many", "invalid int value: 'many'"),
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
    shell.ok("%%agnitra_profile\nasync def later():\n    await other()\nlater.__name__")


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


def test_a_profile_in_a_profile_runs_and_says_that_it_was_not_measured(shell):
    ran = shell.ok(
        "%%agnitra_profile\nip = get_ipython()\nip.run_cell_magic('agnitra_profile', '--name in', 'inner = 1')"
    )
    assert shell["inner"] == 1
    assert any("ran unprofiled" in card for card in ran.cards)


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
