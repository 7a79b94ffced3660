"""Record complete landscapes: compile in many processes, measure in one, file each result as it comes.

Compiling runs ahead of measuring, over all landscapes of the plan; measuring takes a landscape's configs as they are
compiled, then all of them in rounds, then the best again in a fresh process. Whatever ends the measuring process ends
one config. A recording goes on where it stopped: the same command with `is_resumed`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agnitra_lab.benchmark.worker import Outcome, Worker
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.errors import AgnitraError, UsageError
from agnitra_lab.loop.compilers import Compilers
from agnitra_lab.loop.landscape_grids import wide_space
from agnitra_lab.refine.landscape_recording import SCHEMA, Lines, Recording, read
from agnitra_lab.refine.landscape_task import Compiled, Target, Task

_JOBS = "agnitra_lab.loop.landscape_jobs"
_START_S, _SCREEN_DEADLINE_S = 120.0, 30.0
_SCREENED_AT_ONCE, _FIRST_SAMPLES = 32, 3
_ROUNDS, _SAMPLES_A_ROUND = 6, 4
_HOPELESS = 5.0
_NUM_FINALISTS, _FINAL_ROUNDS, _FINAL_SAMPLES = 32, 10, 2
_RESERVE_S = 12.0
_MOST_LOST_PROCESSES = 12
TIMING = (
    "CUDA events around one CUDA graph replay of one call; cold L2 (256 MB read before the first event); "
    "interleaved in rounds over all configs"
)


@dataclass(frozen=True)
class RecordSettings:
    """How to record.

    Attributes:
        out: folder of the recordings.
        device: where to measure, as torch names it.
        limit_s: when to stop; what is begun goes on with `is_resumed`.
        num_processes: how many compile.
        is_resumed: go on with the recordings in `out`.
        cache: Triton's disk cache for this recording.
        most_configs: a random sample of so many configs of each landscape; None for all.
        command: what was typed, for the record.
    """

    out: Path
    device: str
    limit_s: float
    num_processes: int
    is_resumed: bool
    cache: Path
    most_configs: int | None = None
    command: str = ""


Event = Callable[[str], None]


class OutOfTimeError(Exception):
    """The limit has come; everything that was measured is on disk."""


def file_name(site: Site) -> str:
    """Return the stem of a landscape's files: `<template>__<shape>__<dtype>`."""
    return f"{site.template}__{'x'.join(map(str, site.shape))}__{site.dtype}"


def record(sites: Sequence[Site], settings: RecordSettings, on_event: Event) -> list[Recording]:
    """Record landscapes, one after the other, until they are done or the limit has come.

    Args:
        sites: what to record.
        settings: how.
        on_event: called with a line for each step.

    Returns:
        The recordings, done or not (`is_done`).

    Raises:
        UsageError: when a recording is there already and is not to be resumed, or is of another device or grid.
        AgnitraError: when the device does not start.
    """
    began_s = time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
    cached = {"TRITON_CACHE_DIR": str(settings.cache)}
    measuring = _Measuring(settings, cached, began_s + settings.limit_s)
    crew: _Crew | None = None
    try:
        device, target = measuring.start()
        on_event(f"{device['name']} after {time.monotonic() - began_s:.1f} s")
        recordings = [_open(site, settings, device) for site in sites]
        crew = _Crew(sites, recordings, target, settings.num_processes, cached)
        for site, recording in zip(sites, recordings, strict=True):
            if not recording.is_done:
                _Sweep(site, recording, measuring, crew, settings, on_event).run()
    except OutOfTimeError:
        on_event(f"stopped at the limit of {settings.limit_s:g} s; go on with --resume")
    finally:
        if crew is not None:
            crew.stop()
        measuring.close()
    for recording in recordings:
        recording.refresh()
    return recordings


