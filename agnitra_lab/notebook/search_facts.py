"""The kernel searches of a workbench, with what is known of each space beside what was tried of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from agnitra_lab.contracts.search import Trial
from agnitra_lab.errors import AgnitraError
from agnitra_lab.notebook.findings import Findings

RECORDED = "recorded: "


@dataclass(frozen=True)
class Searched:
    """One search, ended or under way.

    Attributes:
        name: template and shape.
        how: sampler, and where it was measured; of a search that is under way only the latter, where it is known.
        trials: in the order in which they were made.
        optimum_ms: time of the fastest config of the whole space; None where nobody has measured all of it.
        num_configs: valid ones; None while the search runs.
    """

    name: str
    how: str
    trials: tuple[Trial, ...]
    optimum_ms: float | None = None
    num_configs: int | None = None

    @property
    def latencies_ms(self) -> list[float | None]:
        """The time of each trial, None for a failed one."""
        return [trial.latency_ms for trial in self.trials]

    @property
    def best_ms(self) -> float | None:
        """The lowest time so far."""
        return min((latency for latency in self.latencies_ms if latency), default=None)

    @property
    def first_ms(self) -> float | None:
        """The first time that was measured."""
        return next((latency for latency in self.latencies_ms if latency), None)

    @property
    def above_optimum(self) -> float | None:
        """How far the best lies above the optimum, as a share of it.

        Of configs that cost the same, one may have been measured a little below the named optimum: that is 0.
        """
        if self.optimum_ms is None or self.best_ms is None:
            return None
        return max(0.0, self.best_ms / self.optimum_ms - 1.0)


def searches_of(known: Findings) -> list[Searched]:
    """The searches that have ended, else those that run."""
    if known.searches:
        return [
            Searched(
                name=_name(found.space_template, found.shape),
                how=f"by {found.sampler}, {found.measured_on}",
                trials=found.trials,
                optimum_ms=_optimum_of(
                    found.space_template, found.shape, found.dtype, found.measured_on, found.trials,
                    is_exhausted=found.stopped_because == "exhausted",
                ),
                num_configs=found.num_configs,
            )
            for found in known.searches
        ]  # fmt: skip
    live: dict[tuple[str, tuple[int, ...], str], list[Trial]] = {}
    for site, trial in known.live_trials:
        live.setdefault((site.template, site.shape, site.dtype), []).append(trial)
    return [
        Searched(
            name=_name(template, shape),
            how="on recorded times" if known.is_replayed else "measured here",
            trials=tuple(trials),
            optimum_ms=recorded_optimum_ms(template, shape, dtype) if known.is_replayed else None,
        )
        for (template, shape, dtype), trials in live.items()
    ]


def _optimum_of(
    template: str, shape: tuple[int, ...], dtype: str, measured_on: str, trials: Sequence[Trial], *, is_exhausted: bool
) -> float | None:
    if measured_on.startswith(RECORDED):
        return recorded_optimum_ms(template, shape, dtype)
    # Whoever has tried every config knows the optimum.
    measured = [trial.latency_ms for trial in trials if trial.latency_ms]
    return min(measured, default=None) if is_exhausted else None


@functools.lru_cache(maxsize=64)
def recorded_optimum_ms(template: str, shape: tuple[int, ...], dtype: str) -> float | None:
    """The time of the fastest config in the recording of exactly this template, shape and type; None without one."""
    from agnitra_lab.refine import replay

    path = replay.find(template, shape)
    try:
        landscape = replay.load(path) if path is not None else None
    except AgnitraError:
        # The search itself says what is wrong with a recording; the picture does without its line.
        return None
    return landscape.best_latency_ms if landscape is not None and landscape.dtype == dtype else None


def _name(template: str, shape: Sequence[int]) -> str:
    return f"{template} {'x'.join(map(str, shape))}"
