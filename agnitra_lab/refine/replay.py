"""Recorded landscapes: the latency of every valid config of a template at one shape, measured on a GPU once.

They let the search run, be tested and be shown where there is no GPU. Whatever is replayed is marked as recorded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.errors import TemplateError
from agnitra_lab.refine.landscape_file import LandscapeFile, read


class Landscape:
    """A recorded landscape that answers like a device would.

    Attributes:
        recorded: the file's contents.
        space: the recorded configs; those that failed are among them.
        latency_ms: [configs] float64, the median of each config's samples; NaN where it failed.
        optimum: the config with the lowest mean when the best were measured again, interleaved, in a fresh process;
            the one with the lowest median where that was not done. Of many configs that cost the same, another may
            have a median that is lower by the noise: such a one is as good.
    """

    def __init__(self, recorded: LandscapeFile) -> None:
        self.recorded = recorded
        about = recorded.about
        self.space = SearchSpace(
            template=about.template,
            shape=about.shape,
            dtype=about.dtype,
            params=about.params,
            configs=tuple(
                KernelConfig(template=about.template, params=recorded.params_of(index))
                for index in range(len(recorded))
            ),
        )
        self._index = {config.key(): index for index, config in enumerate(self.space.configs)}
        self.latency_ms = np.round(_medians(recorded.arrays["samples_us"], recorded.arrays["num_samples"]), 4) / 1000
        means = {index: float(recorded.again_us(index).mean()) for index in recorded.finalists()}
        best = min(means, key=means.__getitem__) if means else int(np.nanargmin(self.latency_ms))
        self.optimum = self.space.configs[best]
        self.best_latency_ms = float(self.latency_ms[best])

    @property
    def template(self) -> str:
        """Name of the template that was measured."""
        return self.recorded.about.template

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that was measured."""
        return self.recorded.about.shape

    @property
    def dtype(self) -> str:
        """Element type of the tensor that was measured."""
        return self.recorded.about.dtype

    @property
    def device_name(self) -> str:
        """Device on which it was measured."""
        return self.recorded.device.name

    @property
    def measured_on(self) -> str:
        """What a SearchResult says about numbers that were replayed from here."""
        return f"recorded: {self.device_name}"

    @cached_property
    def features(self) -> Mapping[str, Mapping[str, float]]:
        """Config key -> registers, spills and shared memory, for each config of which the compiler said them."""
        found = {config.key(): self.recorded.features_of(index) for index, config in enumerate(self.space.configs)}
        return {key: features for key, features in found.items() if features}

    def measure(self, config: KernelConfig) -> float:
        """Return the recorded median of a config, in milliseconds.

        Raises:
            TemplateError: for a config that failed when it was recorded, or that was never recorded.
        """
        index = self._index_of(config)
        failure = self.recorded.failure_of(index)
        if failure is not None:
            name, detail = failure
            raise TemplateError(
                f"{config.key()} failed on {self.device_name} when it was recorded ({_IN_WORDS.get(name, name)}): "
                f"{detail}"
            )
        return float(self.latency_ms[index])

    def failure_of(self, config: KernelConfig) -> tuple[str, str] | None:
        """Return the class and the text of a config's failure; None for one that ran."""
        return self.recorded.failure_of(self._index_of(config))

    def samples_ms(self, config: KernelConfig) -> tuple[float, ...]:
        """Return a config's samples in milliseconds, in the order in which they were taken."""
        return tuple((self.recorded.samples_us(self._index_of(config)) / 1000).tolist())

    def again_ms(self, config: KernelConfig) -> tuple[float, ...]:
        """Return what a finalist's second measurement gave, in milliseconds; none for the others."""
        return tuple((self.recorded.again_us(self._index_of(config)) / 1000).tolist())

    def compile_s(self, config: KernelConfig) -> float | None:
        """Return what compiling a config's kernels cost; None where it was not recorded."""
        return self.recorded.known("compile_s", self._index_of(config))

    def cost_s(self, config: KernelConfig, *, is_compiled: bool = False) -> float | None:
        """Return what measuring a config cost: compiling it, running, checking and sampling it.

        Args:
            config: which.
            is_compiled: whether it was measured before, so that there is nothing to compile.

        Returns:
            Seconds on the device that is recorded, on one core; None where they were not recorded.
        """
        index = self._index_of(config)
        compile_s, wall_s = self.recorded.known("compile_s", index), self.recorded.known("wall_s", index)
        # What does not compile does not run, and what is known of it is all that it cost.
        if compile_s is None and wall_s is None:
            return None
        return (0.0 if is_compiled else compile_s or 0.0) + (wall_s or 0.0)

    def _index_of(self, config: KernelConfig) -> int:
        index = self._index.get(config.key())
        if index is None:
            where = f"{'x'.join(map(str, self.shape))} {self.dtype} on {self.device_name}"
            raise TemplateError(f"{config.key()} was not recorded at {where}.")
        return index


