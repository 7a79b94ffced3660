"""The suite's runner with processes that do as they are told: crashes, limits, resuming, jobs at once."""

import itertools
import json
import signal
import threading
import time
from pathlib import Path

import pytest

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.suite import SuiteResult
from agnitra_lab.errors import UsageError
from agnitra_lab.loop import suite, suite_devices
from agnitra_lab.loop.suite import SuiteSettings, run_suite, select
from agnitra_lab.loop.suite_devices import Seat
from agnitra_lab.runs.read import list_runs, verify
from agnitra_lab.workloads.suite import SUITE

JOBS = Path(__file__).parent / "suite_jobs.py"


@pytest.fixture(autouse=True)
def _fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = DeviceInfo(type="cuda", name="Fake H200")
    seats = [Seat(f"device-{index}.lock", {"CUDA_VISIBLE_DEVICES": str(index)}) for index in range(8)]
    monkeypatch.setattr(suite_devices, "describe", lambda device, num_devices: (facts, seats[:num_devices]))


def settings(tmp_path: Path, *names: str, **more: object) -> SuiteSettings:
    return SuiteSettings(names=names, device="cuda", artifacts=tmp_path / "artifacts", **more)  # type: ignore[arg-type]


def run(given: SuiteSettings, job: str, **more: object) -> suite.SuiteRun:
    return run_suite(given, job=f"{JOBS}:{job}", **more)  # type: ignore[arg-type]


def results(directory: Path) -> dict[str, SuiteResult]:
    found = (SuiteResult.from_json(path.read_bytes()) for path in (directory / "workloads").glob("*.json"))
    return {result.workload: result for result in found}


def test_a_crash_an_error_and_a_timeout_are_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    seen: list[str] = []
    done = run(
        settings(tmp_path, "lstm", "gru", "cumsum", "pooling"), "by_name",
        on_result=lambda result: seen.append(result.workload),
    )  # fmt: skip
    found = results(done.directory)
    assert seen == ["lstm", "gru", "cumsum", "pooling"]
    assert [result.status for result in map(found.get, seen)] == ["failed", "failed", "failed", "done"]
    assert "SIGSEGV" in found["lstm"].error
    assert "no such weights" in found["gru"].error
    assert found["cumsum"].error == "timeout: not done after 240 s of its own"
    assert found["lstm"].device.name == "Fake H200"
    assert "Segmentation fault" in (done.directory / "logs" / "lstm.txt").read_text()
    assert done.left == []
    assert verify(done.directory) == ()
    figures = json.loads((done.directory / "summary.json").read_text())["results"]
    assert (figures["num_workloads"], figures["num_failed"], figures["num_left"]) == (4, 3, 0)
    assert [row["workload"] for row in figures["workloads"]] == ["cumsum", "gru", "lstm", "pooling"]


def test_what_the_time_limit_cuts_off_is_left_and_not_failed(tmp_path: Path) -> None:
    started_s = time.monotonic()
    done = run(settings(tmp_path, "lstm", "gru", "pooling", limit_s=4.0), "sleeps")
    assert time.monotonic() - started_s < 60
    # The order given: lstm comes first and holds the only place until the time is up.
    assert done.left == ["lstm", "gru", "pooling"]
    assert results(done.directory) == {}
    assert verify(done.directory) == ()


def test_a_resumed_run_does_what_is_left_in_the_same_folder(tmp_path: Path) -> None:
    first = run(settings(tmp_path, "pooling", "lstm"), "by_name")
    started: list[list[str]] = []
    again = run(
        settings(tmp_path, "pooling", "lstm", "vit", resume="latest"), "by_name",
        on_start=lambda device, directory, names: started.append(list(names)),
    )  # fmt: skip
    assert again.directory == first.directory
    assert started == [["vit"]]
    assert set(results(again.directory)) == {"pooling", "lstm", "vit"}
    assert verify(again.directory) == ()


def test_what_failed_runs_again_where_that_is_asked_for(tmp_path: Path) -> None:
    first = run(settings(tmp_path, "lstm"), "by_name")
    assert results(first.directory)["lstm"].status == "failed"
    again = run(settings(tmp_path, "lstm", resume=first.directory.name, is_retrying=True), "always")
    assert results(again.directory)["lstm"].status == "done"


def test_a_run_that_was_killed_is_resumed_without_what_is_damaged(tmp_path: Path) -> None:
    first = run(settings(tmp_path, "pooling", "vit"), "by_name")
    (first.directory / "manifest.json").unlink()
    (first.directory / "workloads" / "vit.json").write_text('{"workload": "vi')
    started: list[list[str]] = []
    again = run(
        settings(tmp_path, "pooling", "vit", resume="latest"), "by_name",
        on_start=lambda device, directory, names: started.append(list(names)),
    )  # fmt: skip
    assert started == [["vit"]]
    assert set(results(again.directory)) == {"pooling", "vit"}
    assert verify(again.directory) == ()


