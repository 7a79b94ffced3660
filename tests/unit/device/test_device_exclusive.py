"""Turns at the device: one at a time between processes, free within one, and never kept by a dead one."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agnitra_lab.device import exclusive as module
from agnitra_lab.device.exclusive import DeviceTurn, exclusive, take_turns, waited_s

HOLDER = """
import sys, time
from agnitra_lab.device.exclusive import exclusive, take_turns
take_turns(sys.argv[1])
with exclusive():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def _alone():
    yield
    take_turns(None)


@pytest.mark.usefixtures("_alone")
def test_a_process_that_shares_nothing_never_waits() -> None:
    with exclusive(), exclusive():
        assert waited_s() == 0.0
    assert module._turn is None


def test_two_holders_take_turns_and_the_wait_is_counted(tmp_path: Path) -> None:
    # Two opened files exclude each other as two processes do.
    first, second = DeviceTurn(tmp_path / "lock"), DeviceTurn(tmp_path / "lock")
    order: list[str] = []

    def enter() -> None:
        with second.hold():
            order.append("second")

    with first.hold():
        other = threading.Thread(target=enter)
        other.start()
        time.sleep(0.2)
        assert 0.05 < second.waited_s < 10
        order.append("first")
    other.join(timeout=10)
    assert order == ["first", "second"]
    assert first.waited_s < 0.1


@pytest.mark.usefixtures("_alone")
def test_who_holds_the_device_may_enter_again_and_gives_it_back_at_the_end(tmp_path: Path) -> None:
    take_turns(tmp_path / "lock")
    with exclusive():
        with exclusive():
            pass
        other = DeviceTurn(tmp_path / "lock")
        waiting = threading.Thread(target=lambda: other.hold().__enter__(), daemon=True)
        waiting.start()
        waiting.join(timeout=0.2)
        assert waiting.is_alive()
    waiting.join(timeout=10)
    assert not waiting.is_alive()


@pytest.mark.usefixtures("_alone")
def test_an_error_gives_the_turn_back(tmp_path: Path) -> None:
    take_turns(tmp_path / "lock")
    with pytest.raises(ValueError, match="mine"), exclusive():
        raise ValueError("mine")
    with DeviceTurn(tmp_path / "lock").hold():
        pass


@pytest.mark.usefixtures("_alone")
def test_a_process_that_is_killed_keeps_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait(timeout=30)
    holder.stdout.close()
    take_turns(tmp_path / "lock")
    with exclusive():
        assert waited_s() < 30
