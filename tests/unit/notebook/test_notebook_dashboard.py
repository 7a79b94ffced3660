from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from agnitra_lab.errors import UsageError
from agnitra_lab.notebook.dashboard import WIDGET_MIME, live_bundle
from agnitra_lab.notebook.show import NO_DEAD_BUTTONS
from agnitra_lab.report.dashboard_record import Dashboard

ARTIFACTS = Path(__file__).parents[3] / "artifacts"


@pytest.fixture
def filed(shell):
    """The shell in a folder with a few of the repository's runs."""
    for run in list(ARTIFACTS.glob("certs/*/*")) + list(ARTIFACTS.glob("bench/*/*")):
        shutil.copytree(run, Path("artifacts") / run.relative_to(ARTIFACTS))
    return shell


def test_the_magic_shows_a_card_that_needs_no_kernel_and_then_the_live_dashboard(filed):
    card, live = filed.ok("%agnitra_dashboard").bundles
    assert set(card) == {"text/html", "text/plain"}
    assert "Newest runs" in card["text/html"]
    assert "12.15×" in card["text/plain"]
    assert set(live) == {WIDGET_MIME, "text/html", "text/plain"}
    assert "needs a running kernel" in live["text/html"]


def test_the_live_dashboard_alone_carries_the_card_for_front_ends_without_widgets(filed):
    _, bundle = filed.ok("%agnitra_dashboard --live").bundles
    assert "Newest runs" in bundle["text/html"]
    assert WIDGET_MIME in bundle


def test_the_live_dashboard_alone_says_what_to_do_where_a_reopened_notebook_shows_nothing(filed):
    line, _ = filed.ok("%agnitra_dashboard --live").bundles
    assert "run this cell again" in line["text/html"]
    assert NO_DEAD_BUTTONS in line["text/html"]


def test_static_and_live_together_are_a_usage_error(filed):
    assert isinstance(filed.run("%agnitra_dashboard --live --static").error, UsageError)


def test_the_static_card_holds_no_widget_and_only_what_an_untrusted_notebook_keeps(filed):
    (bundle,) = filed.ok("%agnitra_dashboard --static").bundles
    assert set(bundle) == {"text/html", "text/plain"}
    assert not re.search(r"<(style|script|svg|iframe)|\sid=|display:(flex|grid)", bundle["text/html"])
    assert len(bundle["text/html"]) <= 60_000


def test_the_file_is_written_where_it_is_asked_for(filed):
    (bundle,) = filed.ok("%agnitra_dashboard artifacts --static --out out/all.html").bundles
    assert Path("out/all.html").read_text().startswith("<!doctype html>")
    assert "out/all.html" in bundle["text/plain"]


def test_a_folder_that_is_not_there_is_one_line(shell):
    ran = shell.run("%agnitra_dashboard nothing_here")
    assert isinstance(ran.error, UsageError)
    assert "nothing_here" in ran.text
    assert "Traceback" not in ran.text


def test_a_folder_deleted_meanwhile_leaves_the_live_view_as_it_was(filed):
    from ipywidgets.widgets.widget import _instances

    from agnitra_lab.loop.dashboard import collect_dashboard

    record = collect_dashboard("artifacts")
    assert isinstance(record, Dashboard)
    bundle = live_bundle("artifacts", record, {})
    view = _instances[bundle[WIDGET_MIME]["model_id"]]
    markup = view.markup
    shutil.rmtree("artifacts")
    view._handle_custom_msg({"act": "refresh"}, [])
    assert view.markup == markup
    assert "No folder" in view.problem
    view._handle_custom_msg({"act": "load", "place": 99}, [])
    view._handle_custom_msg("nonsense", [])
