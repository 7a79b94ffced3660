"""Siblings moved to the shape in hand: what suits a landscape moves along its parameters with the shape.

Half the batch wants twice as many splits to fill the device, and a row twice as long wants twice the block. The best
config elsewhere is then a bad one here, and the config that corresponds to it a good one. How far which parameter moves
with which dimension is learned from the siblings among themselves: a parameter corresponds to itself times a power of
here over there, and powers are added one by one while each makes the siblings tell clearly more of each other.

On recordings of an attention whose best number of splits follows the batch, a search needs 5 measurements to within 2%
of the optimum so, and 77 with the siblings where they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.refine.gaussian import Floats
from agnitra_lab.refine.reward import CAP, capped
from agnitra_lab.refine.siblings import Elsewhere, Sibling, filled, values_of
from agnitra_lab.refine.space import Encoding

POWERS = (-1.0, -0.5, 0.5, 1.0)
"""By which a parameter may follow a dimension."""
MAX_MOVES, LEAST_VALUES = 3, 3
COST = math.log(1 / 0.7)
"""Each move has to leave at most 0.7 of what the siblings fail to tell of each other."""
MOST_UNTOLD = 0.7
"""Siblings that, moved, still fail to tell more than this share of each other are left where they are."""
MAX_CHARTS, NUM_BEST, NUM_OTHERS = 4, 100, 100
"""Siblings, the nearest first, and their configs that the moves are learned from."""
SOFTNESS, LEAST_WEIGHT, TINY = 0.25, 0.02, 1e-9
"""A config this much slower than the best, in logarithms, counts 1/e as much; none counts less than the second."""
_MAX_REMEMBERED = 64
_remembered: dict[bytes, Floats] = {}
"""Powers by the content that they were learned from: another seed or a resumed search learns nothing again."""


class Chart:
    """One sibling's landscape that can be read at any point."""

    def __init__(self, there: Elsewhere) -> None:
        self.there = there
        self.shape = np.log2(np.array(there.shape, dtype=np.float64))
        self.points = _log2(there.params)
        self.least = float(there.log_ms.min())
        self._values = [np.unique(column) for column in self.points.T]
        sizes = [len(values) for values in self._values]
        self._radix = np.concatenate([[1.0], np.cumprod(sizes[:-1], dtype=np.float64)])
        keys = self._keys(self.points)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]
        best = np.argsort(there.log_ms, kind="stable")
        rest = np.random.default_rng(0).permutation(best[NUM_BEST:])[:NUM_OTHERS]
        self.sample = np.concatenate([best[:NUM_BEST], rest])

    def at(self, points: Floats) -> Floats:
        """Return the logarithms of latency at the nearest value of each parameter; NaN where that is no config."""
        keys = self._keys(points)
        index = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return np.where(self._sorted[index] == keys, self.there.log_ms[self._order[index]], np.nan)

    def has_values(self, parameter: int) -> bool:
        """Whether a parameter has a logarithm and enough values to move along."""
        values = self._values[parameter]
        return bool(len(values) >= LEAST_VALUES and values[0] >= 0)

    def _keys(self, points: Floats) -> Floats:
        """One number a point of the grid, exact while the grid has fewer than 2^53 of them."""
        keys = np.zeros(len(points))
        for column, values, radix in zip(points.T, self._values, self._radix, strict=True):
            middles = (values[1:] + values[:-1]) / 2
            keys += radix * np.searchsorted(middles, column, side="right")
        return keys


def moved_siblings(elsewhere: Sequence[Elsewhere], encoding: Encoding) -> list[Sibling]:
    """Move siblings to the shape of a space, where the siblings among themselves say that such moves help.

    Args:
        elsewhere: what was measured at other shapes; at least two shapes teach a move.
        encoding: of the space in hand.

    Returns:
        The siblings that move, at their new place.
    """
    shape = np.array(encoding.space.shape, dtype=np.float64)
    charts = [Chart(there) for there in elsewhere if len(there.shape) == len(shape) and min(there.shape, default=0) > 0]
    if not len(shape) or shape.min() <= 0 or len({chart.there.shape for chart in charts}) < 2:
        return []
    here = np.log2(shape)
    charts.sort(key=lambda chart: float(np.abs(chart.shape - here).sum()))
    powers = learned_powers(charts[:MAX_CHARTS])
    found = []
    points = _log2(values_of(encoding))
    for chart in charts:
        move = powers @ (here - chart.shape)
        if move.any():
            nowhere = np.zeros(len(encoding), dtype=bool)
            log_ms = _read(chart, points - move)
            found.append(Sibling(f"{chart.there.name}, moved", log_ms, nowhere, nowhere, is_moved=True))
    return found


