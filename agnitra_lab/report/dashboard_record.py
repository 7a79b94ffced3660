"""Every number that the dashboard shows, as one contract: what `agnitra dashboard --json` prints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from agnitra_lab.contracts.base import Contract, Count, NonNegative
from agnitra_lab.contracts.regressions import FigureRule, Regressions
from agnitra_lab.contracts.suite import SuiteFigures

Status = Literal["complete", "incomplete", "damaged"]
Source = Literal["events", "hotspots", "rows"]
"""events: every event of the profile, layer by layer. hotspots: sums over numbered layers. rows: the largest rows of
the record alone; a row named "rest" has the time of the others."""


class RunRow(Contract):
    """One run directory, as `agnitra runs` lists it, with what its summary says."""

    run_id: str
    category: str
    topic: str
    status: Status
    path: str
    generated_at: str | None = None
    reason: str | None = None
    """Why it is not complete."""
    device: str | None = None
    commit: str | None = None
    is_dirty: bool | None = None
    command: str | None = None
    figures: dict[str, float | str | bool] = Field(default_factory=dict)
    """Figures of the summary that are one value each; numbers as `agnitra regressions` compares them."""


class PairRow(Contract):
    """A topic's newest run against the one before it, on the same device."""

    category: str
    topic: str
    device: str
    baseline_path: str
    candidate_path: str
    found: Regressions


class SuiteGroup(Contract):
    """The suite on one device at one scale, as `agnitra suite table` has it."""

    device: str
    scale: str
    figures: SuiteFigures
    workloads: tuple[dict[str, JsonValue], ...]


class SearchCurve(Contract):
    """One kernel search: every measurement in its order."""

    run_id: str
    topic: str
    template: str
    shape: tuple[int, ...]
    dtype: str
    sampler: str
    measured_on: str
    num_configs: Count
    stopped_because: str
    latencies_ms: tuple[float | None, ...]
    """None where the config failed."""
    best_latency_ms: float | None
    best_config: str | None


class LayerProfile(Contract):
    """Where the time of one profile went, down to the kernel: rows over three tables of names."""

    run_id: str
    topic: str
    device: str | None
    wall_ms: float | None
    """Of one call, without the profiler."""
    total_self_ms: NonNegative
    """Of one call; the rows add up to it."""
    source: Source
    modules: tuple[str, ...]
    ops: tuple[str, ...]
    kernels: tuple[str, ...]
    rows: tuple[tuple[Count, Count, int, NonNegative, NonNegative], ...]
    """(module, op, kernel or -1, milliseconds, calls) of one call, the first three by their place in the tables."""


class Dashboard(Contract):
    """All that is under an artifacts folder, at one time."""

    artifacts: str
    generated_at: str
    runs: tuple[RunRow, ...]
    """Newest first."""
    pairs: tuple[PairRow, ...]
    suite: tuple[SuiteGroup, ...]
    searches: tuple[SearchCurve, ...]
    layers: tuple[LayerProfile, ...]
    rules: tuple[FigureRule, ...]
    """By which any two runs are compared."""
    warnings: tuple[str, ...] = ()
    """What could not be read, apart from the runs that say so themselves."""
    schema_version: str = "agnitra.dashboard.v1"
