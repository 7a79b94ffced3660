from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from agnitra_lab.contracts.events import Event
from agnitra_lab.contracts.run import Manifest, RunSummary
from agnitra_lab.errors import RunStoreError
from agnitra_lab.runs import layout
from agnitra_lab.runs.read import list_runs, load_manifest, verify
from agnitra_lab.runs.store import RunStore

RUN_IDS = [f"20260114_093012_t_{index:04x}" for index in range(64)]


def event(run_id, **payload):
    return Event(event="run.started", timestamp="2026-01-14T09:30:12Z", run_id=run_id, payload=payload)


def finish(run, make_summary, category="reports", **figures):
    return run.finish(category, make_summary(run.run_id, layout.KINDS[category], run.topic, **figures), "# done\n")


def tree(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_a_finished_run_has_the_files_of_the_layout(tmp_path, make_summary):
    run = RunStore(tmp_path).create("llama", "demo:llama")
    run.write_json("reports", "report.json", {"latency_ms": 1.5})
    run.append_event(event(run.run_id))
    run.write_text("profiles", "traces/trace.json", "{}")
    run.finish_all(
        {
            "reports": (make_summary(run.run_id, "report"), "# report\n"),
            "profiles": (make_summary(run.run_id, "profile"), "# profile\n"),
        }
    )
    here = f"demo-llama/{run.run_id}"
    assert tree(tmp_path) == [
        f"profiles/{here}/manifest.json",
        f"profiles/{here}/run.md",
        f"profiles/{here}/summary.json",
        f"profiles/{here}/traces/trace.json",
        f"reports/{here}/events.jsonl",
        f"reports/{here}/manifest.json",
        f"reports/{here}/report.json",
        f"reports/{here}/run.md",
        f"reports/{here}/summary.json",
    ]
    assert [entry.status for entry in list_runs(tmp_path)] == ["complete", "complete"]


def test_links_lead_from_each_category_to_the_others(tmp_path, make_summary):
    run = RunStore(tmp_path).create("llama", "demos/llama")
    directories = run.finish_all(
        {name: (make_summary(run.run_id, layout.KINDS[name]), "#\n") for name in ("reports", "bench", "certs")}
    )
    for category, directory in directories.items():
        links = RunSummary.from_json((directory / "summary.json").read_bytes()).meta.links
        assert set(links) == set(directories) - {category}
        assert all((directory / path).resolve() == directories[other].resolve() for other, path in links.items())
        assert not any(path.startswith("/") for path in links.values())


def test_the_manifest_lists_every_file_with_its_hash(tmp_path, make_summary):
    run = RunStore(tmp_path).create("x", "x")
    run.write_bytes("reports", "plots/a.bin", b"\xff\x00")
    finish(run, make_summary)
    directory = run.directory("reports")
    assert {entry.path for entry in load_manifest(directory).files} == {"plots/a.bin", "run.md", "summary.json"}
    assert verify(directory) == ()


def test_a_run_id_in_use_is_drawn_again(tmp_path):
    ids = iter([RUN_IDS[0], RUN_IDS[0], RUN_IDS[1]])
    store = RunStore(tmp_path, draw_run_id=lambda tag: next(ids))
    assert [store.create("t", "x").run_id, store.create("t", "x").run_id] == RUN_IDS[:2]


def test_a_run_id_in_use_in_another_category_is_drawn_again(tmp_path):
    ids = iter([RUN_IDS[0], RUN_IDS[0], RUN_IDS[1]])
    store = RunStore(tmp_path, draw_run_id=lambda tag: next(ids))
    store.create("t", "x", category="profiles")
    assert store.create("t", "x").run_id == RUN_IDS[1]


def test_creating_gives_up_with_a_clear_error_when_every_id_is_taken(tmp_path):
    store = RunStore(tmp_path, draw_run_id=lambda tag: RUN_IDS[0])
    store.create("t", "x")
    with pytest.raises(RunStoreError, match="No free run id"):
        store.create("t", "x")


def test_sixteen_threads_that_draw_the_same_ids_get_sixteen_directories(tmp_path):
    def create(_):
        ids = iter(RUN_IDS)
        return RunStore(tmp_path, draw_run_id=lambda tag: next(ids)).create("t", "x").run_id

    with ThreadPoolExecutor(16) as pool:
        created = list(pool.map(create, range(16)))
    assert len(set(created)) == 16
    assert len(list((tmp_path / "reports" / "x").iterdir())) == 16


def test_processes_that_create_in_the_same_second_never_share_a_directory(tmp_path):
    script = (
        "import os, sys; from agnitra_lab.runs.store import RunStore\n"
        "for _ in range(3): os.fork()\n"
        "RunStore(sys.argv[1]).create('t', 'x')\n"
        "try: os.wait(); os.wait(); os.wait()\n"
        "except ChildProcessError: pass"
    )
    children = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    assert len(list((tmp_path / "reports" / "x").iterdir())) == 16


def file_a_run_and_die(root, last_step, summaries):
    """In this process: write a whole run, but end at once before the file system step after `last_step`."""
    num_steps = 0

    def count(name, arguments):
        nonlocal num_steps
        if name in ("os.mkdir", "os.rename", "os.remove", "open") and str(root) in str(arguments[0]):
            num_steps += 1
            if num_steps > last_step:
                os._exit(9)

    sys.addaudithook(count)
    run = RunStore(root, draw_run_id=lambda tag: RUN_IDS[0]).create("t", "x")
    run.append_event(event(run.run_id))
    run.write_json("reports", "report.json", {"a": 1})
    run.finish_all(summaries)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_step_leaves_no_run_that_reads_complete_and_is_not(tmp_path, make_summary):
    summaries = {name: (make_summary(RUN_IDS[0], layout.KINDS[name]), "# x") for name in ("reports", "bench")}
    statuses = []
    for step in itertools.count():
        root = tmp_path / f"kill-{step}"
        child = os.fork()
        if child == 0:
            file_a_run_and_die(root, step, summaries)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        entries = list_runs(root)
        assert {entry.status for entry in entries} <= {"complete", "incomplete"}
        assert all(verify(entry.path) == () for entry in entries if entry.status == "complete")
        statuses.append({entry.category: entry.status for entry in entries}.get("reports", "absent"))
        if code == 0:
            break
        assert code == 9
    # The primary category is finished last: nothing but the clean-up after its manifest may follow.
    assert statuses[-1] == "complete"
    assert statuses.index("complete") >= len(statuses) - 4
    assert statuses.count("incomplete") > 10


def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    run = RunStore(tmp_path).create("t", "x")
    path = run.write_text("reports", "a.txt", "old")

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunStoreError, match="No space left on device"):
        run.write_text("reports", "a.txt", "new")
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", ".", "a\\..\\x", "a\0b", ".."])
def test_a_path_that_escapes_is_refused(tmp_path, path):
    run = RunStore(tmp_path / "artifacts").create("t", "x")
    with pytest.raises(RunStoreError):
        run.write_text("reports", path, "x")
    assert tree(tmp_path) == []


