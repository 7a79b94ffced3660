"""A complete landscape as it lies on disk: one npz of plain arrays, and a JSON text that says what they are.

Nothing in it is pickled. A config is a row of `codes`: the place of each parameter's value in the grid that `about`
lists. What was not recorded has no array; a single fact that is not known is -1.

| array | shape | what |
| --- | --- | --- |
| about | [bytes] uint8 | the JSON text of `About` |
| codes | [configs, parameters] uint8 | the configs, in the grid's order |
| failures | [configs] uint8 | 0 for a config that ran, else 1 + its place in `about.failure_classes` |
| details | [configs] uint16 | of a failed config: its place in `about.failure_details` |
| num_samples, samples_us | [configs] uint16, [all samples] float32 | of each config in turn, as they were taken |
| sample_rounds, sample_batches | [all samples] uint8, uint16 | of a sample: its round, 0 for a first run; its batch |
| num_again, again_us | [configs] uint16, [all samples] float32 | the finalists once more, in a fresh process |
| is_early_cut | [configs] bool | only the first run's samples, because they were hopeless |
| compile_s, wall_s | [configs] float32 | compiling all kernels of a config; running, checking and sampling it |
| n_regs, n_spills, shared_bytes | [configs] int32 | what the compiler says, the largest of the config's kernels |
| max_error, wrong_share | [configs] float32 | the output against the reference |
| batch_time_s, sm_clock_mhz, temperature_c, power_w | [batches] float64, float32 | what was read after each batch |
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from agnitra_lab.contracts.base import Contract, Positive
from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.errors import UsageError

_LEAST_US = 0.001
_MOST_BYTES = 512 * 2**20
_INTEGERS = ("codes", "failures", "details", "num_samples", "sample_rounds", "sample_batches", "num_again")
_FEATURES = ("n_regs", "n_spills", "shared_bytes")
_PER_CONFIG = ("compile_s", "wall_s", *_FEATURES, "max_error", "wrong_share", "is_early_cut", "num_again")
_PER_SAMPLE = ("sample_rounds", "sample_batches")
_PER_BATCH = ("batch_time_s", "sm_clock_mhz", "temperature_c", "power_w")
_NEEDED = ("codes", "failures", "details", "num_samples", "samples_us")
_HINT = "`agnitra landscape pack` makes such a file of a recording; `agnitra landscape show` lists those that are here."


class About(Contract):
    """What was recorded, where and how."""

    schema_version: Literal["agnitra.landscape.v2"] = "agnitra.landscape.v2"
    template: str
    shape: tuple[int, ...]
    dtype: str
    device: DeviceInfo
    versions: dict[str, str]
    command: str
    timing: str
    """How one sample was taken, in words."""
    params: dict[str, tuple[int, ...]]
    failure_classes: tuple[str, ...]
    failure_details: tuple[str, ...] = ()
    baselines_us: dict[str, tuple[Positive, ...]] = Field(default_factory=dict)
    """Samples of what a kernel is compared with: "eager", and "copy" for a device copy of as many bytes."""
    recorded_at: str | None = None


class Row(NamedTuple):
    """One config that ran."""

    params: dict[str, int]
    samples_us: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class LandscapeFile:
    """A landscape's arrays, checked.

    Attributes:
        about: what was recorded.
        arrays: name -> array, as the module's table says, without `about`.

    Raises:
        UsageError: when the arrays do not fit together, lie outside of the grid, or hold times that are none.
    """

    about: About
    arrays: Mapping[str, NDArray[Any]]

    def __post_init__(self) -> None:
        problem = _problem(self.about, self.arrays)
        if problem is not None:
            raise UsageError(f"Not a landscape: {problem}.", hint=_HINT)
        ends = np.cumsum(self.arrays["num_samples"], dtype=np.int64)
        object.__setattr__(self, "_ends", ends)
        again = self.arrays.get("num_again", np.zeros(len(ends), dtype=np.int64))
        object.__setattr__(self, "_again_ends", np.cumsum(again, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.arrays["codes"])

    @property
    def device(self) -> DeviceInfo:
        """Where it was recorded."""
        return self.about.device

    @property
    def versions(self) -> dict[str, str]:
        """Versions of what compiled and ran the kernels."""
        return self.about.versions

    @property
    def rows(self) -> Iterator[Row]:
        """The configs that ran, with their samples."""
        for index in np.flatnonzero(self.arrays["failures"] == 0).tolist():
            yield Row(self.params_of(index), tuple(self.samples_us(index).tolist()))

    def params_of(self, index: int) -> dict[str, int]:
        """Return a config's parameters."""
        codes = self.arrays["codes"][index].tolist()
        return {name: values[code] for (name, values), code in zip(self.about.params.items(), codes, strict=True)}

    def samples_us(self, index: int) -> NDArray[np.float64]:
        """Return a config's samples, none for one that failed."""
        ends: NDArray[np.int64] = self.__dict__["_ends"]
        start = ends[index - 1] if index else 0
        return _as_taken(self.arrays["samples_us"][start : ends[index]])

    def again_us(self, index: int) -> NDArray[np.float64]:
        """Return what a finalist's second measurement gave, none for all others."""
        ends: NDArray[np.int64] = self.__dict__["_again_ends"]
        start = ends[index - 1] if index else 0
        return _as_taken(self.arrays.get("again_us", np.zeros(0))[start : ends[index]])

    def finalists(self) -> list[int]:
        """Return the configs that were measured again."""
        counts = self.arrays.get("num_again")
        return [] if counts is None else np.flatnonzero(counts).tolist()

    def failure_of(self, index: int) -> tuple[str, str] | None:
        """Return the class and the text of a config's failure; None for one that ran."""
        code = int(self.arrays["failures"][index])
        if code == 0:
            return None
        return self.about.failure_classes[code - 1], self.about.failure_details[int(self.arrays["details"][index])]

    def known(self, name: str, index: int) -> float | None:
        """Return one fact of a config, such as "compile_s" or "n_regs"; None where it was not recorded."""
        column = self.arrays.get(name)
        value = float(str(column[index])) if column is not None else -1.0  # 0.3, not 0.30000001192092896
        return value if value >= 0 else None

    def features_of(self, index: int) -> dict[str, float]:
        """Return what the compiler says of a config: registers, spills and shared memory, as far as it was recorded."""
        found = {name: self.known(name, index) for name in _FEATURES}
        return {name: value for name, value in found.items() if value is not None}

    def file_name(self) -> str:
        """Return `<template>__<shape>__<dtype>__<device>.npz`."""
        about = self.about
        slug = re.sub(r"[^a-z0-9]+", "-", about.device.name.lower()).strip("-")
        return f"{about.template}__{'x'.join(map(str, about.shape))}__{about.dtype}__{slug}.npz"

    def to_bytes(self) -> bytes:
        """Return the file: the same bytes for the same landscape."""
        text = np.frombuffer(self.about.to_json(indent=None).encode(), dtype=np.uint8)
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"about": text, **self.arrays}
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()


