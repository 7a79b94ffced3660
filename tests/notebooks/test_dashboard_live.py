"""The live dashboard in JupyterLab and under Voila, driven in a real browser; the dashboard itself requests nothing."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
# Voila's own page asks a CDN for an icon font, with or without us; it does without.
NOT_OURS = "https://cdn.jsdelivr.net/npm/@fortawesome/"
READY = """() => { const app = window.jupyterapp, shown = app && app.shell && app.shell.currentWidget;
  const session = shown && shown.sessionContext && shown.sessionContext.session;
  return !!(session && session.kernel && session.kernel.status === 'idle'); }"""
RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); return 1; }"

playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright (and a Chromium on PATH)")
pytest.importorskip("jupyterlab")
pytest.importorskip("voila")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH"),
]


@pytest.fixture
def folder(tmp_path):
    """A folder with the dashboard's notebook and a part of the repository's runs."""
    shutil.copy(ROOT / "notebooks" / "dashboard.ipynb", tmp_path)
    for pattern in ("bench/llama-decode/*", "certs/llama-decode/*", "profiles/llama-decode-*/*", "perf/suite/*"):
        for run in (ROOT / "artifacts").glob(pattern):
            shutil.copytree(run, tmp_path / "artifacts" / run.relative_to(ROOT / "artifacts"))
    return tmp_path


@pytest.fixture(params=["lab", "voila"])
def address(request, folder, tmp_path_factory):
    """A server of its own over the folder, with settings of its own, that ends with the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if request.param == "lab":
        arguments = [
            "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
            "--ServerApp.port_retries=0", "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}",
            "--LabApp.expose_app_in_browser=True",
        ]  # fmt: skip
        path = "lab/tree/dashboard.ipynb?token=t&reset"
    else:
        arguments = ["voila", "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}", str(folder / "dashboard.ipynb")]
        path = ""
    own = {name: str(tmp_path_factory.mktemp(name)) for name in (
        "JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}  # fmt: skip
    environment = {**os.environ, **own, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/api")
        yield f"http://127.0.0.1:{port}/{path}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def wait_for(url, limit_s=120):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no server at {url} after {limit_s} s")


def test_the_live_dashboard_drills_down_and_reads_again(address, folder):
    host = address[: address.index("/", 8)]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page, outside = browser.new_page(viewport={"width": 1400, "height": 1000}), []
        page.on(
            "request",
            lambda request: None if request.url.startswith((host, "data:", "blob:")) else outside.append(request.url),
        )
        page.goto(address, timeout=200_000)
        if "/lab/" in address:
            page.wait_for_function(READY, timeout=120_000)
            page.evaluate(RUN_ALL)
        page.wait_for_selector(".agn .tree tbody tr", timeout=120_000)

        # A profile's rows travel when they are asked for.
        about = page.locator("[data-part=layers] .about")
        first = about.inner_text()
        page.locator("[data-part=layers] select").select_option(index=1)
        playwright.expect(about).not_to_have_text(first, timeout=60_000)
        page.locator(".tree tr[tabindex='0']").focus()
        page.keyboard.press("ArrowDown")
        assert page.locator(".tree tbody tr").nth(1).get_attribute("tabindex") == "0"

        # A run that went away meanwhile is gone after reading again, and the view goes on.
        before = int(page.locator(".kpis li", has_text="directories").locator(".value").inner_text())
        shutil.rmtree(next((folder / "artifacts" / "perf" / "suite").iterdir()))
        page.get_by_role("button", name="Read again").click()
        fewer = page.locator(".kpis li", has_text="directories").locator(".value")
        playwright.expect(fewer).to_have_text(str(before - 1), timeout=60_000)
        playwright.expect(page.locator(".tree tbody tr").first).to_be_visible(timeout=60_000)
        assert [url for url in outside if not url.startswith(NOT_OURS)] == []
        browser.close()
