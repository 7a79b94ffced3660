"""The suite's run: each workload in a process of its own, each result filed as it comes, until the time is up."""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from agnitra_lab.benchmark.worker import Outcome, Worker
from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.suite import SuiteAssignment, SuiteResult
from agnitra_lab.device import info
from agnitra_lab.errors import UsageError
from agnitra_lab.loop import preflight, suite_devices, suite_filing, suite_table
from agnitra_lab.loop.suite_baselines import KNOWN_MODES, MODES
from agnitra_lab.loop.suite_devices import Seat
from agnitra_lab.runs import provenance
from agnitra_lab.runs.store import Run, RunStore
from agnitra_lab.workloads.suite import SCALES, SUITE, Family, default_scale
from agnitra_lab.workloads.target import called, family_of, own_name, table_facts

_JOB = "agnitra_lab.loop.suite_workload:measure"
# What a workload takes at least (or a tenth of a shorter limit); where less is left, none is started.
_LEAST_S = 45.0
# Beyond its own time limit a process that cannot even end itself is ended from here.
_GRACE_S = 15.0
_CANCEL_TICK_S = 0.1


@dataclass(frozen=True)
class SuiteSettings:
    """Everything that steers a run of the suite.

    Attributes:
        names: workloads of the suite, or targets of one's own (FILE.py:FUNCTION, package.module:FUNCTION), which say
            for themselves how large they are; empty for all of the suite.
        family: keep one family.
        shard: (i, n): keep the i-th of n parts, i from 1.
        scale: of the workloads, by default what fits the device.
        device: "cuda" or "cpu", by default CUDA where there is one.
        modes: of torch.compile, by default those that differ on the device.
        budget_s: for compiling one optimisation.
        timing_s: for the loop that times the sides of one workload.
        timeout_s: when to give one workload up; waiting for the device does not count.
        limit_s: when to stop; what is left is named, and `resume` goes on with it.
        num_jobs: workloads at once on one device.
        num_devices: devices of one kind to spread over; each workload sees one of them.
        warm_cache: folder with compiled code of earlier runs; None compiles each side cold.
        is_controlled: check all of torch.compile's modes against eager, not only the fastest.
        resume: a run id, or "latest": skip what it has finished, file the rest there.
        is_retrying: with `resume`, run again what failed.
        artifacts: folder of the runs.
        command: for the record.
    """

    names: tuple[str, ...] = ()
    family: str | None = None
    shard: tuple[int, int] = (1, 1)
    scale: str | None = None
    device: str | None = None
    modes: tuple[str, ...] | None = None
    budget_s: float = 60.0
    timing_s: float = 12.0
    timeout_s: float = 240.0
    limit_s: float = 520.0
    num_jobs: int = 1
    num_devices: int = 1
    warm_cache: Path | None = None
    is_controlled: bool = False
    resume: str | None = None
    is_retrying: bool = False
    artifacts: Path | str = "artifacts"
    command: str = "agnitra suite run"

    def public(self) -> dict[str, Any]:
        """Return what is written down of it."""
        hidden = ("artifacts", "command", "warm_cache")
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if name not in hidden
        } | {"is_cache_warm": self.warm_cache is not None}


@dataclass
class SuiteRun:
    """How a run of the suite stands.

    Attributes:
        directory: of the run.
        filed: every result in it, those of earlier invocations included.
        left: workloads that were chosen and not finished.
    """

    directory: Path
    filed: list[suite_table.Filed]
    left: list[str] = field(default_factory=list)


