"""The dashboard's file in a real browser: its script runs, the keyboard drives it, and nothing leaves the machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from agnitra_lab.loop.dashboard import collect_dashboard, write_dashboard

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright (and a Chromium on PATH)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH"),
]


@pytest.fixture(scope="module")
def record():
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        return collect_dashboard("artifacts")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield made
        made.close()


@pytest.fixture
def page(browser, record, tmp_path):
    """The dashboard's page; at the end nothing may have been requested, and nothing may have gone wrong."""
    file = write_dashboard(record, tmp_path / "dashboard.html")
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    opened, requests, problems = context.new_page(), [], []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(file.as_uri())
    opened.wait_for_selector(".tree tbody tr")
    yield opened
    assert requests == [file.as_uri()]
    assert problems == []
    context.close()


def focused(page):
    return page.evaluate("() => document.activeElement.innerText.replace(/\\s+/g, ' ').trim()")


def milliseconds(text):
    return float(re.search(r"([\d.]+) ms", text)[1])


def test_the_rows_of_the_first_level_add_up_to_the_profiles_time(page, record):
    rows = page.locator(".tree tr[aria-level='1'] td:nth-child(2)").all_inner_texts()
    total = record.layers[0].total_self_ms
    assert sum(map(milliseconds, rows)) == pytest.approx(total, abs=0.01 * len(rows))


def test_arrow_keys_open_close_and_move(page):
    page.locator(".tree tr[tabindex='0']").focus()
    first = focused(page)
    page.keyboard.press("ArrowLeft")
    assert page.locator(".tree tr[tabindex='0']").get_attribute("aria-expanded") == "false"
    assert focused(page).lstrip("▸▾") == first.lstrip("▸▾")
    page.keyboard.press("ArrowRight")
    assert page.locator(".tree tr[tabindex='0']").get_attribute("aria-expanded") == "true"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("() => document.activeElement.getAttribute('aria-level')") == "2"
    page.keyboard.press("Home")
    assert focused(page) == first
    assert page.locator(".tree tr[tabindex='0']").count() == 1
    page.keyboard.press("ArrowDown")
    assert page.locator(".tree tbody tr").nth(1).get_attribute("tabindex") == "0"
    assert page.locator(".tree tr[tabindex='0']").count() == 1


def test_a_block_of_the_picture_opens_its_row(page):
    block = page.locator(".icicle div").nth(3)
    name = block.inner_text()
    block.click()
    assert page.locator(".icicle div").nth(3).inner_text() == name
    assert page.locator(".icicle div").first.inner_text().startswith("◂")


def test_layers_can_be_seen_one_by_one(page):
    page.get_by_label("Put numbered layers together").uncheck()
    page.wait_for_function("() => !document.querySelector('.tree').innerText.includes('layers)')")
    assert re.search(r"module \d+\b", page.locator(".tree").inner_text())


def test_every_profile_can_be_chosen(page, record):
    select = page.locator("[data-part=layers] select")
    for place, profile in enumerate(record.layers):
        select.select_option(str(place))
        page.wait_for_function(f"() => document.querySelector('.about').textContent.startsWith('{profile.run_id}')")
        assert page.locator(".tree tbody tr").count() >= 2


def test_two_runs_are_compared_as_the_shell_does_and_can_be_swapped(page, record):
    pair = record.pairs[0]
    output = page.locator("[data-part=compare] output")
    for change in pair.found.metrics:
        row = output.locator("tr", has_text=change.metric).first.inner_text()
        assert f"{change.baseline:.6g}" in row
        assert f"{change.candidate:.6g}" in row
        assert f"{change.relative_change:+.1%}" in row
    page.get_by_role("button", name="Swap the two").click()
    assert f"-b {pair.candidate_path} -c {pair.baseline_path}" in output.inner_text()


def test_the_surface_can_be_changed_and_follows_the_reader(page, browser, record, tmp_path):
    def background(target):
        return target.evaluate("() => getComputedStyle(document.querySelector('.agn')).backgroundColor")

    dark = background(page)
    page.get_by_role("button", name="Light surface").click()
    light = background(page)
    assert dark != light
    other = browser.new_context(color_scheme="light").new_page()
    other.goto(write_dashboard(record, tmp_path / "light.html").as_uri())
    assert background(other) == light
    other.close()


def test_tables_stand_with_scripts_off(browser, record, tmp_path):
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(write_dashboard(record, tmp_path / "plain.html").as_uri())
    text = plain.locator("body").inner_text()
    assert f"{record.suite[0].figures.speedup_vs_best_geomean:.3f}x" in text
    assert record.runs[0].run_id in text
    assert not plain.get_by_role("button", name="Swap the two").is_visible()
    context.close()
