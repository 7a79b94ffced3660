"""How many measurements each sampler needs, on recorded landscapes, one shape left out at a time.

    python tests/benchmarks/search.py [--quick] [--json] [--samplers rl ...] [--seeds 20] [--only PART ...]
                                      [--parts DIR] [--artifacts DIR]

The target landscape is unknown to the search; the other recordings of its template are its siblings. Figures are those
of the search, with the optimum known: medians over landscapes of the medians over 20 seeds. The families ASIDE have
figures of their own: the samplers were tuned without them up to the run 20261126_235006_search_84de, and since then on
synthetic landscapes and on all recordings alike. So has every family, as `family_...`, and `all_...` is over all of the
recordings: since the run of 2026-11-27 that moves siblings along with the shape, every family was looked at.
Synthetic landscapes have made-up times: theirs are named `synthetic_...` and are about robustness only, and `drawn_...`
where the kernel itself was drawn from a seed: some of these were looked at in a few comparisons while the samplers were
tuned. The last line is a JSON object of figures.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: figures are of one core
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import synthetic_families
import synthetic_landscapes
from numpy.typing import NDArray

from agnitra_lab.contracts.search import ForeignResult, KernelConfig, SearchSpace
from agnitra_lab.refine import replay
from agnitra_lab.refine.finals import middle
from agnitra_lab.refine.foreign import results_of
from agnitra_lab.refine.sampler import SAMPLERS
from agnitra_lab.refine.search import search
from agnitra_lab.refine.study import NOTHING_KNOWN, Knowledge, Study

ASIDE = ("decode_attention", "layer_norm", "cross_entropy")
"""Templates that the first samplers were not tuned on; changes since were judged on them too."""
NUM_SEEDS, BUDGET = 20, 100
NUM_DRAWN, FIRST_DRAWN = 12, 100
"""Kernels drawn for the figures; those of the first seeds are the ones that samplers are tuned on."""
SLOW = ("tpe", "cmaes", "reinforce", "reinforce-cold")
SAME_EACH_TIME = ("portfolio",)
USE_SIBLINGS = ("rl", "portfolio", "reinforce")
PARTS = ("recorded", "synthetic", "drawn", "winner", "latency", "ledger")
NEVER = 10**6
"""Measurements of a run that did not get there: the median shows it as more than the budget."""


@dataclass(frozen=True)
class Target:
    """One landscape to search, with its siblings."""

    name: str
    template: str
    space: SearchSpace
    latency_ms: dict[str, float]
    optimum_ms: float
    """Of the config that was best when the best were measured again: a lower median elsewhere is noise."""
    siblings: dict[str, list[ForeignResult]]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the siblings."""


def recorded_targets() -> list[Target]:
    """Every committed recording of a template that was recorded at several shapes."""
    landscapes = {path: replay.load(path) for path in replay._recordings()}
    results = {path: results_of(landscape) for path, landscape in landscapes.items()}
    targets = []
    for path, landscape in landscapes.items():
        others = [
            other for other, recorded in landscapes.items() if other != path and recorded.template == landscape.template
        ]
        siblings = {other.stem: results[other] for other in others}
        shapes = {other.stem: landscapes[other].shape for other in others}
        latency_ms = {row.config.key(): row.latency_ms for row in results[path] if row.latency_ms is not None}
        targets.append(
            Target(
                path.stem, landscape.template, landscape.space, latency_ms, landscape.best_latency_ms, siblings, shapes
            )
        )
    return [target for target in targets if target.siblings]


def synthetic_targets() -> list[Target]:
    """Made-up devices; the siblings are the other devices of the family."""
    found = synthetic_landscapes.all_landscapes()
    results = [_results(landscape) for landscape in found]
    return [
        Target(
            name=f"synthetic {landscape.family} on {landscape.device}",
            template=landscape.space.template,
            space=landscape.space,
            latency_ms={row.config.key(): row.latency_ms for row in results[index] if row.latency_ms is not None},
            optimum_ms=landscape.optimum_ms,
            siblings={
                other.device: results[position]
                for position, other in enumerate(found)
                if position != index and other.family == landscape.family
            },
        )
        for index, landscape in enumerate(found)
    ]


def drawn_targets() -> list[Target]:
    """Drawn kernels; their siblings agree with them strongly, weakly, not at all or the other way round."""
    return [
        Target(
            name=target.family,
            template=target.space.template,
            space=target.space,
            latency_ms={row.config.key(): row.latency_ms for row in _results(target) if row.latency_ms is not None},
            optimum_ms=target.optimum_ms,
            siblings={sibling.device: _results(sibling) for sibling in siblings},
        )
        for target, siblings in synthetic_families.all_families(NUM_DRAWN, FIRST_DRAWN)
    ]


