"""How long each tutorial takes, and whether it is green every time: nbval over all of them, again and again.

    python tests/benchmarks/notebooks.py --repeats 20 --artifacts artifacts --rows rows.jsonl

Rounds are interleaved, each run in a folder of its own with no compiled code from the one before. The seconds are
those of the whole test, with the start of pytest and of the kernel. A run that fails is counted and its end is shown.
With --rows each run is a line of a file: begun again, the rounds go on where they stopped. Runs of another state of the
package or of the notebooks are left out and counted.
The load average is among the figures: above the number of cores, others had a part of the machine, and the seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TypedDict

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
from test_notebooks import FOLDER, NOTEBOOKS, QUICKEST, code_cells, run_nbval

from agnitra_lab.device.info import describe
from agnitra_lab.runs import provenance, summary
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.store import RunStore

ROOT = Path(__file__).parents[2]


class Row(TypedDict):
    """One run of one notebook."""

    state: str
    round: int
    notebook: str
    wall_s: float
    cpu_s: float
    is_green: bool
    load: float


def run_once(notebook: Path) -> tuple[float, float, bool, str]:
    """Run one notebook in a new folder with cold caches.

    Returns:
        (seconds, CPU seconds of all its processes, whether every cell passed, the last lines).
    """
    before_s = _children_cpu_s()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        work = Path(folder) / "work"
        work.mkdir()
        started = time.monotonic()
        done = run_nbval(notebook, work)
        wall_s = time.monotonic() - started
    is_green = done.returncode == 0 and f"{len(code_cells(notebook))} passed" in done.stdout
    return wall_s, _children_cpu_s() - before_s, is_green, (done.stdout + done.stderr)[-3000:]


def _children_cpu_s() -> float:
    """CPU seconds of the processes that have ended below this one: what a notebook costs beside whatever else runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def state_sha256() -> str:
    """Identify what is run: the package and the notebooks, byte for byte."""
    digest = hashlib.sha256()
    for folder, pattern in ((ROOT / "agnitra_lab", "**/*.py"), (ROOT / "agnitra_lab", "**/*.js"), (FOLDER, "*.ipynb")):
        for path in sorted(folder.glob(pattern)):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def earlier_rows(path: Path | None, state: str) -> tuple[list[Row], int]:
    """Read the runs that were made before.

    Returns:
        (those of this very state, how many there are of others).
    """
    if path is None or not path.exists():
        return [], 0
    rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    own = [row for row in rows if row["state"] == state]
    return own, len(rows) - len(own)


def run_rounds(options: argparse.Namespace, chosen: list[Path], rows: list[Row], state: str) -> None:
    """Add what is missing of the rounds to `rows`, in order, until the time is over."""
    started = time.monotonic()
    num_rounds = 1 if options.quick else options.repeats
    known = {(row["round"], row["notebook"]) for row in rows}
    missing = [(at, path) for at in range(1, num_rounds + 1) for path in chosen if (at, path.stem) not in known]
    for at, notebook in missing:
        if time.monotonic() - started >= options.limit_s:
            return
        wall_s, cpu_s, is_green, tail = run_once(notebook)
        row = Row(
            state=state,
            round=at,
            notebook=notebook.stem,
            wall_s=wall_s,
            cpu_s=cpu_s,
            is_green=is_green,
            load=os.getloadavg()[0],
        )
        rows.append(row)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if not options.json or not is_green:
            print(
                f"{at} {notebook.stem} {wall_s:.1f} s, {cpu_s:.1f} CPU s {'green' if is_green else 'FAILED'}",
                file=sys.stderr,
            )
        if not is_green:
            print(tail, file=sys.stderr)


def figures_of(rows: list[Row], chosen: list[Path]) -> dict[str, float]:
    """Reduce the runs to figures; a round counts as whole when every notebook has run in it."""
    rounds = {row["round"] for row in rows}
    whole = [at for at in rounds if {row["notebook"] for row in rows if row["round"] == at} >= {p.stem for p in chosen}]
    figures: dict[str, float] = {
        "num_notebooks": len(chosen), "num_rounds": len(whole), "num_runs": len(rows),
        "num_green": sum(row["is_green"] for row in rows), "num_cores": os.cpu_count() or 1,
        "load_average_mean": statistics.mean(row["load"] for row in rows),
    }  # fmt: skip
    for stem in (path.stem for path in chosen):
        values = [row["wall_s"] for row in rows if row["notebook"] == stem]
        if values:
            figures[f"nb_{stem}_wall_s_p50"] = statistics.median(values)
            figures[f"nb_{stem}_wall_s_max"] = max(values)
            figures[f"nb_{stem}_cpu_s_p50"] = statistics.median(row["cpu_s"] for row in rows if row["notebook"] == stem)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the quickest notebook, once")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no further run after this time")
    parser.add_argument("--rows", type=Path, help="file of the runs: those that are there are not made again")
    parser.add_argument("--artifacts", help="file the figures as a run in this folder")
    options = parser.parse_args()
    chosen = [path for path in NOTEBOOKS if path.stem == QUICKEST] if options.quick else NOTEBOOKS
    state = state_sha256()
    rows, num_left_out = earlier_rows(options.rows, state)
    run_rounds(options, chosen, rows, state)
    figures = figures_of(rows, chosen)
    if options.artifacts:
        run = RunStore(options.artifacts).create("notebooks", "notebooks", category="perf")
        command = f"python tests/benchmarks/notebooks.py --repeats {options.repeats}"
        meta = provenance.meta(
            run.run_id, "perf", "notebooks", command=command, argv=sys.argv, seed=0, device=describe("cpu"),
            config={
                "num_rounds_asked": options.repeats, "is_cache_warm": False, "state_sha256": state,
                "num_runs_of_other_states": num_left_out,
            },
        )  # fmt: skip
        filed = summary.summarise(meta, summary.Results(**figures))
        run.finish("perf", filed, run_markdown(filed, "Whether the tutorials are green every time, and how long."))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
