"""activation_gemm: activations that the matrix library applies, told by what is computed and not by how it is spelt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_rewrites_layouts import made
from torch import Tensor, nn
from torch.nn import functional as F
from written_language import Formula

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.install import install
from agnitra_lab.patch.rewrites import activation_gemm

WIDTH = 16


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.fixture
def is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_gemm, "measure", lambda *_: (2.0, 1.0))


def layers() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "up": nn.Linear(WIDTH, 2 * WIDTH), "down": nn.Linear(2 * WIDTH, WIDTH),
        "plain": nn.Linear(WIDTH, 2 * WIDTH, bias=False), "odd": nn.Linear(WIDTH, 2 * WIDTH + 1),
        "turned": nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 4), "shift": nn.Parameter(torch.randn(2 * WIDTH)),
    }  # fmt: skip


def gelu_of_gpt2(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_of_bert(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_of_bloom(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def conv1d(m: Any, x: Tensor) -> Tensor:
    """A product as GPT-2 writes it: flattened, [K, N], and brought back to its shape."""
    return torch.addmm(m.shift, x.view(-1, WIDTH), m.turned).view(2, 20, 2 * WIDTH)


X = torch.randn(2, 20, WIDTH, generator=torch.Generator().manual_seed(1))
CASES: dict[str, tuple[Any, int]] = {
    "relu": (lambda m, x: m.down(F.relu(m.up(x))), 1),
    "relu as a method": (lambda m, x: m.down(m.up(x).relu()), 1),
    "clamped at 0": (lambda m, x: m.down(m.up(x).clamp(min=0)), 1),
    "the tanh GELU": (lambda m, x: m.down(F.gelu(m.up(x), approximate="tanh")), 1),
    "in GPT-2's steps": (lambda m, x: m.down(gelu_of_gpt2(m.up(x))), 1),
    "in BLOOM's steps": (lambda m, x: m.down(gelu_of_bloom(m.up(x))), 1),
    "after a view": (lambda m, x: m.down(gelu_of_gpt2(conv1d(m, x))), 1),
    "without a bias": (lambda m, x: m.down(F.relu(m.plain(x))), 1),
    "x @ W": (lambda m, x: m.down(F.relu(x @ m.turned)), 1),
    "it is the result": (lambda m, x: F.relu(m.up(x)), 1),
    "dropout that does nothing": (lambda m, x: m.down(F.dropout(F.gelu(m.up(x)), 0.1, training=False)), 1),
    "two of them": (lambda m, x: F.relu(m.down(F.relu(m.up(x)))), 2),
    "through fp32": (lambda m, x: m.down(F.relu(m.up(x)).float().to(x.dtype)), 1),
    "the GELU by erf": (lambda m, x: m.down(F.gelu(m.up(x))), 1),
    "in BERT's steps": (lambda m, x: m.down(gelu_of_bert(m.up(x))), 1),
    "other constants stay": (lambda m, x: m.down(F.relu(m.up(x)) * 1.01), 0),
    "leaky ReLU stays": (lambda m, x: m.down(F.leaky_relu(m.up(x))), 0),
    "a product that is read twice": (lambda m, x: [p := m.up(x), m.down(F.relu(p)) + m.down(p)][1], 0),
    "a step that is read twice": (lambda m, x: [p := m.up(x), q := torch.tanh(p), m.down(p * q) + m.down(q)][2], 0),
    "another tensor in it": (lambda m, x: m.down(F.relu(m.up(x) + m.shift.exp())), 0),
    "pointwise ops read it": (lambda m, x: F.relu(m.up(x)) * m.shift, 0),
    "an odd width": (lambda m, x: F.relu(m.odd(x)), 0),
    "a computed weight": (lambda m, x: F.relu(x @ (m.turned * 2)).sum(-1), 0),
}  # fmt: skip
LOWERED = ("in GPT-2's steps", "two of them")
"""Two of them say what Inductor makes of it."""


def bound(function: Any, x: Tensor) -> tuple[nn.Module, Tensor]:
    return Formula(function, **layers()).bfloat16().eval(), x.bfloat16()


@pytest.mark.parametrize(
    ("name", "is_lowered"), [*((name, False) for name in CASES), *((name, True) for name in LOWERED)]
)
def test_an_activation_in_its_product_gives_the_same_values(name: str, is_lowered: bool, is_faster: None) -> None:
    function, count = CASES[name]
    model, x = bound(function, X)
    patch = install(Workload("case", model, (x,)), ["activation_gemm"], name="candidate", is_lowered=is_lowered)
    assert len(made(patch, "activation_gemm")) == count, patch.log().refusals
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(patch.model(x), model(x), rtol=2e-2, atol=2e-2)
            for parameter in model.parameters():
                parameter.mul_(1.25)
    assert patch.model.num_guard_misses == 0


def test_in_fp16_the_gelu_by_erf_stays_what_it_is(is_faster: None) -> None:
    model, x = bound(CASES["the GELU by erf"][0], X)
    patch = install(
        Workload("case", model.half(), (x.half(),)), ["activation_gemm"], name="candidate", is_lowered=False
    )
    assert not made(patch, "activation_gemm")


@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.0, 4.0])
def test_in_bf16_a_gelu_by_tanh_of_unrounded_sums_is_nearer_to_that_by_erf_than_eager(deviation: float) -> None:
    sums = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * deviation
    truth = F.gelu(sums)
    eager = F.gelu(sums.bfloat16())
    ours = F.gelu(sums, approximate="tanh").bfloat16()
    error, eagers = ((found.double() - truth).norm() for found in (ours, eager))
    assert error < 0.95 * eagers
    assert ((ours.double() - eager.double()).abs() <= 1.6e-2 * eager.double().abs() + 1e-3).double().mean() > 0.999


def test_a_library_that_is_further_from_fp64_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool, activation: str) -> Tensor:
        return F.relu(F.linear(x, weight, bias)) * 1.008

    monkeypatch.setattr(activation_gemm, "activated_product", coarse)
    monkeypatch.setattr(activation_gemm, "time_ms", lambda *_: 1.0)
    x, weight = X.reshape(-1, WIDTH).bfloat16(), torch.randn(2 * WIDTH, WIDTH).bfloat16()
    assert activation_gemm.measure(x, weight, None, True, "relu") is None


@pytest.mark.parametrize("case", ["few rows", "fp32"])
def test_products_of_few_rows_and_of_fp32_are_left_to_others(case: str, is_faster: None) -> None:
    model, x = bound(CASES["relu"][0], X[:, :8] if case == "few rows" else X)
    model, x = (model.float(), x.float()) if case == "fp32" else (model, x)
    patch = install(Workload("case", model, (x,)), ["activation_gemm"], name="candidate", is_lowered=False)
    assert not made(patch, "activation_gemm")


def test_the_measurement_decides_and_runs_on_the_machine_at_hand() -> None:
    model, x = bound(CASES["two of them"][0], X)
    patch = install(Workload("case", model, (x,)), ["activation_gemm"], name="candidate", is_lowered=False)
    assert made(patch, "activation_gemm") or any("in one" in refusal.reason for refusal in patch.log().refusals)


def test_a_library_that_computes_another_function_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool, activation: str) -> Tensor:
        return F.linear(x, weight, bias).abs()

    monkeypatch.setattr(activation_gemm, "activated_product", another)
    model, x = bound(CASES["relu"][0], X)
    patch = install(Workload("case", model, (x,)), ["activation_gemm"], name="candidate", is_lowered=False)
    assert not made(patch, "activation_gemm")