def _open(site: Site, settings: RecordSettings, device: dict[str, Any]) -> Recording:
    path = settings.out / f"{file_name(site)}.jsonl"
    space = wide_space(site)
    configs = list(space.configs)
    # In an order of chance, so that good configs come early whatever the grid's order is.
    random.Random(site.key()).shuffle(configs)
    names = list(space.params)
    header = {
        "schema": SCHEMA, "template": site.template, "shape": list(site.shape), "dtype": site.dtype, "device": device,
        "params": {name: list(values) for name, values in space.params.items()},
        "configs": [[config.params[name] for name in names] for config in configs[: settings.most_configs]],
        "timing": TIMING if settings.device.startswith("cuda") else "wall time of a call in Triton's interpreter",
        "command": settings.command, "recorded_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    if not path.exists():
        lines = Lines(path)
        lines.add("header", **header)
        lines.close()
        return read(path)
    if not settings.is_resumed:
        raise UsageError(f"There is a recording {path} already.", hint="Go on with --resume, or give another --out.")
    found = read(path)
    for name in ("template", "shape", "dtype", "params", "configs", "device"):
        if found.header.get(name) != header[name]:
            raise UsageError(
                f"The recording {path} has another {name}, so it cannot be resumed here.",
                hint="Use the device, versions and grid that it began with, or give another --out.",
            )
    # What was running when the last session ended ended with it, through no fault of its own.
    found.begun = None
    return found


class _Measuring:
    """The process that has the GPU, and a second one that waits to measure the finalists."""

    def __init__(self, settings: RecordSettings, env: dict[str, str], deadline_s: float) -> None:
        self._settings, self._env, self._deadline_s = settings, env, deadline_s
        self._worker = Worker(env=env)
        self._spare: Worker | None = None
        self._warming: threading.Thread | None = None
        self.num_lost = 0

    @property
    def left_s(self) -> float:
        """Seconds until the limit."""
        return self._deadline_s - time.monotonic()

    def start(self) -> tuple[dict[str, Any], Target | None]:
        """Start the device, and return what it is and Triton's target."""
        outcome = self._worker.run(f"{_JOBS}:warm", (self._settings.device,), name="start", deadline_s=_START_S)
        if outcome.status != "ok":
            raise AgnitraError(f"The measuring process does not start: {outcome.message}")
        found: tuple[dict[str, Any], Target | None] = outcome.value
        return found

    def run(self, job: str, args: tuple[Any, ...], name: str, deadline_s: float) -> Outcome:
        """Run one job, unless the limit would come first."""
        if self.left_s < _RESERVE_S:
            raise OutOfTimeError
        return self._worker.run(f"{_JOBS}:{job}", args, name=name, deadline_s=min(deadline_s, self.left_s))

    def prepare_spare(self) -> None:
        """Start a fresh process beside the measuring, so that nobody waits for it later."""
        self._drop_spare()
        self._spare = Worker(env=self._env)
        warm = (f"{_JOBS}:warm", (self._settings.device,))
        self._warming = threading.Thread(
            target=self._spare.run, args=warm, kwargs={"name": "spare", "deadline_s": _START_S}, daemon=True
        )
        self._warming.start()

    def run_fresh(self, job: str, args: tuple[Any, ...], name: str, deadline_s: float) -> Outcome:
        """Run one job in the fresh process, and end that process."""
        if self.left_s < _RESERVE_S:
            raise OutOfTimeError
        if self._spare is None or self._warming is None:
            self.prepare_spare()
        assert self._spare is not None and self._warming is not None
        self._warming.join()
        outcome = self._spare.run(f"{_JOBS}:{job}", args, name=name, deadline_s=min(deadline_s, self.left_s))
        self._drop_spare()
        return outcome

    def close(self) -> None:
        """End both processes."""
        self._drop_spare()
        self._worker.close()

    def _drop_spare(self) -> None:
        if self._spare is not None and self._warming is not None:
            self._warming.join()
            self._spare.close()
        self._spare = self._warming = None


class _Crew:
    """What compiles, in the plan's order; each answer becomes a line of its recording.

    Attributes:
        problem: why it stopped before the end, where it did.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        recordings: Sequence[Recording],
        target: Target | None,
        num_processes: int,
        env: dict[str, str],
    ) -> None:
        self._lines = [Lines(recording.path) for recording in recordings]
        # Landscapes of one family share kernels, and only the first to ask for one sees it compiled.
        self._kernel_s = {hash_: s for recording in recordings for hash_, s in recording.kernel_s.items()}
        self.problem: str | None = None
        self._compilers = Compilers(num_processes, env)
        for lines, site, recording in zip(self._lines, sites, recordings, strict=True):
            for config in range(recording.num_configs):
                if config in recording.compiled or config in recording.failures:
                    continue
                if target is None:  # the interpreter compiles nothing
                    lines.add("compiled", i=config, kernels=[])
                    continue
                asked = self._compilers.submit(site, recording.params_of(config), target)
                asked.add_done_callback(partial(self._file, lines, config))

    def stop(self) -> None:
        """Let no further config begin, and end the processes."""
        self._compilers.stop()
        self._compilers.join()
        for lines in self._lines:
            lines.close()

    def _file(self, lines: Lines, config: int, asked: Future[Outcome]) -> None:
        if asked.cancelled() or self.problem is not None:
            return
        outcome = asked.result()
        compiled: Compiled | None = outcome.value
        if outcome.status == "error":  # what a compiler raises is an answer; this came from around it
            self.problem = outcome.message
            self._compilers.stop()
            return
        if compiled is not None and compiled.kernels:
            self._kernel_s |= {k.hash: round(k.compile_s, 4) for k in compiled.kernels if k.compile_s is not None}
            kernels = [[k.name, k.hash, self._kernel_s.get(k.hash), k.shared_bytes] for k in compiled.kernels]
            lines.add("compiled", i=config, kernels=kernels)
            return
        detail = compiled.detail if compiled is not None else f"{outcome.status}: {outcome.message}"
        failure = "timeout" if outcome.status == "timeout" else "compile"
        lines.add("failed", i=config, failure=failure, detail=detail)


class _Sweep:
    """One landscape, from the first config that is compiled to the finalists."""

    def __init__(
        self, site: Site, recording: Recording, measuring: _Measuring, crew: _Crew, settings: RecordSettings,
        on_event: Event,
    ) -> None:  # fmt: skip
        self._task = Task(site, settings.device, recording.path)
        self._recording, self._measuring, self._crew = recording, measuring, crew
        self._on_event = on_event
        self._lines = Lines(recording.path)

    def run(self) -> None:
        """Measure everything that is left of this landscape."""
        began_s = time.monotonic()
        recording = self._recording
        self._measuring.prepare_spare()
        self._screen()
        screened_s = time.monotonic() - began_s
        self._rounds()
        self._finals()
        if not recording.baselines:
            self._measuring.run("baselines", (self._task,), "baselines", _SCREEN_DEADLINE_S)
        self._lines.add("done")
        recording.refresh()
        self._lines.close()
        best_us = min(map(recording.median_us, recording.ready), default=float("nan"))
        num_recompiled = sum(ready.num_recompiled for ready in recording.ready.values())
        self._on_event(
            f"{self._task.site.key()}: {len(recording.ready)} ok, {len(recording.failures)} failed, best "
            f"{best_us:.2f} us; screened in {screened_s:.1f} s, done in {time.monotonic() - began_s:.1f} s, "
            f"{num_recompiled} compiled again, {self._measuring.left_s:.0f} s left"
        )

    def _screen(self) -> None:
        recording = self._recording
        while True:
            recording.refresh()
            waiting = recording.waiting()[:_SCREENED_AT_ONCE]
            if waiting:
                args = (self._task, self._items(waiting), _FIRST_SAMPLES)
                self._settle(self._measuring.run("screen", args, "screen", _SCREEN_DEADLINE_S))
            elif len(recording.compiled.keys() | recording.failures.keys()) >= recording.num_configs:
                return
            elif self._crew.problem is not None:
                raise AgnitraError(f"The compiling processes do not get on: {self._crew.problem}")
            elif self._measuring.left_s < _RESERVE_S:
                raise OutOfTimeError
            else:
                time.sleep(0.05)

    def _rounds(self) -> None:
        recording = self._recording
        if not recording.ready:
            return
        medians = {config: recording.median_us(config) for config in recording.ready}
        hopeful = [config for config, us in medians.items() if us <= _HOPELESS * min(medians.values())]
        for number in range(1, _ROUNDS + 1):
            for is_careful in (False, True):
                left = [c for c in hopeful if c in recording.ready and number not in recording.samples[c]]
                if not left:
                    break
                random.Random(number).shuffle(left)
                sampled_s = sum(medians[config] + 500 for config in left) * _SAMPLES_A_ROUND / 1e6
                args = (self._task, self._items(left), number, _SAMPLES_A_ROUND, is_careful)
                self._settle(self._measuring.run("sweep", args, f"round {number}", 30.0 + 20 * sampled_s))

    def _finals(self) -> None:
        recording = self._recording
        best = sorted(recording.ready, key=recording.median_us)[:_NUM_FINALISTS]
        if not best or all(config in recording.again for config in best):
            return
        args = (self._task, self._items(best), _FINAL_ROUNDS, _FINAL_SAMPLES)
        outcome = self._measuring.run_fresh("finals", args, "finals", _START_S)
        if outcome.status != "ok":
            self._on_event(f"{self._task.site.key()}: the finalists were not measured again: {outcome.message}")
        recording.refresh()

    def _settle(self, outcome: Outcome) -> None:
        """File the config that ended the process, if one did."""
        recording = self._recording
        recording.refresh()
        if outcome.status == "ok":
            return
        if self._measuring.left_s < _RESERVE_S:
            raise OutOfTimeError
        lost = recording.begun
        if lost is not None:
            failure = {"timeout": "timeout", "out_of_memory": "oom"}.get(outcome.status, "launch")
            self._lines.add("failed", i=lost, failure=failure, detail=f"{outcome.status}: {outcome.message}"[:300])
            recording.refresh()
        self._measuring.num_lost += 1
        name = recording.params_of(lost) if lost is not None else "no config"
        self._on_event(f"{self._task.site.key()}: {outcome.status} at {name}: {outcome.message}"[:300])
        if self._measuring.num_lost > _MOST_LOST_PROCESSES or (lost is None and outcome.status == "error"):
            raise AgnitraError(f"The measuring process does not get on: {outcome.message}\n{outcome.stderr_tail}")

    def _items(self, configs: Sequence[int]) -> list[tuple[int, dict[str, int]]]:
        return [(config, self._recording.params_of(config)) for config in configs]
