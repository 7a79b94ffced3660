"""Notebooks executed from top to bottom: cells marked NBVAL_CHECK_OUTPUT must give their committed output.

All of them take minutes, so that a day has its two: the quickest, and one by turns. AGNITRA_EVERY_NTH=1 runs all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from agnitra_lab.contracts import STAGES

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
QUICKEST = "03_refine"
CELL_TIMEOUT_S = 480
MIN_STRICT_CELLS = 3

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def todays_notebooks() -> list[Path]:
    if os.environ.get("AGNITRA_EVERY_NTH") == "1":
        return NOTEBOOKS
    by_turns = NOTEBOOKS[date.today().toordinal() % len(NOTEBOOKS)]
    return [path for path in NOTEBOOKS if path.stem == QUICKEST or path == by_turns]


def run_nbval(notebook: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a copy of a notebook in `folder`, where its artifacts go, under this very interpreter."""
    copy = shutil.copy(notebook, folder)
    (folder / "pytest.ini").write_text("[pytest]\n")
    hidden = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "AGNITRA_LLM_API_KEY", "AGNITRA_LLM_BASE_URL", "AGNITRA_DISPLAY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    # --nbval-current-env uses this interpreter's own kernel, whatever kernels are registered on the machine.
    options = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT_S}", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--timeout=0", *options, str(copy)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def outputs_of(cell: dict) -> list[dict]:
    return cell.get("outputs", [])


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_is_a_notebook_for_each_stage_of_the_loop():
    stages = [path.stem[3:] for path in NOTEBOOKS]
    assert [stage for stage in stages if stage in STAGES] == list(STAGES)
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(len(NOTEBOOKS))]
    assert "first_light" in stages


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("notebook", todays_notebooks(), ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    done = run_nbval(notebook, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(code_cells(notebook))} passed" in done.stdout


@pytest.mark.timeout(300)
def test_a_strict_cell_with_another_output_fails(tmp_path):
    import nbformat

    book = nbformat.v4.new_notebook()
    wrong = nbformat.v4.new_output("execute_result", {"text/plain": "3"}, execution_count=1)
    cell = nbformat.v4.new_code_cell("# NBVAL_CHECK_OUTPUT\n1 + 1", outputs=[wrong], execution_count=1)
    raising = nbformat.v4.new_code_cell("%load_ext agnitra_lab\n%agnitra_optimize nothing_here")
    book.cells = [cell, raising]
    path = tmp_path / "wrong.ipynb"
    nbformat.write(book, path)
    (tmp_path / "run").mkdir()
    done = run_nbval(path, tmp_path / "run")
    assert done.returncode == 1
    assert "2 failed" in done.stdout


@each_notebook
def test_a_notebook_is_committed_with_the_outputs_of_one_run(notebook):
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [
        output for cell in code_cells(notebook) for output in outputs_of(cell) if output["output_type"] == "error"
    ]


@each_notebook
def test_a_notebook_has_strict_cells_and_each_has_an_output(notebook):
    strict = [cell for cell in code_cells(notebook) if "NBVAL_CHECK_OUTPUT" in "".join(cell["source"])]
    assert len(strict) >= MIN_STRICT_CELLS
    assert all(outputs_of(cell) for cell in strict)


@each_notebook
def test_a_notebook_reads_without_a_kernel(notebook):
    assert "widgets" not in json.loads(notebook.read_text())["metadata"]
    for cell in code_cells(notebook):
        for output in outputs_of(cell):
            assert output["output_type"] == "stream" or "text/plain" in output["data"]


@each_notebook
def test_a_notebook_holds_no_path_of_the_machine_that_ran_it(notebook):
    text = notebook.read_text()
    home = re.escape(str(Path.home())) if len(str(Path.home())) > 5 else "/root/"
    assert re.findall(rf"/tmp/|/home/|/Users/|site-packages|{home}", text) == []


@each_notebook
def test_a_notebook_says_where_its_numbers_were_recorded(notebook):
    text = notebook.read_text()
    for cell in code_cells(notebook):
        shown = "".join(str(output.get("text", "")) + str(output.get("data", "")) for output in outputs_of(cell))
        # A number of a GPU in an output has the word beside it: this machine has none.
        assert "NVIDIA H200" not in shown or "recorded" in text


def test_the_dashboards_notebook_is_committed_without_outputs():
    cells = code_cells(FOLDER / "dashboard.ipynb")
    assert any("%agnitra_dashboard" in "".join(cell["source"]) for cell in cells)
    assert not any(outputs_of(cell) for cell in cells)


@each_notebook
def test_a_notebook_is_small_enough_to_review(notebook):
    assert notebook.stat().st_size <= 400_000
