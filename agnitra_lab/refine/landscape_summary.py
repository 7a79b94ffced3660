"""What a landscape looks like, in figures: how far its configs lie from the optimum, and which parameters matter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.refine.replay import Landscape

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
WITHIN_PERCENT = (2, 5, 10)
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Summary:
    """The figures of one landscape; times are medians in microseconds.

    Attributes:
        name: of its file, without the suffix.
        measured_on: device, as replayed numbers name it.
        num_configs, num_ok: recorded, and of them those that ran.
        num_early_cut: hopeless configs that were sampled in their first run only.
        num_samples: of all configs together.
        failures: class -> number of configs.
        optimum: the best config, as `Landscape.optimum` says.
        best_us: its median.
        best_again_us: its mean when the best were measured again; None where that was not recorded.
        quantiles_us: share of the configs that ran -> latency.
        within_percent: percent above the optimum -> share of all configs that lie within.
        expected_draws: percent -> configs that a draw by chance takes to get within, on average, without repetition.
        importance: parameter -> how much the log latency varies when it alone changes, as a share of all parameters.
        baselines_us: what it is compared with -> median.
        compile_s, measure_s: of all configs together; None where it was not recorded.
    """

    name: str
    measured_on: str
    num_configs: int
    num_ok: int
    num_early_cut: int
    num_samples: int
    failures: dict[str, int]
    optimum: dict[str, int]
    best_us: float
    best_again_us: float | None
    quantiles_us: dict[float, float]
    within_percent: dict[int, float]
    expected_draws: dict[int, float]
    importance: dict[str, float]
    baselines_us: dict[str, float]
    compile_s: float | None
    measure_s: float | None

    @property
    def worst_over_best(self) -> float:
        """The slowest config's latency over the optimum's."""
        return self.quantiles_us[1.0] / self.best_us


def summarise(landscape: Landscape) -> Summary:
    """Return the figures of a landscape."""
    recorded, latency_us = landscape.recorded, landscape.latency_ms * 1000
    ran, best_us = latency_us[np.isfinite(latency_us)], landscape.best_latency_ms * 1000
    near = {percent: int((ran <= (1 + percent / 100) * best_us).sum()) for percent in WITHIN_PERCENT}
    again_ms = landscape.again_ms(landscape.optimum)
    failed = Counter(found[0] for index in range(len(recorded)) if (found := recorded.failure_of(index)) is not None)
    return Summary(
        name=recorded.file_name().removesuffix(".npz"),
        measured_on=f"recorded on {landscape.device_name}",
        num_configs=len(recorded),
        num_ok=len(ran),
        num_early_cut=int(recorded.arrays.get("is_early_cut", np.zeros(1)).sum()),
        num_samples=len(recorded.arrays["samples_us"]),
        failures=dict(sorted(failed.items())),
        optimum=dict(landscape.optimum.params),
        best_us=best_us,
        best_again_us=1000 * sum(again_ms) / len(again_ms) if again_ms else None,
        quantiles_us={share: float(np.quantile(ran, share)) for share in QUANTILES},
        within_percent={percent: count / len(recorded) for percent, count in near.items()},
        expected_draws={percent: (len(recorded) + 1) / (count + 1) for percent, count in near.items()},
        importance=importance(landscape),
        baselines_us={name: float(np.median(us)) for name, us in recorded.about.baselines_us.items()},
        compile_s=_total(recorded.arrays.get("compile_s")),
        measure_s=_total(recorded.arrays.get("wall_s")),
    )


def importance(landscape: Landscape) -> dict[str, float]:
    """Return each parameter's share of the variation of the log latency.

    Configs that differ in one parameter alone are a group; a parameter's variation is the mean variance within its
    groups. Failures stand aside.
    """
    codes, log_us = landscape.recorded.arrays["codes"], np.log(landscape.latency_ms)
    codes, log_us = codes[np.isfinite(log_us)], log_us[np.isfinite(log_us)]
    names = list(landscape.space.params)
    spread = {}
    for place, name in enumerate(names):
        _, groups = np.unique(np.delete(codes, place, axis=1), axis=0, return_inverse=True)
        sizes = np.bincount(groups)
        means = np.bincount(groups, weights=log_us) / sizes
        within = np.bincount(groups, weights=(log_us - means[groups]) ** 2) / sizes
        spread[name] = float(within[sizes > 1].mean()) if (sizes > 1).any() else 0.0
    # What rounding leaves of equal times is no variation.
    spread = {name: value if value > _ROUNDING else 0.0 for name, value in spread.items()}
    total = sum(spread.values())
    return {name: value / total if total else 0.0 for name, value in spread.items()}


def over_optimum(landscape: Landscape, config: KernelConfig) -> float | None:
    """Return a config's latency over the optimum's; None for one that failed or was never recorded."""
    if config.key() not in {known.key() for known in landscape.space.configs}:
        return None
    if landscape.failure_of(config) is not None:
        return None
    return landscape.measure(config) / landscape.best_latency_ms


def _total(seconds: NDArray[np.float32] | None) -> float | None:
    return None if seconds is None else float(seconds[seconds >= 0].sum())
