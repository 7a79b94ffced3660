"""padded_linear: the same values in every spelling, weights that follow updates, and a measurement that decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rewrites_layouts import made
from torch import Tensor, nn
from torch.nn import functional as F
from written_language import Formula

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.install import install
from agnitra_lab.patch.rewrites import padded_linear


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.fixture
def is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded_linear, "measure", lambda *_: (2.0, 1.0))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def layers() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "head": nn.Linear(16, 13, bias=False), "odd": nn.Linear(11, 16), "both": nn.Linear(11, 13),
        "even": nn.Linear(16, 24), "turned": nn.Parameter(torch.randn(16, 13)), "words": nn.Embedding(13, 16),
    }  # fmt: skip


WIDE, NARROW = random(2, 20, 16), random(2, 20, 11)
CASES: dict[str, tuple[Any, Tensor, int]] = {
    "odd rows": (lambda m, x: m.head(x), WIDE, 1),
    "odd columns": (lambda m, x: m.odd(x), NARROW, 1),
    "both, with a bias": (lambda m, x: m.both(x), NARROW, 1),
    "a tied head": (lambda m, x: F.linear(x, m.words.weight), WIDE, 1),
    "x @ W": (lambda m, x: x @ m.turned, WIDE, 1),
    "x @ E.T": (lambda m, x: x @ m.words.weight.t(), WIDE, 1),
    "flattened": (lambda m, x: m.head(x).view(-1, 13), WIDE, 1),
    "a view of all": (lambda m, x: m.head(x).view(-1), WIDE, 1),
    "a loss after it": (
        lambda m, x: F.cross_entropy(m.head(x).view(-1, 13), torch.arange(40, device=x.device) % 13), WIDE, 1,
    ),
    "one after the other": (lambda m, x: m.head(m.odd(x).relu()), NARROW, 2),
    "even ones stay": (lambda m, x: m.even(x), WIDE, 0),
    "few rows stay": (lambda m, x: m.head(x[:, :4]), WIDE, 0),
    "no weight": (lambda m, x: x @ x[0, :13].t(), WIDE, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_padded_product_gives_the_same_values(name: str, dtype: torch.dtype, is_faster: None) -> None:
    function, x, count = CASES[name]
    model, x = Formula(function, **layers()).to(dtype).eval(), x.to(dtype)
    patch = install(Workload("case", model, (x,)), ["padded_linear"], name="candidate", is_lowered=False)
    assert len(made(patch, "padded_linear")) == count
    with torch.no_grad():
        for _ in range(2):
            ours, theirs = patch.model(x), model(x)
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
            for parameter in model.parameters():
                parameter.mul_(1.25)
    assert patch.model.num_guard_misses == 0


def test_products_in_fp32_stay(is_faster: None) -> None:
    model = Formula(CASES["odd rows"][0], **layers()).eval()
    patch = install(Workload("case", model, (WIDE,)), ["padded_linear"], name="candidate", is_lowered=False)
    assert "no product of half-precision values" in patch.log().refusals[0].reason


def test_the_measurement_decides_and_runs_on_the_machine_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Formula(CASES["both, with a bias"][0], **layers()).bfloat16().eval(), NARROW.bfloat16()
    workload = Workload("case", model, (x,))
    patch = install(workload, ["padded_linear"], name="candidate", is_lowered=False)
    assert made(patch, "padded_linear") or "padded" in patch.log().refusals[0].reason
    torch._dynamo.reset()
    monkeypatch.setattr(padded_linear, "measure", lambda *_: (1.0, 1.0))
    patch = install(workload, ["padded_linear"], name="candidate", is_lowered=False)
    assert "takes 1.0000 ms" in patch.log().refusals[0].reason
