"""linear_cross_entropy: a head and its loss in every spelling become one kernel, and stay two where somebody looks.

On the CPU the kernel is its template's plain formula; the Triton kernels are tested in losses_in_interpreter.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_models_as_written import kernel_of
from test_rewrites import as_tuple, fresh_dynamo, x_of
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.install import install
from agnitra_lab.patch.rewrites import linear_cross_entropy

__all__ = ["fresh_dynamo"]

K, V = 16, 11
X, TARGET = x_of(2, 6, K), torch.tensor([[3, 0, 10, -100, 7, 1], [1, 1, 5, 9, -100, 2]])


class Head(nn.Module):
    """A function over heads of different make."""

    def __init__(self, function: Any, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.head, self.biased = nn.Linear(K, V, bias=False), nn.Linear(K, V)
        self.turned, self.embed = nn.Parameter(torch.randn(K, V) / 4), nn.Embedding(V, K)
        self.narrow = nn.Linear(K - 4, V)
        self.to(dtype).eval()

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def applied(function: Any, *args: Any, expected: int = 1, actions: Any = ("linear_cross_entropy",)) -> Any:
    """Install the rewrite, compare with the model in fp32, and return the log."""
    args = args or (X.bfloat16(), TARGET)
    model = Head(function, args[0].dtype)
    patch = install(Workload("case", model, args), list(actions), name="candidate", kernels=kernel_of, is_lowered=False)
    with torch.no_grad():
        ours = patch.model(*args)
        exact = model.float()(*[x.float() if x.is_floating_point() else x for x in args])
        eager = Head(function, args[0].dtype)(*args)
    for left, right, same in zip(as_tuple(ours), as_tuple(exact), as_tuple(eager), strict=True):
        assert (left.shape, left.dtype, left.stride()) == (same.shape, same.dtype, same.stride())
        torch.testing.assert_close(left.float(), right.float(), rtol=1.6e-2, atol=1.6e-2)
    assert patch.model.num_guard_misses == 0
    assert len(patch.log().descriptors) == expected, patch.log().refusals
    return patch.log()


def shifted(m: Head, x: Tensor, t: Tensor) -> Tensor:
    """The loss of Hugging Face's language models, before 4.46."""
    logits = m.head(x).float()
    shift_logits, shift_labels = logits[..., :-1, :].contiguous(), t[..., 1:].contiguous()
    return nn.CrossEntropyLoss()(shift_logits.view(-1, V), shift_labels.view(-1))


LOSSES: dict[str, Any] = {
    "function": lambda m, x, t: F.cross_entropy(m.head(x).view(-1, V), t.view(-1)),
    "bias": lambda m, x, t: F.cross_entropy(m.biased(x).float().view(-1, V), t.view(-1)),
    "tied embedding": lambda m, x, t: F.cross_entropy((x @ m.embed.weight.t()).flatten(0, 1).float(), t.flatten()),
    "turned weight": lambda m, x, t: F.cross_entropy((x @ m.turned).view(-1, V), t.view(-1), reduction="sum"),
    "mm": lambda m, x, t: F.cross_entropy(torch.mm(x.view(-1, K), m.turned), t.view(-1), reduction="none"),
    "addmm": lambda m, x, t: F.cross_entropy(
        torch.addmm(m.biased.bias, x.reshape(-1, K), m.biased.weight.t()), t.reshape(-1)
    ),
    "einsum": lambda m, x, t: F.cross_entropy(
        torch.einsum("bsk,vk->bsv", x, m.head.weight).reshape(-1, V), t.reshape(-1), label_smoothing=0.1
    ),
    "nll_loss": lambda m, x, t: F.nll_loss(F.log_softmax(m.head(x).view(-1, V), -1), t.view(-1)),
    "nll_loss of a view": lambda m, x, t: F.nll_loss(F.log_softmax(m.head(x), dim=-1).view(-1, V), t.view(-1)),
    "log_softmax in fp32": lambda m, x, t: F.nll_loss(
        F.log_softmax(m.head(x).view(-1, V), -1, dtype=torch.float32), t.view(-1)
    ),
    "gathered": lambda m, x, t: -torch.log_softmax(m.head(x), -1).gather(-1, t.clamp(min=0)[..., None]).squeeze(-1),
    "shifted": shifted,
    "shifted before": lambda m, x, t: F.cross_entropy(m.head(x[:, :-1]).reshape(-1, V), t[:, 1:].reshape(-1)),
    "shifted, not widened": lambda m, x, t: F.cross_entropy(m.head(x)[:, :-1].reshape(-1, V), t[:, 1:].reshape(-1)),
    "padded labels": lambda m, x, t: F.cross_entropy(
        m.head(x).float().view(-1, V), F.pad(t, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    ),
    "classes in the middle": lambda m, x, t: F.cross_entropy(m.head(x).transpose(1, 2), t, reduction="none"),
    "classes in the middle, widened": lambda m, x, t: F.cross_entropy(m.head(x).float().mT, t),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_head_and_its_loss_become_a_kernel(name: str) -> None:
    (found,) = applied(LOSSES[name]).descriptors
    assert found.config["shape"] == [10 if name.startswith("shifted") else 12, K, V]
    assert any(step in found.replaced for step in ("linear", "matmul", "addmm", "einsum"))


def test_the_loss_alone_is_left_nothing_and_a_turned_weight_follows_its_source() -> None:
    args = (X.half(), TARGET)
    model = Head(LOSSES["turned weight"], torch.float16)
    actions = ["linear_cross_entropy", "cross_entropy"]
    patch = install(Workload("case", model, args), actions, name="candidate", kernels=kernel_of, is_lowered=False)
    assert [found.action for found in patch.log().descriptors] == ["linear_cross_entropy"]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(patch.model(*args), model(*args), rtol=1e-2, atol=1e-2)
            model.turned.mul_(2)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no cross-entropy", lambda m, x, t: m.head(x).mean()),
        ("no cross-entropy", lambda m, x, t: F.cross_entropy((m.head(x) * 2).view(-1, V), t.view(-1))),
        ("no cross-entropy", lambda m, x, t: F.cross_entropy(m.head(x)[..., :9].reshape(-1, 9), t.view(-1) % 9)),
        ("read elsewhere", lambda m, x, t: (lambda y: (F.cross_entropy(y.view(-1, V), t.view(-1)), y))(m.head(x))),
        ("written in between", lambda m, x, t: (lambda y: (x.mul_(1), F.cross_entropy(y, t[0]))[1])(m.head(x[0]))),
        ("multiplies bfloat16", lambda m, x, t: F.cross_entropy(F.linear(x[0].float(), m.head.weight.float()), t[0])),
        ("16 bytes", lambda m, x, t: F.cross_entropy(m.narrow(x[0, :, :-4]), t[0])),
        ("not a tensor that the graph is given", lambda m, x, t: F.cross_entropy(x[0] @ (m.turned * x[0, 0, 0]), t[0])),
    ],
    ids=["none", "scaled", "some classes", "logits too", "written", "fp32", "odd rows", "computed"],
)  # fmt: skip
def test_other_losses_keep_their_head(because: str, function: Any) -> None:
    log = applied(function, X.bfloat16().clone(), TARGET, expected=0)
    assert any(because in refusal.reason for refusal in log.refusals), log.refusals


def test_a_product_that_the_library_multiplies_faster_keeps_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_LARGEST_K", 8)
    monkeypatch.setattr(linear_cross_entropy, "_FEW_TOKENS", 4)
    log = applied(LOSSES["function"], expected=0)
    assert any("library's product is faster" in refusal.reason for refusal in log.refusals)
