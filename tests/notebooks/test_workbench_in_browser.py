"""The workbench in JupyterLab and Notebook 7, driven as a user does. Skipped where there is no browser."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import browser
import pytest

MODELS = Path(__file__).parents[1] / "unit" / "notebook"
MAX_GROWTH_BYTES = 60_000
SETTINGS = 'suggest="preset", only="torch.compile", timing_s=0.5, budget_s=60'
CELLS = [
    "import torch\nfrom workbench_models import Chain, Sleeper\nfrom agnitra_lab import Workbench\n"
    "from agnitra_lab.workloads.demos import demo\n%load_ext agnitra_lab",
    f'workbench = Workbench(Chain().eval(), torch.randn(4, 4), name="chain", {SETTINGS})\nworkbench',
    f'other = Workbench(demo("llama-decode", scale="small"), {SETTINGS}, max_trials=5)\nother',
    "slow = Workbench(Sleeper(), torch.ones(2), name='slow', suggest='preset')\nslow",
    "print(workbench.printed, 'nothing else')",
]
NUM_BUTTONS = 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(browser.why_not() is not None, reason=str(browser.why_not())),
]


@pytest.fixture(scope="module", params=["lab", "notebook"])
def desk(request, tmp_path_factory):
    """A page with three workbenches, none of which has run."""
    from playwright.sync_api import sync_playwright

    folder = tmp_path_factory.mktemp(request.param)
    browser.write_notebook(folder / "book.ipynb", CELLS)
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(MODELS))))
    with (
        browser.Server(folder, request.param, {"PYTHONPATH": paths}) as server,
        sync_playwright() as playwright,
        browser.Page(playwright, server, "book.ipynb") as page,
    ):
        page.run_all()
        page.controls_at(2).wait_for(timeout=60_000)
        yield page


def test_nothing_runs_before_a_button_is_pressed(desk):
    assert [desk.step(stage) for stage in ("profile", "report")] == ["waiting", "waiting"]
    assert not (desk.folder / "artifacts").exists()


def test_the_keyboard_reaches_everything_in_the_order_of_the_page_and_the_notebook_stays_as_it_is(desk):
    num_cells = desk.num_cells()
    desk.button("Run profile").focus()
    names = [desk.focused()]
    for _ in range(NUM_BUTTONS):
        desk.page.keyboard.press("Tab")
        names.append(desk.focused())
    assert names == [
        "Run profile",
        "Run all steps",
        "Cancel",
        "Roll back",
        "Options of the steps to come, and of a redo",
    ]
    desk.button("Run profile").focus()
    desk.page.keyboard.press("Enter")
    desk.wait_for_step("profile", "done")
    desk.wait_until_idle()
    # The button that was pressed keeps the focus, and the notebook's own keys did not act.
    assert desk.focused() == "Run suggest"
    desk.page.keyboard.press("Space")
    desk.wait_for_step("suggest", "done")
    for key in ("a", "b", "x"):
        desk.page.keyboard.press(key)
    assert desk.num_cells() == num_cells


def test_all_steps_run_and_the_card_and_its_chart_come_under_their_own_cell(desk):
    desk.button("Run all steps").click()
    desk.wait_for_step("report", "done")
    desk.wait_until_idle()
    desk.page.locator(".jp-OutputArea-output h1", has_text="torch.compile").first.wait_for(timeout=20_000)
    desk.page.locator(".js-plotly-plot").first.wait_for(timeout=60_000)
    assert desk.outputs_of(4) == 1
    said = desk.controls.locator("output").first.text_content()
    assert said.startswith("report done in")


def test_copy_and_download_give_the_bytes_on_disk(desk):
    (on_disk,) = desk.folder.glob("artifacts/reports/chain/*/report.json")
    expected = hashlib.sha256(on_disk.read_bytes()).hexdigest()
    desk.controls.get_by_label("File", exact=True).select_option("report.json")
    desk.button("Copy").click()
    desk.controls.locator("output", has_text=f"Copied report.json, {on_disk.stat().st_size:,} bytes").wait_for()
    copied = desk.page.evaluate("() => navigator.clipboard.readText()")
    assert hashlib.sha256(copied.encode()).hexdigest() == expected
    with desk.page.expect_download() as waiting:
        desk.button("Download").click()
    assert hashlib.sha256(Path(waiting.value.path()).read_bytes()).hexdigest() == expected
    assert waiting.value.suggested_filename == "report.json"
    assert expected in desk.controls.locator("output", has_text="Downloaded").text_content()


def test_rolling_back_proves_itself(desk):
    desk.button("Roll back").click()
    desk.page.locator(".jp-OutputArea-output", has_text="The original is restored, bit for bit.").first.wait_for()
    desk.wait_until_idle()
    assert desk.button("Roll back").get_attribute("aria-disabled") == "true"


def test_the_search_is_done_again_with_another_sampler(desk):
    other = desk.at(1)
    for stage in ("profile", "suggest", "refine"):
        other.button(f"Run {stage}").click()
        other.wait_for_step(stage, "done")
        other.wait_until_idle()
    card = desk.page.locator(".jp-OutputArea-output")
    assert card.get_by_text("by rl, recorded").count() > 0
    other.controls.locator("summary", has_text="Options").click()
    other.controls.get_by_label("Sampler").select_option("random")
    other.button("Redo refine").click()
    card.get_by_text("by random, recorded").first.wait_for(timeout=60_000)
    other.wait_until_idle()
    assert other.step("suggest") == "done" and other.step("generate") == "waiting"


def test_cancel_and_the_notebooks_own_stop_button_end_a_step_that_no_cell_waits_for(desk):
    slow = desk.at(2)
    slow.button("Run profile").click()
    slow.wait_for_step("profile", "running")
    slow.button("Cancel").click()
    slow.wait_for_step("profile", "cancelled", 10)
    slow.wait_until_idle()
    slow.button("Run profile").click()
    slow.wait_for_step("profile", "running")
    desk.page.wait_for_timeout(1000)
    desk.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:interrupt-kernel') }")
    slow.wait_for_step("profile", "cancelled", 10)
    assert "stop button" in slow.controls.locator(".why").text_content()


def test_the_kernel_stays_free_while_a_step_runs(desk):
    slow = desk.at(2)
    slow.button("Run profile").click()
    slow.wait_for_step("profile", "running")
    desk.run_cell(4)
    assert slow.step("profile") == "running"
    slow.button("Cancel").click()
    slow.wait_for_step("profile", "cancelled", 10)


def test_a_page_that_is_loaded_again_has_the_state_and_the_card(desk):
    desk.save()
    desk.page.reload()
    desk.page.wait_for_function(browser.READY, timeout=90_000)
    desk.wait_for_step("report", "done", 60)
    card = desk.controls.locator("h1", has_text="Rolled back")
    card.wait_for(timeout=20_000)
    assert card.is_visible()


def test_no_request_leaves_the_machine_and_nothing_fails_in_the_console(desk):
    assert desk.elsewhere == []
    assert [error for error in desk.errors if "agnitra" in error.lower() or "widget" in error.lower()] == []


def test_a_saved_notebook_is_small_and_reads_with_no_kernel_and_no_network(desk, tmp_path):
    book = json.loads((desk.folder / "book.ipynb").read_text())
    assert "widgets" not in book["metadata"]
    sizes = [len(json.dumps(cell["outputs"], indent=1)) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert max(sizes) <= MAX_GROWTH_BYTES
    page = tmp_path / "book.html"
    done = subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "html", str(desk.folder / "book.ipynb"), "--output", str(page)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reader = desk.context.browser.new_context(offline=True).new_page()
    reader.goto(page.as_uri(), wait_until="domcontentloaded")
    text = reader.locator("body").inner_text()
    for shown in (
        "Agnitra Lab",
        "The original is restored, bit for bit.",
        "A/B: eager and torch.compile",
        "report.json",
    ):
        assert shown in text


def test_an_untrusted_notebook_shows_its_cards(desk, tmp_path):
    from playwright.sync_api import sync_playwright  # noqa: F401

    book = json.loads((desk.folder / "book.ipynb").read_text())
    # Trust is of the content: another content is untrusted.
    book["cells"].append({"cell_type": "markdown", "id": "extra", "metadata": {}, "source": "untrusted"})
    (desk.folder / "strange.ipynb").write_text(json.dumps(book))
    page = desk.context.new_page()
    page.goto(desk.server.url("strange.ipynb"), timeout=90_000)
    page.locator(".jp-OutputArea-output", has_text="The original is restored, bit for bit.").first.wait_for(
        timeout=60_000
    )
    assert page.get_by_text("Error displaying widget").count() == 0
    assert page.locator(".jp-OutputArea-output img[alt^='Distribution of the latencies']").first.is_visible()
    page.close()


def test_a_trusted_notebook_without_its_kernel_shows_its_cards_and_no_error_in_place_of_the_buttons(desk):
    book = json.loads((desk.folder / "book.ipynb").read_text())
    book["cells"].append({"cell_type": "markdown", "id": "extra", "metadata": {}, "source": "trusted"})
    (desk.folder / "trusted.ipynb").write_text(json.dumps(book))
    data = {"JUPYTER_DATA_DIR": str(desk.folder / ".jupyter" / "data")}
    done = subprocess.run(
        [sys.executable, "-m", "nbformat.sign", str(desk.folder / "trusted.ipynb")], env={**os.environ, **data},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = desk.context.new_page()
    page.goto(desk.server.url("trusted.ipynb"), timeout=90_000)
    page.locator(".jp-OutputArea-output", has_text="The original is restored, bit for bit.").first.wait_for(
        timeout=60_000
    )
    error = page.get_by_text("Error displaying widget: model not found")
    # Written by the front end a moment after the kernel is there, which has no such widget.
    error.first.wait_for(state="attached", timeout=60_000)
    assert [each.is_visible() for each in error.all()] == [False] * error.count()
    page.screenshot(path=str(desk.folder / "trusted.png"), full_page=True)
    page.close()


def test_after_a_restart_of_the_kernel_the_card_stays_the_buttons_say_what_to_do_and_the_cell_makes_new_ones(desk):
    desk.page.evaluate(
        "() => { window.__again = 0; window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()"
        ".then(() => { window.__again = 1 }) }"
    )
    desk.page.wait_for_function("() => window.__again === 1", timeout=60_000)
    desk.page.wait_for_function(browser.READY, timeout=60_000)
    card = desk.page.locator(".jp-OutputArea-output", has_text="The original is restored, bit for bit.").first
    assert card.is_visible()
    if desk.controls.is_visible():
        desk.controls.locator("button[aria-disabled=false]").first.click()
        desk.controls.locator(".why", has_text="run this cell again").wait_for(timeout=20_000)
    desk.run_cell(0)
    desk.run_cell(1)
    desk.controls.wait_for(timeout=60_000)
    desk.button("Run profile").click()
    desk.wait_for_step("profile", "done")
    desk.wait_until_idle()
