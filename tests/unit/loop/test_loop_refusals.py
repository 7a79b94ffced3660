"""What the report says of changes that were looked for and not made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agnitra_lab.contracts.patch import PatchLog, Refusal
from agnitra_lab.loop.filing import refusals_of


@pytest.mark.parametrize(("winner", "expected"), [("eager", 1), ("torch.compile", 1), ("agnitra-softmax", 0)])
def test_what_all_changes_left_as_it_was_is_reported_where_no_candidate_of_ours_is_kept(
    winner: str, expected: int
) -> None:
    refusal = Refusal(action="split_gemm", reason="TF32 is allowed here")
    whole = PatchLog(candidate="agnitra", descriptors=(), refusals=(refusal,))
    fewer = PatchLog(candidate="agnitra-softmax", descriptors=())
    patches: Any = {log.candidate: SimpleNamespace(log=lambda log=log: log) for log in (fewer, whole)}
    assert len(refusals_of(patches, winner)) == expected
