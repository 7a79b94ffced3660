"""What the early end of hopeless configs saves, and what it costs: the same searches with and without, on recordings.

    python tests/benchmarks/early_end.py [--quick] [--json] [--seeds 20] [--artifacts DIR]

A measurement is 20 of a config's recorded samples, drawn anew each time, as many as the lab takes; with the bound,
sampling ends as soon as the config is slower than the best one so far beyond doubt. The siblings are the other
recordings of the template. What a config takes is the mean of the middle half of all its samples. The last line is a
JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from agnitra_lab.contracts.search import KernelConfig, Measurement, SearchResult
from agnitra_lab.refine import replay
from agnitra_lab.refine.bound import NO_BOUND, Bound, sampled
from agnitra_lab.refine.finals import middle
from agnitra_lab.refine.foreign import knowledge_of
from agnitra_lab.refine.search import search

NUM_SEEDS, MAX_TRIALS, NUM_SAMPLES = 20, 24, 20
NEAR = 1.02


@dataclass
class Tally:
    """Sums over searches; every loss is over the best of the configs that the search measured, as a share."""

    num_trials: int = 0
    num_cut: int = 0
    num_near_cut: int = 0
    num_samples: int = 0
    losses: list[float] = field(default_factory=list)

    def add(self, result: SearchResult, truth: dict[str, float]) -> None:
        """Take in one search."""
        best = min(truth[trial.config.key()] for trial in result.trials if trial.latency_ms is not None)
        cut = [trial for trial in result.trials if trial.is_aborted]
        self.num_trials += len(result.trials)
        self.num_cut += len(cut)
        self.num_near_cut += sum(bool(truth[trial.config.key()] <= NEAR * best) for trial in cut)
        self.num_samples += sum(len(trial.samples_ms) for trial in result.trials)
        assert result.best is not None
        self.losses.append(truth[result.best.config.key()] / best - 1)


def searched(path: Path, seed: int, *, is_bounded: bool) -> tuple[SearchResult, dict[str, float]]:
    """Search one recording, and say what each of its configs takes."""
    landscape = replay.load(path)
    taken = {config.key(): np.array(landscape.samples_ms(config)) for config in landscape.space.configs}
    rng = np.random.default_rng(seed)

    def measure(config: KernelConfig, *, bound: Bound) -> Measurement:
        known = taken[config.key()]
        if not len(known):
            return Measurement(latency_ms=None, failure="launch", detail="failed when it was recorded")
        drawn = iter(rng.choice(known, NUM_SAMPLES, replace=len(known) < NUM_SAMPLES).tolist())
        latency_ms, samples_ms, is_cut = sampled(
            lambda: float(next(drawn)), bound if is_bounded else NO_BOUND, num_samples=NUM_SAMPLES
        )
        return Measurement(latency_ms=latency_ms, samples_ms=samples_ms, is_aborted=is_cut)

    known = knowledge_of(landscape.template, without=[path])
    result = search(landscape.space, measure, max_trials=MAX_TRIALS, budget_s=1e6, seed=seed, knowledge=known)
    return result, {key: middle(samples) if len(samples) else math.inf for key, samples in taken.items()}


def figures_of(tallies: dict[bool, Tally]) -> dict[str, float]:
    """Name the sums."""
    with_bound, without = tallies[True], tallies[False]
    return {
        "num_searches": len(with_bound.losses),
        "configs_ended_early_share": round(with_bound.num_cut / with_bound.num_trials, 4),
        "configs_ended_early_within_2_percent_of_the_best": with_bound.num_near_cut,
        "samples_share": round(with_bound.num_samples / without.num_samples, 4),
        "winner_loss_percent_mean": round(100 * statistics.fmean(with_bound.losses), 4),
        "winner_loss_percent_mean_without": round(100 * statistics.fmean(without.losses), 4),
        "winner_loss_percent_max": round(100 * max(with_bound.losses), 3),
        "winner_loss_percent_max_without": round(100 * max(without.losses), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    parser.add_argument("--artifacts", help="file the figures as a run in this folder")
    options = parser.parse_args()
    paths = [path for path in replay._recordings() if getattr(replay.load(path), "samples_ms", None) is not None]
    tallies = {is_bounded: Tally() for is_bounded in (True, False)}
    for path in paths:
        for seed in range(1 if options.quick else options.seeds):
            for is_bounded, tally in tallies.items():
                tally.add(*searched(path, seed, is_bounded=is_bounded))
        if not options.json:
            print(path.stem, figures_of(tallies), flush=True)
    figures = figures_of(tallies)
    if options.artifacts:
        _file(options.artifacts, figures, [path.name for path in paths])
    print(json.dumps(figures))


def _file(artifacts: str, figures: dict[str, float], recordings: list[str]) -> None:
    from agnitra_lab.device.info import describe
    from agnitra_lab.runs import provenance, summary
    from agnitra_lab.runs.markdown import run_markdown
    from agnitra_lab.runs.store import RunStore

    run = RunStore(artifacts).create("early_end", "early_end", category="perf")
    command = shlex.join(["python", "tests/benchmarks/early_end.py", *sys.argv[1:]])
    meta = provenance.meta(
        run.run_id, "perf", "early_end", command=command, argv=sys.argv, seed=0, device=describe("cpu"),
        config={"max_trials": MAX_TRIALS, "num_samples": NUM_SAMPLES, "recordings": recordings},
    )  # fmt: skip
    filed = summary.summarise(meta, summary.Results(**figures))
    run.finish("perf", filed, run_markdown(filed, "What ending hopeless configs early saves, on recorded landscapes."))


if __name__ == "__main__":
    main()
