"""Drawn landscapes: families of kernels that nobody wrote, so that a search cannot have been tuned on them.

A seed draws a kernel: 5 to 12 parameters (block extents, work a thread, vector width, stages, switches), constraints
on them, and what they act on: occupancy, waves, reuse, coalescing, spills, switches that matter at some extents only,
values that are bad without a reason, a factor of its own a config. It draws devices too, and how much of all that they
share. Public tuning spaces look like this: 500 to 20,000 valid configs, none to half of which fail, optima that are
moved, kept or reversed from one device to the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from synthetic_landscapes import Columns, Synthetic, enumerated

from agnitra_lab.contracts.search import KernelConfig, SearchSpace

RELATIONS: Mapping[str, tuple[float, ...]] = {
    "strong": (0.97, 0.93),
    "mixed": (0.95, 0.6, 0.2, -0.4),
    "weak": (0.5, 0.35),
    "misleading": (-0.3,),
}
"""How much the effects of each sibling agree with the target's: 1 is the same device, below 0 the reverse."""
MIN_CONFIGS, MAX_CONFIGS = 500, 20_000


@dataclass(frozen=True)
class _Effects:
    """What a device makes of the parameters: all normal numbers, so that two devices mix to a third."""

    values: NDArray[np.float64]
    pairs: NDArray[np.float64]
    constants: NDArray[np.float64]
    own: NDArray[np.float64]

    def towards(self, other: _Effects, share: float) -> _Effects:
        """Return effects that correlate with these by `share`, the rest being `other`'s."""
        rest = np.sqrt(max(0.0, 1 - share**2))
        # What a resource costs has the same sign everywhere: constants agree by half at least.
        kept = max(share, 0.5)
        return _Effects(
            share * self.values + rest * other.values,
            share * self.pairs + rest * other.pairs,
            kept * self.constants + np.sqrt(1 - kept**2) * other.constants,
            share * self.own + rest * other.own,
        )


