"""Kernel Tuner's strategies in its own simulation mode, on our landscapes as `agnitra landscape export` writes them.

    python3 -m venv /some/venv && /some/venv/bin/pip install kernel_tuner==1.5.0
    python tests/benchmarks/kernel_tuner_replay.py --python /some/venv/bin/python [--quick] [--json]

It shows that the exported cache loads unmodified (brute force finds every config and our best median), that the T4
export holds against Kernel Tuner's own schema, and how near each strategy comes to the optimum in how many
measurements. Kernel Tuner has an environment of its own: this file is run there as well, with the exported files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

STRATEGIES = ("random_sample", "genetic_algorithm", "adaptive_tabu_greywolf", "hybrid_vndx", "pso")
QUICK_STRATEGIES = ("random_sample", "genetic_algorithm")
MOST_MEASUREMENTS = 100
COUNTS = (10, 25, 50, 100)
PERCENTS = (5, 2)


def simulate(folder: Path, strategies: list[str], num_seeds: int) -> dict[str, Any]:
    """Run in Kernel Tuner's environment: brute force once, then each strategy with each seed."""
    import jsonschema
    import kernel_tuner
    from kernel_tuner import file_utils

    _, schema = file_utils.output_file_schema("results")
    found: dict[str, Any] = {"version": kernel_tuner.__version__, "landscapes": {}}
    for path in sorted(folder.glob("*.cache.json")):
        name = path.name.removesuffix(".cache.json")
        jsonschema.validate(json.loads((folder / f"{name}.t4.json").read_text()), schema)
        found["landscapes"][name] = {
            "brute_force": _times(path, "brute_force", None, 0),
            **{
                strategy: [_times(path, strategy, MOST_MEASUREMENTS, seed) for seed in range(num_seeds)]
                for strategy in strategies
            },
        }
    return found


def _times(path: Path, strategy: str, most: int | None, seed: int) -> list[float | None]:
    """Return the times that a strategy saw, in ms, each config once, in its order; None for a failure."""
    import kernel_tuner
    import numpy as np

    cached = json.loads(path.read_text())
    valid = set(cached["cache"])

    def is_valid(point: dict[str, int]) -> bool:  # a lambda's source would be parsed
        return ",".join(map(str, point.values())) in valid

    random.seed(seed)
    np.random.seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        results, environment = kernel_tuner.tune_kernel(
            cached["kernel_name"], f"__global__ void {cached['kernel_name']}() {{}}", tuple(cached["problem_size"]), [],
            cached["tune_params"], restrictions=[is_valid], cache=str(path),
            simulation_mode=True, strategy=strategy, strategy_options={"max_fevals": most} if most else {}, lang="CUDA",
        )  # fmt: skip
    assert environment["device_name"] == cached["device_name"]
    seen: dict[str, float | None] = {}
    for result in results:
        key = ",".join(str(result[name]) for name in cached["tune_params_keys"])
        seen.setdefault(key, None if "__error__" in result else result["time"])
    return list(seen.values())


def figures(exported: dict[str, tuple[int, float, float]], simulated: dict[str, Any]) -> dict[str, float | int]:
    """Sum up: what brute force found, and medians over landscapes of the medians over seeds."""
    landscapes = simulated["landscapes"]
    is_whole = all(
        len(landscapes[name]["brute_force"]) == num_configs
        and abs(min(filter(None, landscapes[name]["brute_force"])) - lowest_ms) <= 1e-9
        for name, (num_configs, lowest_ms, _) in exported.items()
    )
    table: dict[str, float | int] = {"num_landscapes": len(landscapes), "is_brute_force_exact": is_whole}
    for strategy in next(iter(landscapes.values())):
        if strategy == "brute_force":
            continue
        runs = {name: found[strategy] for name, found in landscapes.items()}
        for percent in PERCENTS:
            needed = [
                statistics.median(_needed(times, (1 + percent / 100) * exported[name][2]) for times in seeds)
                for name, seeds in runs.items()
            ]
            table[f"{strategy}_measurements_to_{percent}_percent"] = statistics.median(needed)
        for count in COUNTS:
            over = [_best(times[:count]) / exported[name][2] for name, seeds in runs.items() for times in seeds]
            table[f"{strategy}_after_{count}_over_optimum"] = round(statistics.geometric_mean(over), 4)
            within = [ratio <= 1.02 for ratio in over]
            table[f"{strategy}_after_{count}_runs_within_2_percent"] = round(100 * sum(within) / len(within), 1)
    return table