def read(path: Path) -> LandscapeFile:
    """Read a landscape.

    Raises:
        UsageError: for a missing, truncated, foreign or inconsistent file, with what is wrong in it.
    """
    try:
        with path.open("rb") as file:
            return _parse(file)
    except OSError as error:
        hint = "refine.replay.find(template) gives the path of a recorded one."
        raise UsageError(f"The landscape {path} cannot be read: {error.strerror or error}.", hint=hint) from error
    except UsageError as error:
        raise UsageError(f"{path} is no recorded landscape. {error.message}", hint=error.hint or _HINT) from error
    except (ValueError, KeyError, EOFError, MemoryError, NotImplementedError, RuntimeError, struct.error) as error:
        reason = "its arrays are pickled objects" if "pickle" in str(error).lower() else f"{error}" or "it is torn"
        raise UsageError(f"{path} is no recorded landscape: {reason}.", hint=_HINT) from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} is no recorded landscape: it is torn or no npz ({error}).", hint=_HINT) from error


def _parse(file: Any) -> LandscapeFile:
    with zipfile.ZipFile(file) as archive:
        num_bytes = sum(member.file_size for member in archive.infolist())
    if num_bytes > _MOST_BYTES:
        raise ValueError(f"it unpacks to {num_bytes / 2**20:.0f} MB, more than the {_MOST_BYTES // 2**20} MB of any")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    text = arrays.pop("about", None)
    if text is None or text.dtype != np.uint8:
        raise ValueError("it has no metadata")
    return LandscapeFile(About.from_json(text.tobytes()), arrays)


