"""A landscape while it is recorded: one JSON line for each thing that happened, appended, so that a kill loses nothing.

The first line says what is recorded and names every config; a later line names a config by its place there.

| kind | what it says |
| --- | --- |
| compiled | a config's kernels with the seconds that each took, or why there are none |
| begin | a config is about to run: what has no answer after it ended the process |
| ready, failed | it ran and gave the right values, with the first samples; or the class of its failure |
| samples, again | more samples of one round; samples of the finalists in a fresh process |
| clocks | what the device's sensors said beside a batch of samples |
| baseline | samples of something to compare with, such as the eager reference |
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from agnitra_lab.errors import UsageError

SCHEMA = "agnitra.landscape-recording.v1"
FailureClass = Literal["compile", "launch", "oom", "timeout", "wrong", "constraint"]
FAILURE_CLASSES: tuple[str, ...] = get_args(FailureClass)
FIRST_ROUND = 0
"""The samples that were taken when a config first ran; those of later rounds are interleaved with all the others."""


class Lines:
    """Appends lines to a file that other processes append to as well: each line is one write."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, kind: str, **fields: Any) -> None:
        """Append one line."""
        text = json.dumps({"kind": kind, **fields}, separators=(",", ":"), allow_nan=False)
        os.write(self._descriptor, text.encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


@dataclass
class Ready:
    """What the first run of a config gave."""

    n_regs: int
    n_spills: int
    shared_bytes: int
    max_error: float | None
    wrong_share: float
    wall_s: float
    num_recompiled: int


@dataclass
class Batch:
    """What was read beside a batch of samples; None is what the driver does not say."""

    time_s: float
    sm_clock_mhz: float | None
    temperature_c: float | None
    power_w: float | None


@dataclass
class Recording:
    """What the lines of one file say so far.

    Attributes:
        header: the first line.
        compile_s: config -> seconds of all its kernels; NaN where a kernel was in the cache from before.
        kernels: config -> (name, hash) of its kernels.
        ready, failures: config -> how it went; a config is in one of them once it has run.
        samples: config -> round -> (batch, samples in microseconds).
        again: config -> samples in microseconds, of the fresh process.
        wall_s: config -> seconds that measuring it took, all rounds.
        batches: what the sensors said.
        baselines: name -> samples in microseconds.
        begun: the config that began last, when it has no answer yet.
        num_unreadable: lines that are no JSON: the torn end of a killed process.
    """

    path: Path
    header: dict[str, Any] = field(default_factory=dict)
    kernel_s: dict[str, float] = field(default_factory=dict)
    compiled: dict[int, list[tuple[str, str, int]]] = field(default_factory=dict)
    ready: dict[int, Ready] = field(default_factory=dict)
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    samples: dict[int, dict[int, tuple[int, list[float]]]] = field(default_factory=dict)
    again: dict[int, list[float]] = field(default_factory=dict)
    wall_s: dict[int, float] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    baselines: dict[str, list[float]] = field(default_factory=dict)
    begun: int | None = None
    is_done: bool = False
    num_unreadable: int = 0
    _offset: int = 0

    def refresh(self) -> None:
        """Read what was appended since the last time; a line without its end is left for the next time."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                fields = json.loads(line)
                self._take(fields.pop("kind"), fields)
            except (ValueError, KeyError, TypeError, AttributeError):
                self.num_unreadable += 1

    @property
    def num_configs(self) -> int:
        """How many configs the header names."""
        return len(self.header.get("configs", ()))

    def params_of(self, config: int) -> dict[str, int]:
        """Return a config's parameters."""
        return dict(zip(self.header["params"], self.header["configs"][config], strict=True))

    def compile_s_of(self, config: int) -> float | None:
        """Return what compiling a config cost, all its kernels; None where that is not known."""
        kernels = self.compiled.get(config)
        if kernels is None or any(hash_ not in self.kernel_s for _, hash_, _ in kernels):
            return None
        return sum(self.kernel_s[hash_] for _, hash_, _ in kernels)

    def waiting(self) -> list[int]:
        """Return the configs that are compiled and have not run."""
        return [config for config in self.compiled if config not in self.ready and config not in self.failures]

    def median_us(self, config: int) -> float:
        """Return the median of all samples of a config that ran."""
        values = sorted(value for _, taken in self.samples[config].values() for value in taken)
        return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2

    def _take(self, kind: str, fields: dict[str, Any]) -> None:
        take = getattr(self, f"_take_{kind}", None)
        if take is None:
            self.num_unreadable += 1
            return
        take(**fields)

    def _take_header(self, **fields: Any) -> None:
        self.header = fields

    def _take_compiled(self, i: int, kernels: Sequence[tuple[str, str, float | None, int]]) -> None:
        for _, hash_, seconds, _ in kernels:
            if seconds is not None:
                self.kernel_s.setdefault(hash_, seconds)
        self.compiled[i] = [(name, hash_, shared) for name, hash_, _, shared in kernels]

    def _take_begin(self, i: int) -> None:
        self.begun = i

    def _take_ready(self, i: int, us: list[float], b: int, **fields: Any) -> None:
        self.begun = None
        self.ready[i] = Ready(**fields)
        self._take_samples(i, FIRST_ROUND, b, us, self.ready[i].wall_s)

    def _take_failed(self, i: int, failure: str, detail: str) -> None:
        self.begun = None
        self.failures[i] = (failure if failure in FAILURE_CLASSES else "launch", detail)
        self.ready.pop(i, None)

    def _take_samples(self, i: int, round: int, b: int, us: list[float], s: float) -> None:  # noqa: A002
        self.samples.setdefault(i, {})[round] = (len(self.batches) + b, us)
        self.wall_s[i] = self.wall_s.get(i, 0.0) + s
        self.begun = None

    def _take_again(self, i: int, us: list[float]) -> None:
        self.again.setdefault(i, []).extend(us)
        self.begun = None

    def _take_clocks(self, t: float, mhz: float | None, c: float | None, w: float | None) -> None:
        self.batches.append(Batch(t, mhz, c, w))

    def _take_baseline(self, name: str, us: list[float]) -> None:
        self.baselines[name] = us

    def _take_done(self) -> None:
        self.is_done = True


def read(path: Path) -> Recording:
    """Read a recording.

    Raises:
        UsageError: for a missing file, or one that does not begin with a header.
    """
    recording = Recording(path)
    try:
        recording.refresh()
    except OSError as error:
        raise UsageError(f"The recording {path} cannot be read: {error.strerror or error}.") from error
    if recording.header.get("schema") != SCHEMA:
        raise UsageError(f"{path} is no recording of a landscape: its first line is no header of {SCHEMA}.")
    return recording