def test_a_link_that_leads_out_is_refused(tmp_path):
    run = RunStore(tmp_path / "artifacts").create("t", "x")
    (run.directory("reports") / "out").symlink_to(tmp_path)
    with pytest.raises(RunStoreError, match="through a link"):
        run.write_text("reports", "out/x.txt", "x")
    assert not (tmp_path / "x.txt").exists()


def test_a_finished_category_takes_no_more_files(tmp_path, make_summary):
    run = RunStore(tmp_path).create("t", "x")
    finish(run, make_summary)
    with pytest.raises(RunStoreError, match="is finished"):
        run.write_text("reports", "late.txt", "x")
    with pytest.raises(RunStoreError, match="is finished"):
        run.append_event(event(run.run_id))


def test_events_of_many_threads_stay_on_lines_of_their_own(tmp_path):
    run = RunStore(tmp_path).create("t", "x")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: run.append_event(event(run.run_id, n=n, filler="x" * 5000)), range(64)))
    lines = (run.directory("reports") / "events.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["payload"]["n"] for line in lines) == list(range(64))


def test_no_secret_reaches_the_disk(tmp_path, make_summary, monkeypatch):
    secrets = ["sk-" + "a1B2" * 6, "ghp_" + "c3D4" * 8, "environment-secret-value"]
    monkeypatch.setenv("MY_API_KEY", secrets[2])
    run = RunStore(tmp_path).create("t", "x")
    text = " ".join(secrets)
    run.append_event(event(run.run_id, note=text, api_key="plain-value-of-a-key"))
    run.write_text("reports", "log.txt", text)
    run.write_text("reports", "a.json", json.dumps({"note": text}))
    run.write_bytes("reports", "b.txt", text.encode())
    run.write_json("reports", "c.json", {"api_key": "plain-value-of-a-key", "list": ["--api-key", secrets[0]]})
    run.finish("reports", make_summary(run.run_id, note=text), text)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(secret in written for secret in [*secrets, "plain-value-of-a-key"])
    assert json.loads((run.directory("reports") / "a.json").read_text())["note"].count("[redacted]") == 3


def test_a_text_file_that_holds_no_secret_is_written_byte_for_byte(tmp_path):
    run = RunStore(tmp_path).create("t", "x")
    content = '{"b": 1,  "a": "ä\\u00e4"}'
    assert run.write_text("reports", "a.json", content).read_text() == content


def test_checking_leaves_nothing_behind(tmp_path):
    RunStore(tmp_path / "not" / "there").check_writable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["artifacts", "artifacts/reports"])
