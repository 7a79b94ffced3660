"""Whatever a candidate does to its process, the parent gets an outcome that names it, and the next one runs."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agnitra_lab.benchmark.worker import Outcome, Worker
from agnitra_lab.benchmark.worker_frames import FrameError, FrameReader, encode
from agnitra_lab.benchmark.worker_main import classify
from agnitra_lab.errors import AgnitraError, UsageError

JOBS = Path(__file__).with_name("worker_jobs.py")
LONG_S = 60.0


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker() as opened:
        yield opened


def run(worker: Worker, function: str, *args: Any, deadline_s: float = LONG_S, **kwargs: Any) -> Outcome:
    return worker.run(f"{JOBS}:{function}", args, kwargs, name=function, deadline_s=deadline_s)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int) -> bool:
    """A killed orphan is gone at once, but nobody here can wait for it."""
    ends_s = time.monotonic() + LONG_S
    while is_alive(pid) and time.monotonic() < ends_s:
        time.sleep(0.01)
    return not is_alive(pid)


def assert_takes_the_next_job(worker: Worker, spent_pid: int | None) -> None:
    outcome = run(worker, "own_pid")
    assert outcome.status == "ok"
    assert outcome.value != spent_pid
    assert outcome.start_s > 0.0
    assert spent_pid is None or not Path(f"/proc/{spent_pid}").exists()


def test_a_job_gets_its_arguments_and_gives_its_value(worker: Worker) -> None:
    outcome = run(worker, "add", 40, right=2)
    assert (outcome.status, outcome.value, outcome.message, outcome.exit_signal) == ("ok", 42, "", None)


def test_a_job_can_be_named_by_its_module(worker: Worker) -> None:
    assert worker.run("math:hypot", (3.0, 4.0), name="hypot", deadline_s=LONG_S).value == 5.0


def test_jobs_that_end_well_share_one_process_and_it_is_not_this_one(worker: Worker) -> None:
    pids = {run(worker, "own_pid").value for _ in range(3)}
    assert pids == {worker.pid}
    assert os.getpid() not in pids


def test_the_worker_loads_no_torch_of_its_own(worker: Worker) -> None:
    assert run(worker, "has_torch").value is False


def test_an_error_is_told_by_type_and_first_line_and_the_process_goes_on(worker: Worker) -> None:
    outcome = run(worker, "raise_text", "wrong tile\nsecond line")
    assert (outcome.status, outcome.message) == ("error", "RuntimeError: wrong tile")
    assert "worker_jobs.py" in outcome.stderr_tail
    assert str(outcome) == "Candidate 'raise_text': error (RuntimeError: wrong tile)"
    assert run(worker, "own_pid").start_s == 0.0


def test_a_job_that_exits_the_interpreter_is_an_error(worker: Worker) -> None:
    assert run(worker, "leave").message == "SystemExit: no more"


def test_a_job_that_does_not_exist_is_an_error_that_names_it(worker: Worker) -> None:
    assert "no_such_function" in run(worker, "no_such_function").message
    outcome = worker.run("no_such_module:f", name="x", deadline_s=LONG_S)
    assert (outcome.status, "no_such_module" in outcome.message) == ("error", True)


def test_a_hang_is_a_timeout_that_shows_where_it_hung_and_the_next_job_runs(worker: Worker) -> None:
    spent = run(worker, "own_pid").value
    outcome = run(worker, "hang", deadline_s=0.3)
    assert (outcome.status, outcome.exit_signal, outcome.value) == ("timeout", "SIGTERM", None)
    assert "in hang" in outcome.stderr_tail
    assert_takes_the_next_job(worker, spent)


def test_a_hang_that_holds_the_lock_and_declines_sigterm_is_killed(worker: Worker) -> None:
    spent = run(worker, "own_pid").value
    outcome = run(worker, "hang_in_c_and_decline_to_end", deadline_s=0.3)
    assert (outcome.status, outcome.exit_signal) == ("timeout", "SIGKILL")
    assert_takes_the_next_job(worker, spent)


@pytest.mark.parametrize(
    ("function", "args", "exit_signal", "message"),
    [
        ("segfault", (), "SIGSEGV", "the process ended with SIGSEGV"),
        ("kill_self", (), "SIGKILL", "the process ended with SIGKILL"),
        ("exit_at_once", (3,), None, "the process ended with exit code 3"),
        ("half_an_answer", (), None, "the process ended with exit code 0"),
    ],
)
def test_a_crash_says_what_ended_the_process(
    worker: Worker, function: str, args: tuple[Any, ...], exit_signal: str | None, message: str
) -> None:
    spent = run(worker, "own_pid").value
    outcome = run(worker, function, *args)
    assert (outcome.status, outcome.exit_signal, outcome.message) == ("crash", exit_signal, message)
    assert_takes_the_next_job(worker, spent)


def test_a_segfault_leaves_the_python_stack(worker: Worker) -> None:
    assert "in segfault" in run(worker, "segfault").stderr_tail


def test_garbage_on_the_answers_pipe_is_a_crash(worker: Worker) -> None:
    outcome = run(worker, "write_to_every_pipe", b"garbage")
    assert outcome.status == "crash"
    assert "garb" in outcome.message
    assert_takes_the_next_job(worker, None)


def test_a_fork_that_comes_back_from_the_job_answers_nothing(worker: Worker) -> None:
    assert [run(worker, "fork_and_return_twice").value for _ in range(2)] == ["parent", "parent"]


def test_memory_past_the_limit_is_out_of_memory_and_below_it_is_fine() -> None:
    with Worker(max_memory_bytes=2**30) as limited:
        assert run(limited, "allocate", 2**24).value == 2**24
        spent = limited.pid
        outcome = run(limited, "allocate", 2**31)
        assert (outcome.status, outcome.message) == ("out_of_memory", "MemoryError")
        assert_takes_the_next_job(limited, spent)
        assert run(limited, "allocate", 2**31).status == "out_of_memory"


def test_a_limit_that_no_interpreter_fits_into_is_an_error_and_not_a_crash_of_the_candidate() -> None:
    with Worker(max_memory_bytes=2**20) as limited, pytest.raises(AgnitraError, match="does not start"):
        run(limited, "own_pid")


@pytest.mark.parametrize("function", ["raise_text", "raise_wrapped"])
def test_a_poisoned_device_context_costs_the_process(worker: Worker, function: str) -> None:
    spent = run(worker, "own_pid").value
    outcome = run(worker, function, "CUDA error: an illegal memory access was encountered")
    assert outcome.status == "device_lost"
    assert_takes_the_next_job(worker, spent)


def test_a_device_that_fails_after_the_job_has_returned_is_that_jobs_failure(worker: Worker) -> None:
    outcome = run(worker, "return_before_the_device_fails")
    assert (outcome.status, outcome.value) == ("device_lost", None)
    assert_takes_the_next_job(worker, None)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("CUDA error: device-side assert triggered", "device_lost"),
        ("Triton Error [CUDA]: an illegal memory access was encountered", "device_lost"),
        ("unspecified launch failure", "device_lost"),
        ("CUDA error: out of memory", "out_of_memory"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "out_of_memory"),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory", "out_of_memory"),
        ("out of resource: shared memory, Required: 300000", "error"),
        ("Torch not compiled with CUDA enabled", "error"),
    ],
)
def test_messages_of_drivers_and_allocators_are_told_apart(text: str, status: str) -> None:
    assert classify(RuntimeError(text)) == status


def test_a_lost_device_outranks_the_memory_error_that_came_of_it() -> None:
    error = MemoryError()
    error.__context__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert classify(error) == "device_lost"


def test_a_megabyte_on_both_streams_neither_blocks_nor_corrupts_and_its_end_is_kept() -> None:
    with Worker(env={"PYTHONUNBUFFERED": ""}) as worker:
        outcome = run(worker, "print_much", 2**20)
        assert (outcome.status, outcome.value) == ("ok", "printed")
        assert outcome.stderr_tail.endswith("the last words\n")
        assert "straight to stdout" in outcome.stderr_tail
        assert len(outcome.stderr_tail) <= 16 * 1024
        assert run(worker, "add", 1).stderr_tail == ""


def test_arguments_and_values_larger_than_a_pipe_cross(worker: Worker) -> None:
    assert run(worker, "size_of", bytes(2**22)).value == 2**22
    assert run(worker, "repeat", 2**22).value == b"x" * 2**22


@pytest.mark.parametrize(
    ("function", "message"), [("a_lock", "lock, cannot be pickled"), ("an_instance", "cannot be read in the parent")]
)
def test_a_value_that_cannot_cross_is_an_error_that_says_so(worker: Worker, function: str, message: str) -> None:
    outcome = run(worker, function)
    assert (outcome.status, outcome.value) == ("error", None)
    assert message in outcome.message
    assert run(worker, "own_pid").start_s == 0.0


def test_arguments_that_cannot_cross_are_the_callers_mistake(worker: Worker) -> None:
    with pytest.raises(UsageError, match="cannot be sent"):
        run(worker, "add", threading.Lock())
    assert run(worker, "add", 1).value == 2


@pytest.mark.parametrize("job", ["no_function", "module:", ":function", "module:not a name"])
def test_a_malformed_job_is_the_callers_mistake(worker: Worker, job: str) -> None:
    with pytest.raises(UsageError, match=r"package\.module:function"):
        worker.run(job, name="x", deadline_s=1.0)


@pytest.mark.parametrize(
    ("leaves_the_group", "ending"), [(False, "hang"), (True, "hang"), (False, "segfault")], ids=str
)
def test_what_the_job_started_ends_with_it(worker: Worker, tmp_path: Path, leaves_the_group: bool, ending: str) -> None:
    path = tmp_path / "pid"
    outcome = run(worker, "start_sleeper", str(path), leaves_the_group, ending, deadline_s=2.0)
    assert outcome.status == {"hang": "timeout", "segfault": "crash"}[ending]
    assert wait_until_gone(int(path.read_text()))


def test_what_a_job_left_running_ends_when_the_worker_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with Worker() as worker:
        assert run(worker, "start_sleeper", str(path), True, "return").status == "ok"
        assert is_alive(int(path.read_text()))
    assert wait_until_gone(int(path.read_text()))


def test_a_worker_that_was_killed_while_idle_is_replaced_and_the_candidate_not_blamed(worker: Worker) -> None:
    spent = run(worker, "own_pid").value
    os.kill(spent, signal.SIGKILL)
    assert wait_until_gone(spent)
    assert_takes_the_next_job(worker, spent)


def test_two_workers_at_once_are_independent() -> None:
    with Worker() as first, Worker() as second:
        assert run(first, "own_pid").value != run(second, "own_pid").value
        spent = first.pid
        assert run(second, "segfault").status == "crash"
        assert run(first, "own_pid").value == spent


def test_an_interrupt_of_the_parent_ends_the_job_and_passes_on(worker: Worker) -> None:
    spent = run(worker, "own_pid").value
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(worker, "hang")
    timer.join()
    assert not Path(f"/proc/{spent}").exists()
    assert_takes_the_next_job(worker, spent)


@pytest.mark.parametrize(
    ("function", "is_in_main_thread"),
    [("own_pid", True), ("own_pid", False), ("hang", False), ("hang_in_c_and_decline_to_end", True)],
)
def test_the_worker_does_not_outlive_a_parent_that_was_killed(function: str, is_in_main_thread: bool) -> None:
    code = f"""
