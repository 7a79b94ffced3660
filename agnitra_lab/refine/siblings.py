"""What is known elsewhere: the same template at other shapes, on other devices, and hints of where to look.

A sibling says something about the order of the configs, never about their latency here. What it says is aligned to
the arms of the space in hand; where it says nothing of a config, its nearest configs answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.search import ForeignResult, KernelConfig, SearchSpace
from agnitra_lab.errors import UsageError
from agnitra_lab.refine.space import Encoding

FAILURE_LOG_MS = 0.7
"""A failure there is read as twice the slowest config there: to be avoided, without bending the whole scale."""
NUM_NEAREST = 4
_CHUNK = 2048
"""Arms filled at a time: the distances of 20,000 arms to 20,000 configs would not fit in memory."""


@dataclass(frozen=True)
class Sibling:
    """One landscape of the same template, aligned to the arms of a space.

    Attributes:
        name: for people, such as "4096x2048 on NVIDIA H200".
        log_ms: [configs] float64, the logarithm of the latency there; known or filled, never NaN.
        is_known: [configs] bool, where it was really measured.
        is_failed: [configs] bool, where it failed; none that was not measured.
        is_moved: it was measured at another shape and moved along with the shape: no config stands where it stood.
    """

    name: str
    log_ms: NDArray[np.float64]
    is_known: NDArray[np.bool_]
    is_failed: NDArray[np.bool_]
    is_moved: bool = False


@dataclass(frozen=True)
class Elsewhere:
    """What was measured of the same template elsewhere, in its own order.

    Attributes:
        name: for people.
        params: [results, parameters] float64, in the order of the names that it was read for.
        log_ms: [results] float64, the logarithm of the latency; a failure's is above all others.
        is_failed: [results] bool.
        shape: of the problem there; empty where it is not known.
    """

    name: str
    params: NDArray[np.float64]
    log_ms: NDArray[np.float64]
    is_failed: NDArray[np.bool_]
    shape: tuple[int, ...] = ()


def elsewhere_of(
    name: str, results: Iterable[ForeignResult], encoding: Encoding, shape: tuple[int, ...] = ()
) -> Elsewhere | None:
    """Read the results of another search or recording.

    Args:
        name: for people.
        results: measured there, failures included.
        encoding: of the space in hand, whose parameters they have to have.
        shape: of the problem there, where it is known.

    Returns:
        None where fewer than two results have a latency or share their parameters with the space.
    """
    rows = [result for result in results if set(result.config.params) == set(encoding.names)]
    known = [result for result in rows if result.latency_ms is not None]
    if len(known) < 2:
        return None
    worst = max(np.log(result.latency_ms or 1.0) for result in known) + FAILURE_LOG_MS
    return Elsewhere(
        name,
        np.array([[row.config.params[name] for name in encoding.names] for row in rows], dtype=np.float64),
        np.array([worst if row.latency_ms is None else np.log(row.latency_ms) for row in rows]),
        np.array([row.latency_ms is None for row in rows]),
        shape,
    )


def aligned(there: Elsewhere, encoding: Encoding) -> Sibling:
    """Align what was measured elsewhere to the arms of a space."""
    position = {tuple(point): index for index, point in enumerate(there.params.tolist())}
    wanted = values_of(encoding)
    at = np.array([position.get(tuple(point), -1) for point in wanted.tolist()], dtype=np.int64)
    is_known = at >= 0
    log_ms = np.where(is_known, there.log_ms[at], 0.0)
    if not is_known.all():
        log_ms[~is_known] = filled(wanted[~is_known], there.params, there.log_ms)
    return Sibling(there.name, log_ms, is_known, is_known & there.is_failed[at])


def values_of(encoding: Encoding) -> NDArray[np.float64]:
    """Return [configs, parameters], the values of every config's parameters."""
    return np.array(
        [[config.params[name] for name in encoding.names] for config in encoding.configs], dtype=np.float64
    ).reshape(len(encoding), len(encoding.names))


def hints_of(hints: Sequence[KernelConfig], encoding: Encoding) -> Sibling | None:
    """Turn ranked hints, a language model's or a preset's, into a sibling that rises with the distance to them.

    Args:
        hints: best first.
        encoding: of the space in hand.
    """
    points = np.array([encoding.encode(hint) for hint in hints if hint in encoding])
    if not len(points) or len(encoding) < 2:
        return None
    steps = np.abs(encoding.points[:, None, :] - points[None, :, :]).sum(axis=2)
    log_ms = (steps + 0.1 * np.arange(len(points))).min(axis=1)
    return Sibling("hints", log_ms, np.ones(len(encoding), dtype=bool), np.zeros(len(encoding), dtype=bool))


def facts_of(facts: Mapping[str, Mapping[str, float]] | None, encoding: Encoding) -> NDArray[np.float64]:
    """Arrange what the compiler says of the configs: one column a fact that is known for every config.

    Args:
        facts: config key -> name -> value, such as registers, spills and shared memory.
        encoding: of the space in hand.

    Returns:
        [configs, facts] float64 in 0..1; facts that are missing somewhere or never change have no column.
    """
    rows = [(facts or {}).get(config.key(), {}) for config in encoding.configs]
    columns = []
    for name in sorted({name for row in rows for name in row}):
        if all(name in row for row in rows):
            column = np.log1p(np.maximum([float(row[name]) for row in rows], 0.0))
            if np.isfinite(column).all() and np.ptp(column) > 0:
                columns.append((column - column.min()) / np.ptp(column))
    return np.stack(columns, axis=1) if columns else np.zeros((len(encoding), 0))


def foreign_of(space: SearchSpace, latencies_ms: Sequence[float | None]) -> list[ForeignResult]:
    """Pair the configs of a space with their latencies; None and NaN are failures.

    Raises:
        UsageError: when there are more or fewer latencies than configs.
    """
    if len(latencies_ms) != len(space.configs):
        raise UsageError(f"{len(latencies_ms)} latencies for {len(space.configs)} configs.")
    return [
        ForeignResult(config=config, latency_ms=float(ms), failure=None)
        if ms is not None and np.isfinite(ms) and ms > 0
        else ForeignResult(config=config, latency_ms=None, failure="unknown")
        for config, ms in zip(space.configs, latencies_ms, strict=True)
    ]


def filled(wanted: NDArray[np.float64], given: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Answer for configs that a sibling did not measure: the mean of its nearest ones, the nearer the heavier."""
    both = np.log2(np.maximum(np.concatenate([wanted, given]), 0.0) + 1.0)
    span = np.where(np.ptp(both, axis=0) > 0, np.ptp(both, axis=0), 1.0)
    scaled = (both - both.min(axis=0)) / span
    here, there = scaled[: len(wanted)], scaled[len(wanted) :]
    filled = np.empty(len(wanted))
    num_nearest = min(NUM_NEAREST, len(given))
    for start in range(0, len(here), _CHUNK):
        part = here[start : start + _CHUNK]
        away = (part**2).sum(axis=1)[:, None] - 2 * part @ there.T + (there**2).sum(axis=1)
        nearest = np.argpartition(away, num_nearest - 1, axis=1)[:, :num_nearest]
        weight = 1.0 / (np.maximum(np.take_along_axis(away, nearest, axis=1), 0.0) + 1e-3)
        filled[start : start + _CHUNK] = (weight * values[nearest]).sum(axis=1) / weight.sum(axis=1)
    return filled
