"""How long an optimisation takes with nothing cached, beside torch.compile's max-autotune, and once more with findings.

    python tests/benchmarks/cold_start.py [--workloads NAME ...] [--budget-s 20] [--scale full] [--json]
                                          [--artifacts DIR]

Each part is a process of its own with caches of its own: `cold` begins with empty ones, `warm` with those of `cold`,
`max_autotune` with empty ones again. Clocks begin once the model is on the device: torch's import and the weights are
in none of them, everything else is. Ours ends with the report on disk and is the whole loop: profile, suggestions,
kernel search, candidates with their checks and timings, the winner's timing; max-autotune's ends with the third call.
The last line is a JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORKLOADS = ("llama-1b-decode", "llama-1b-prefill")
PARTS = ("cold", "warm", "max_autotune")
LIMIT_S = 400


def ours(name: str, scale: str, device: str, budget_s: float, folder: Path) -> dict[str, float]:
    """Run the loop in this process; return the seconds of its stages, and of all of it."""
    from agnitra_lab.loop.optimization import Optimization
    from agnitra_lab.loop.settings import Settings
    from agnitra_lab.workloads.suite import suite_workload

    workload = suite_workload(name, scale=scale, device=device)
    seconds: dict[str, float] = {}
    settings = Settings(
        suggest="preset", budget_s=budget_s, artifacts=folder / "artifacts", tuned_folder=folder / "tuned",
        command="tests/benchmarks/cold_start.py",
    )  # fmt: skip
    started_s = time.perf_counter()

    def note(point: Any) -> None:
        seconds[f"{point.stage}_s"] = round(point.wall_s, 2)
        if point.stage in ("refine", "patch"):
            seconds[f"until_{point.stage}_ended_s"] = round(time.perf_counter() - started_s, 2)

    result = Optimization(workload, settings, on_checkpoint=note).run_all()
    seconds["s"] = round(time.perf_counter() - started_s, 2)
    latency = result.report.comparison.candidate_latency
    return seconds | {"p50_ms": latency.latency_ms_p50, "device_p50_ms": latency.device_ms_p50 or 0.0}


def max_autotune(name: str, scale: str, device: str) -> dict[str, float]:
    """Compile in this process as a user would; return the seconds until the third call has ended."""
    import torch

    from agnitra_lab.workloads.suite import suite_workload

    workload = suite_workload(name, scale=scale, device=device)
    started_s = time.perf_counter()
    with torch.no_grad():
        compiled = torch.compile(workload.model, mode="max-autotune", dynamic=False)
        for _ in range(3):
            compiled(*workload.args, **workload.kwargs)
        if device == "cuda":
            torch.cuda.synchronize()
    return {"s": round(time.perf_counter() - started_s, 2)}


def _part(options: argparse.Namespace) -> dict[str, float]:
    part, name, folder = options.part
    if part == "max_autotune":
        return max_autotune(name, options.scale, options.device)
    return ours(name, options.scale, options.device, options.budget_s, Path(folder))


def _run(part: str, name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    env = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton"),
        "AGNITRA_CACHE_DIR": str(folder / "agnitra"),
    }  # fmt: skip
    command = [
        sys.executable, __file__, "--part", part, name, str(folder), "--scale", options.scale, "--device",
        options.device, "--budget-s", str(options.budget_s),
    ]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{part} of {name} ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def figures_of(options: argparse.Namespace) -> dict[str, float]:
    """Run every part of every workload, and name what it took."""
    figures: dict[str, float] = {}
    for name in options.workloads:
        with tempfile.TemporaryDirectory() as scratch:
            for part in PARTS:
                folder = Path(scratch) / ("other" if part == "max_autotune" else "ours")
                folder.mkdir(exist_ok=True)
                found = _run(part, name, folder, options)
                stem = f"{name.replace('-', '_')}_{part}"
                figures |= {f"{stem}_{key}": value for key, value in found.items()}
                if not options.json:
                    print(name, part, found, flush=True)
        stem = name.replace("-", "_")
        figures[f"{stem}_cold_over_max_autotune"] = round(
            figures[f"{stem}_cold_s"] / figures[f"{stem}_max_autotune_s"], 3
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--budget-s", type=float, default=20.0, help="of the candidates, as of `agnitra optimize`")
    parser.add_argument("--scale", default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--artifacts", help="file the figures as a run in this folder")
    parser.add_argument("--part", nargs=3, metavar=("PART", "NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(_part(options)))
        return
    # Files that a first process of a machine reads from its disk are in memory for all parts alike.
    subprocess.run([sys.executable, "-c", "import torch._inductor.compile_fx, plotly, pandas"], check=False)
    figures = figures_of(options)
    if options.artifacts:
        _file(options.artifacts, figures, options)
    print(json.dumps(figures))


def _file(artifacts: str, figures: dict[str, float], options: argparse.Namespace) -> None:
    from agnitra_lab.device.info import describe
    from agnitra_lab.runs import provenance, summary
    from agnitra_lab.runs.markdown import run_markdown
    from agnitra_lab.runs.store import RunStore

    run = RunStore(artifacts).create("bench", "cold_start", category="perf")
    command = shlex.join(["python", "tests/benchmarks/cold_start.py", *sys.argv[1:]])
    meta = provenance.meta(
        run.run_id, "perf", "cold_start", command=command, argv=sys.argv, seed=0, device=describe(options.device),
        config={"workloads": options.workloads, "budget_s": options.budget_s, "scale": options.scale,
                "num_cores": len(os.sched_getaffinity(0))},
    )  # fmt: skip
    filed = summary.summarise(meta, summary.Results(**figures))
    run.finish("perf", filed, run_markdown(filed, "An optimisation with nothing cached, and max-autotune's."))


if __name__ == "__main__":
    main()
