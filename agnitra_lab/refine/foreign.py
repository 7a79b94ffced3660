"""From recordings to what a search knows: their results as siblings, and a measure that answers from one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from agnitra_lab.contracts.search import ForeignResult, KernelConfig, Measurement
from agnitra_lab.errors import AgnitraError
from agnitra_lab.refine import ledger as ledgers
from agnitra_lab.refine import replay
from agnitra_lab.refine.bound import Bound
from agnitra_lab.refine.measuring import failed
from agnitra_lab.refine.replay import Landscape
from agnitra_lab.refine.study import Knowledge, as_measurement


def results_of(landscape: Landscape) -> list[ForeignResult]:
    """Return every config of a recording with its latency or its failure."""
    results = []
    for config in landscape.space.configs:
        try:
            measured = as_measurement(landscape.measure(config))
        except AgnitraError as error:
            measured = failed(error)
        results.append(ForeignResult(config=config, latency_ms=measured.latency_ms, failure=measured.failure))
    return results


@dataclass(frozen=True)
class Recorded:
    """One recording of a template.

    Attributes:
        name: its shape and device, for people.
        shape: of the problem.
        results: of every config.
    """

    name: str
    shape: tuple[int, ...]
    results: Sequence[ForeignResult]


def recordings_of(template: str, *, without: Iterable[Path] = ()) -> list[Recorded]:
    """Return what was recorded of a template at any shape and on any device.

    Args:
        template: its name.
        without: recordings to leave out, such as the one that is searched.
    """
    left_out = {path.resolve() for path in without}
    paths = [path for path in replay._recordings() if path.stem.partition("__")[0] == template]
    paths = [path for path in paths if path.resolve() not in left_out]
    return [_read(path, path.stat().st_mtime_ns) for path in paths]


@lru_cache(maxsize=64)
def _read(path: Path, modified_ns: int) -> Recorded:
    """Read one recording, once for all the sites of a graph that search its template: 0.1 s for 1,500 configs."""
    landscape = replay.load(path)
    return Recorded(_name(landscape), landscape.shape, tuple(results_of(landscape)))


def results_in_ledger(path: Path) -> list[ForeignResult]:
    """Return what the ledger of another search measured.

    Raises:
        LedgerError: for a file that is no ledger, or is corrupt.
    """
    _, events = ledgers.read(path)
    trials = [event.trial for event in events if isinstance(event, ledgers.Told | ledgers.Attached)]
    return [
        ForeignResult(
            config=trial.config,
            latency_ms=trial.latency_ms,
            failure=trial.failure,
            samples_ms=trial.samples_ms,
            is_aborted=trial.is_aborted,
        )
        for trial in trials
    ]


def facts_in(landscape: Landscape) -> Mapping[str, Mapping[str, float]]:
    """Return what the compiler said of each config of a recording, where the recording holds it."""
    facts: Mapping[str, Mapping[str, float]] = getattr(landscape, "features", {})
    return facts


def knowledge_of(template: str, *, seeds: Sequence[KernelConfig] = (), without: Iterable[Path] = ()) -> Knowledge:
    """Return what recordings know of a template.

    Args:
        template: its name.
        seeds: configs to measure first.
        without: recordings to leave out.
    """
    recorded = recordings_of(template, without=without)
    return Knowledge(
        seeds=seeds,
        siblings={sibling.name: sibling.results for sibling in recorded},
        shapes={sibling.name: sibling.shape for sibling in recorded},
    )


def replayed(landscape: Landscape) -> Callable[..., Measurement]:
    """Return a measure that answers from a recording."""

    # Recordings that hold no samples or costs answer with the median alone.
    samples_of = getattr(landscape, "samples_ms", None)
    compile_s_of, cost_s_of = getattr(landscape, "compile_s", None), getattr(landscape, "cost_s", None)

    def measure(config: KernelConfig, *, bound: Bound) -> Measurement:
        clock_s = cost_s_of(config) if cost_s_of is not None else None
        try:
            latency_ms = landscape.measure(config)
        except AgnitraError as error:
            return failed(error).model_copy(update={"clock_s": clock_s})
        return Measurement(
            latency_ms=latency_ms,
            samples_ms=samples_of(config) if samples_of is not None else (),
            compile_s=compile_s_of(config) if compile_s_of is not None else None,
            clock_s=clock_s,
        )

    return measure


def _name(landscape: Landscape) -> str:
    return f"{'x'.join(map(str, landscape.shape))} {landscape.dtype} on {landscape.device_name}"
