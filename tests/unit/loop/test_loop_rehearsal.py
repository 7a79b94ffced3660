"""Candidates in a process of their own first: whatever they do there is named, and costs the next one nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import UsageError
from agnitra_lab.loop import handover
from agnitra_lab.loop.rehearsal import Rehearsal
from agnitra_lab.patch.candidates import Candidate

CASES = f"{Path(__file__).with_name('rehearsal_cases.py')}:rehearse"

# A new process imports torch before it can read the job: some 4 s, more on a busy machine.
_START_S = 60.0


def workload(model: nn.Module) -> Workload:
    return Workload("mlp", model.eval(), (torch.randn(4, 8),))


def rehearsal(model: nn.Module, **given) -> Rehearsal:
    settings = {"timing_s": 0.2, "peaks": None, "deadline_s": 60.0, **given}
    return Rehearsal(workload(model), None, (), **settings)


@pytest.mark.parametrize(("name", "status"), [("hangs", "timeout"), ("dies", "crash")])
def test_the_next_candidate_is_tried_after_one_that_hangs_or_dies(name, status):
    opened = rehearsal(nn.Linear(8, 8), deadline_s=_START_S, job=CASES)
    try:
        opened(Candidate("works", "default"))
        opened.deadline_s = 1.0
        failed = opened(Candidate(name, "default")).result
        opened.deadline_s = _START_S
        good = opened(Candidate("works", "default"))
    finally:
        opened.close()
    assert (failed.name, failed.status) == (name, "failed")
    assert failed.reason.startswith(status)
    assert (good.result.status, good.is_whole) == ("rejected", False)


def test_a_candidate_that_cannot_be_built_is_a_failed_row_with_its_reason():
    opened = rehearsal(nn.Linear(8, 8))
    try:
        found = opened(Candidate("cuda_graph", "eager", ("cuda_graph",)))
    finally:
        opened.close()
    assert found.result.status == "failed"
    assert "CUDA" in found.result.reason


def test_a_workload_that_was_handed_over_computes_the_same_and_keeps_its_ties(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    given = workload(model)
    handover.write(given, tmp_path / "file")
    found = handover.read(tmp_path / "file")
    assert found.model[2].weight is found.model[0].weight
    assert found.model[0].weight is not model[0].weight
    assert torch.equal(found(), given())


def test_a_workload_that_no_other_process_could_read_is_refused_with_what_to_do(tmp_path):
    model = nn.Linear(8, 8)
    model.lock = __import__("threading").Lock()
    with pytest.raises(UsageError, match="cannot be handed to another process") as caught:
        handover.write(workload(model), tmp_path / "file")
    assert "cloudpickle" in caught.value.hint
