"""What a sampler is, and the table of samplers by name.

A sampler thinks in arms, the positions of the valid configs. What every search needs (seeds first, no config twice,
results in any order, failures) is kept once, by the study around it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.search import FailureClass, KernelConfig, SearchSpace
from agnitra_lab.errors import UsageError
from agnitra_lab.refine.siblings import Sibling
from agnitra_lab.refine.space import Encoding


@dataclass(frozen=True)
class SamplerInfo:
    """One line of the table.

    Attributes:
        module: has `build(problem) -> Sampler`.
        summary: what it does.
        rank: median measurements to within 2% of the optimum on all our recordings, with the other shapes known and
            cold: `all_..._median_measurements_to_2_percent` of the newest filed run of `tests/benchmarks/search.py`.
        extra: the extra of this package that it needs, None for none.
        is_polished: the last measurements of a search go to the neighbours of the best config.
    """

    module: str
    summary: str
    rank: str
    extra: str | None = None
    is_polished: bool = False


SAMPLERS: dict[str, SamplerInfo] = {
    "rl": SamplerInfo(
        "agnitra_lab.refine.bandit",
        "contextual bandit: exact GP over coordinates and siblings",
        rank="2 / 26",
        is_polished=True,
    ),
    "portfolio": SamplerInfo(
        "agnitra_lab.refine.portfolio", "greedy portfolio of the siblings' best configs", rank="2 / none"
    ),
    "reinforce": SamplerInfo(
        "agnitra_lab.refine.reinforce", "policy gradient, warm from the siblings", rank="31 / none"
    ),
    "tpe": SamplerInfo(
        "agnitra_lab.refine.parzen", "Optuna's tree-structured Parzen estimator", rank="none / 34", extra="search"
    ),
    "coordinate": SamplerInfo(
        "agnitra_lab.refine.coordinate", "coordinate descent with random restarts", rank="none / 35"
    ),
    "reinforce-cold": SamplerInfo("agnitra_lab.refine.reinforce", "policy gradient, from nothing", rank="none / 58"),
    "random": SamplerInfo("agnitra_lab.refine.random_search", "every valid config equally likely", rank="none / 59"),
    "cmaes": SamplerInfo(
        "agnitra_lab.refine.evolution", "CMA-ES with categorical margins", rank="none / 87", extra="search"
    ),
    "exhaustive": SamplerInfo(
        "agnitra_lab.refine.exhaustive", "every valid config, in the order of the space", rank="none / all"
    ),
}


@dataclass(frozen=True)
class Problem:
    """What a sampler knows before the first measurement.

    Attributes:
        name: the sampler's, for those that share a module.
        encoding: of the valid configs.
        seed: of the sampler's random numbers.
        siblings: what is known of the same template at other shapes or on other devices, and hints.
        facts: [configs, facts] float64, what the compiler says of each config; no columns where nothing is known.
    """

    name: str
    encoding: Encoding
    seed: int
    siblings: tuple[Sibling, ...] = ()
    facts: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True)
class Observation:
    """What is known of one arm.

    Attributes:
        arm: position of the config.
        log_ms: natural logarithm of its latency, None for a failure.
        failure: why it has none.
        is_aborted: the latency comes from the few samples that showed it to be slower than the best.
        is_foreign: it was not asked for: a seed's, a language model's, an earlier ledger's.
    """

    arm: int
    log_ms: float | None
    failure: FailureClass | None = None
    is_aborted: bool = False
    is_foreign: bool = False


class Sampler(Protocol):
    """Proposes arms and learns from what they cost."""

    def propose(self, num: int, is_open: NDArray[np.bool_]) -> Sequence[int]:
        """Return up to `num` different open arms; the study passes at least one open arm, and `num` >= 1.

        Args:
            num: how many are wanted at once, before any of them is told.
            is_open: [configs] bool, the arms that were neither asked for nor told.
        """

    def learn(self, seen: Observation) -> None:
        """Learn of one arm. Arms come in any order, and some were never proposed."""


def make(problem: Problem) -> Sampler:
    """Build the sampler that the problem names.

    Raises:
        UsageError: for an unknown name, with the known ones.
        MissingError: where the package behind the sampler is not installed.
    """
    return cast(Sampler, importlib.import_module(info(problem.name).module).build(problem))


def info(name: str) -> SamplerInfo:
    """Return a sampler's line in the table.

    Raises:
        UsageError: for an unknown name, with the known ones.
    """
    if name not in SAMPLERS:
        raise UsageError(f"There is no sampler {name!r}; known are {', '.join(sorted(SAMPLERS))}.")
    return SAMPLERS[name]


def valid_seeds(seeds: Sequence[KernelConfig], space: SearchSpace) -> list[KernelConfig]:
    """Return the seeds that are valid configs of the space, each once, in their order."""
    valid = {config.key() for config in space.configs}
    return list({seed.key(): seed for seed in seeds if seed.key() in valid}.values())
