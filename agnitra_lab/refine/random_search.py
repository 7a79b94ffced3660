"""Random search: the seeds, then every other valid config in a random order. The baseline that a learner must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.refine.sampler import valid_seeds


class RandomSearch:
    """A sampler that learns nothing."""

    def __init__(self, space: SearchSpace, *, seed: int, seeds: Sequence[KernelConfig] = ()) -> None:
        order = np.random.default_rng(seed).permutation(len(space.configs))
        planned = [*valid_seeds(seeds, space), *(space.configs[index] for index in order)]
        self._queue = list({config.key(): config for config in planned}.values())[::-1]

    def ask(self) -> KernelConfig | None:
        """Return the next config, or None at the end."""
        return self._queue.pop() if self._queue else None

    def tell(self, config: KernelConfig, latency_ms: float | None) -> None:
        """Take note that a config is known, so that it is not proposed any more."""
        self._queue = [queued for queued in self._queue if queued.key() != config.key()]


def build(space: SearchSpace, *, seed: int, seeds: Sequence[KernelConfig] = ()) -> RandomSearch:
    """Build the sampler of the name "random"."""
    return RandomSearch(space, seed=seed, seeds=seeds)
