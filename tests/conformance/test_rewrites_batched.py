"""batched_linears: towers side by side, in an order that keeps every write between its reads."""

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
from agnitra_lab.patch.rewrites import batched_linears


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


E = 8


def check(function: Any, *args: Tensor, expected: int, is_lowered: bool = False) -> Any:
    """Install the rewrite, compare with eager (values, strides, arguments), also after an update of the weights."""
    torch.manual_seed(0)
    layers: dict[str, Any] = {name: nn.Linear(E, E) for name in ("a", "b", "c", "d")}
    layers |= {"bare": nn.Linear(E, E, bias=False), "wide": nn.Linear(E, 2 * E)}
    layers |= {"left": nn.Parameter(torch.randn(E, 5)), "right": nn.Parameter(torch.randn(E, 5))}
    model = Formula(function, **layers).eval()
    given = [arg.clone() for arg in args]
    patch = install(Workload("case", model, tuple(given)), ["batched_linears"], name="candidate", is_lowered=is_lowered)
    with torch.no_grad():
        for _ in range(2):
            ours, theirs = [arg.clone() for arg in args], [arg.clone() for arg in args]
            leaves = torch.utils._pytree.tree_leaves
            for left, right in zip(leaves((patch.model(*ours), ours)), leaves((model(*theirs), theirs)), strict=True):
                assert (left.shape, left.stride()) == (right.shape, right.stride())
                torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
            for parameter in model.parameters():
                parameter.mul_(1.25)
    assert len(made(patch, "batched_linears")) == expected, patch.log().refusals
    return patch


X, Y = (torch.randn(2, 5, E, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))

BATCHED: dict[str, tuple[Any, int]] = {
    "two": (lambda m, x, y: m.a(x).relu() + m.b(y), 1),
    "towers": (lambda m, x, y: m.b(m.a(x).relu()) * m.d(m.c(y).relu()), 2),
    "results that leave": (lambda m, x, y: (m.a(x), m.b(y)), 1),
    "a result written": (lambda m, x, y: m.a(x).mul_(2) + m.b(y), 1),
    "in-place activations": (lambda m, x, y: m.b(F.relu(m.a(x), inplace=True)) + m.d(F.relu(m.c(y), inplace=True)), 2),
    "weights of one orientation": (lambda m, x, y: x @ m.left + torch.matmul(y, m.right), 1),
    "other shapes of one count": (lambda m, x, y: m.a(x).sum(1) + m.b(y.flatten(0, 1)).view(2, 5, E).sum(1), 1),
    "three of four": (lambda m, x, y: m.d(m.a(x) + m.b(y) + m.c(x * y)), 1),
    "a sum between them": (
        lambda m, x, y: (h := m.a(x), s := torch.zeros(2), s.add_(h.mean()), m.b(y) + s[0])[3], 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHED)
def test_independent_products_of_one_shape_become_one(name: str) -> None:
    function, expected = BATCHED[name]
    check(function, X, Y, expected=expected)


def test_what_stands_between_towers_keeps_its_place_beside_writes() -> None:
    def function(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        room = torch.zeros(2, 5, E)
        first = m.a(x)
        room[:, :2] = first[:, :2]
        before = room.clone()
        second = m.b(y)
        room.add_(second)
        return before, room * 2, m.c(before) - m.d(room)

    check(function, X, Y, expected=2)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no two independent", lambda m, x, y: m.a(m.b(x) + y)),
        ("no two independent", lambda m, x, y: m.a(x).sum() + m.wide(y).sum()),
        ("no two independent", lambda m, x, y: m.a(x) + m.bare(y)),
        ("no two independent", lambda m, x, y: m.a(x) + F.linear(y, m.b.weight * 2, m.b.bias)),
        ("share their input", lambda m, x, y: m.a(x) + m.b(x)),
        ("share their input", lambda m, x, y: m.a(x) + m.a(y)),
        ("bias is computed", lambda m, x, y: F.linear(x, m.a.weight, m.a.bias + 1) + F.linear(y, m.b.weight, m.b.bias)),
        ("writes to", lambda m, x, y: (m.a(x), x.mul_(2), m.b(y))),
    ],
    ids=["chain", "widths", "one bias", "computed", "one input", "one weight", "computed bias", "written input"],
)
def test_other_products_stay_single(because: str, function: Any) -> None:
    patch = check(function, X, Y, expected=0)
    assert any(because in refusal.reason for refusal in patch.log().refusals), patch.log().refusals


def test_products_that_fill_the_device_or_whose_inputs_are_all_there_is_stay_single(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batched_linears, "_LARGEST_RESULT", 8)
    assert "fills the device" in check(BATCHED["two"][0], X, Y, expected=0).log().refusals[0].reason
    torch._dynamo.reset()
    monkeypatch.setattr(batched_linears, "_LARGEST_RESULT", 10**6)
    monkeypatch.setattr(batched_linears, "_LARGEST_INPUT_SHARE", 0)
    assert "stacking" in check(BATCHED["two"][0], X, Y, expected=0).log().refusals[0].reason


@pytest.mark.slow
def test_a_batched_graph_goes_through_inductor() -> None:
    check(BATCHED["towers"][0], X, Y, expected=2, is_lowered=True)