def run_suite(
    settings: SuiteSettings,
    *,
    on_start: Callable[[DeviceInfo, Path, Sequence[str]], None] | None = None,
    on_result: Callable[[SuiteResult], None] | None = None,
    job: str = _JOB,
) -> SuiteRun:
    """Run workloads of the suite until all are done or the time is up, and file each result as it comes.

    Args:
        settings: what to run and how.
        on_start: called once with the device, the run's directory and the names that will run.
        on_result: called after each workload; from one thread at a time.
        job: what each process does with its `SuiteAssignment`.

    Raises:
        UsageError: unknown names, or settings that do not go together; nothing was run.
        MissingError: there is no such device, or no C++ compiler.
        RunStoreError: the artifacts folder cannot be written, or there is no run to resume.
    """
    started_s = time.monotonic()
    names = select(settings)
    store = RunStore(settings.artifacts)
    preflight.check_machine(store)
    device = settings.device or info.default_device()
    if settings.num_jobs * settings.num_devices > 1 and not device.startswith("cuda"):
        raise UsageError(
            f"{settings.num_jobs * settings.num_devices} jobs at once on a CPU would time each other's compiling.",
            hint="Leave out --jobs and --devices.",
        )
    facts, seats = suite_devices.describe(device, settings.num_devices)
    scale = settings.scale or default_scale(device)
    run, done = suite_filing.open_run(store, settings.resume, scale, facts, is_retrying=settings.is_retrying)
    directory = run.directory(suite_filing.CATEGORY)
    todo = [name for name in names if called(name) not in done]
    if on_start:
        on_start(facts, directory, todo)
    with tempfile.TemporaryDirectory(prefix="agnitra-suite-", ignore_cleanup_errors=True) as scratch:
        crew = _Crew(settings, run, facts, device, scale, Path(scratch), started_s + settings.limit_s, job, on_result)
        left = crew.work(todo, seats)
    filed = suite_table.read_results(directory, [])
    suite_filing.finish(run, filed, left, device=facts, command=settings.command, config=settings.public())
    return SuiteRun(directory, filed, left)


def select(settings: SuiteSettings) -> list[str]:
    """Choose workloads by name, family and shard, in the order given, or of the suite.

    Raises:
        UsageError: for what is unknown, with what is known; or when nothing is chosen.
    """
    unknown = [name for name in settings.names if name not in SUITE and own_name(name) is None]
    if unknown:
        hint = f"Known: {', '.join(SUITE)}. One of your own: FILE.py:FUNCTION."
        raise UsageError(f"Unknown suite workload {unknown[0]!r}.", hint=hint)
    first: dict[str, str] = {}
    for name in settings.names:
        if first.setdefault(called(name), name) != name:
            raise UsageError(
                f"{first[called(name)]} and {name} would both be called {called(name)}.",
                hint="Run them apart, or rename one's file.",
            )
    for what, given, known in (("scale", settings.scale, SCALES), ("family", settings.family, get_args(Family))):
        if given is not None and given not in known:
            raise UsageError(f"Unknown {what} {given!r}.", hint=f"Known: {', '.join(known)}.")
    for mode in settings.modes or ():
        if mode not in KNOWN_MODES:
            raise UsageError(f"Unknown torch.compile mode {mode!r}.", hint=f"Known: {', '.join(KNOWN_MODES)}.")
    part, num_parts = settings.shard
    if not 1 <= part <= num_parts:
        raise UsageError(f"Shard {part}/{num_parts} is not one.", hint="Give i/n with i from 1 to n, such as 2/4.")
    named = dict.fromkeys(settings.names or SUITE)
    chosen = [name for name in named if settings.family in (None, family_of(name))][part - 1 :: num_parts]
    if not chosen:
        raise UsageError("No workload of the suite is chosen.", hint="See them: agnitra suite list")
    return chosen