def test_a_run_of_another_scale_is_not_resumed_and_stays_whole(tmp_path: Path) -> None:
    first = run(settings(tmp_path, "pooling", scale="tiny"), "by_name")
    with pytest.raises(UsageError, match="scale tiny"):
        run(settings(tmp_path, "pooling", scale="full", resume="latest"), "by_name")
    assert verify(first.directory) == ()


@pytest.mark.parametrize("resume", ["latest", "20260101_000000_suite_0000"])
def test_a_run_that_is_not_there_cannot_be_resumed(tmp_path: Path, resume: str) -> None:
    with pytest.raises(UsageError, match="No run"):
        run(settings(tmp_path, "pooling", resume=resume), "by_name")
    assert list_runs(tmp_path / "artifacts") == []


def test_jobs_run_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_TEST_FILE", str(tmp_path / "meeting"))
    done = run(settings(tmp_path, "pooling", "vit", num_jobs=2), "meets")
    assert {result.status for result in results(done.directory).values()} == {"done"}
    assert all(result.num_jobs == 2 for result in results(done.directory).values())


def test_each_device_has_its_own_workload_and_its_own_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_TEST_FILE", str(tmp_path / "meeting"))
    done = run(settings(tmp_path, "pooling", "vit", num_devices=2), "meets")
    assert {result.status for result in results(done.directory).values()} == {"done"}
    assert {path.read_text() for path in (tmp_path / "meeting").iterdir()} == {"0 device-0.lock", "1 device-1.lock"}


@pytest.mark.parametrize("many", [{"num_jobs": 2}, {"num_devices": 2}])
def test_jobs_at_the_same_time_are_refused_on_a_cpu(tmp_path: Path, many: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="on a CPU"):
        run_suite(SuiteSettings(device="cpu", artifacts=tmp_path, **many))  # type: ignore[arg-type]
    assert list_runs(tmp_path) == []


def test_compiled_code_is_thrown_away_unless_a_folder_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_TEST_FILE", str(tmp_path / "paths"))
    run(settings(tmp_path, "pooling"), "caches")
    cold = [Path(line) for line in (tmp_path / "paths").read_text().splitlines()]
    assert not any(path.parents[1].exists() for path in cold)
    warm = run(settings(tmp_path, "pooling", warm_cache=tmp_path / "warm"), "caches")
    assert (tmp_path / "paths").read_text().splitlines() == [
        str(tmp_path / "warm" / name) for name in ("inductor", "triton")
    ]
    assert results(warm.directory)["pooling"].is_cache_warm


def test_an_interrupt_ends_the_processes_and_leaves_a_run_that_reads_as_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []

    class Interrupting(suite._Crew):
        def _measure(self, name: str, seat: Seat) -> SuiteResult | None:
            threading.Thread(target=self._break, daemon=True).start()
            return super()._measure(name, seat)

        def _break(self) -> None:
            while not (self.workers and self.workers[0].pid):
                time.sleep(0.05)
            pids.append(self.workers[0].pid)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr(suite, "_Crew", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp_path, "lstm", "gru"), "sleeps")
    assert not Path(f"/proc/{pids[0]}").exists()
    (entry,) = list_runs(tmp_path / "artifacts")
    assert entry.status == "incomplete"


def test_the_choice_follows_names_family_and_shard_in_the_order_given() -> None:
    assert select(SuiteSettings()) == list(SUITE)
    assert select(SuiteSettings(names=("vit", "bert", "vit"))) == ["vit", "bert"]
    assert select(SuiteSettings(family="recurrent")) == ["lstm", "gru"]
    shards = [select(SuiteSettings(shard=(part, 3))) for part in (1, 2, 3)]
    assert sorted(itertools.chain(*shards)) == sorted(SUITE)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_models_of_ones_own_are_chosen_by_where_they_are_and_called_without_their_folder() -> None:
    assert select(SuiteSettings(names=("a/mine.py:mlp", "vit", "pack.models:net"))) == [
        "a/mine.py:mlp", "vit", "pack.models:net",
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"a/mine\.py:mlp and b/mine\.py:mlp would both be called mine:mlp"):
        select(SuiteSettings(names=("a/mine.py:mlp", "b/mine.py:mlp")))
    with pytest.raises(UsageError, match="Unknown suite workload 'demo:transformer_block'"):
        select(SuiteSettings(names=("demo:transformer_block",)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"names": ("gpt-5",)}, "gpt-5"),
        ({"scale": "huge"}, "Known: tiny, small, full"),
        ({"family": "music"}, "recurrent"),
        ({"modes": ("fast",)}, "max-autotune"),
        ({"shard": (3, 2)}, "3/2"),
        ({"names": ("lstm",), "family": "vision"}, "No workload"),
    ],
)
def test_a_wrong_choice_says_what_there_is(wrong: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        select(SuiteSettings(**wrong))
    assert message in str(caught.value)