import threading
from agnitra_lab.benchmark.worker import Worker
def work():
    worker = Worker()
    print(worker.run({str(JOBS)!r} + ":own_pid", name="x", deadline_s=60).value, flush=True)
    worker.run({str(JOBS)!r} + ":{function}", name="x", deadline_s=600)
    input()
work() if {is_in_main_thread} else threading.Thread(target=work).start()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.2)
        assert is_alive(child)
        parent.kill()
    assert wait_until_gone(child)


def test_a_worker_started_in_a_thread_outlives_the_thread(worker: Worker) -> None:
    thread = threading.Thread(target=run, args=(worker, "own_pid"))
    thread.start()
    thread.join()
    time.sleep(0.2)  # a signal that follows the thread would have come by now
    started = worker.pid
    assert run(worker, "own_pid").value == started


def test_credentials_stay_behind_and_the_rest_of_the_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PASSWORD"):
        monkeypatch.setenv(name, "swordfish-swordfish")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with Worker(env={"GIVEN": "by name"}) as worker:
        seen = run(worker, "environment").value
    assert "swordfish-swordfish" not in seen.values()
    assert (seen["TOKENIZERS_PARALLELISM"], seen["GIVEN"], seen["PATH"]) == ("false", "by name", os.environ["PATH"])


def test_a_module_on_a_path_that_the_environment_names_is_found(tmp_path: Path) -> None:
    (tmp_path / "only_there.py").write_text("def f():\n    return 'found'\n")
    with Worker(env={"PYTHONPATH": str(tmp_path)}) as worker:
        assert worker.run("only_there:f", name="x", deadline_s=LONG_S).value == "found"


