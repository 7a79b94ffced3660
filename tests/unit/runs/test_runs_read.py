from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.contracts.run import RunSummary
from agnitra_lab.errors import RunStoreError
from agnitra_lab.runs import layout
from agnitra_lab.runs.read import latest, list_runs, load_summary, verify
from agnitra_lab.runs.store import RunStore


@pytest.fixture
def finished(tmp_path, make_summary):
    """(topic, category, run_id) -> directory of a finished run."""

    def make(topic="x", category="reports", run_id=None):
        draw = {"draw_run_id": lambda tag: run_id} if run_id else {}
        run = RunStore(tmp_path, **draw).create("t", topic, category=category)
        run.finish(category, make_summary(run.run_id, layout.KINDS[category], topic), "# x\n")
        return run.directory(category)

    return make


def only(root):
    (entry,) = list_runs(root)
    return entry


def test_an_absent_folder_has_no_runs(tmp_path):
    assert list_runs(tmp_path / "nothing") == []


def test_a_complete_run_is_listed_with_its_topic(tmp_path, finished):
    directory = finished("demo:llama")
    entry = only(tmp_path)
    assert (entry.status, entry.topic, entry.path, entry.reason) == ("complete", "demo:llama", directory, None)
    assert entry.generated_at.endswith("Z")


def test_a_topic_named_like_a_category_is_listed(tmp_path, finished):
    finished("bench/reports", "bench")
    assert only(tmp_path).status == "complete"


def test_a_run_without_manifest_is_incomplete(tmp_path, finished):
    (finished() / "manifest.json").unlink()
    assert only(tmp_path).status == "incomplete"


@pytest.mark.parametrize("name", ["manifest.json", "summary.json", "run.md"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"schema_version": 1}', b"[" * 5000])
def test_a_torn_or_foreign_file_makes_the_run_damaged(tmp_path, finished, name, content):
    (finished() / name).write_bytes(content)
    entry = only(tmp_path)
    assert entry.status == "damaged"
    assert entry.reason


def test_a_missing_file_makes_the_run_damaged(tmp_path, finished):
    (finished() / "run.md").unlink()
    assert only(tmp_path).reason == "run.md is missing"


def test_a_copied_run_directory_is_damaged_under_another_name(tmp_path, finished):
    directory = finished()
    directory.rename(directory.with_name("20200101_000000_other_0000"))
    assert only(tmp_path).status == "damaged"


def test_a_manifest_that_points_out_of_the_run_is_damaged(tmp_path, finished):
    path = finished() / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["path"] = "../../../secret"
    path.write_text(json.dumps(manifest))
    assert "points out of the run" in only(tmp_path).reason


def test_foreign_things_are_listed_as_damaged_and_do_not_hide_runs(tmp_path, finished):
    finished()
    (tmp_path / "reports" / "x" / "notes.txt").write_text("mine")
    (tmp_path / "reports" / "foreign").mkdir()
    (tmp_path / "reports" / "foreign" / "a.bin").write_bytes(b"\0")
    (tmp_path / "reports" / "x" / "20200101_000000_file_0000").write_text("a file")
    statuses = {entry.run_id: entry.status for entry in list_runs(tmp_path)}
    assert sorted(statuses.values()) == ["complete", "damaged", "damaged", "damaged"]
    assert {"notes.txt", "foreign", "20200101_000000_file_0000"} <= set(statuses)


def test_a_folder_that_links_to_itself_ends(tmp_path, finished):
    finished()
    (tmp_path / "reports" / "loop").symlink_to(tmp_path)
    assert "complete" in {entry.status for entry in list_runs(tmp_path)}


def test_the_newest_run_comes_first_and_is_the_latest(tmp_path, finished):
    ids = ["20260101_000000_t_0001", "20260103_000000_t_0003", "20260102_000000_t_0002"]
    for run_id in ids:
        finished("x", "bench", run_id)
    assert [entry.run_id for entry in list_runs(tmp_path)] == sorted(ids, reverse=True)
    assert latest(tmp_path, "bench", "x").run_id == ids[1]


def test_latest_passes_over_runs_that_are_not_complete(tmp_path, finished):
    finished("x", "bench", "20260101_000000_t_0001")
    (finished("x", "bench", "20260102_000000_t_0002") / "manifest.json").unlink()
    assert latest(tmp_path, "bench", "x").run_id == "20260101_000000_t_0001"
    assert latest(tmp_path, "bench", "another") is None


def test_verify_finds_a_change_of_equal_size(finished):
    directory = finished()
    path = directory / "run.md"
    path.write_text("# y\n")
    assert verify(directory) == ("run.md has changed: its sha256 differs from the manifest",)


def test_verify_finds_a_file_that_was_added(finished):
    directory = finished()
    (directory / "more.txt").write_text("x")
    assert verify(directory) == ("more.txt is not in the manifest",)


def test_verify_says_so_when_there_is_no_manifest(tmp_path):
    (problem,) = verify(tmp_path)
    assert "manifest.json" in problem


def test_a_summary_is_loaded_from_its_directory_and_from_its_file(finished):
    directory = finished("demo:x")
    assert load_summary(directory) == load_summary(directory / "summary.json")
    assert load_summary(directory).meta.topic == "demo:x"


def test_the_layout_documents_own_example_is_loaded(tmp_path):
    summary = {
        "schema_version": "mgr.telemetry.v1",
        "meta": {
            "run_id": "20251218_004200_smoke", "generated_at": "2025-12-18T05:42:00Z", "kind": "baseline",
            "topic": "nanochat", "git": {"commit_full": "abc123", "branch": "main", "dirty": False},
            "python": {"executable": "python", "version": "3.13.0"}, "command": "x", "argv": ["x"], "seed": 42,
            "device": "cuda:0",
        },
        "budget": {"max_steps": 200, "warmup_steps": 10},
        "results": {"losses": [10.8, 10.2, 9.9], "tokens_per_second": 120000.0},
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert load_summary(tmp_path).results.losses == (10.8, 10.2, 9.9)


def test_an_absent_summary_is_one_clear_line(tmp_path):
    with pytest.raises(RunStoreError, match="No such file") as raised:
        load_summary(tmp_path / "nothing")
    assert "\n" not in str(raised.value)


@given(content=st.binary(max_size=300))
def test_reading_any_bytes_gives_a_summary_or_a_typed_error(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "summary.json"
    path.write_bytes(content)
    try:
        assert isinstance(load_summary(path), RunSummary)
    except RunStoreError as error:
        assert error.message
