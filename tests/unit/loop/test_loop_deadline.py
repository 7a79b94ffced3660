"""Work that asks for no time is given up at a deadline, and what ends before it is left alone."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from agnitra_lab.contracts import Workload
from agnitra_lab.loop.deadline import OutOfTimeError, given_up_at
from agnitra_lab.patch.backend import Backend
from agnitra_lab.patch.install import install


def spin(seconds: float) -> bool:
    """Work for so long, and say that all of it was done."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        pass
    return True


def test_work_that_passes_its_deadline_is_given_up():
    with pytest.raises(OutOfTimeError), given_up_at(time.monotonic() + 0.1, time.monotonic):
        spin(20.0)


def test_nothing_arrives_after_work_that_ended_in_time():
    for _ in range(3):
        with given_up_at(time.monotonic() + 0.3, time.monotonic):
            assert spin(0.3)
    assert spin(0.6)


def test_a_handler_of_failures_does_not_keep_the_work_going():
    def work() -> None:
        while True:
            try:
                spin(0.01)
            except Exception:
                continue

    with pytest.raises(OutOfTimeError), given_up_at(time.monotonic() + 0.1, time.monotonic):
        work()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_raised_in_a_callback_of_the_garbage_collector_is_raised_again():
    def spin_once(phase: str, info: dict[str, int]) -> None:
        gc.callbacks.remove(spin_once)
        spin(1.0)

    gc.callbacks.append(spin_once)
    with pytest.raises(OutOfTimeError), given_up_at(time.monotonic() + 0.1, time.monotonic):
        gc.collect()
        spin(20.0)


def test_work_that_is_being_given_up_may_take_its_time_to_put_things_back():
    is_back = False
    with pytest.raises(OutOfTimeError), given_up_at(time.monotonic() + 0.1, time.monotonic):
        try:
            spin(20.0)
        finally:
            is_back = spin(2.0)
    assert is_back


def test_a_module_that_is_being_imported_is_imported_whole(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(
        "import time\nuntil_s = time.monotonic() + 1.0\nwhile time.monotonic() < until_s:\n    pass\nis_whole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OutOfTimeError), given_up_at(time.monotonic() + 0.1, time.monotonic):
        importlib.import_module("slow_to_import")
        spin(20.0)
    assert sys.modules.pop("slow_to_import").is_whole


def test_a_clock_that_stands_still_gives_nothing_up():
    with given_up_at(1.0, lambda: 0.0):
        assert spin(0.6)


def test_the_interpreter_is_as_it_was_after_work_that_ended_in_time():
    code = """
import sys, time
from agnitra_lab.loop.deadline import given_up_at
with given_up_at(time.monotonic() + 60, time.monotonic):
    pass
sys.setprofile(lambda *_: None)
(lambda: None)()
"""
    # In a process of its own: one that spins in the interpreter heeds no signal.
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_an_exception_that_comes_too_late_is_taken_in():
    now_s = 0.0

    def clock_s() -> float:
        nonlocal now_s
        if now_s:
            return now_s
        now_s = 1.0
        return 0.0

    for _ in range(20):
        now_s = 0.0
        try:
            with given_up_at(0.5, clock_s):
                # About as long as the watcher needs to look twice.
                time.sleep(0.5)
        except OutOfTimeError:
            continue
    assert spin(0.1)


class Counting(nn.Module):
    """A model whose calls are counted in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls: torch.Tensor
        self.register_buffer("num_calls", torch.zeros(()))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return self.linear(x).relu()


def test_a_model_whose_compilation_was_given_up_is_as_it_was_and_compiles_again(monkeypatch):
    model, x = Counting(), torch.ones(2, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = Backend.__call__

    def endless(self, graph_module, example_inputs):
        spin(20.0)
        return compiled(self, graph_module, example_inputs)

    monkeypatch.setattr(Backend, "__call__", endless)
    with pytest.raises(OutOfTimeError), given_up_at(time.monotonic() + 0.5, time.monotonic):
        install(Workload("case", model, (x,)), [], name="candidate", is_lowered=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    monkeypatch.setattr(Backend, "__call__", compiled)
    patch = install(Workload("case", model, (x,)), [], name="candidate", is_lowered=False)
    with torch.no_grad():
        torch.testing.assert_close(patch.model(x), model(x))
