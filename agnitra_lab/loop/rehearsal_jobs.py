"""What runs in the worker process for one candidate: build it on a copy of the model, judge it against eager there."""

from __future__ import annotations

from pathlib import Path

from agnitra_lab.benchmark import winner as contest
from agnitra_lab.benchmark.compare import compare
from agnitra_lab.benchmark.reference import Reference
from agnitra_lab.contracts.measurement import CandidateResult
from agnitra_lab.device.exclusive import shared_file, take_turns
from agnitra_lab.errors import AgnitraError
from agnitra_lab.generate.kernels import KernelBook
from agnitra_lab.loop import handover
from agnitra_lab.loop.rehearsal import Part, Rehearsed
from agnitra_lab.patch import candidates

# One workload a process: its copy and eager's answers stay for the next candidate.
_references: dict[Path, Reference] = {}


def rehearse(part: Part) -> Rehearsed:
    """Build a candidate and hold it against eager.

    Returns:
        Its row and number of graphs; a candidate that cannot be compiled has "failed".
    """
    if part.turns_file != shared_file():
        take_turns(part.turns_file)
    if part.file not in _references:
        _references[part.file] = Reference(handover.read(part.file))
    reference = _references[part.file]
    kernels = None if part.tuned is None else KernelBook(part.tuned, refused=part.refused)
    name = part.candidate.name
    try:
        patch = candidates.build(reference.workload, part.candidate, kernels)
    except AgnitraError as error:
        return Rehearsed(CandidateResult(name=name, status="failed", reason=str(error)[:500]))
    try:
        found = compare(
            reference.workload, patch.model, candidate_name=name, budget_s=part.timing_s, peaks=part.peaks,
            reference=reference, is_brief=True,
        )  # fmt: skip
        return Rehearsed(contest.judge(name, found, patch.log().compile_s), patch.is_whole)
    except AgnitraError as error:
        return Rehearsed(CandidateResult(name=name, status="failed", reason=str(error)[:500]))
    finally:
        patch.discard()
