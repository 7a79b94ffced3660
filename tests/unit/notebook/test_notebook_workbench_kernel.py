from __future__ import annotations

import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

DEFINE = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import time, torch
from workbench_models import Chatty, Sleeper
from agnitra_lab import Workbench
slow = Workbench(Sleeper(), torch.ones(2), name="slow", suggest="preset")
chatty = Workbench(Chatty(), torch.ones(2), name="chatty", suggest="preset")
"""
WAIT = "while chatty.is_busy: time.sleep(0.05)"


@pytest.fixture(scope="module")
def desk(kernel):
    assert kernel.run(DEFINE).status == "ok"
    return kernel


def until(kernel, expression, timeout_s=30.0):
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        (value,) = kernel.run(expression).values
        if value == "True":
            return True
        time.sleep(0.1)
    return False


def test_the_kernel_answers_while_a_step_runs_and_nothing_is_printed_under_another_cell(desk):
    started = desk.run("chatty.run_next(wait=False)")
    between = desk.run(WAIT)
    after = desk.run("chatty.printed")
    assert started.kinds == between.kinds == []
    assert [
        content for reply in (started, between, after) for kind, content in reply.elsewhere if kind == "stream"
    ] == []
    assert "called with" in after.values[0]


def test_the_stop_button_cancels_a_step_that_no_cell_waits_for(desk):
    desk.run("slow.run_next(wait=False)")
    assert until(desk, "slow.workload.model.begun.is_set()")
    desk.interrupt()
    assert until(desk, "not slow.is_busy")
    assert "stop button" in desk.run("slow.steps['profile'].headline").values[0]
    # Between cells the interrupt is ignored again, as before.
    time.sleep(1.0)
    desk.interrupt()
    assert desk.run("1 + 1").values == ["2"]


def test_the_stop_button_ends_a_cell_that_waits_for_a_step_and_the_step_with_it(desk):
    desk.run("slow.workload.model.begun.clear()")
    reply = desk.run("print('begun', flush=True); slow.run_next()", when="begun", then=lambda: _soon(desk))
    assert [name for name, _ in reply.errors] == ["KeyboardInterrupt"]
    assert desk.run("slow.steps['profile'].status, slow.is_busy").values == ["('cancelled', False)"]


def test_a_shown_workbench_sends_controls_and_a_card_and_updates_both_under_its_own_cell(desk):
    shown = desk.run("chatty")
    kinds = [sorted(content["data"]) for content in shown.of("display_data")]
    assert kinds == [
        ["application/vnd.jupyter.widget-view+json", "text/html", "text/plain"],
        ["text/html", "text/plain"],
    ]
    desk.run("chatty.run_next(wait=False)")
    later = desk.run(WAIT)
    updates = [content for kind, content in later.elsewhere + later.outputs if kind == "update_display_data"]
    assert updates, "the card was not updated"
    assert not later.of("update_display_data")


def _soon(kernel):
    time.sleep(1.0)
    kernel.interrupt()