def _results(landscape: synthetic_landscapes.Synthetic) -> list[ForeignResult]:
    rows = zip(landscape.space.configs, landscape.latency_ms, strict=True)
    return [
        ForeignResult(config=config, latency_ms=float(ms))
        if np.isfinite(ms)
        else ForeignResult(config=config, latency_ms=None, failure="launch")
        for config, ms in rows
    ]


def curve(target: Target, sampler: str, seed: int, budget: int, *, is_warm: bool) -> NDArray[np.float64]:
    """Return [budget], the best latency so far over the optimum; infinite before the first success."""
    knowledge = Knowledge(siblings=target.siblings, shapes=target.shapes) if is_warm else NOTHING_KNOWN
    study = Study(target.space, sampler=sampler, seed=seed, knowledge=knowledge)
    best, found = math.inf, []
    while len(found) < budget and (asked := study.ask()):
        latency_ms = target.latency_ms.get(asked[0].key())
        study.tell(asked[0], latency_ms)
        best = min(best, latency_ms or math.inf)
        found.append(best / target.optimum_ms)
    return np.array(found + found[-1:] * (budget - len(found)))


def _curves(job: tuple[Target, str, int, int, bool]) -> NDArray[np.float64]:
    target, sampler, num_seeds, budget, is_warm = job
    seeds = 1 if sampler in SAME_EACH_TIME and is_warm else num_seeds
    return np.array([curve(target, sampler, seed, budget, is_warm=is_warm) for seed in range(seeds)])


def measurements_to(curves: NDArray[np.float64], share: float) -> float:
    """Median over seeds of the measurements until the best is within `share` of the optimum."""
    reached = curves <= 1 + share + 1e-12
    counts = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, NEVER)
    return float(np.median(counts))


def figures_of(prefix: str, found: dict[str, NDArray[np.float64]]) -> dict[str, float | None]:
    """Sum up one sampler over landscapes; None where the median run did not get there."""
    if not found:
        return {}
    five, two = (statistics.median(measurements_to(c, s) for c in found.values()) for s in (0.05, 0.02))
    hits = {n: statistics.fmean(float((c[:, n - 1] <= 1.02).mean()) for c in found.values()) for n in (10, 25, 50)}
    worst = max(float(np.exp(np.log(c[:, 49]).mean())) for c in found.values())
    return {
        f"{prefix}_median_measurements_to_5_percent": None if five >= NEVER else five,
        f"{prefix}_median_measurements_to_2_percent": None if two >= NEVER else two,
        **{f"{prefix}_share_within_2_percent_after_{n}": round(hit, 4) for n, hit in hits.items()},
        f"{prefix}_worst_landscape_after_50_over_optimum": round(worst, 4),
    }


