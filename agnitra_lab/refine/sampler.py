"""What a sampler is, and the table of samplers by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol, cast

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.errors import UsageError

SAMPLERS: dict[str, str] = {
    "rl": "agnitra_lab.refine.bandit",
    "random": "agnitra_lab.refine.random_search",
}
"""Each module has `build(space, *, seed, seeds)`."""


class Sampler(Protocol):
    """Proposes configs and learns from what they cost. It never proposes one config twice."""

    def ask(self) -> KernelConfig | None:
        """Return the next config to measure, or None when every valid config was proposed."""

    def tell(self, config: KernelConfig, latency_ms: float | None) -> None:
        """Learn the latency of a config; None is a failure. Configs that were never asked for may be told too."""


def make(name: str, space: SearchSpace, *, seed: int, seeds: Sequence[KernelConfig] = ()) -> Sampler:
    """Build a sampler by its name.

    Args:
        name: a key of SAMPLERS.
        space: what to sample from.
        seed: of the sampler's random numbers; the same seed and answers give the same proposals.
        seeds: configs to propose first, in this order; those that are not in the space are left out.

    Raises:
        UsageError: for an unknown name, with the known ones.
    """
    if name not in SAMPLERS:
        raise UsageError(f"There is no sampler {name!r}; known are {', '.join(sorted(SAMPLERS))}.")
    return cast(Sampler, importlib.import_module(SAMPLERS[name]).build(space, seed=seed, seeds=seeds))


def valid_seeds(seeds: Sequence[KernelConfig], space: SearchSpace) -> list[KernelConfig]:
    """Return the seeds that are valid configs of the space, each once, in their order."""
    valid = {config.key() for config in space.configs}
    return list({seed.key(): seed for seed in seeds if seed.key() in valid}.values())
