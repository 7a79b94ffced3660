"""Configs as points of the unit cube, so that a model can learn from one config about its neighbours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.errors import SearchError


class Encoding:
    """The encoding of one search space.

    A parameter's coordinate is the rank of its value, scaled to 0..1. Ranks of powers of two are their logarithms,
    which is the scale that block sizes and warps act on.

    Attributes:
        configs: the valid configs, in the space's order, each once.
        points: [configs, parameters] float64, one row a config.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._names = tuple(space.params)
        self._ranks = {
            name: {value: rank / max(1, len(values) - 1) for rank, value in enumerate(values)}
            for name, values in space.params.items()
        }
        self._steps = np.array([1 / max(1, len(space.params[name]) - 1) for name in self._names])
        self.configs = tuple({config.key(): config for config in space.configs}.values())
        self._index = {config.key(): index for index, config in enumerate(self.configs)}
        self.points: NDArray[np.float64] = np.array([self.encode(config) for config in self.configs]).reshape(
            len(self.configs), len(self._names)
        )

    def __contains__(self, config: KernelConfig) -> bool:
        return config.key() in self._index

    def index(self, config: KernelConfig) -> int:
        """Return the position of a valid config in `configs`.

        Raises:
            SearchError: for a config that is not in the space.
        """
        if config not in self:
            raise SearchError(f"{config.key()} is not one of the {len(self.configs)} valid configs of the space.")
        return self._index[config.key()]

    def encode(self, config: KernelConfig) -> NDArray[np.float64]:
        """Return [parameters] float64 in 0..1.

        Raises:
            SearchError: for a parameter or value that the space does not list.
        """
        try:
            return np.array([self._ranks[name][config.params[name]] for name in self._names], dtype=np.float64)
        except KeyError as error:
            raise SearchError(f"{config.key()} has no place in the space: {error.args[0]!r} is not listed.") from error

    def decode(self, point: NDArray[np.float64]) -> KernelConfig:
        """Return the valid config nearest to a point; `decode(encode(config)) == config` for every valid config.

        Args:
            point: [parameters] float64.

        Raises:
            SearchError: when the space is empty.
        """
        if not self.configs:
            raise SearchError("The search space is empty: there is nothing to decode to.")
        return self.configs[int(np.argmin(((self.points - point) ** 2).sum(axis=1)))]

    def neighbours(self, config: KernelConfig) -> list[KernelConfig]:
        """Return the valid configs that are one step away in exactly one parameter."""
        away = np.abs(self.points - self.encode(config)) / self._steps
        is_one_step = np.isclose(away.sum(axis=1), 1.0) & np.isclose(away.max(axis=1, initial=0.0), 1.0)
        return [self.configs[index] for index in np.flatnonzero(is_one_step)]