def test_closing_leaves_nothing_behind_over_twenty_uses() -> None:
    def what_is_open() -> tuple[int, int, list[str]]:
        children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), children

    before = what_is_open()
    for use in range(20):
        with Worker(grace_s=0.1) as worker:
            assert run(worker, "add", use).value == use + 1
            if use % 4 == 0:
                assert run(worker, "segfault").status == "crash"
        worker.close()
    assert what_is_open() == before


def test_a_closed_worker_takes_no_job() -> None:
    worker = Worker()
    worker.close()
    with pytest.raises(UsageError, match="closed"):
        run(worker, "own_pid")


def test_a_worker_that_was_forgotten_takes_its_process_along() -> None:
    worker = Worker()
    pid = run(worker, "own_pid").value
    del worker
    assert wait_until_gone(pid)


def test_frames_come_whole_out_of_any_pieces() -> None:
    payloads = [b"", b"one", pickle.dumps(list(range(1000)))]
    reader, found = FrameReader(), []
    for byte in b"".join(map(encode, payloads)):
        reader.feed(bytes([byte]))
        frame = reader.next()
        if frame is not None:
            found.append(frame)
    assert found == payloads
    assert reader.is_empty


@pytest.mark.parametrize("damage", [b"x", encode(b"payload")[:-1] + b"!", b"AGW1" + b"\xff" * 12])
def test_bytes_that_can_become_no_frame_are_refused(damage: bytes) -> None:
    reader = FrameReader()
    reader.feed(damage)
    with pytest.raises(FrameError):
        reader.next()
