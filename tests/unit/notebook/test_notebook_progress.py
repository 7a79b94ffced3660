"""A long capture shows what it is doing, in its own cell only, and leaves nothing behind."""

from __future__ import annotations

import re
import threading

import pytest

from agnitra_lab.notebook.progress import Progress


class Publisher:
    """Records what a front end that updates displays in place would be sent."""

    def __init__(self):
        self.parent_header = {"msg_id": "this cell"}
        self.sent, self.was_sent = [], threading.Event()

    def publish(self, content, metadata, *, transient, update):
        self.sent.append((content["text/plain"], transient["display_id"], update))
        self.was_sent.set()


def status_lines(reply):
    """(message type, text, display id) of every status display of a cell."""
    return [
        (kind, content["data"]["text/plain"], content["transient"]["display_id"])
        for kind, content in reply.outputs
        if kind in ("display_data", "update_display_data") and content.get("transient", {}).get("display_id")
    ]


def test_a_long_block_shows_one_display_that_is_updated_and_then_emptied():
    publisher = Publisher()
    with Progress(publisher, delay_s=0.01, period_s=0.01) as progress:
        publisher.was_sent.wait(60)
        progress.tell("reading 7 events")
        while not publisher.sent[-1][0].endswith(", reading 7 events"):
            publisher.was_sent.clear()
            assert publisher.was_sent.wait(60)
    texts, displays, updates = zip(*publisher.sent, strict=True)
    assert texts[0] == "Profiling: 0 s" and texts[-1] == ""
    assert len(set(displays)) == 1
    assert updates[0] is False and all(updates[1:])


def test_a_short_block_shows_nothing_and_its_thread_ends_with_it():
    publisher, before = Publisher(), set(threading.enumerate())
    with Progress(publisher):
        assert [thread.daemon for thread in set(threading.enumerate()) - before] == [True]
    assert set(threading.enumerate()) == before
    assert publisher.sent == []


def test_the_line_is_emptied_and_the_thread_ended_when_the_block_raises():
    publisher, before = Publisher(), set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), Progress(publisher, delay_s=0.01):
        publisher.was_sent.wait(60)
        raise KeyboardInterrupt
    assert publisher.sent[-1][0] == ""
    assert set(threading.enumerate()) == before


def test_a_publisher_that_cannot_update_a_display_gets_no_thread(shell):
    before = set(threading.enumerate())
    with Progress(shell.ip.display_pub), Progress(Publisher(), is_on=False):
        assert set(threading.enumerate()) == before


def test_a_publisher_that_fails_costs_the_line_and_not_the_block():
    class Closed(Publisher):
        def publish(self, *_, **__):
            self.was_sent.set()
            raise OSError("closed")

    publisher = Closed()
    with Progress(publisher, delay_s=0.0, period_s=0.0):
        assert publisher.was_sent.wait(60)
    assert publisher.sent == []


def test_a_long_cell_shows_its_progress_in_its_own_cell_while_another_one_runs(kernel):
    if not kernel.has_subshells:
        pytest.skip("this ipykernel runs one cell at a time")
    body = "%%agnitra_profile --repeat 2\nimport time\nprint('started', flush=True)\ntime.sleep(1.2)\n'value'"
    reply = kernel.run(body, when="started", then=lambda: kernel.execute_beside("'another cell'"))
    assert "'another cell'" in [content["data"]["text/plain"] for kind, content in reply.elsewhere if "data" in content]
    assert not [content for _, content in reply.elsewhere if "Profiling" in str(content)]
    (first, *_, last) = lines = status_lines(reply)
    assert first[0] == "display_data" and re.fullmatch(r"Profiling: 2 s, run [12] of 2", first[1])
    assert last[:2] == ("update_display_data", "")
    assert len({display for *_, display in lines}) == 1
    # It is gone before the card comes, and is no value.
    assert reply.kinds[-2:] == ["display_data", "execute_result"] and len(reply.cards) == 1
    assert kernel.run("_").values == ["'value'"]
    assert kernel.run("[t for t in __import__('threading').enumerate() if 'agnitra' in t.name]").values == ["[]"]


def test_an_interrupted_cell_empties_its_line_before_the_card_and_the_traceback(kernel):
    reply = kernel.run("%%agnitra_profile\nimport time\ntime.sleep(300)", when="Profiling: 2 s", then=kernel.interrupt)
    assert reply.kinds == ["display_data", "update_display_data", "display_data", "error"]
    assert status_lines(reply)[-1][1] == ""
    assert len(reply.cards) == 1 and reply.errors == [("KeyboardInterrupt", "")]


def test_cards_that_are_off_turn_the_line_off(kernel):
    kernel.run("%agnitra_display off")
    reply = kernel.run("%%agnitra_profile\nimport time\ntime.sleep(2.1);")
    kernel.run("%agnitra_display on")
    assert reply.kinds == ["stream"] and reply.stdout.startswith("Telemetry: ")
