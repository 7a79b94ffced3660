from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from workbench_models import QUICK, Moody, Small

from agnitra_lab.notebook import workbench_view
from agnitra_lab.notebook.artifact_files import RunFiles
from agnitra_lab.notebook.steps import SAMPLER_CHOICES
from agnitra_lab.notebook.widget import _SCRIPT
from agnitra_lab.notebook.workbench import Workbench
from agnitra_lab.notebook.workbench_card import workbench_card_html, workbench_card_text
from agnitra_lab.refine.sampler import SAMPLERS
from agnitra_lab.report import palette

MAX_SCRIPT_BYTES, MAX_CARD_BYTES = 20_000, 40_000


class Desk:
    """A workbench in a view, with what the view sent to the page."""

    def __init__(self, workbench, monkeypatch):
        self.workbench, self.sent, self.shown = workbench, [], []
        monkeypatch.setattr(workbench_view.shown, "send", self._show)
        self.view = workbench_view.View(workbench)
        self.controls = self.view._controls
        self.controls.send = lambda content, buffers=None: self.sent.append((content, buffers))
        self.view.open()

    def _show(self, bundle, *, metadata=None, display_id=None, is_update=False):
        self.shown.append((bundle, display_id, is_update))

    def press(self, act, **more):
        self.view._heard({"do": act, "id": f"{act}-1", "page": "p", **more})
        self.workbench.wait()
        return self.sent[-1][0]

    @property
    def state(self):
        return self.controls.state

    @property
    def card(self):
        return [bundle["text/html"] for bundle, _, _ in self.shown if "text/html" in bundle][-1]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Desk(Workbench(Small(), torch.ones(2, 512), name="small", **QUICK), monkeypatch)


def test_a_press_runs_the_next_step_and_is_acknowledged(desk):
    assert desk.press("next") == {"kind": "ack", "id": "next-1", "page": "p"}
    assert desk.workbench.steps["profile"].status == "done"
    desk.view._changed(is_step=True)
    assert desk.state["next"] == "suggest"
    assert [step["status"] for step in desk.state["steps"]][:2] == ["done", "waiting"]


def test_every_sampler_can_be_chosen():
    assert set(SAMPLER_CHOICES) == {*SAMPLERS, "none"}


def test_options_travel_with_the_press(desk):
    desk.press("next", options={"sampler": "none", "budget_s": 2, "accept": None, "suggest": "preset"})
    assert desk.workbench.settings.sampler is None
    assert desk.workbench.settings.budget_s == 2.0


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"do": "next", "options": {"artifacts": "/etc"}}, "Unknown options: artifacts."),
        ({"do": "redo", "stage": "patch"}, "profile comes first"),
        ({"do": "redo"}, "KeyError"),
        ({"do": "rollback"}, "the report comes first"),
        ({"do": "file", "name": "report.json"}, "There is no run yet"),
        ({"do": "next", "options": {"budget_s": "x"}}, "ValueError"),
    ],
)
def test_what_a_page_may_not_ask_is_refused_in_words(desk, message, text):
    act = message.pop("do")
    answer = desk.press(act, **message)
    assert answer["kind"] == "refused"
    assert text in answer["text"]
    assert desk.workbench.steps.num_ended == 0


def test_a_file_is_sent_as_it_lies_on_disk_and_no_other_file_is(desk):
    desk.press("next")
    desk.press("file", name="telemetry.json")
    (content, (raw,)) = next((content, buffers) for content, buffers in desk.sent if content["kind"] == "file")
    on_disk = (desk.workbench.run.directory("profiles") / "telemetry.json").read_bytes()
    assert raw == on_disk
    assert content["sha256"] == hashlib.sha256(on_disk).hexdigest()
    assert content["path"].endswith("telemetry.json")
    for name in ("../../../etc/passwd", "profiles/../../x.json", "manifest.json"):
        assert desk.press("file", name=name)["kind"] == "refused"


def test_a_file_that_was_deleted_is_named_as_such(desk):
    desk.press("next")
    (desk.workbench.run.directory("profiles") / "telemetry.json").unlink()
    assert "telemetry.json of this run is no longer on disk" in desk.press("file", name="telemetry.json")["text"]


def test_a_deleted_run_folder_is_said_on_the_card(desk):
    import shutil

    desk.press("next")
    shutil.rmtree("artifacts")
    desk.view._changed(is_step=True)
    assert "run&#x27;s folder was deleted" in desk.card
    assert "folder was deleted" in desk.state["problem"]


