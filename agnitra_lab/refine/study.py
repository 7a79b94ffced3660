"""The ask/tell core: configs out, measurements in, in any order, with every step in a ledger.

    study = Study(space, sampler="rl", siblings=(...,))
    for config in study.ask(4):
        study.tell(config, 0.12)            # or a Measurement, or None for a failure

The study knows what was asked and told, so no sampler proposes a config twice, and no sampler sees a config that is
not valid. What others measured is attached: it teaches the sampler and is not asked for again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.search import (
    ForeignResult,
    KernelConfig,
    Measurement,
    Provenance,
    SearchSpace,
    Trial,
)
from agnitra_lab.errors import SearchError
from agnitra_lab.refine import sampler as samplers
from agnitra_lab.refine.blas_threads import on_one_blas_thread
from agnitra_lab.refine.bound import Bound
from agnitra_lab.refine.ledger import Asked, Attached, FinalMeasured, Ledger, LedgerHeader, Told
from agnitra_lab.refine.moved import moved_siblings
from agnitra_lab.refine.siblings import Sibling, aligned, elsewhere_of, facts_of, hints_of
from agnitra_lab.refine.space import Encoding, space_sha256

StopReason = Literal["budget", "exhausted", "time", "cancelled", "hanging"]


@dataclass(frozen=True)
class Knowledge:
    """What a search knows before its first measurement.

    Attributes:
        seeds: configs to measure first, best first; those that are not in the space are left out.
        siblings: name -> results of the same template at another shape or on another device.
        shapes: name -> shape of those siblings whose shape is known: what suits a shape moves along with it.
        hints: configs that a language model or a preset would choose, best first; they need not be measured first.
        facts: config key -> what the compiler says of it, such as registers, spills and shared memory.
    """

    seeds: Sequence[KernelConfig] = ()
    siblings: Mapping[str, Sequence[ForeignResult]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    hints: Sequence[KernelConfig] = ()
    facts: Mapping[str, Mapping[str, float]] | None = None


NOTHING_KNOWN = Knowledge()


@dataclass(frozen=True)
class LedgerKey:
    """What a ledger's measurements depend on beside the space.

    Attributes:
        device: name of the device, or "recorded: <device>".
        kernel_sha256: of the kernel's source.
        versions: of the compiler, the driver and whatever else the times depend on.
    """

    device: str = ""
    kernel_sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


class Study:
    """One search, asked and told from outside.

    Attributes:
        space: what is searched.
        trials: what was told, in the order of telling.
        attached: what others measured.
        finals: second measurements of finalists.
    """

    @on_one_blas_thread
    def __init__(
        self,
        space: SearchSpace,
        *,
        sampler: str = "rl",
        seed: int = 0,
        knowledge: Knowledge = NOTHING_KNOWN,
        ledger: str | Path | None = None,
        ledger_key: LedgerKey | None = None,
    ) -> None:
        """Begin a search, or go on with the one that the ledger holds.

        Args:
            space: the valid configs.
            sampler: a key of `sampler.SAMPLERS`.
            seed: of the sampler's random numbers; the same seed and answers give the same questions.
            knowledge: what is known before the first measurement.
            ledger: file that every step is written to; one that exists is gone on with.
            ledger_key: what the measurements depend on beside the space.

        Raises:
            SearchError: when the space has no valid config.
            UsageError: for an unknown sampler.
            MissingError: where the package behind the sampler is not installed.
            LedgerError: for a ledger that is corrupt, belongs to another search, or is in use.
        """
        if not space.configs:
            raise SearchError(
                f"The search space of {space.template} at {space.shape} {space.dtype} has no valid config.",
                hint="Widen its parameters or loosen its constraints: nothing was measured.",
            )
        self.space = space
        self.trials: list[Trial] = []
        self.attached: list[Trial] = []
        self.finals: list[Trial] = []
        self._encoding = Encoding(space)
        self._sampler = samplers.make(
            samplers.Problem(
                name=sampler,
                encoding=self._encoding,
                seed=seed,
                siblings=_aligned(knowledge, self._encoding),
                facts=facts_of(knowledge.facts, self._encoding),
            )
        )
        self._queue = [self._encoding.index(config) for config in samplers.valid_seeds(knowledge.seeds, space)][::-1]
        self._is_open = np.ones(len(self._encoding), dtype=bool)
        self._pending: dict[int, None] = {}
        self._reissued: list[int] = []
        self._told_arms: set[int] = set()
        self._elapsed_before_s = 0.0
        self._began = time.perf_counter()
        self._ledger: Ledger | None = None
        if ledger is not None:
            header = _header(space, sampler, seed, knowledge, ledger_key or LedgerKey())
            self._ledger = Ledger(ledger, header)
            self._replay()

    @property
    def pending(self) -> tuple[KernelConfig, ...]:
        """Configs that were asked for and not told yet, in the order of asking."""
        return tuple(self._encoding.configs[arm] for arm in self._pending)

    @property
    def elapsed_s(self) -> float:
        """Since the search began, its earlier lives included."""
        return self._elapsed_before_s + time.perf_counter() - self._began

    @property
    def ranked(self) -> list[Trial]:
        """The trials and attached results that succeeded and were sampled in full, fastest first."""
        measured = (*self.attached, *self.trials)
        whole = [trial for trial in measured if trial.latency_ms is not None and not trial.is_aborted]
        return sorted(whole, key=lambda trial: (trial.latency_ms, trial.index))

    @property
    def best(self) -> Trial | None:
        """The trial or attached result with the lowest latency; None while nothing has succeeded."""
        return next(iter(self.ranked), None)

    @property
    def bound(self) -> Bound:
        """What a measurement may compare its samples with, to end a hopeless one early."""
        best = self.best
        if best is None or best.latency_ms is None:
            return Bound()
        return Bound(best.samples_ms or (best.latency_ms,))

    @property
    def trust(self) -> dict[str, float]:
        """How much the sampler relies on each sibling, 0..1, where it says so."""
        told: Callable[[], dict[str, float]] | None = getattr(self._sampler, "trust", None)
        return told() if told is not None else {}

    @on_one_blas_thread
    def ask(self, num: int = 1, *, is_polish: bool = False) -> list[KernelConfig]:
        """Return up to `num` configs to measure, none of which was asked for or told before.

        After a resume the configs that were in flight come first. The list is empty when every valid config is known.

        Args:
            num: how many are wanted at once.
            is_polish: choose among the configs that differ from the best one in one parameter, while some are open.
        """
        arms = self._reissued[:num]
        del self._reissued[: len(arms)]
        if len(arms) < num:
            fresh = self._asked(num - len(arms), is_polish)
            if fresh and self._ledger is not None:
                keys = tuple(self._encoding.configs[arm].key() for arm in fresh)
                self._ledger.append(Asked(num=num - len(arms), keys=keys, is_polish=is_polish))
            arms += fresh
        return [self._encoding.configs[arm] for arm in arms]

    @on_one_blas_thread
    def tell(self, config: KernelConfig, measured: Measurement | float | None) -> Trial:
        """Take a config's measurement; None and a time that is no latency are failures.

        Raises:
            SearchError: for a config that is not valid, or was told before.
        """
        arm = self._encoding.index(config)
        if arm in self._told_arms:
            raise SearchError(f"{config.key()} was told before.", hint="Attach a second opinion, or measure finals.")
        trial = _trial(len(self.trials), config, as_measurement(measured), self.elapsed_s, "measured")
        if self._ledger is not None:
            self._ledger.append(Told(trial=trial))
        self._told(arm, trial)
        return trial

    @on_one_blas_thread
    def attach(self, results: Iterable[ForeignResult], *, provenance: Provenance = "ledger") -> list[Trial]:
        """Take what others measured of this very space on this very device.

        Configs that are not in the space, or are known already, are left out.

        Args:
            results: the measurements.
            provenance: who made them.

        Returns:
            What was taken.
        """
        taken = []
        for result in results:
            if result.config not in self._encoding:
                continue
            arm = self._encoding.index(result.config)
            if not self._is_open[arm]:
                continue
            given = Measurement(
                latency_ms=result.latency_ms,
                failure=None if result.latency_ms is not None else result.failure or "unknown",
                samples_ms=result.samples_ms,
                is_aborted=result.is_aborted,
            )
            trial = _trial(len(self.attached), result.config, given, self.elapsed_s, provenance)
            if self._ledger is not None:
                self._ledger.append(Attached(trial=trial))
            self._take_foreign(arm, trial)
            taken.append(trial)
        return taken

    def tell_final(self, config: KernelConfig, measured: Measurement | float | None) -> Trial:
        """Take a second measurement of a config; it is for the final choice and teaches the sampler nothing."""
        self._encoding.index(config)
        trial = _trial(len(self.finals), config, as_measurement(measured), self.elapsed_s, "measured")
        if self._ledger is not None:
            self._ledger.append(FinalMeasured(trial=trial))
        self.finals.append(trial)
        return trial

    def close(self) -> None:
        """Release the ledger."""
        if self._ledger is not None:
            self._ledger.close()

    def _asked(self, num: int, is_polish: bool) -> list[int]:
        arms: list[int] = []
        while self._queue and len(arms) < num:
            arm = self._queue.pop()
            if self._is_open[arm]:
                arms.append(arm)
                self._is_open[arm] = False
        if len(arms) < num and self._is_open.any():
            is_open = self._near_best() if is_polish else self._is_open.copy()
            for arm in self._sampler.propose(num - len(arms), is_open):
                if self._is_open[arm]:
                    arms.append(int(arm))
                    self._is_open[arm] = False
        self._pending.update(dict.fromkeys(arms))
        return arms

    def _near_best(self) -> NDArray[np.bool_]:
        """The open arms beside the best one; all that are open where none of those is."""
        best = self.best
        if best is not None:
            near = self._encoding.is_on_same_line(self._encoding.index(best.config)) & self._is_open
            if near.any():
                return near
        return self._is_open.copy()

    def _told(self, arm: int, trial: Trial) -> None:
        is_foreign = arm not in self._pending
        self._pending.pop(arm, None)
        if arm in self._reissued:
            self._reissued.remove(arm)
        self._is_open[arm] = False
        self._told_arms.add(arm)
        self.trials.append(trial)
        self._sampler.learn(_observation(arm, trial, is_foreign=is_foreign))

    def _take_foreign(self, arm: int, trial: Trial) -> None:
        self._is_open[arm] = False
        self.attached.append(trial)
        self._sampler.learn(_observation(arm, trial, is_foreign=True))

    def _replay(self) -> None:
        """Put the sampler through all that the ledger holds, so that its next question is the one it would have been.

        Where the sampler asks otherwise than it did (another linear algebra library rounds otherwise), the ledger's
        word stands: what it says was asked is no longer open.
        """
        assert self._ledger is not None
        for event in self._ledger.events:
            if isinstance(event, Asked):
                self._replay_ask(event)
            elif isinstance(event, Told):
                self._told(self._encoding.index(event.trial.config), event.trial)
            elif isinstance(event, Attached):
                self._take_foreign(self._encoding.index(event.trial.config), event.trial)
            else:
                self.finals.append(event.trial)
        times = [trial.elapsed_s for trial in (*self.trials, *self.attached, *self.finals)]
        self._elapsed_before_s = max(times, default=0.0)
        self._began = time.perf_counter()
        self._reissued = list(self._pending)

    def _replay_ask(self, event: Asked) -> None:
        arms = [self._encoding.arm_of(key) for key in event.keys]
        asked = self._asked(event.num, event.is_polish)
        for arm in set(asked) - set(arms):
            self._is_open[arm] = True
            del self._pending[arm]
        for arm in arms:
            self._is_open[arm] = False
            self._pending.setdefault(arm)


def as_measurement(measured: Measurement | float | None) -> Measurement:
    """Read what a `measure` returned: a plain number is a latency in ms, and only a positive finite one is."""
    if isinstance(measured, Measurement):
        return measured
    if measured is None:
        return Measurement(latency_ms=None, failure="unknown", detail="failed")
    latency_ms = float(measured)
    if not (math.isfinite(latency_ms) and latency_ms > 0):
        return Measurement(latency_ms=None, failure="launch", detail=f"measured {latency_ms} ms, which is no latency")
    return Measurement(latency_ms=latency_ms)


def _aligned(known: Knowledge, encoding: Encoding) -> tuple[Sibling, ...]:
    read = [elsewhere_of(name, rows, encoding, known.shapes.get(name, ())) for name, rows in known.siblings.items()]
    elsewhere = [there for there in read if there is not None]
    hints = hints_of(known.hints, encoding)
    return (
        *moved_siblings(elsewhere, encoding),
        *(aligned(there, encoding) for there in elsewhere),
        *((hints,) if hints is not None else ()),
    )


def _observation(arm: int, trial: Trial, *, is_foreign: bool) -> samplers.Observation:
    return samplers.Observation(
        arm=arm,
        log_ms=None if trial.latency_ms is None else math.log(trial.latency_ms),
        failure=trial.failure,
        is_aborted=trial.is_aborted,
        is_foreign=is_foreign,
    )


def _trial(index: int, config: KernelConfig, given: Measurement, elapsed_s: float, provenance: Provenance) -> Trial:
    return Trial(
        index=index,
        config=config,
        latency_ms=given.latency_ms,
        status="failed" if given.latency_ms is None else "ok",
        detail=given.detail,
        elapsed_s=elapsed_s,
        failure=given.failure,
        samples_ms=given.samples_ms,
        is_aborted=given.is_aborted,
        compile_s=given.compile_s,
        clock_s=given.clock_s,
        provenance=provenance,
    )


def _header(space: SearchSpace, sampler: str, seed: int, known: Knowledge, key: LedgerKey) -> LedgerHeader:
    context = hashlib.sha256(
        json.dumps(
            [
                [config.key() for config in samplers.valid_seeds(known.seeds, space)],
                [config.key() for config in known.hints],
                known.facts,
            ],
            sort_keys=True,
        ).encode()
    )
    for name, results in known.siblings.items():
        context.update(name.encode())
        if name in known.shapes:
            context.update(repr(tuple(known.shapes[name])).encode())
        for result in results:
            context.update(f"{result.config.key()}={result.latency_ms!r}\n".encode())
    return LedgerHeader(
        template=space.template,
        shape=space.shape,
        dtype=space.dtype,
        space_sha256=space_sha256(space),
        kernel_sha256=key.kernel_sha256,
        device=key.device,
        versions=dict(sorted(key.versions.items())),
        sampler=sampler,
        seed=seed,
        context_sha256=context.hexdigest(),
    )