def test_a_file_where_a_folder_must_be_is_found_up_front(tmp_path, place):
    target = tmp_path / place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("mine")
    with pytest.raises(RunStoreError, match="is not a folder") as raised:
        RunStore(tmp_path / "artifacts").check_writable()
    assert "--artifacts DIR" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(RunStoreError):
        RunStore(tmp_path / "artifacts").create("t", "x")
    assert target.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_found_up_front(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunStoreError, match="Permission denied"):
            RunStore(tmp_path / "artifacts").check_writable()
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that takes no files")  # noqa: PTH112
def test_a_folder_that_takes_no_files_is_found_up_front():
    with pytest.raises(RunStoreError, match="Cannot write"):
        RunStore("/proc/self/artifacts").check_writable()


def test_the_manifest_on_disk_is_a_valid_contract(tmp_path, make_summary):
    run = RunStore(tmp_path).create("t", "x")
    path = finish(run, make_summary)
    assert Manifest.from_json(path.read_bytes()).run_id == run.run_id


def test_a_run_that_is_reopened_reads_as_incomplete_until_it_is_finished_again(tmp_path, make_summary):
    first = RunStore(tmp_path).create("suite", "suite", category="perf")
    first.write_text("perf", "workloads/bert.json", "{}")
    finish(first, make_summary, "perf")
    again = RunStore(tmp_path).reopen(first.run_id, "suite", category="perf")
    assert [entry.status for entry in list_runs(tmp_path)] == ["incomplete"]
    again.write_text("perf", "workloads/vit.json", "{}")
    finish(again, make_summary, "perf")
    assert again.directory("perf") == first.directory("perf")
    assert [entry.status for entry in list_runs(tmp_path)] == ["complete"]
    assert verify(again.directory("perf")) == ()


def test_a_run_that_is_not_there_cannot_be_reopened(tmp_path):
    with pytest.raises(RunStoreError, match="no run"):
        RunStore(tmp_path).reopen("20260114_093012_suite_3fa9", "suite", category="perf")
    assert list(tmp_path.iterdir()) == []
