"""Configs as points of the unit cube, so that a model can learn from one config about its neighbours."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.errors import SearchError


class Encoding:
    """The encoding of one search space. The position of a config in `configs` is its arm.

    A parameter's coordinate is the rank of its value, scaled to 0..1. Ranks of powers of two are their logarithms,
    which is the scale that block sizes and warps act on.

    Attributes:
        configs: the valid configs, in the space's order, each once.
        points: [configs, parameters] float64, one row a config.
        ranks: [configs, parameters] int64, the position of each value in its parameter's list.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.names = tuple(space.params)
        self._rank_of = {name: {value: rank for rank, value in enumerate(space.params[name])} for name in self.names}
        self._scale = np.array([max(1, len(space.params[name]) - 1) for name in self.names], dtype=np.float64)
        self.configs: tuple[KernelConfig, ...] = tuple({config.key(): config for config in space.configs}.values())
        self._arm_of = {config.key(): arm for arm, config in enumerate(self.configs)}
        self.ranks: NDArray[np.int64] = np.array(
            [self._ranks(config) for config in self.configs], dtype=np.int64
        ).reshape(len(self.configs), len(self.names))
        self.points: NDArray[np.float64] = self.ranks / self._scale

    def __len__(self) -> int:
        return len(self.configs)

    def __contains__(self, config: KernelConfig) -> bool:
        return config.key() in self._arm_of

    def index(self, config: KernelConfig) -> int:
        """Return the position of a valid config in `configs`.

        Raises:
            SearchError: for a config that is not in the space.
        """
        return self.arm_of(config.key())

    def arm_of(self, key: str) -> int:
        """Return the position of the valid config with this key.

        Raises:
            SearchError: for a key that is not in the space.
        """
        if key not in self._arm_of:
            raise SearchError(f"{key} is not one of the {len(self.configs)} valid configs of the space.")
        return self._arm_of[key]

    def encode(self, config: KernelConfig) -> NDArray[np.float64]:
        """Return [parameters] float64 in 0..1.

        Raises:
            SearchError: for a parameter or value that the space does not list.
        """
        return np.array(self._ranks(config), dtype=np.float64) / self._scale

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

    def nearest(self, point: NDArray[np.float64], is_open: NDArray[np.bool_]) -> int:
        """Return the open arm nearest to a point; at least one must be open."""
        arms = np.flatnonzero(is_open)
        return int(arms[np.argmin(((self.points[arms] - point) ** 2).sum(axis=1))])

    def neighbours(self, config: KernelConfig) -> list[KernelConfig]:
        """Return the valid configs that are one step away in exactly one parameter."""
        away = np.abs(self.ranks - np.array(self._ranks(config))).sum(axis=1)
        return [self.configs[arm] for arm in np.flatnonzero(away == 1)]

    def on_same_lines(self, arm: int) -> NDArray[np.intp]:
        """Return the arms that differ from this one in exactly one parameter, by any number of steps."""
        return np.flatnonzero(self.is_on_same_line(arm))

    def is_on_same_line(self, arm: int) -> NDArray[np.bool_]:
        """Return for every arm whether it differs from this one in exactly one parameter."""
        return np.asarray((self.ranks != self.ranks[arm]).sum(axis=1) == 1)

    def _ranks(self, config: KernelConfig) -> list[int]:
        try:
            return [self._rank_of[name][config.params[name]] for name in self.names]
        except KeyError as error:
            raise SearchError(f"{config.key()} has no place in the space: {error.args[0]!r} is not listed.") from error


def space_sha256(space: SearchSpace) -> str:
    """Identify a space by its content: template, shape, dtype, parameters and every valid config, in their order."""
    digest = hashlib.sha256(
        json.dumps([space.template, space.shape, space.dtype, {k: list(v) for k, v in space.params.items()}]).encode()
    )
    for config in space.configs:
        digest.update(config.key().encode() + b"\n")
    return digest.hexdigest()
