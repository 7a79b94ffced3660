"""residual_gemm: sums made by the product itself, only where nobody sees that the residual was written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_models_as_written import kernel_of
from test_rewrites_layouts import made
from torch import Tensor, nn
from torch.nn import functional as F
from written_language import Formula

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.install import install
from agnitra_lab.patch.rewrites import residual_gemm

WIDTH = 16


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.fixture
def is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_gemm, "measure", lambda *_: (2.0, 1.0))


def layers() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "into": nn.Linear(WIDTH, WIDTH, bias=False), "out": nn.Linear(WIDTH, WIDTH, bias=False),
        "down": nn.Linear(WIDTH, WIDTH, bias=False), "shifted": nn.Linear(WIDTH, WIDTH),
        "turned": nn.Parameter(torch.randn(WIDTH, WIDTH) / 4), "norm": nn.RMSNorm(WIDTH),
    }  # fmt: skip


def block(m: Any, x: Tensor) -> Tensor:
    """Two branches of a decoder's layer on a stream that begins with the model's own value."""
    stream = m.into(x)
    stream = stream + m.out(F.silu(m.norm(stream)))
    stream = stream + m.down(torch.tanh(m.norm(stream)))
    return m.norm(stream)


X = torch.randn(2, 20, WIDTH, generator=torch.Generator().manual_seed(1))
CASES: dict[str, tuple[Any, Tensor, int]] = {
    "a decoder's layer": (block, X, 2),
    "the product first": (lambda m, x: (m.out(x) + m.into(x).tanh()).relu(), X, 1),
    "either is a product": (lambda m, x: (m.into(x) + m.out(x.relu())).relu(), X, 1),
    "x @ W": (lambda m, x: (m.into(x) + x.relu() @ m.turned).relu(), X, 1),
    "flattened on the way": (lambda m, x: m.into(x) + m.out(x.view(-1, WIDTH).relu()).view(2, 20, WIDTH), X, 1),
    "the stream is the result": (lambda m, x: m.into(x).tanh() + m.out(x), X, 1),
    "a dropout that does nothing": (lambda m, x: m.into(x) + F.dropout(m.out(x.relu()), 0.1, training=False), X, 1),
    "the input stays": (lambda m, x: x + m.out(x.relu()), X, 0),
    "a view of the input stays": (lambda m, x: x.view(40, WIDTH) + m.out(x.relu()).view(40, WIDTH), X, 0),
    "a weight stays": (lambda m, x: m.turned + m.out(m.turned.repeat(1, 1)), X[:, :16], 0),
    "a stream that is read later": (lambda m, x: [s := m.into(x).relu(), (s + m.out(x)) * s][1], X, 0),
    "a view that is read later": (lambda m, x: [s := m.into(x).relu(), v := s[:, 1:], (s + m.out(x))[:, 1:] * v][2],
                                  X, 0),
    "a stream that is a result": (lambda m, x: [s := m.into(x).relu(), (s, s + m.out(x))][1], X, 0),
    "the stream multiplied": (lambda m, x: [s := m.into(x).relu(), s + m.out(s)][1], X, 0),
    "a product that is read twice": (lambda m, x: [p := m.out(x), (m.into(x).relu() + p) * p][1], X, 0),
    "a bias stays": (lambda m, x: m.into(x).relu() + m.shifted(x), X, 0),
    "a broadcast residual": (lambda m, x: m.into(x)[:, :1].relu() + m.out(x), X, 0),
    "few rows stay": (block, X[:, :8], 0),
    "a computed operand": (lambda m, x: m.into(x).relu() + x @ (m.turned * 2), X, 0),
}  # fmt: skip


LOWERED = ("a decoder's layer", "the stream is the result")
"""Two of them say what Inductor makes of it."""


@pytest.mark.parametrize(
    ("name", "is_lowered"), [*((name, False) for name in CASES), *((name, True) for name in LOWERED)]
)
def test_a_product_into_its_residual_gives_the_same_values(name: str, is_lowered: bool, is_faster: None) -> None:
    function, x, count = CASES[name]
    model, x = Formula(function, **layers()).bfloat16().eval(), x.bfloat16()
    patch = install(Workload("case", model, (x,)), ["residual_gemm"], name="candidate", is_lowered=is_lowered)
    assert len(made(patch, "residual_gemm")) == count, patch.log().refusals
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(patch.model(x), model(x), rtol=2e-2, atol=2e-2)
            for parameter in model.parameters():
                parameter.mul_(1.25)
    assert patch.model.num_guard_misses == 0


def test_norms_after_it_find_the_stream_and_add_nothing(is_faster: None) -> None:
    model, x = Formula(block, **layers()).bfloat16().eval(), X.bfloat16()
    actions = ["residual_gemm", "rms_norm"]
    patch = install(Workload("case", model, (x,)), actions, name="candidate", kernels=kernel_of, is_lowered=False)
    log = patch.log()
    assert [change.action for change in log.descriptors].count("residual_gemm") == 2
    norms = [change for change in log.descriptors if change.action == "rms_norm"]
    assert len(norms) == 3
    assert not any("add" in " ".join(change.replaced) for change in norms)


def test_the_measurement_decides_and_runs_on_the_machine_at_hand() -> None:
    model, x = Formula(block, **layers()).bfloat16().eval(), X.bfloat16()
    patch = install(Workload("case", model, (x,)), ["residual_gemm"], name="candidate", is_lowered=False)
    found = made(patch, "residual_gemm")
    assert found or any("in one" in refusal.reason for refusal in patch.log().refusals)


def test_fp32_products_are_left_to_others(is_faster: None) -> None:
    model = Formula(block, **layers()).eval()
    patch = install(Workload("case", model, (X,)), ["residual_gemm"], name="candidate", is_lowered=False)
    assert not made(patch, "residual_gemm")