def sampler_figures(
    targets: list[Target], samplers: list[str], num_seeds: int, workers: int, prefix: str, *, is_quiet: bool
) -> tuple[dict[str, float | None], dict[str, dict[str, dict[str, float]]]]:
    """Run every sampler on every target, warm where it can be and cold."""
    runs = [(name, True) for name in samplers if name in USE_SIBLINGS]
    runs += [(name, False) for name in samplers if name not in ("portfolio", "reinforce")]
    figures: dict[str, float | None] = {}
    table: dict[str, dict[str, dict[str, float]]] = {}
    kept: dict[tuple[str, bool], dict[str, NDArray[np.float64]]] = {}
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for name, is_warm in runs:
            began = time.perf_counter()
            seeds = max(1, num_seeds // 2) if name in SLOW else num_seeds
            jobs = [(target, name, seeds, BUDGET, is_warm) for target in targets]
            found = dict(zip((target.name for target in targets), pool.map(_curves, jobs), strict=True))
            kept[name, is_warm] = found
            label = f"{prefix}{name.replace('-', '_')}_{'with_siblings' if is_warm else 'cold'}"
            main = {t.name: found[t.name] for t in targets if t.template not in ASIDE}
            aside = {t.name: found[t.name] for t in targets if t.template in ASIDE}
            figures |= figures_of(label, main) | figures_of(f"aside_{label}", aside)
            if not prefix:
                figures |= figures_of(f"all_{label}", found)
            if name == "rl" and not prefix:
                for family in sorted({target.template for target in targets}):
                    own = {t.name: found[t.name] for t in targets if t.template == family}
                    figures |= figures_of(f"family_{family}_{label}", own)
            table[label] = {
                target: {
                    "to_5_percent": measurements_to(c, 0.05),
                    "to_2_percent": measurements_to(c, 0.02),
                    "after_50_over_optimum": float(np.exp(np.log(c[:, 49]).mean())),
                }
                for target, c in found.items()
            }
            if not is_quiet:
                shown = figures_of("", main) or figures_of("", aside)
                print(f"{label:<42}", *shown.values(), f"({time.perf_counter() - began:.0f} s)", flush=True)
    if ("rl", True) in kept and ("rl", False) in kept:
        over = [
            float(np.exp(np.log(kept["rl", True][name][:, 99]).mean() - np.log(cold[:, 99]).mean()))
            for name, cold in kept["rl", False].items()
        ]
        figures[f"{prefix}rl_worst_with_siblings_over_cold_after_100"] = round(max(over), 4)
    return figures, table


def winner_figures(num_seeds: int) -> dict[str, float]:
    """How much slower the named winner is than the best that was measured, with noise of one recorded sample.

    What a config takes is the mean of its samples' middle half: a median of times at a few steps of the timer is at one
    of them or another by chance.
    """
    single, named = [], []
    for path in replay._recordings():
        landscape = replay.load(path)
        samples = _samples(landscape)
        if not samples:
            continue
        truth = {key: middle(taken) for key, taken in samples.items()}
        optimum = min(truth.values())
        for seed in range(num_seeds):
            rng = np.random.default_rng(seed)

            def measure(
                config: KernelConfig, rng: np.random.Generator = rng, samples: dict[str, list[float]] = samples
            ) -> float:
                return float(rng.choice(samples[config.key()]))

            result = search(
                landscape.space.model_copy(
                    update={"configs": tuple(c for c in landscape.space.configs if c.key() in samples)}
                ),
                measure, sampler="random", max_trials=10**6, budget_s=1e6, seed=seed,
            )  # fmt: skip
            assert result.best is not None
            first = min(result.trials, key=lambda trial: trial.latency_ms or math.inf)
            single.append(truth[first.config.key()] / optimum - 1)
            named.append(truth[result.best.config.key()] / optimum - 1)
    if not named:
        return {}
    return {
        "winner_loss_percent_max_by_one_sample": round(100 * max(single), 3),
        "winner_loss_percent_mean_by_one_sample": round(100 * statistics.fmean(single), 3),
        "winner_loss_percent_max_after_finals": round(100 * max(named), 3),
        "winner_loss_percent_mean_after_finals": round(100 * statistics.fmean(named), 3),
    }


def _samples(landscape: replay.Landscape) -> dict[str, list[float]]:
    take = getattr(landscape, "samples_ms", None)
    if take is not None:
        taken = {config.key(): list(take(config)) for config in landscape.space.configs}
        return {key: samples for key, samples in taken.items() if len(samples) >= 5}
    found = {}
    for row in landscape.recorded.rows:
        config = KernelConfig(template=landscape.template, params=row.params)
        found[config.key()] = [sample / 1000 for sample in row.samples_us]
    return found


def latency_figures(num_configs: int = 20_000, num_observations: int = 100) -> dict[str, float]:
    """Time of one suggestion on one core, thread time, at 20,000 configs and up to 100 observations."""
    landscapes = [synthetic_landscapes.landscape("channels", device) for device in synthetic_landscapes.DEVICES[:3]]
    copies = math.ceil(num_configs / len(landscapes[0].space.configs))
    # One more parameter with as many values as it takes: the space has just over 20,000 configs.
    configs = tuple(
        KernelConfig(template="synthetic", params={**config.params, "copy": copy})
        for copy in range(copies)
        for config in landscapes[0].space.configs
    )[:num_configs]
    params = {**landscapes[0].space.params, "copy": tuple(range(copies))}
    space = SearchSpace(template="synthetic", shape=(1,), dtype="float32", params=params, configs=configs)
    figures = {}
    for is_warm in (False, True):
        siblings = {}
        for landscape in landscapes[1:] if is_warm else ():
            times = np.tile(landscape.latency_ms, copies)[:num_configs]
            siblings[landscape.device] = [
                ForeignResult(config=config, latency_ms=float(ms)) for config, ms in zip(configs, times, strict=True)
            ]
        study = Study(space, knowledge=Knowledge(siblings=siblings))
        own = np.tile(landscapes[0].latency_ms, copies)[:num_configs]
        truth = {config.key(): float(ms) for config, ms in zip(configs, own, strict=True)}
        spent = []
        for _ in range(num_observations + 30):
            began = time.thread_time()
            (config,) = study.ask()
            spent.append(1e3 * (time.thread_time() - began))
            study.tell(config, truth[config.key()])
        label = "with_siblings" if is_warm else "cold"
        figures[f"suggestion_ms_p50_{label}"] = round(float(np.percentile(spent[:num_observations], 50)), 3)
        figures[f"suggestion_ms_p95_{label}"] = round(float(np.percentile(spent[:num_observations], 95)), 3)
        last = spent[num_observations - 20 :]
        figures[f"suggestion_ms_p95_{label}_around_100_observations"] = round(float(np.percentile(last, 95)), 3)
    return figures


def ledger_figures(step: int) -> dict[str, float]:
    """Cut a ledger at every `step`-th byte, go on, and count what was lost and which questions changed."""
    space = synthetic_landscapes.landscape("convolution", synthetic_landscapes.DEVICES[0]).space
    space = space.model_copy(update={"configs": space.configs[::20]})
    truth = {config.key(): 1.0 + (hash_of(config) % 1000) / 1000 for config in space.configs}

    def go(path: Path | None, num: int) -> list[str]:
        study = Study(space, ledger=path, seed=1)
        while len(study.trials) < num:
            for config in study.ask():
                study.tell(config, truth[config.key()])
        study.close()
        return [trial.config.key() for trial in study.trials]

    most_lost, num_changed, num_cuts = 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        expected = go(path, 12)
        content = path.read_bytes()
        for cut in range(0, len(content) + 1, step):
            path.write_bytes(content[:cut])
            num_begun = content[:cut].count(b'"event":"ask"')
            study = Study(space, ledger=path, seed=1)
            most_lost = max(most_lost, num_begun - len(study.trials))
            study.close()
            num_changed += go(path, 12) != expected
            num_cuts += 1
    return {
        "ledger_cuts": num_cuts,
        "ledger_measurements_lost_max": most_lost,
        "ledger_trajectories_changed": num_changed,
    }


def hash_of(config: KernelConfig) -> int:
    """A number of the config alone."""
    return sum(value * 31**index for index, value in enumerate(config.params.values()))


def _parts(options: argparse.Namespace, num_seeds: int) -> tuple[dict[str, float | None], dict]:
    """Run each part, or read it where an earlier run has kept it: parts may run side by side, and after a kill."""

    def known(prefix: str, targets: list[Target], seeds: int) -> tuple[dict, dict]:
        names = [name for name in options.samplers if not prefix or name in ("rl", "portfolio", "random")]
        return sampler_figures(targets, names, seeds, options.workers, prefix, is_quiet=options.json)

    is_left_out = options.quick or options.no_synthetic
    runs = {
        "recorded": lambda: known("", recorded_targets(), num_seeds),
        "synthetic": lambda: (
            ({}, {}) if is_left_out else known("synthetic_", synthetic_targets(), max(1, num_seeds // 10))
        ),
        "drawn": lambda: ({}, {}) if is_left_out else known("drawn_", drawn_targets(), max(1, num_seeds // 10)),
        "winner": lambda: (winner_figures(1 if options.quick else num_seeds), {}),
        "latency": lambda: (latency_figures(), {}),
        "ledger": lambda: (ledger_figures(97 if options.quick else 7), {}),
    }
    figures: dict[str, float | None] = {}
    table: dict = {}
    for part in options.only:
        kept = Path(options.parts) / f"{part}.json" if options.parts else None
        if kept is not None and kept.exists():
            found = json.loads(kept.read_text())
        else:
            found = runs[part]()
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(found))
        figures, table = figures | found[0], table | found[1]
        if not options.json:
            print(
                *(f"  {key:<60}{value:.4g}\n" for key, value in found[0].items() if value is not None), sep="", end=""
            )
    return figures, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 seeds, no synthetic landscapes")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--samplers", nargs="*", default=[name for name in SAMPLERS if name != "exhaustive"])
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    parser.add_argument("--no-synthetic", action="store_true", help="recordings only")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="some parts")
    parser.add_argument("--parts", help="folder that each part's figures are kept in; those that are there are not run")
    parser.add_argument("--artifacts", help="file the figures as a run in this folder")
    options = parser.parse_args()
    num_seeds = 2 if options.quick else options.seeds
    figures, table = _parts(options, num_seeds)
    figures["num_seeds"] = num_seeds
    if options.artifacts:
        _file(options.artifacts, figures, table)
    print(json.dumps(figures))


def _file(artifacts: str, figures: dict[str, float | None], table: dict) -> None:
    from agnitra_lab.device.info import describe
    from agnitra_lab.runs import provenance, summary
    from agnitra_lab.runs.markdown import run_markdown
    from agnitra_lab.runs.store import RunStore

    run = RunStore(artifacts).create("search", "search", category="perf")
    command = shlex.join(["python", "tests/benchmarks/search.py", *sys.argv[1:]])
    meta = provenance.meta(
        run.run_id, "perf", "search", command=command, argv=sys.argv, seed=0, device=describe("cpu"),
        config={"budget": BUDGET, "aside": list(ASIDE), "recordings": [path.name for path in replay._recordings()]},
    )  # fmt: skip
    run.write_json("perf", "landscapes.json", table)
    known = {name: value for name, value in figures.items() if value is not None}
    filed = summary.summarise(meta, summary.Results(**known))
    run.finish("perf", filed, run_markdown(filed, "Measurements that each sampler needs on recorded landscapes."))


if __name__ == "__main__":
    main()
