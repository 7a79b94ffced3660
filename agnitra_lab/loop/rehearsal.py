"""Candidates in a process of their own before they come into this one: they may hang, crash or poison the device there.

What a rehearsal finds right and fast is built once more here, with Inductor's and Triton's caches warm. It costs the
memory of a second model and a second trace, so it is asked for (`Settings.is_isolated`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agnitra_lab.benchmark.worker import Worker
from agnitra_lab.contracts.device import DevicePeaks
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.measurement import CandidateResult
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.device.exclusive import shared_file
from agnitra_lab.loop import handover
from agnitra_lab.patch.candidates import Candidate

_JOB = "agnitra_lab.loop.rehearsal_jobs:rehearse"


@dataclass(frozen=True)
class Part:
    """What the other process needs to know of one rehearsal.

    Attributes:
        file: the workload, as `handover` wrote it.
        candidate: what to build.
        tuned, refused: kernel configs by site, and sites without a kernel; None where no kernel runs.
        timing_s: for the comparison with eager.
        peaks: measured ceilings, for the record.
        turns_file: where processes that share the device take turns.
    """

    file: Path
    candidate: Candidate
    tuned: Mapping[Site, KernelConfig] | None
    refused: Mapping[Site, str]
    timing_s: float
    peaks: DevicePeaks | None
    turns_file: Path | None


@dataclass(frozen=True)
class Rehearsed:
    """How one candidate did.

    Attributes:
        result: its row; "failed" with the reason where it ended the process or hung.
        is_whole: as `Patch.is_whole`.
    """

    result: CandidateResult
    is_whole: bool = True


class Rehearsal:
    """Sees candidates through in a worker process.

    Args:
        workload: what they stand in for.
        tuned, refused: as `KernelBook` takes them; `tuned` is None where no kernel runs.
        timing_s: of one comparison with eager.
        peaks: measured ceilings.
        deadline_s: after which a candidate has hung.

    Attributes:
        deadline_s: of the next candidate.

    Raises:
        UsageError: when the workload cannot be handed over.
    """

    def __init__(
        self,
        workload: Workload,
        tuned: Mapping[Site, KernelConfig] | None,
        refused: Mapping[Site, str],
        *,
        timing_s: float,
        peaks: DevicePeaks | None,
        deadline_s: float,
        job: str = _JOB,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="agnitra-rehearsal-", ignore_cleanup_errors=True)
        self._file = Path(self._folder.name) / "workload.pickle"
        try:
            handover.write(workload, self._file)
        except BaseException:
            self._folder.cleanup()
            raise
        self._worker = Worker()
        self._tuned, self._refused = tuned, refused
        self._timing_s, self._peaks, self._job = timing_s, peaks, job
        self.deadline_s = deadline_s

    def __call__(self, candidate: Candidate) -> Rehearsed:
        """Build and judge one candidate there; whatever happens, the process for the next one is ready."""
        part = Part(self._file, candidate, self._tuned, dict(self._refused), self._timing_s, self._peaks, shared_file())
        outcome = self._worker.run(self._job, (part,), name=candidate.name, deadline_s=self.deadline_s)
        if outcome.status == "ok" and isinstance(outcome.value, Rehearsed):
            return outcome.value
        reason = f"{outcome.status} in a process of its own: {outcome.message}"[:500]
        return Rehearsed(CandidateResult(name=candidate.name, status="failed", reason=reason))

    def close(self) -> None:
        """End the process."""
        self._worker.close()
        self._folder.cleanup()
