"""The product's own gate, at its own settings, against planted kernel bugs: each is caught, each control passes."""

from __future__ import annotations

import functools
from typing import Any

import planted_indices
import planted_norms
import planted_products
import planted_steps
import pytest
import torch
from planted_bugs import BF16, BOTH, FP32, OUTPUT_BUGS, Candidate, Family

from agnitra_lab.benchmark.equivalence import verify
from agnitra_lab.contracts.measurement import Equivalence
from agnitra_lab.contracts.workload import Inputs, Workload

FAMILIES: dict[str, Family] = {
    name.lower(): family
    for module in (planted_norms, planted_products, planted_indices, planted_steps)
    for name, family in vars(module).items()
    if isinstance(family, Family)
}


def _bugs() -> dict[str, Any]:
    """Return family, candidate builder and dtypes of each bug by "family: defect"."""
    found: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        for defect, candidate in family.bugs.items():
            dtypes = (FP32,) if defect in family.fp32_only else (BF16,) if defect in family.bf16_only else BOTH
            found[f"{name}: {defect}"] = (family, lambda candidate=candidate: candidate, dtypes)
        for defect, build in OUTPUT_BUGS.items() if family.has_output_bugs else ():
            found[f"{name}: {defect}"] = (family, build, BOTH)
    return found


BUGS = _bugs()


def _judge(family: Family, candidate: Candidate, dtype: torch.dtype) -> Equivalence:
    """Judge a candidate as `compare` does: three seeds, two of them with shapes that the workload does not have."""
    model = family.build(dtype).eval()

    def make_inputs(seed: int) -> Inputs:
        size = dict(enumerate(family.sizes)).get(seed, family.sizes[0])
        return family.inputs(dtype, size, torch.Generator().manual_seed(seed)), {}

    args, _ = make_inputs(3)
    workload = Workload("planted", model, args, make_inputs=make_inputs)
    return verify(workload, functools.partial(candidate, model)).equivalence


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str) -> None:
    family, build, dtypes = BUGS[name]
    for dtype in dtypes:
        found = _judge(family, build(), dtype)
        assert not found.is_equivalent, f"missed in {dtype}"
        assert not any("the candidate raised" in problem for problem in found.problems), found.problems


@pytest.mark.parametrize("dtype", BOTH, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_right_computation_in_another_order_passes(name: str, dtype: torch.dtype) -> None:
    found = _judge(FAMILIES[name], FAMILIES[name].control, dtype)
    assert found.problems == ()
    assert found.is_equivalent


def test_more_than_a_hundred_distinct_bugs_are_planted() -> None:
    own = sum(len(family.bugs) for family in FAMILIES.values())
    assert own > 100
    assert len(FAMILIES) > 10
    assert len(BUGS) == own + sum(len(OUTPUT_BUGS) for family in FAMILIES.values() if family.has_output_bugs)