class Replay:
    """A measure that answers from a landscape, and keeps the clock that the real search would have shown.

    Attributes:
        landscape: what answers.
        clock_s: what everything that was measured so far cost where it was recorded, one config at a time; None
            when the recording does not say.
    """

    def __init__(self, landscape: Landscape) -> None:
        self.landscape = landscape
        self.clock_s: float | None = 0.0
        self._compiled: set[str] = set()

    def __call__(self, config: KernelConfig) -> float:
        """Return the recorded median of a config in milliseconds, and let the clock go on; a failure costs too.

        Raises:
            TemplateError: for a config that failed when it was recorded, or that was never recorded.
        """
        cost_s = self.landscape.cost_s(config, is_compiled=config.key() in self._compiled)
        self._compiled.add(config.key())
        self.clock_s = None if cost_s is None or self.clock_s is None else self.clock_s + cost_s
        return self.landscape.measure(config)


# In words by which the class of a failure is told from its text.
_IN_WORDS = {
    "compile": "it does not compile", "launch": "it does not launch", "oom": "out of memory", "timeout": "timeout",
    "wrong": "wrong values", "constraint": "a constraint",
}  # fmt: skip


def load(path: str | Path) -> Landscape:
    """Read a recorded landscape.

    Raises:
        UsageError: for a missing, unreadable, corrupt or foreign file, with what is wrong in it.
    """
    return Landscape(read(Path(path)))


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
        size = math.prod(int(extent) for extent in extents.split("x"))
        found.append((size, path.name, path))
    return max(found)[2] if found else None


def nearest(template: str, shape: tuple[int, ...]) -> Path | None:
    """Find the recorded landscape of a template whose shape is nearest to `shape`, in powers of two.

    Returns:
        A path for `load`, whose own shape says what was measured; None when the template was never recorded with as
        many dimensions.
    """
    candidates = [
        path
        for path in _recordings()
        if path.stem.partition("__")[0] == template and len(_shape_of(path)) == len(shape)
    ]
    return min(candidates, key=lambda path: _shape_distance(_shape_of(path), shape), default=None)


def recorded() -> list[str]:
    """Names of the templates that were recorded."""
    return sorted({path.stem.partition("__")[0] for path in _recordings()})


def every() -> list[Path]:
    """Paths of all recorded landscapes, in a checkout or in the installed package."""
    return _recordings()


def _medians(values: NDArray[Any], lengths: NDArray[Any]) -> NDArray[np.float64]:
    """Return the median of each run of `values`, NaN for one without values; all at once, for there are thousands."""
    counts = lengths.astype(np.int64)
    owners = np.repeat(np.arange(len(counts)), counts)
    ordered = np.append(values[np.lexsort((values, owners))].astype(np.float64), np.nan)
    starts = np.cumsum(counts) - counts
    low, high = starts + (counts - 1) // 2, starts + counts // 2
    medians: NDArray[np.float64] = (ordered[low] + ordered[high]) / 2
    return np.where(counts > 0, medians, np.nan)


def _shape_of(path: Path) -> tuple[int, ...]:
    extents = path.stem.partition("__")[2].partition("__")[0]
    return tuple(int(extent) for extent in extents.split("x") if extent.isdigit())


def _shape_distance(left: tuple[int, ...], right: tuple[int, ...]) -> float:
    return sum(abs(math.log2(max(a, 1)) - math.log2(max(b, 1))) for a, b in zip(left, right, strict=True))


def _recordings() -> list[Path]:
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "fixtures" / "landscapes", package.parent / "fixtures" / "landscapes"):
        paths = sorted(folder.glob("*.npz")) if folder.is_dir() else []
        if paths:
            return paths
    return []
