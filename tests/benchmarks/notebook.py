"""What the notebook costs: load_ext to the first card, an empty magic, a click's round trip, and Cancel.

    python tests/benchmarks/notebook.py [--quick] [--json] [--artifacts FOLDER]

A real kernel answers over the Jupyter protocol, as a front end would hear it. "First card" is from the request that
loads the extension to the display_data of a workbench's card, in a kernel that has imported torch: what we add to it.
The empty magic is a cell that holds `%agnitra_display on` alone, in the kernel. A click is a message to the controls'
comm until the message that answers it, while the kernel is idle; "while running" is the same while a step runs in its
worker. Cancel is from the message to the state that says "cancelled". Where there is a browser, the same is measured in
JupyterLab as a user sees it: from the click on Copy to the line that says so (the file is read, sent, hashed and put on
the clipboard), and from the click on Cancel to the step that is marked. The last line is a JSON object of figures.
"""

# ruff: noqa: E402 - the tests' own modules are in no package, so their folders come first

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "unit" / "notebook"), str(TESTS / "notebooks")]

import browser
from notebook_kernel import KernelSession

from agnitra_lab.contracts.run import Budget, Results, RunSummary
from agnitra_lab.runs import provenance
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.store import RunStore

MODEL = """
import time, torch
class Sleeper(torch.nn.Module):
    def forward(self, x):
        for _ in range(3000):
            time.sleep(0.01)
        return x
model, x = torch.nn.Linear(8, 8).eval(), torch.ones(2, 8)
"""
CARD = "%load_ext agnitra_lab\n%agnitra_workbench model x"
MAGIC_LOOP = """
import time as _time
_ip = get_ipython()
_samples = []
for _ in range({count}):
    _began = _time.perf_counter(); _ip.run_cell("%agnitra_display on")
    _samples.append((_time.perf_counter() - _began) * 1e3)
print(sorted(_samples)[len(_samples) // 2])
"""
# [label of the button, selector and text to wait for, index of the controls] -> milliseconds from the click.
CLICK = """([label, selector, text, at]) => new Promise((tell) => {
  const root = document.querySelectorAll('.agn')[at];
  const button = [...root.querySelectorAll('button')].find((each) => each.textContent === label);
  const began = performance.now();
  button.focus(); button.click();
  const look = () => [...root.querySelectorAll(selector)].some((each) => each.textContent.includes(text))
    ? tell(performance.now() - began) : requestAnimationFrame(look);
  requestAnimationFrame(look);
})"""
TIMEOUT_S = 60.0


class Front:
    """What a page does: it hears a comm being opened, and sends it messages."""

    def __init__(self, kernel: KernelSession) -> None:
        self.kernel, self.comm = kernel, ""

    def run(self, code: str) -> tuple[float, float | None]:
        """Execute a cell; return seconds to its end, and to its first card."""
        began_s, first_s = time.perf_counter(), None
        request = self.kernel.client.execute(code)
        while True:
            message = self.kernel.client.get_iopub_msg(timeout=TIMEOUT_S)
            kind, content = message["msg_type"], message["content"]
            if kind == "comm_open" and "_esm" in content["data"].get("state", {}):
                self.comm = content["comm_id"]
            if kind == "display_data" and "Agnitra Lab" in content["data"].get("text/html", "") and first_s is None:
                first_s = time.perf_counter() - began_s
            if kind == "error":
                raise RuntimeError("\n".join(content["traceback"]))
            is_ours = message["parent_header"].get("msg_id") == request
            if is_ours and kind == "status" and content["execution_state"] == "idle":
                return time.perf_counter() - began_s, first_s

    def press(self, act: str, is_answer: Any) -> float:
        """Send one message to the controls; return milliseconds until the answer."""
        session = self.kernel.client.session
        content = {"comm_id": self.comm, "data": {"method": "custom", "content": {"do": act, "id": act, "page": "p"}}}
        message = session.msg("comm_msg", content)
        began_s = time.perf_counter()
        self.kernel.client.shell_channel.send(message)
        while True:
            try:
                heard = self.kernel.client.get_iopub_msg(timeout=TIMEOUT_S)
            except queue.Empty as error:
                raise TimeoutError(f"no answer to {act}") from error
            if heard["msg_type"] == "comm_msg" and is_answer(heard["content"]["data"]):
                return (time.perf_counter() - began_s) * 1e3

    def quiet(self) -> None:
        """Hear everything that is still to come."""
        while True:
            try:
                self.kernel.client.get_iopub_msg(timeout=0.3)
            except queue.Empty:
                return


def is_ack(data: dict[str, Any]) -> bool:
    return data.get("content", {}).get("kind") == "ack"


