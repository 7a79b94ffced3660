"""The dashboard's record and page over this repository's own artifacts, against what the shell prints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.cli import main
from agnitra_lab.errors import RunStoreError, UsageError
from agnitra_lab.loop.dashboard import collect_dashboard, write_dashboard
from agnitra_lab.report import dashboard as page
from agnitra_lab.report.dashboard_record import Dashboard
from agnitra_lab.runs.read import load_summary
from agnitra_lab.runs.regressions import compare_runs

ROOT = Path(__file__).parents[3]
NODE = shutil.which("node") or shutil.which("nodejs")
needs_node = pytest.mark.skipif(NODE is None, reason="node, which runs the page's script, is not installed")


@pytest.fixture(scope="module")
def record():
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        return collect_dashboard("artifacts")


@pytest.fixture
def shell(monkeypatch, capsys):
    """The shell's JSON for a command line, run in the repository."""
    monkeypatch.chdir(ROOT)

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["agnitra", *arguments])
        assert main(exits=False) == code
        return capsys.readouterr().out

    return run


@pytest.fixture
def small(tmp_path):
    """A folder with one whole run, one cut short and one whose file has changed."""
    source = next((ROOT / "artifacts" / "certs").glob("*/*"))
    topic = tmp_path / "artifacts" / "certs" / source.parent.name
    names = (source.name, "20261122_000000_cut_0000", "20261122_000001_changed_0001")
    for name in names:
        shutil.copytree(source, topic / name)
        for file in ("summary.json", "manifest.json"):
            text = (topic / name / file).read_text().replace(source.name, name)
            (topic / name / file).write_text(text)
        manifest = json.loads((topic / name / "manifest.json").read_text())
        for entry in manifest["files"]:
            entry["size_bytes"] = (topic / name / entry["path"]).stat().st_size
        (topic / name / "manifest.json").write_text(json.dumps(manifest))
    (topic / names[1] / "manifest.json").unlink()
    with (topic / names[2] / "run.md").open("a") as file:
        file.write("one line more\n")
    return tmp_path / "artifacts"


def run_script(source, value):
    """Run the page's script in Node with `value` as `given`; `source` is an expression over both."""
    script = f"{page.dashboard_script()}\nconst given = JSON.parse(require('fs').readFileSync(0, 'utf8'));\n"
    script += f"process.stdout.write(JSON.stringify({source}));"
    done = subprocess.run([NODE, "-e", script], input=json.dumps(value), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_runs_are_those_that_the_shell_lists(record, shell):
    listed = json.loads(shell("runs", "--json"))
    shown = [row.model_dump(include={"run_id", "category", "topic", "status", "path"}) for row in record.runs]
    assert shown == listed


def test_the_suite_is_what_the_shell_tabulates(record, shell):
    groups = json.loads(shell("suite", "table", "--json"))["groups"]
    shown = [
        {"device": group.device, "scale": group.scale, **group.figures.model_dump(), "workloads": list(group.workloads)}
        for group in record.suite
    ]
    assert shown == groups


def test_each_regression_is_what_the_shell_says_of_the_two_runs(record, shell):
    assert record.pairs
    for pair in record.pairs:
        said = shell("regressions", "-b", pair.baseline_path, "-c", pair.candidate_path, "--json")
        assert json.loads(said) == pair.found.model_dump(mode="json")


def test_the_shells_json_is_the_record(record, shell):
    printed = Dashboard.from_json(shell("dashboard", "--json"))
    assert printed.model_copy(update={"generated_at": record.generated_at}) == record


def test_the_rows_of_each_profile_add_up_to_its_self_time(record):
    assert len(record.layers) >= 10
    for profile in record.layers:
        total = sum(row[3] for row in profile.rows)
        assert total == pytest.approx(profile.total_self_ms, rel=1e-6)


def test_profiles_reach_the_kernels_of_single_layers(record):
    profile = next(one for one in record.layers if one.topic == "llama-decode-eager")
    assert profile.source == "events"
    places = {(profile.modules[module], profile.ops[op]) for module, op, kernel, *_ in profile.rows if kernel >= 0}
    assert ("layers.0.mlp.down_proj", "aten::mm") in places
    assert ("layers.21.mlp.down_proj", "aten::mm") in places


def test_hotspots_of_the_telemetry_are_the_sums_of_the_rows(record):
    profile = next(one for one in record.layers if one.topic == "llama-decode-eager")
    (directory,) = (ROOT / "artifacts" / "profiles" / profile.topic).glob(profile.run_id)
    spot = json.loads((directory / "telemetry.json").read_text())["hotspots"][0]
    place = [
        row for row in profile.rows
        if profile.modules[row[0]].replace(".", " ").split()[2:] == spot["place"].split(".")[2:]
        and profile.kernels[row[2]] == spot["kernel"]
    ]  # fmt: skip
    assert sum(row[3] for row in place) == pytest.approx(spot["latency_ms"], rel=1e-6)


def test_every_number_of_the_suite_and_the_regressions_is_on_the_page(record):
    text = page.dashboard_page(record)
    for group in record.suite:
        for row in group.workloads:
            assert "speedup_vs_best" not in row or f"{row['speedup_vs_best']:.3f}x" in text
            assert "agnitra_latency_ms_p50" not in row or f"{row['agnitra_latency_ms_p50']:.4g}" in text
    for pair in record.pairs:
        for change in pair.found.metrics:
            assert change.baseline is None or f"{change.baseline:.6g}" in text
            assert change.candidate is None or f"{change.candidate:.6g}" in text
    for search in record.searches:
        assert search.best_latency_ms is None or f"{search.best_latency_ms * 1e3:.2f} us" in text


def test_the_repositorys_own_dashboard_is_small(record):
    assert len(page.dashboard_page(record).encode()) <= 2_000_000


def test_what_is_incomplete_or_damaged_is_shown_as_such_and_counted(small):
    found = collect_dashboard(small)
    assert sorted(row.status for row in found.runs) == ["complete", "damaged", "incomplete"]
    assert all(row.reason for row in found.runs if row.status != "complete")
    assert all(not row.figures for row in found.runs if row.status != "complete")
    text = page.dashboard_page(found)
    assert "3 directories; 1 incomplete, 1 damaged" in text
    assert "the run was cut short, or is still going on" in text


def test_a_file_that_is_no_search_or_telemetry_is_named_and_the_rest_is_shown(small):
    run = next(row for row in collect_dashboard(small).runs if row.status == "complete")
    for category, name in (("cmaes", "trials/x.json"), ("profiles", "telemetry.json")):
        copy = small / category / "x" / run.run_id
        shutil.copytree(run.path, copy)
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("{")
    found = collect_dashboard(small)
    assert len(found.warnings) == 2
    assert len(found.runs) == 5


def test_an_empty_folder_has_a_dashboard_that_says_what_to_do(tmp_path):
    text = page.dashboard_page(collect_dashboard(tmp_path))
    assert "agnitra demo" in text


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No folder"):
        collect_dashboard(tmp_path / "nothing")


def test_the_shell_writes_the_file_and_counts_what_is_not_whole(small, shell, tmp_path):
    said = shell("dashboard", str(small), "--out", str(tmp_path / "all.html"))
    assert (tmp_path / "all.html").is_file()
    assert "3 run directories, 2 of them incomplete or damaged" in said


def test_a_folder_that_is_not_there_ends_the_shell_with_its_code_for_bad_usage(shell, tmp_path):
    assert shell("dashboard", str(tmp_path / "nothing"), code=2) == "", "nothing but the complaint, on stderr"


@pytest.mark.parametrize("name", ["dashboard.txt", "folder.html"])
def test_only_an_html_file_is_written(tmp_path, name):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match=r"dashboard\.html"):
        write_dashboard(collect_dashboard(tmp_path), tmp_path / name)