def learned_powers(charts: Sequence[Chart]) -> Floats:
    """Learn which parameter follows which dimension, and by which power, from how siblings tell each other.

    Args:
        charts: at least two, of two shapes at least.

    Returns:
        [parameters, dimensions], 0 where a parameter does not follow.
    """
    digest = hashlib.sha256()
    for chart in charts:
        digest.update(repr((chart.there.shape, chart.points.shape)).encode())
        digest.update(chart.points.tobytes() + chart.there.log_ms.tobytes())
    key = digest.digest()
    if key not in _remembered:
        if len(_remembered) >= _MAX_REMEMBERED:
            _remembered.pop(next(iter(_remembered)))
        _remembered[key] = _learned_powers(charts)
    return _remembered[key]


def _learned_powers(charts: Sequence[Chart]) -> Floats:
    pairs = _Pairs(charts)
    powers = np.zeros((charts[0].points.shape[1], len(charts[0].shape)))
    untold = pairs.untold(powers)
    path = [(math.log(max(untold, TINY)), untold, powers)]
    for num_moves in range(1, MAX_MOVES + 1):
        tried = [(pairs.untold(candidate), index, candidate) for index, candidate in enumerate(_next(powers, charts))]
        if not tried or min(tried)[0] >= untold:
            break
        untold, _, powers = min(tried)
        path.append((math.log(max(untold, TINY)) + num_moves * COST, untold, powers))
    _, untold, powers = min(path, key=lambda step: step[0])
    return powers if untold <= MOST_UNTOLD else np.zeros_like(powers)


def _next(powers: Floats, charts: Sequence[Chart]) -> Iterator[Floats]:
    shapes = np.array([chart.shape for chart in charts])
    for parameter in range(powers.shape[0]):
        if not all(chart.has_values(parameter) for chart in charts):
            continue
        for dimension in np.flatnonzero(np.ptp(shapes, axis=0) > 0):
            for power in POWERS:
                if powers[parameter, dimension] != power:
                    candidate = powers.copy()
                    candidate[parameter, dimension] = power
                    yield candidate


class _Pairs:
    """How little siblings tell of each other once they are moved; each pair and move is worked out once."""

    def __init__(self, charts: Sequence[Chart]) -> None:
        self._pairs = [(there, here) for there in charts for here in charts if there is not here]
        self._known: dict[tuple[int, bytes], float] = {}

    def untold(self, powers: Floats) -> float:
        """Return the mean, over ordered pairs, of the share that one fails to tell of the other."""
        total = 0.0
        for index, (there, here) in enumerate(self._pairs):
            move = powers @ (here.shape - there.shape)
            key = index, move.tobytes()
            if key not in self._known:
                self._known[key] = _untold(there, here, move)
            total += self._known[key]
        return total / len(self._pairs)


def _untold(there: Chart, here: Chart, move: Floats) -> float:
    """The share of a landscape's weighted variance that another, moved and shifted, fails to tell; the good ones count.

    Above 1 where it tells the contrary. Where it knows no such config it tells nothing.
    """
    truth = capped(here.there.log_ms[here.sample] - here.least, CAP)
    told = capped(there.at(here.points[here.sample] - move) - there.least, CAP)
    is_told = ~np.isnan(told)
    told = np.where(is_told, told, np.inf)
    weight = np.exp(-truth / SOFTNESS) + LEAST_WEIGHT + np.exp(-told / SOFTNESS)
    nothing = weight * (truth - np.average(truth, weights=weight)) ** 2
    if not is_told.any():
        return 1.0
    gap = truth[is_told] - told[is_told]
    untold = weight[is_told] * (gap - np.average(gap, weights=weight[is_told])) ** 2
    return float((untold.sum() + nothing[~is_told].sum()) / max(nothing.sum(), TINY))


def _read(chart: Chart, points: Floats) -> Floats:
    """Read a landscape between and beyond its configs: at the nearest values, else from the nearest configs."""
    values = chart.at(points)
    is_missing = np.isnan(values)
    if is_missing.any():
        wanted = np.clip(points[is_missing], chart.points.min(axis=0), chart.points.max(axis=0))
        values[is_missing] = filled(2.0**wanted, chart.there.params, chart.there.log_ms)
    return values


def _log2(params: NDArray[np.float64]) -> Floats:
    return np.asarray(np.log2(np.maximum(params, 0.5)))
