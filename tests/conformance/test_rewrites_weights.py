"""fold_weights: what a model computes from its weights is computed ahead, follows updates, and stays where it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rewrites import Net, check_applied, check_refused, fresh_dynamo, x_of
from torch import nn
from torch.nn import functional

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.install import install
from agnitra_lab.patch.rewrites import fold_weights

__all__ = ["fresh_dynamo"]

X = x_of(2, 5, 13)


class Weights(Net):
    """The layers of Net, with tables, buffers and parametrised layers beside them."""

    def __init__(self, function: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(function, dtype)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(13, 5))
        self.table = nn.Parameter(torch.randn(9, 5))
        self.packed = nn.Parameter(torch.randint(-9, 9, (7, 13), dtype=torch.int8), requires_grad=False)
        self.register_buffer("index", torch.arange(25).view(5, 5) % 9)
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)))
        self.eval()


FOLDED: dict[str, Any] = {
    "one plus a weight": lambda m, x: x * (1.0 + m.weight),
    "widened": lambda m, x: functional.linear(x.double(), m.a.weight.double()),
    "scaled": lambda m, x: x @ (m.a.weight * 3).t(),
    "weight norm": lambda m, x: m.normed(x),
    "bias of positions": lambda m, x: x @ x.mT + m.table[m.index.view(-1)].view(5, 5, -1).permute(2, 0, 1)[:1],
    "constants beside it": lambda m, x: x * (torch.arange(13) * m.weight),
    "a buffer beside it": lambda m, x: x @ x.mT * (m.mask * m.table[:5])[None],
    "both halves": lambda m, x: torch.cat([x, x]) * torch.cat([m.weight, m.weight])[:13],
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_is_made_of_weights_alone_is_made_ahead_and_follows_them(name: str) -> None:
    check_applied("fold_weights", Weights(FOLDED[name]), X)
    model = Weights(FOLDED[name])
    patch = install(Workload("case", model, (X,)), ["fold_weights"], name="candidate", is_lowered=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1.5)
        model.mask.mul_(2)
        torch.testing.assert_close(patch.model(X), model(X))
    assert patch.model.num_guard_misses == 0


def test_two_values_of_one_weight_stay_two() -> None:
    check_applied("fold_weights", Weights(lambda m, x: x * (1 + m.weight) + x * (2 + m.weight)), X, expected=2)


def test_a_folded_weight_is_a_weight_for_other_rewrites() -> None:
    model = Weights(lambda m, x: functional.linear(x, m.a.weight * 2).relu() + functional.linear(x, 3 * m.b.weight))
    patch = install(Workload("case", model, (X,)), ["fold_weights", "qkv_concat"], name="candidate", is_lowered=False)
    assert [found.action for found in patch.log().descriptors] == ["fold_weights", "fold_weights", "qkv_concat"]
    with torch.no_grad():
        torch.testing.assert_close(patch.model(X), model(X))
        model.b.weight.neg_()
        torch.testing.assert_close(patch.model(X), model(X))


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("nothing in the graph", lambda m, x: m.a(x)),
        ("nothing in the graph", lambda m, x: x @ m.a.weight.T),
        ("nothing in the graph", lambda m, x: x @ (x.mT * 2)),
        ("nothing in the graph", lambda m, x: x @ x.mT * (m.mask == 0)),
        ("nothing in the graph", lambda m, x: (m.weight.mul_(1.0), x * m.weight)[1]),
        ("nothing in the graph", lambda m, x: (x * (w := m.weight + 1), w.mul_(2))[0]),
        ("nothing in the graph", lambda m, x: x * functional.dropout(m.weight, 0.0)),
        ("leaves the graph", lambda m, x: (x + m.weight, (m.weight * 2).view(1, 13))),
        ("not contiguous", lambda m, x: x @ (m.a.weight.T * 2)),
    ],
    ids=["given", "view", "input", "buffers alone", "written", "written later", "random", "output", "turned"],
)
def test_other_values_stay_where_they_are(because: str, function: Any) -> None:
    check_refused("fold_weights", Weights(function), X, because=because)


def test_large_values_and_packed_weights_are_not_kept_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_weights, "_SMALL_BYTES", 0)
    check_refused("fold_weights", Weights(lambda m, x: x * (m.weight[:, None] * m.weight)[0]), X, because="memory")
    check_applied("fold_weights", Weights(FOLDED["widened"]), X)
    monkeypatch.setattr(fold_weights, "_LEAST_PACKED", 0)
    dequantised: Any = lambda m, x: functional.linear(x, m.packed.float() * 0.1)  # noqa: E731
    check_refused("fold_weights", Weights(dequantised), X, because="one byte")