def _as_taken(samples_us: NDArray[Any]) -> NDArray[np.float64]:
    """Undo what float32 added: samples are taken to the nanosecond."""
    taken: NDArray[np.float64] = samples_us.astype(np.float64)
    return taken.round(3)


def _problem(about: About, arrays: Mapping[str, NDArray[Any]]) -> str | None:
    missing = [name for name in _NEEDED if name not in arrays]
    if missing:
        return f"it has no array {missing[0]}"
    unknown = sorted(set(arrays) - {*_NEEDED, *_PER_CONFIG, *_PER_SAMPLE, *_PER_BATCH, "again_us"})
    if unknown:
        return f"it has an array {unknown[0]!r} that none has"
    for name, array in arrays.items():
        if array.dtype.kind not in ("ui" if name in _INTEGERS else "uifb"):
            return f"{name} holds {array.dtype}"
    return _shape_problem(about, arrays) or _grid_problem(about, arrays) or _time_problem(arrays)


def _shape_problem(about: About, arrays: Mapping[str, NDArray[Any]]) -> str | None:
    num_configs = len(arrays["codes"]) if arrays["codes"].ndim else 0
    num_samples = int(arrays["num_samples"].sum(dtype=np.int64))
    wanted: dict[str, tuple[int, ...]] = {
        "codes": (num_configs, len(about.params)),
        **dict.fromkeys(("failures", "details", "num_samples", *_PER_CONFIG), (num_configs,)),
        **dict.fromkeys(("samples_us", *_PER_SAMPLE), (num_samples,)),
        "again_us": (int(arrays.get("num_again", np.zeros(1)).sum(dtype=np.int64)),),
    }
    if "batch_time_s" in arrays:
        wanted |= dict.fromkeys(_PER_BATCH, (len(arrays["batch_time_s"]),))
    for name, array in arrays.items():
        if array.shape != wanted.get(name, array.shape):
            return f"{name} has the shape {array.shape} where {wanted[name]} is expected"
    return None


def _grid_problem(about: About, arrays: Mapping[str, NDArray[Any]]) -> str | None:
    codes, failures, details = arrays["codes"], arrays["failures"], arrays["details"]
    lengths = np.array([len(values) for values in about.params.values()], dtype=np.int64)
    outside = np.flatnonzero(((codes >= lengths) | (codes < 0)).any(axis=1))
    if len(outside):
        return f"config {outside[0]} lies outside of the grid of params: {codes[outside[0]].tolist()}"
    if len(np.unique(codes, axis=0)) != len(codes):
        return "a config occurs twice"
    is_failed = failures != 0
    if (failures > len(about.failure_classes)).any() or (details[is_failed] >= len(about.failure_details)).any():
        return "a config failed in a way that the metadata does not list"
    if not len(codes) or is_failed.all():
        return "no config ran"
    return None


def _time_problem(arrays: Mapping[str, NDArray[Any]]) -> str | None:
    for name in ("samples_us", "again_us"):
        times = arrays.get(name, np.zeros(0))
        wrong = np.flatnonzero(~(np.isfinite(times) & (times >= _LEAST_US)))
        if len(wrong):
            return f"{name} holds {times[wrong[0]]} at {wrong[0]}, which is no time"
    for name in (*_PER_CONFIG, *_PER_BATCH):
        if name in arrays and not np.isfinite(arrays[name]).all():
            return f"{name} holds a value that is no number"
    ran = arrays["failures"] == 0
    if (arrays["num_samples"][ran] == 0).any() or (arrays["num_samples"][~ran] != 0).any():
        return "a config that ran has no samples, or one that failed has some"
    return None