class _Kernel:
    """One drawn kernel: its space, and its time for given effects."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng([seed, 77])
        self.name = f"drawn-{seed}"
        while True:
            self.params = _drawn_params(rng)
            columns = enumerated(self.params)
            keep = _is_valid(columns, rng)
            if MIN_CONFIGS <= keep.sum() <= MAX_CONFIGS:
                break
        self.c: Columns = {name: column[keep] for name, column in columns.items()}
        self.share_failing = float(rng.choice([0.0, 0.05, 0.2, 0.5]))
        self.ruggedness = float(rng.uniform(0.01, 0.05))
        self.strength = float(rng.uniform(0.1, 0.4))
        self.contrast = float(rng.uniform(0.35, 1.0))
        names = list(self.params)
        pairs = list(itertools.combinations(range(len(names)), 2))
        self.pairs = [pairs[index] for index in rng.permutation(len(pairs))[: len(names)]]
        self.ranks = np.stack(
            [np.searchsorted(np.array(self.params[name], float), self.c[name]) for name in names], axis=1
        )

    def effects(self, rng: np.random.Generator) -> _Effects:
        num_values = max(len(values) for values in self.params.values())
        return _Effects(
            rng.standard_normal((len(self.params), num_values)),
            rng.standard_normal((len(self.pairs), 3)),
            rng.standard_normal(8),
            rng.standard_normal(len(self.ranks)),
        )

    def times(self, effects: _Effects) -> NDArray[np.float64]:
        c, k = self.c, np.exp(0.35 * effects.constants)
        threads = c["block_x"] * c["block_y"]
        one = np.ones_like(threads)
        work = c["tile_x"] * c.get("tile_y", one)
        stages, vector, chunk = c.get("stages", one), c.get("vector", one), c.get("chunk", one)
        regs = (18 + 2.2 * work * vector**0.5 + 2 * stages) * k[0] ** 0.3
        shared_kb = (c["block_x"] * c["tile_x"] + c["block_y"] * c.get("tile_y", one)) * chunk**0.5 * stages / 64 * k[1]
        by_regs, by_shared = np.floor(65536 / (regs * threads)), np.floor(100 / np.maximum(shared_kb, 0.5))
        occupancy = np.minimum(np.maximum(np.minimum(by_regs, by_shared), 0.5) * threads / 2048, 1)
        spill = 1 + 0.02 * np.maximum(0, regs - 110 * k[2] ** 0.3)
        hide = 1 - np.exp(-occupancy * (1 + work**0.5 * stages**0.5) / (1.2 * k[3]))
        blocks = 3e6 * k[4] / (threads * work)
        slots = np.maximum(1, 108 * occupancy * 2048 / threads)
        waves = np.ceil(blocks / slots) * slots / blocks
        coalesced = np.minimum(1, c["block_x"] * vector / (32 * k[5])) ** 0.6
        halo = (1 + 4 * k[6] / (c["block_x"] * c["tile_x"])) * (1 + 4 * k[6] / (c["block_y"] * c.get("tile_y", one)))
        compute, memory = spill * waves / hide, k[7] * halo / coalesced
        log_ms = self.contrast * (np.log((compute**4 + memory**4) ** 0.25) + self._drawn(effects))
        log_ms += self.ruggedness * np.abs(effects.own)
        is_heavy = shared_kb * k[1] + regs * threads / 1500
        limit = np.quantile(is_heavy, 1 - self.share_failing) if self.share_failing else np.inf
        return np.where(is_heavy > limit, np.nan, np.exp(log_ms))

    def _drawn(self, effects: _Effects) -> NDArray[np.float64]:
        """Single values that are bad for no reason, and pairs of parameters that act together."""
        spans = np.maximum(1, np.array([len(values) for values in self.params.values()]) - 1)
        unit = self.ranks / spans
        log = np.zeros(len(unit))
        for index in range(unit.shape[1]):
            weight = 0.25 * self.strength if spans[index] > 1 else 0.4 * self.strength
            log += weight * effects.values[index, self.ranks[:, index]]
        for (left, right), (lean, at, other) in zip(self.pairs, effects.pairs, strict=True):
            bump = (unit[:, left] - 0.5 - 0.2 * at) * (unit[:, right] - 0.5 - 0.2 * other)
            cliff = (unit[:, left] > 0.5) & (unit[:, right] > 0.5)
            log += self.strength * (1.5 * lean * bump + 0.3 * np.maximum(at, 0) * cliff)
        return log


def _drawn_params(rng: np.random.Generator) -> dict[str, tuple[int, ...]]:
    powers = tuple(2**power for power in range(10))
    start = int(rng.integers(0, 5))
    params: dict[str, tuple[int, ...]] = {
        "block_x": powers[start : start + int(rng.integers(4, 7))] if rng.random() < 0.6 else tuple(range(16, 144, 16)),
        "block_y": powers[: int(rng.integers(3, 7))],
        "tile_x": tuple(range(1, int(rng.integers(4, 9)))) if rng.random() < 0.6 else (1, 2, 4, 8),
    }
    if rng.random() < 0.75:
        params["tile_y"] = tuple(range(1, int(rng.integers(4, 9)))) if rng.random() < 0.6 else (1, 2, 4, 8)
    for name, values in (("vector", (1, 2, 4, 8)), ("stages", (1, 2, 3, 4)), ("chunk", (16, 32, 64))):
        if rng.random() < 0.5:
            params[name] = values[: int(rng.integers(2, len(values) + 1))]
    for index in range(int(rng.integers(1, 6))):
        params[f"switch_{index}"] = (0, 1) if rng.random() < 0.8 else (0, 1, 2, 4)
    return params


def _is_valid(c: Columns, rng: np.random.Generator) -> NDArray[np.bool_]:
    threads = c["block_x"] * c["block_y"]
    keep: NDArray[np.bool_] = (threads >= 32) & (threads <= 1024)
    if "vector" in c and rng.random() < 0.7:
        keep &= c["block_x"] * c["tile_x"] % (8 * c["vector"]) == 0
    if "tile_y" in c and rng.random() < 0.5:
        keep &= c["tile_x"] * c["tile_y"] <= 24
    if "switch_1" in c and rng.random() < 0.5:
        keep &= (c["switch_0"] == 0) | (c["switch_1"] == 0)
    return keep


def family(seed: int, relation: str) -> tuple[Synthetic, list[Synthetic]]:
    """Draw a kernel and its devices.

    Args:
        seed: of the draw; each is another kernel.
        relation: a key of `RELATIONS`.

    Returns:
        The target, and its siblings.
    """
    kernel = _Kernel(seed)
    rng = np.random.default_rng([seed, 78])
    effects = kernel.effects(rng)
    configs = tuple(
        KernelConfig(template=kernel.name, params={name: int(kernel.c[name][index]) for name in kernel.params})
        for index in range(len(kernel.ranks))
    )
    space = SearchSpace(template=kernel.name, shape=(1,), dtype="float32", params=kernel.params, configs=configs)
    target = Synthetic(f"{kernel.name} {relation}", "target", space, kernel.times(effects))
    siblings = [
        Synthetic(target.family, f"agrees by {share}", space, kernel.times(effects.towards(kernel.effects(rng), share)))
        for share in RELATIONS[relation]
    ]
    return target, siblings


def all_families(num: int = 8, first: int = 0) -> list[tuple[Synthetic, list[Synthetic]]]:
    """Draw `num` kernels, their relations to their siblings in turn."""
    relations = list(RELATIONS)
    # Shifted by one every round, because the seeds of a round have no order.
    return [
        family(seed, relations[(seed + seed // len(relations)) % len(relations)]) for seed in range(first, first + num)
    ]