def test_a_dashboard_that_cannot_be_written_leaves_the_old_one(tmp_path):
    found = collect_dashboard(tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunStoreError, match="Choose another file with --out"):
        write_dashboard(found, tmp_path / "file" / "dashboard.html")
    assert (tmp_path / "file").read_text() == "kept"


@needs_node
def test_the_page_compares_any_two_runs_as_python_does(record):
    runs = page.comparable(record.runs)
    # Every third of the ordered pairs: all devices and categories are among them.
    pairs = list(permutations(range(len(runs)), 2))[::3]
    index = page.dashboard_index(record, [])
    shown = run_script("given.pairs.map(([a, b]) => agnitra.compareRuns(given.index.rules, given.index.runs[a], "
                       "given.index.runs[b]))", {"index": index, "pairs": pairs})  # fmt: skip
    summaries = [load_summary(ROOT / row.path) for row in runs]
    for (first, second), got in zip(pairs, shown, strict=True):
        found = compare_runs(summaries[first], summaries[second]).model_dump(mode="json")
        assert {key: got[key] for key in ("verdict", "note")} == {key: found[key] for key in ("verdict", "note")}
        assert got["metrics"] == found["metrics"]


@needs_node
def test_a_tree_has_the_profiles_whole_time_folded_or_not(record):
    profile = page.layer_values(record.layers[0])
    shown = run_script("[true, false].map((fold) => { const tree = agnitra.buildTree(given, fold); return [tree.ms, "
                       "agnitra.childrenOf(tree).reduce((sum, node) => sum + node.ms, 0)]; })", profile)  # fmt: skip
    for whole, parts in shown:
        assert whole == pytest.approx(profile["total_self_ms"], rel=1e-5)
        assert parts == pytest.approx(whole, rel=1e-9)


@needs_node
@settings(max_examples=12, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=40, max_size=200))
def test_the_page_writes_numbers_as_the_shell_does(values):
    shown = run_script("given.map(agnitra.general)", values)
    for value, text in zip(values, shown, strict=True):
        if value == 0:
            continue
        # A tie in the seventh digit may be rounded either way.
        assert text == f"{value:.6g}" or float(text) == pytest.approx(value, rel=6e-6)
