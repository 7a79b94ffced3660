"""How long each tutorial takes, and whether it is green every time: nbval over all of them, again and again.

    python tests/benchmarks/notebooks.py --repeats 20 --artifacts artifacts

Rounds are interleaved, each run in a folder of its own with no compiled code from the one before. The seconds are
those of the whole test, with the start of pytest and of the kernel. A run that fails is counted and its end is shown.
The load average is among the figures: above the number of cores, others had a part of the machine, and the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
from test_notebooks import NOTEBOOKS, QUICKEST, code_cells, run_nbval

from agnitra_lab.device.info import describe
from agnitra_lab.runs import provenance, summary
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.store import RunStore


def run_once(notebook: Path) -> tuple[float, bool, str]:
    """Run one notebook in a new folder with cold caches: seconds, whether every cell passed, and the last lines."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        work = Path(folder) / "work"
        work.mkdir()
        started = time.monotonic()
        done = run_nbval(notebook, work)
        wall_s = time.monotonic() - started
    is_green = done.returncode == 0 and f"{len(code_cells(notebook))} passed" in done.stdout
    return wall_s, is_green, (done.stdout + done.stderr)[-3000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the quickest notebook, once")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no further round after this time")
    parser.add_argument("--artifacts", help="file the figures as a run in this folder")
    options = parser.parse_args()
    chosen = [path for path in NOTEBOOKS if path.stem == QUICKEST] if options.quick else NOTEBOOKS
    seconds: dict[str, list[float]] = {path.stem: [] for path in chosen}
    num_green, num_rounds, started = 0, 0, time.monotonic()
    loads: list[float] = []
    while num_rounds < (1 if options.quick else options.repeats) and time.monotonic() - started < options.limit_s:
        num_rounds += 1
        for notebook in chosen:
            wall_s, is_green, tail = run_once(notebook)
            loads.append(os.getloadavg()[0])
            seconds[notebook.stem].append(wall_s)
            num_green += is_green
            if not options.json or not is_green:
                print(
                    f"{num_rounds} {notebook.stem} {wall_s:.1f} s {'green' if is_green else 'FAILED'}", file=sys.stderr
                )
            if not is_green:
                print(tail, file=sys.stderr)
    figures: dict[str, float] = {
        "num_notebooks": len(chosen), "num_rounds": num_rounds, "num_runs": num_rounds * len(chosen),
        "num_green": num_green, "num_cores": os.cpu_count() or 1, "load_average_mean": statistics.mean(loads),
    }  # fmt: skip
    for stem, values in seconds.items():
        figures[f"nb_{stem}_wall_s_p50"] = statistics.median(values)
        figures[f"nb_{stem}_wall_s_max"] = max(values)
    if options.artifacts:
        run = RunStore(options.artifacts).create("notebooks", "notebooks", category="perf")
        command = f"python tests/benchmarks/notebooks.py --repeats {options.repeats}"
        meta = provenance.meta(
            run.run_id, "perf", "notebooks", command=command, argv=sys.argv, seed=0, device=describe("cpu"),
            config={"num_rounds": num_rounds, "is_cache_warm": False},
        )  # fmt: skip
        filed = summary.summarise(meta, summary.Results(**figures))
        run.finish("perf", filed, run_markdown(filed, "Whether the tutorials are green every time, and how long."))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