class _Crew:
    """The threads that each see one process after another through a workload."""

    def __init__(
        self, settings: SuiteSettings, run: Run, facts: DeviceInfo, device: str, scale: str, scratch: Path,
        ends_s: float, job: str, on_result: Callable[[SuiteResult], None] | None,
    ) -> None:  # fmt: skip
        self.settings, self.run, self.facts, self.device, self.scale = settings, run, facts, device, scale
        self.scratch, self.ends_s, self.job, self.on_result = scratch, ends_s, job, on_result
        self.modes = settings.modes if settings.modes is not None else MODES[facts.type]
        self.lock = threading.Lock()
        self.workers: list[Worker] = []
        self.todo: list[str] = []
        self.finished: set[str] = set()
        self.taken_s: list[float] = []
        self.is_cancelled = False

    def work(self, names: Sequence[str], seats: Sequence[Seat]) -> list[str]:
        """Go through the workloads, `num_jobs` at once at each seat; return those that are left."""
        self.todo = list(names)
        # Every device gets its first workload before one gets its second.
        taken = [seat for _ in range(self.settings.num_jobs) for seat in seats][: max(len(names), 1)]
        with ThreadPoolExecutor(len(taken), thread_name_prefix="suite") as pool:
            futures = [pool.submit(self._go_on, seat) for seat in taken]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self._cancel(futures)
                raise
        return [name for name in names if name not in self.finished]

    def _go_on(self, seat: Seat) -> None:
        while True:
            with self.lock:
                if self.is_cancelled or not self.todo or self._is_late():
                    return
                name = self.todo.pop(0)
            result = self._measure(name, seat)
            if result is None:
                continue
            with self.lock:
                self.taken_s.append(result.wall_s)
                suite_filing.file_result(self.run, result)
                self.finished.add(name)
                if self.on_result:
                    self.on_result(result)

    def _measure(self, name: str, seat: Seat) -> SuiteResult | None:
        """Run one workload in a process of its own; None where the time was up before it was done."""
        settings, started_s = self.settings, time.monotonic()
        with tempfile.TemporaryDirectory(prefix="workload-", dir=self.scratch, ignore_cleanup_errors=True) as scratch:
            given = SuiteAssignment(
                name=name, scale=self.scale, device=self.device, modes=self.modes, budget_s=settings.budget_s,
                timing_s=settings.timing_s, timeout_s=settings.timeout_s, turns_file=self.scratch / seat.turns_file,
                scratch=Path(scratch), is_cache_warm=settings.warm_cache is not None,
                is_controlled=settings.is_controlled, num_jobs=settings.num_jobs, command=settings.command,
            )  # fmt: skip
            # Turns at the device come from each of the other processes in the worst case.
            most_s = settings.num_jobs * settings.timeout_s + _GRACE_S
            deadline_s = max(min(most_s, self._remaining_s()), 0.1)
            with Worker(env=self._environment(Path(scratch), seat)) as worker:
                self.workers.append(worker)
                try:
                    outcome = worker.run(self.job, (given,), name=name, deadline_s=deadline_s)
                finally:
                    self.workers.remove(worker)
        if outcome.status == "ok":
            return outcome.value
        is_cut_short = outcome.status == "timeout" and deadline_s < most_s
        if is_cut_short or self.is_cancelled:
            return None
        return self._failed(name, outcome, time.monotonic() - started_s)

    def _failed(self, name: str, outcome: Outcome, wall_s: float) -> SuiteResult:
        is_timeout = outcome.status == "timeout" or (outcome.status == "crash" and outcome.exit_signal == "SIGTERM")
        limit = f"timeout: not done after {self.settings.timeout_s:g} s of its own"
        if outcome.stderr_tail.strip():
            suite_filing.file_log(self.run, called(name), outcome.stderr_tail)
        return SuiteResult(
            **table_facts(name, self.scale), status="failed",
            error=limit if is_timeout else f"{outcome.status}: {outcome.message}"[:1000],
            device=self.facts, is_cache_warm=self.settings.warm_cache is not None, num_jobs=self.settings.num_jobs,
            wall_s=wall_s, command=self.settings.command, generated_at=provenance.utc_now(),
        )  # fmt: skip

    def _environment(self, scratch: Path, seat: Seat) -> dict[str, str]:
        caches = self.settings.warm_cache or scratch / "caches"
        num_processes = self.settings.num_jobs * self.settings.num_devices
        num_threads = max((os.cpu_count() or 1) // num_processes, 1)
        return {
            **seat.environment,
            "TORCHINDUCTOR_CACHE_DIR": str(Path(caches).resolve() / "inductor"),
            "TRITON_CACHE_DIR": str(Path(caches).resolve() / "triton"),
            # Each process would otherwise start as many compilers as there are cores.
            **({"TORCHINDUCTOR_COMPILE_THREADS": str(num_threads)} if num_processes > 1 else {}),
        }

    def _remaining_s(self) -> float:
        return self.ends_s - time.monotonic()

    def _is_late(self) -> bool:
        """Tell whether another workload would hardly be done in time, as those before it went."""
        least_s = min(_LEAST_S, self.settings.limit_s / 10)
        return self._remaining_s() < max(least_s, statistics.median(self.taken_s) if self.taken_s else 0.0)

    def _cancel(self, futures: Sequence[Future[None]]) -> None:
        """End the processes that are still at work, so that the threads that wait for them come back."""
        self.is_cancelled = True
        while not all(future.done() for future in futures):
            for pid in [worker.pid for worker in self.workers]:
                if pid is not None:
                    with suppress(OSError):
                        os.killpg(pid, signal.SIGKILL)
            time.sleep(_CANCEL_TICK_S)