def has_status(status: str) -> Any:
    def told(data: dict[str, Any]) -> bool:
        steps = data.get("state", {}).get("state", {}).get("steps", [])
        return bool(steps) and steps[0]["status"] == status

    return told


def measure(is_quick: bool) -> dict[str, float]:
    """Take every figure."""
    cards, empties, idle, busy, cancels = [], [], [], [], []
    for _ in range(1 if is_quick else 5):
        with tempfile.TemporaryDirectory() as folder, KernelSession(Path(folder)) as kernel:
            front = Front(kernel)
            front.run(MODEL)
            _, card_s = front.run(CARD)
            assert card_s is not None
            cards.append(card_s)
            reply = kernel.run(MAGIC_LOOP.format(count=50 if is_quick else 500))
            empties.append(float(reply.stdout))
            idle += [front.press("hello", is_ack) for _ in range(10 if is_quick else 40)]
            front.run("%agnitra_workbench Sleeper() x")
            front.quiet()
            for _ in range(2 if is_quick else 6):
                front.press("next", has_status("running"))
                time.sleep(0.7)
                busy += [front.press("hello", is_ack) for _ in range(5)]
                cancels.append(front.press("cancel", has_status("cancelled")))
                front.quiet()
    return {
        "first_card_s_p50": statistics.median(cards),
        "first_card_s_max": max(cards),
        "empty_magic_ms_p50": statistics.median(empties),
        "click_ms_p50": statistics.median(idle),
        "click_ms_p95": _p95(idle),
        "click_while_running_ms_p95": _p95(busy),
        "cancel_ms_p50": statistics.median(cancels),
        "cancel_ms_max": max(cancels),
    }


def measure_in_browser(is_quick: bool) -> dict[str, float]:
    """Click in JupyterLab; nothing where there is no browser."""
    if browser.why_not() is not None:
        return {}
    from playwright.sync_api import sync_playwright

    shown = "from agnitra_lab import Workbench\n{name} = Workbench({model}, x, name='{name}')\n{name}"
    cells = [MODEL, shown.format(name="small", model="model"), shown.format(name="slow", model="Sleeper()")]
    copies, cancels = [], []
    with tempfile.TemporaryDirectory() as folder:
        browser.write_notebook(Path(folder) / "clicks.ipynb", cells)
        with (
            browser.Server(Path(folder)) as server,
            sync_playwright() as playwright,
            browser.Page(playwright, server, "clicks.ipynb") as page,
        ):
            page.run_all()
            small, slow = page.at(0), page.at(1)
            small.button("Run profile").click()
            small.wait_for_step("profile", "done")
            small.wait_until_idle()
            for _ in range(5 if is_quick else 40):
                copies.append(page.page.evaluate(CLICK, ["Copy", "output", "Copied", 0]))
            for _ in range(2 if is_quick else 10):
                slow.button("Run profile").click()
                slow.wait_for_step("profile", "running")
                page.page.wait_for_timeout(500)
                cancels.append(page.page.evaluate(CLICK, ["Cancel", "li.cancelled", "profile", 1]))
                slow.wait_until_idle()
    return {
        "browser_click_ms_p50": statistics.median(copies),
        "browser_click_ms_p95": _p95(copies),
        "browser_cancel_ms_p50": statistics.median(cancels),
        "browser_cancel_ms_max": max(cancels),
    }


def file_run(figures: dict[str, float], artifacts: Path) -> Path:
    """File the figures as a run of perf/notebook."""
    import ipykernel

    run = RunStore(artifacts).create("notebook", "notebook", category="perf")
    meta = provenance.meta(
        run.run_id, "perf", "notebook", command=f"python {' '.join(sys.argv)}", argv=sys.argv, seed=0, device=None,
        config={"ipykernel": ipykernel.__version__},
    )  # fmt: skip
    summary = RunSummary(
        schema_version="agnitra.summary.v1", meta=meta, budget=Budget(), results=Results.model_validate(figures)
    )
    run.finish("perf", summary, run_markdown(summary, "What the notebook costs: first card, magic, click, Cancel."))
    return run.directory("perf")


def main() -> int:
    """Measure, print, and file when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kernel and a few samples")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--artifacts", type=Path, help="file the result as a run in this folder")
    given = parser.parse_args()
    figures = {**measure(given.quick), **measure_in_browser(given.quick)}
    if not given.json:
        for name, value in figures.items():
            print(f"{name:28} {value:10.3f}")
        if given.artifacts is not None:
            print(file_run(figures, given.artifacts))
    print(json.dumps(figures))
    return 0


def _p95(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=20)[18] if len(samples) > 1 else samples[0]


if __name__ == "__main__":
    sys.exit(main())