def test_the_end_of_each_step_is_announced_once(desk):
    spoken = []
    desk.controls.observe(lambda change: spoken.append(tuple(change["new"]["announcement"].values())), "state")
    desk.press("next")
    desk.press("next")
    desk.view._changed(is_step=True)
    desk.view._changed(is_step=True)
    said = list(dict.fromkeys(spoken))
    assert [text.split()[0] for _, text in said if text] == ["profile", "suggest"]


def test_a_page_that_was_loaded_later_gets_the_card_in_the_widget(desk):
    desk.press("hello")
    assert "card" not in desk.state
    desk.view._heard({"do": "hello", "id": "1", "page": "another"})
    assert "Agnitra Lab" in desk.state["card"]


def test_a_failure_is_told_on_the_card_as_text(tmp_path, monkeypatch):
    desk = Desk(Workbench(Moody(), torch.ones(2), artifacts=tmp_path, **QUICK), monkeypatch)
    desk.press("next")
    desk.view._changed(is_step=True)
    assert "Profile failed" in desk.card and "The notebook goes on as usual" in desk.card
    assert "<b>unplugged" not in desk.card and "&lt;b&gt;unplugged" in desk.card
    assert "unplugged" in desk.state["problem"]


def test_only_what_an_untrusted_notebook_keeps_is_on_the_card(desk):
    desk.press("next")
    desk.press("next")
    html = workbench_card_html(desk.workbench, desk.view._run_files().all())
    assert len(html.encode()) <= MAX_CARD_BYTES
    kept = {"div", "p", "h1", "h2", "strong", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "wbr",
            "img", "details", "summary", "pre", "a"}  # fmt: skip
    assert set(re.findall(r"<([a-z0-9]+)", html)) <= kept
    assert not re.search(r"<[^>]+\s(id|class|onclick|role|aria-[a-z]+)=", html)
    assert "http" not in re.sub(r'src="data:[^"]*"', "", html)


def test_card_and_text_tell_the_same_states(desk):
    desk.press("next")
    text, html = workbench_card_text(desk.workbench), workbench_card_html(desk.workbench)
    assert "profile: done" in text and "report: waiting" in text
    assert desk.workbench.steps["profile"].headline in text
    assert html.count("waiting") == 6


def test_the_script_is_one_small_file_that_asks_for_nothing():
    assert len(_SCRIPT.encode()) <= MAX_SCRIPT_BYTES
    for word in ("fetch(", "XMLHttpRequest", "import ", "http://", "https://", "eval("):
        assert word not in _SCRIPT


def test_every_colour_of_the_controls_can_be_read():
    named = dict(re.findall(r"--(\w+):(#[0-9A-F]{6})", _SCRIPT))
    for surface in (named["bg"], named["panel"]):
        for role in ("fg", "dim", "on", "warn"):
            assert palette.contrast(named[role], surface) >= 7.0, (role, surface)
        assert palette.contrast(named["edge"], surface) >= 3.0
    assert palette.contrast(named["bg"], named["on"]) >= 7.0
    # What is no role is decoration: it carries neither text nor an edge of a control.
    assert set(re.findall(r"#[0-9A-F]{6}", _SCRIPT)) - set(named.values()) == {palette.GRID}


def test_every_colour_of_the_cards_can_be_read():
    for colour in (*palette.TEXT_ROLES.values(), *palette.DATA_ROLES.values()):
        for surface in palette.SURFACES.values():
            assert palette.contrast(colour, surface) >= 7.0
    assert all(palette.contrast(palette.EDGE, surface) >= 3.0 for surface in palette.SURFACES.values())


def test_a_folder_that_vanishes_while_it_is_listed_has_no_files(tmp_path, monkeypatch):
    def gone(self, pattern):
        raise FileNotFoundError(self)

    files = RunFiles(tmp_path, "small", "20260101_000000_optimize_0000")
    monkeypatch.setattr(Path, "rglob", gone)
    assert files.all() == ()


def test_a_card_with_buttons_hides_them_where_they_are_dead_and_one_without_has_no_rule(desk, monkeypatch):
    assert desk.view._card()["text/html"].endswith(workbench_view.shown.NO_DEAD_BUTTONS)
    alone = workbench_view.View(desk.workbench, has_controls=False)
    assert "<style" not in alone._card()["text/html"]
