"""Recorded landscapes: the latency of every valid config of a template at one shape, measured on a GPU once.

They let the search run, be tested and be shown where there is no GPU. Whatever is replayed is marked as recorded.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from agnitra_lab.contracts.base import Contract, Positive
from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.errors import TemplateError, UsageError


class LandscapeRow(Contract):
    """One measured config."""

    params: dict[str, int]
    latency_us_p50: Positive
    samples_us: tuple[Positive, ...]


class LandscapeFailure(Contract):
    """One config that could not be compiled or launched, or gave wrong values."""

    params: dict[str, int]
    detail: str


class LandscapeFile(Contract):
    """A landscape as it lies on disk."""

    schema_version: Literal["agnitra.landscape.v1"] = "agnitra.landscape.v1"
    template: str
    shape: tuple[int, ...]
    dtype: str
    device: DeviceInfo
    versions: dict[str, str]
    command: str
    timing: str
    """How one sample was taken, in words."""
    params: dict[str, tuple[int, ...]]
    rows: tuple[LandscapeRow, ...]
    failures: tuple[LandscapeFailure, ...] = ()

    @model_validator(mode="after")
    def _points_lie_in_the_grid(self) -> LandscapeFile:
        if not self.rows:
            raise ValueError("a landscape needs at least one measured row")
        points = [*(row.params for row in self.rows), *(failure.params for failure in self.failures)]
        for point in points:
            if set(point) != set(self.params) or any(value not in self.params[name] for name, value in point.items()):
                raise ValueError(f"the point {point} does not lie in the grid of params")
        if len({tuple(sorted(point.items())) for point in points}) != len(points):
            raise ValueError("a point occurs twice")
        return self

    def file_name(self) -> str:
        """Return `<template>__<shape>__<dtype>__<device>.json`."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.device.name.lower()).strip("-")
        return f"{self.template}__{'x'.join(map(str, self.shape))}__{self.dtype}__{slug}.json"


class Landscape:
    """A recorded landscape that answers like a device would."""

    def __init__(self, recorded: LandscapeFile) -> None:
        self.recorded = recorded
        self.space = SearchSpace(
            template=recorded.template,
            shape=recorded.shape,
            dtype=recorded.dtype,
            params=recorded.params,
            configs=tuple(
                KernelConfig(template=recorded.template, params=params)
                for params in (*(row.params for row in recorded.rows), *(fail.params for fail in recorded.failures))
            ),
        )
        self._latency_ms = {self._key(row.params): row.latency_us_p50 / 1000 for row in recorded.rows}
        self._failures = {self._key(failure.params): failure.detail for failure in recorded.failures}

    @property
    def template(self) -> str:
        """Name of the template that was measured."""
        return self.recorded.template

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that was measured."""
        return self.recorded.shape

    @property
    def dtype(self) -> str:
        """Element type of the tensor that was measured."""
        return self.recorded.dtype

    @property
    def device_name(self) -> str:
        """Device on which it was measured."""
        return self.recorded.device.name

    @property
    def measured_on(self) -> str:
        """What a SearchResult says about numbers that were replayed from here."""
        return f"recorded: {self.device_name}"

    @property
    def best_latency_ms(self) -> float:
        """Lowest recorded median."""
        return min(self._latency_ms.values())

    def measure(self, config: KernelConfig) -> float:
        """Return the recorded median of a config, in milliseconds.

        Raises:
            TemplateError: for a config that failed when it was recorded, or that was never recorded.
        """
        key = self._key(config.params)
        if config.template == self.template and key in self._latency_ms:
            return self._latency_ms[key]
        detail = self._failures.get(key) if config.template == self.template else None
        if detail is None:
            where = f"{'x'.join(map(str, self.shape))} {self.dtype} on {self.device_name}"
            raise TemplateError(f"{config.key()} was not recorded at {where}.")
        raise TemplateError(f"{config.key()} failed on {self.device_name} when it was recorded: {detail}")

    @staticmethod
    def _key(params: dict[str, int]) -> tuple[tuple[str, int], ...]:
        return tuple(sorted(params.items()))


def load(path: str | Path) -> Landscape:
    """Read a recorded landscape.

    Raises:
        UsageError: for a missing, unreadable, corrupt or foreign file, with what is wrong in it.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"The landscape {path} cannot be read: {error.strerror or error}.",
            hint="refine.replay.find(template) gives the path of a recorded one.",
        ) from error
    try:
        return Landscape(LandscapeFile.from_json(text))
    except UsageError as error:
        raise UsageError(f"{path} is no recorded landscape. {error.message}") from error


def find(template: str, shape: tuple[int, ...] | None = None) -> Path | None:
    """Find a recorded landscape, in a checkout or in the installed package.

    Args:
        template: the template's name.
        shape: the wanted shape; None takes the largest that was recorded.

    Returns:
        A path for `load`, or None when there is no such recording.
    """
    wanted = None if shape is None else "x".join(map(str, shape))
    found: list[tuple[int, str, Path]] = []
    for path in _recordings():
        name, _, rest = path.stem.partition("__")
        extents = rest.partition("__")[0]
        if name != template or not re.fullmatch(r"\d+(x\d+)*", extents) or (wanted is not None and extents != wanted):
            continue
        size = 1
        for extent in extents.split("x"):
            size *= int(extent)
        found.append((size, path.name, path))
    return max(found)[2] if found else None


def nearest(template: str, shape: tuple[int, ...]) -> Path | None:
    """Find the recorded landscape of a template whose shape is nearest to `shape`, in powers of two.

    Returns:
        A path for `load`, whose own shape says what was measured; None when the template was never recorded.
    """
    candidates = [path for path in _recordings() if path.stem.partition("__")[0] == template]
    return min(candidates, key=lambda path: _shape_distance(_shape_of(path), shape), default=None)


def recorded() -> list[str]:
    """Names of the templates that were recorded."""
    return sorted({path.stem.partition("__")[0] for path in _recordings()})


def _shape_of(path: Path) -> tuple[int, ...]:
    extents = path.stem.partition("__")[2].partition("__")[0]
    return tuple(int(extent) for extent in extents.split("x") if extent.isdigit())


def _shape_distance(left: tuple[int, ...], right: tuple[int, ...]) -> float:
    if len(left) != len(right):
        return math.inf
    return sum(abs(math.log2(max(a, 1)) - math.log2(max(b, 1))) for a, b in zip(left, right, strict=True))


def _recordings() -> list[Path]:
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "fixtures" / "landscapes", package.parent / "fixtures" / "landscapes"):
        paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
        if paths:
            return paths
    return []