def _needed(times: list[float | None], limit_ms: float) -> int:
    """Return after how many measurements a run got below a limit; one more than all where it never did."""
    return next((place for place, ms in enumerate(times, start=1) if ms and ms <= limit_ms), MOST_MEASUREMENTS + 1)


def _best(times: list[float | None]) -> float:
    return min((ms for ms in times if ms), default=1e6)


def export(folder: Path, is_quick: bool) -> dict[str, tuple[int, float, float]]:
    """Write both formats of the landscapes; return each one's configs, lowest median and optimum in ms."""
    from agnitra_lab.refine import replay
    from agnitra_lab.refine.landscape_export import kernel_tuner, t4

    exported = {}
    for path in replay.every():
        landscape = replay.load(path)
        name = "/".join(path.stem.split("__")[:3])
        stem = name.replace("/", "__")
        if landscape.compile_s(landscape.optimum) is None:  # the older ones do not know what measuring cost
            continue
        (folder / f"{stem}.cache.json").write_text(kernel_tuner(landscape))
        (folder / f"{stem}.t4.json").write_text(t4(landscape))
        lowest_ms = float(landscape.latency_ms[landscape.latency_ms > 0].min())
        exported[stem] = (len(landscape.space.configs), lowest_ms, landscape.best_latency_ms)
        if is_quick:
            break
    return exported


def main() -> None:
    """Export, simulate in the other environment, sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="the interpreter of an environment with kernel_tuner")
    parser.add_argument("--quick", action="store_true", help="one landscape, two strategies, 2 seeds")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print nothing but the figures")
    parser.add_argument("--artifacts", help="file the run in this folder")
    parser.add_argument("--simulate", nargs=3, metavar=("FOLDER", "STRATEGIES", "SEEDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulate:
        folder, strategies, seeds = options.simulate
        print(json.dumps(simulate(Path(folder), strategies.split(","), int(seeds))))
        return
    if not options.python:
        parser.error("--python is needed: an environment with kernel_tuner")
    strategies, num_seeds = (QUICK_STRATEGIES, 2) if options.quick else (STRATEGIES, options.seeds)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        exported = export(Path(folder), options.quick)
        # Its own packages must not meet those of this environment.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [options.python, __file__, "--simulate", folder, ",".join(strategies), str(num_seeds)],
            env=env, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    simulated = json.loads(done.stdout.splitlines()[-1])
    found = figures(exported, simulated) | {"num_seeds": num_seeds, "wall_s": round(time.monotonic() - began_s, 1)}
    if not options.json:
        print(f"kernel_tuner {simulated['version']}, replayed from what was recorded on NVIDIA H200")
        print(*(f"  {name:<60}{value}\n" for name, value in found.items()), sep="", end="")
    if options.artifacts:
        _file(options.artifacts, found, simulated, options.quick)
    print(json.dumps(found))


def _file(artifacts: str, found: dict[str, Any], simulated: dict[str, Any], is_quick: bool) -> None:
    from agnitra_lab.device.info import describe
    from agnitra_lab.runs import provenance, summary
    from agnitra_lab.runs.markdown import run_markdown
    from agnitra_lab.runs.store import RunStore

    run = RunStore(artifacts).create("bench", "kernel_tuner_replay", category="perf")
    command = "python tests/benchmarks/kernel_tuner_replay.py --python KERNEL_TUNER_PYTHON" + " --quick" * is_quick
    meta = provenance.meta(
        run.run_id, "perf", "kernel_tuner_replay", command=command, argv=command.split()[1:], seed=0,
        device=describe("cpu"),
        config={"kernel_tuner": simulated["version"], "landscapes": list(simulated["landscapes"]),
                "most_measurements": MOST_MEASUREMENTS, "measured_on": "recorded on NVIDIA H200"},
    )  # fmt: skip
    filed = summary.summarise(meta, summary.Results(**found))
    why = "Kernel Tuner's strategies in its simulation mode, replayed from what was recorded on NVIDIA H200."
    run.finish("perf", filed, run_markdown(filed, why))


if __name__ == "__main__":
    main()
