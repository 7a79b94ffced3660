"""JupyterLab and Notebook 7 in a real browser: a server of its own, a page, and what a user does on it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TOKEN = "tok"
START_S, STEP_S = 90, 180
# A cell's indicator says idle before there is a kernel; this asks the session itself.
READY = """() => { const app = window.jupyterapp, shown = app && app.shell && app.shell.currentWidget,
  session = shown && shown.sessionContext && shown.sessionContext.session;
  return !!(session && session.kernel && session.kernel.status === 'idle') }"""
RUN_ALL = """() => { window.__done = 0;
  window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.__done = 1 }); return 1 }"""
RUN_ONE = """(index) => { window.__done = 0; const app = window.jupyterapp;
  app.shell.currentWidget.content.activeCellIndex = index;
  app.commands.execute('notebook:run-cell').then(() => { window.__done = 1 }); return 1 }"""


def why_not() -> str | None:
    """Why no browser test can run here; None when it can."""
    missing = [name for name in ("playwright", "jupyterlab", "notebook") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return None if find_browser() else f"no browser on PATH (looked for {', '.join(BROWSERS)})"


def find_browser() -> str | None:
    """Path of a Chromium."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def write_notebook(path: Path, cells: list[str]) -> Path:
    """Write a notebook of code cells without outputs."""
    book = {
        "cells": [
            {"cell_type": "code", "id": f"cell{index}", "execution_count": None, "metadata": {}, "outputs": [],
             "source": source}
            for index, source in enumerate(cells)
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }  # fmt: skip
    path.write_text(json.dumps(book))
    return path


class Server:
    """A Jupyter server over one folder, with settings of its own, ended with its kernels."""

    def __init__(self, folder: Path, app: str = "lab", environment: dict[str, str] | None = None) -> None:
        self.folder, self.app = folder, app
        self._environment = environment or {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def __enter__(self) -> Server:
        private = self.folder / ".jupyter"
        settings = private / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text(
            json.dumps({"fetchNews": "false", "checkForUpdates": False})
        )
        expose = "LabApp" if self.app == "lab" else "JupyterNotebookApp"
        command = [
            sys.executable, "-m", "jupyterlab" if self.app == "lab" else "notebook", "--no-browser", "--allow-root",
            "--ip=127.0.0.1", f"--port={self.port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
            f"--ServerApp.root_dir={self.folder}", f"--{expose}.expose_app_in_browser=True",
            "--KernelSpecManager.ensure_native_kernel=True",
        ]  # fmt: skip
        environment = {
            **os.environ,
            "JUPYTER_CONFIG_DIR": str(private / "config"),
            "JUPYTERLAB_SETTINGS_DIR": str(private / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(private / "workspaces"),
            "JUPYTER_DATA_DIR": str(private / "data"),
            **self._environment,
        }
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "AGNITRA_LLM_BASE_URL", "AGNITRA_DISPLAY"):
            environment.pop(name, None)
        self._log = (self.folder / ".server.log").open("wb")
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True, cwd=self.folder
        )
        ends_s = time.monotonic() + START_S
        while time.monotonic() < ends_s:
            try:
                urllib.request.urlopen(f"{self.address}/api?token={TOKEN}", timeout=2).close()
                return self
            except OSError:
                time.sleep(0.2)
        self.__exit__()
        raise TimeoutError((self.folder / ".server.log").read_text()[-2000:])

    def __exit__(self, *_: Any) -> None:
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, sign)
                self._process.wait(timeout=5)
                break
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self._log.close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, notebook: str) -> str:
        path = f"lab/tree/{notebook}" if self.app == "lab" else f"notebooks/{notebook}"
        return f"{self.address}/{path}?token={TOKEN}{'&reset' if self.app == 'lab' else ''}"


class Page:
    """One browser page on a notebook.

    Attributes:
        page: Playwright's.
        elsewhere: addresses that the page asked for on other hosts.
        errors: what it wrote to the console as errors.
    """

    def __init__(self, playwright: Any, server: Server, notebook: str, width: int = 1280, height: int = 1400) -> None:
        self._browser = playwright.chromium.launch(
            executable_path=find_browser(), headless=True, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        self.context = self._browser.new_context(
            viewport={"width": width, "height": height},
            accept_downloads=True,
            permissions=["clipboard-read", "clipboard-write"],
        )
        self.page = self.context.new_page()
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._asked)
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.server = server
        self.page.goto(server.url(notebook), timeout=START_S * 1000)

    def __enter__(self) -> Page:
        self.page.wait_for_function(READY, timeout=START_S * 1000)
        return self

    def __exit__(self, *_: Any) -> None:
        self._browser.close()

    def run_all(self) -> None:
        self.page.evaluate(RUN_ALL)
        self.page.wait_for_function("() => window.__done === 1", timeout=STEP_S * 1000)

    def run_cell(self, index: int, *, wait: bool = True) -> None:
        self.page.evaluate(RUN_ONE, index)
        if wait:
            self.page.wait_for_function("() => window.__done === 1", timeout=STEP_S * 1000)

    def save(self) -> None:
        self.page.evaluate("() => { window.jupyterapp.commands.execute('docmanager:save') }")
        self.page.wait_for_timeout(1500)

    @property
    def folder(self) -> Path:
        return self.server.folder

    def at(self, index: int) -> Controls:
        return Controls(self.page, index)

    def controls_at(self, index: int) -> Any:
        return self.page.locator(".agn").nth(index)

    def __getattr__(self, name: str) -> Any:
        """What concerns the first workbench may be asked of the page."""
        return getattr(self.at(0), name)

    def focused(self) -> str:
        return str(self.page.evaluate("() => document.activeElement.getAttribute('aria-label') || "
                                      "document.activeElement.textContent"))  # fmt: skip

    def num_cells(self) -> int:
        return int(self.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.widgets.length"))

    def outputs_of(self, index: int) -> int:
        return int(self.page.evaluate("(at) => window.jupyterapp.shell.currentWidget.content.widgets[at].model.outputs"
                                      ".length", index))  # fmt: skip

    def _asked(self, request: Any) -> None:
        address = request.url
        if not address.startswith((self.server.address, "data:", "blob:", "ws://127.0.0.1")):
            self.elsewhere.append(address)


class Controls:
    """The buttons of one workbench on the page."""

    def __init__(self, page: Any, index: int) -> None:
        self.page = page
        self.controls = page.locator(".agn").nth(index)

    def button(self, name: str) -> Any:
        return self.controls.get_by_role("button", name=name, exact=True)

    def step(self, stage: str) -> str:
        """How a step stands, as its class says."""
        return str(self._step(stage).get_attribute("class"))

    def wait_for_step(self, stage: str, status: str, timeout_s: float = STEP_S) -> None:
        self._step(stage, f".{status}").wait_for(timeout=timeout_s * 1000)

    def wait_until_idle(self, timeout_s: float = STEP_S) -> None:
        self.controls.locator("button[aria-disabled=true]", has_text="Cancel").wait_for(timeout=timeout_s * 1000)

    def _step(self, stage: str, status: str = "") -> Any:
        return self.controls.locator(f"li{status}", has=self.page.locator("b", has_text=stage))
