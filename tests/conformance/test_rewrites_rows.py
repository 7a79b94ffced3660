"""The rewrites of row kernels: softmax, cross-entropy and running sums fire on what a graph computes, and where alone.

On the CPU a template's kernel is its plain formula; the Triton kernels are tested in rows_in_interpreter.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_rewrites
import torch
from test_rewrites import WIDTH, Net, check_applied, check_refused, fresh_dynamo, kernel, x_of
from torch import nn
from torch.nn import functional

__all__ = ["fresh_dynamo"]


def softmax_formula(x, *, is_log, out_dtype):
    wide = x.float()
    return (torch.log_softmax(wide, -1) if is_log else torch.softmax(wide, -1)).to(out_dtype)


def cross_entropy_formula(x, target, *, ignore_index, label_smoothing, reduction, out_dtype):
    assert target.shape == x.shape[:-1] and x.stride(-1) == 1
    rules = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    loss = functional.cross_entropy(x.float().reshape(-1, x.shape[-1]), target.reshape(-1), **rules)
    return (loss.reshape(target.shape) if reduction == "none" else loss).to(out_dtype)


def cumsum_formula(x, mask, *, reverse, out_dtype):
    wide = x.float() if mask is None else x.float() * mask
    return (wide.flip(-1).cumsum(-1).flip(-1) if reverse else wide.cumsum(-1)).to(out_dtype)


@pytest.fixture(autouse=True)
def row_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    formulas = {"softmax": softmax_formula, "cross_entropy": cross_entropy_formula, "cumsum": cumsum_formula}
    kernels = {name: kernel(name, formula) for name, formula in formulas.items()}
    monkeypatch.setattr(test_rewrites, "KERNELS", test_rewrites.KERNELS | kernels)


X = x_of(2, 5, WIDTH)
TARGET = torch.tensor([[3, 0, 12, -100, 7], [1, 1, 5, 11, -100]])
F32 = torch.float32
BF16 = torch.bfloat16


# --- softmax ---------------------------------------------------------------------------------------------------------

SOFTMAX: dict[str, Any] = {
    "torch.softmax": lambda m, x: torch.softmax(x, -1),
    "F.softmax": lambda m, x: functional.softmax(x, dim=2),
    "method": lambda m, x: x.softmax(dim=-1),
    "special": lambda m, x: torch.special.softmax(x, -1),
    "module": lambda m, x: nn.Softmax(dim=-1)(x),
    "logarithm": lambda m, x: functional.log_softmax(x, dim=-1),
    "logarithm as a module": lambda m, x: nn.LogSoftmax(dim=-1)(x),
    "logarithm as a method": lambda m, x: x.log_softmax(2),
    "dtype": lambda m, x: functional.softmax(x, dim=-1, dtype=torch.float32),
    "dtype by place": lambda m, x: torch.softmax(x, -1, torch.float32),
    "dtype and back": lambda m, x: functional.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype),
    "upcast": lambda m, x: x.float().softmax(-1),
    "upcast and back": lambda m, x: torch.softmax(x.float(), dim=-1).type_as(x),
    "of a linear": lambda m, x: torch.softmax(m.a(x), -1),
    "of a view of a linear": lambda m, x: torch.softmax(m.a(x).float().view(10, 7), -1),
    "of a product": lambda m, x: torch.softmax(x @ x.transpose(1, 2), -1) @ x,
    "before an idle dropout": lambda m, x: functional.dropout(torch.softmax(x, -1), 0.1, m.training) @ m.square.weight,
    "topk after it": lambda m, x: torch.topk(torch.softmax(m.a(x), -1), 2)[0],
    "by hand": lambda m, x: (lambda e: e / e.sum(-1, keepdim=True))(torch.exp(x - x.max(-1, keepdim=True)[0])),
    "by hand, values": lambda m, x: (lambda e: e / torch.sum(e, dim=-1, keepdim=True))(
        torch.exp(x - torch.max(x, dim=-1, keepdim=True).values)
    ),
    "by hand, amax": lambda m, x: (lambda e: e.div(e.sum(dim=-1).unsqueeze(-1)))((x - x.amax(-1, True)).exp()),
    "by hand, new axes": lambda m, x: (lambda e: torch.div(e, e.sum(2)[..., None]))(
        torch.exp(torch.sub(x, torch.max(x, 2)[0][:, :, None]))
    ),
}


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_softmax_becomes_a_kernel(name, dtype):
    (descriptor,) = check_applied(
        "softmax", Net(SOFTMAX[name], dtype), x_of(2, 5, WIDTH, dtype=dtype), rtol=1e-5 if dtype is F32 else 1.6e-2
    ).descriptors
    assert descriptor.config["is_log"] is name.startswith("logarithm")


def test_a_widened_softmax_reads_the_narrow_value():
    function = SOFTMAX["of a view of a linear"]
    (descriptor,) = check_applied(
        "softmax", Net(function, BF16), x_of(2, 5, WIDTH, dtype=BF16), rtol=1.6e-2
    ).descriptors
    assert descriptor.config["dtypes"] == "bfloat16 to float32"
    assert "float" in descriptor.replaced


@pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH)])
def test_a_softmax_that_chooses_its_dimension_is_taken_when_it_is_the_last(shape):
    with pytest.warns(UserWarning, match="Implicit dimension"):
        check_applied("softmax", Net(lambda m, x: functional.softmax(x)), x_of(*shape))


def test_a_slice_of_a_padded_row_keeps_its_stride():
    check_applied("softmax", Net(lambda m, x: torch.softmax(m.a(x)[..., :5], -1)), X)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no softmax", lambda m, x: torch.softmax(x, 1)),
        ("no softmax", lambda m, x: functional.softmax(x[None])[0]),
        ("no softmax", lambda m, x: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)),
        ("no softmax", lambda m, x: (lambda e: e / e.sum(-1, keepdim=True))(torch.exp(x - x.max(1, keepdim=True)[0]))),
        ("no softmax", lambda m, x: (lambda e: e / e.sum(-1, keepdim=True))(torch.exp(x - x.amax(-1, True) * 2))),
        ("its input comes from", lambda m, x: torch.softmax(x * 0.5, -1)),
        ("its input comes from", lambda m, x: torch.softmax((x @ x.mT).masked_fill(x[..., :5] > 0, -1e9), -1) @ x),
        ("float64", lambda m, x: torch.softmax(x.double(), -1).float() @ m.square.weight),
        ("is copied", lambda m, x: torch.softmax(x.transpose(0, 1).contiguous(), -1)),
        ("not contiguous", lambda m, x: torch.softmax(x.transpose(1, 2), -1)),
        ("is used by", lambda m, x: torch.softmax(x, -1) * x),
        ("is used by", lambda m, x: torch.softmax(x, -1).sum(0)),
        ("float64", lambda m, x: torch.softmax(x, -1, dtype=torch.float64)),
        ("rounded before", lambda m, x: torch.softmax(x, -1, dtype=torch.bfloat16)),
        ("used elsewhere", lambda m, x: (lambda e: (e / e.sum(-1, True), e))(torch.exp(x - x.amax(-1, True)))),
    ],
    ids=[
        "other dim", "implicit dim", "no maximum", "maximum of another dim", "not the maximum", "scaled", "masked",
        "double", "copied", "strided", "weighted", "summed", "wider dtype", "narrower dtype", "shared",
    ],
)  # fmt: skip
def test_a_softmax_that_is_none_or_not_alone_is_refused(because, function):
    check_refused("softmax", Net(function), X.clone(), because=because)


def test_a_softmax_of_a_value_written_after_its_cast_is_refused():
    def written(m, x):
        wide = x.float()
        x.mul_(2)
        return torch.softmax(wide, -1)

    check_refused("softmax", Net(written), x_of(3, WIDTH, dtype=BF16), because="written in between")


def test_a_softmax_that_is_written_afterwards_is_still_a_tensor_of_its_own():
    check_applied("softmax", Net(lambda m, x: torch.softmax(x, -1).mul_(2)), X, expected=None)
    check_applied("softmax", Net(lambda m, x: (lambda p: (p, p.mul_(2))[0])(torch.softmax(x, -1))), X)


# --- cross_entropy ---------------------------------------------------------------------------------------------------


def flat(loss: Any) -> Any:
    return lambda m, x, t: loss(m.square(x).view(-1, WIDTH), t.view(-1))


def shifted(m: Net, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The loss of Hugging Face's language models, before 4.46."""
    logits = m.square(x).float()
    shift_logits, shift_labels = logits[..., :-1, :].contiguous(), t[..., 1:].contiguous()
    return nn.CrossEntropyLoss()(shift_logits.view(-1, WIDTH), shift_labels.view(-1))


LOSSES: dict[str, Any] = {
    "function": flat(lambda x, t: functional.cross_entropy(x, t)),
    "none": flat(lambda x, t: functional.cross_entropy(x.float(), t, reduction="none")),
    "sum": flat(lambda x, t: functional.cross_entropy(x, t, reduction="sum")),
    "other ignored class": flat(lambda x, t: functional.cross_entropy(x, t.clamp(min=0), ignore_index=1)),
    "module": flat(lambda x, t: nn.CrossEntropyLoss()(x.float(), t)),
    "smoothed": flat(lambda x, t: nn.CrossEntropyLoss(label_smoothing=0.1)(x, t)),
    "nll_loss": flat(lambda x, t: functional.nll_loss(functional.log_softmax(x, -1), t)),
    "nll_loss of a view": lambda m, x, t: functional.nll_loss(
        functional.log_softmax(m.square(x), dim=-1).view(-1, WIDTH), t.view(-1)
    ),
    "nll_loss of a view, each": lambda m, x, t: functional.nll_loss(
        m.square(x).log_softmax(2).flatten(0, 1), t.flatten(), reduction="none"
    ),
    "NLLLoss": flat(lambda x, t: nn.NLLLoss(reduction="none")(nn.LogSoftmax(dim=1)(x), t)),
    "gathered": lambda m, x, t: -torch.log_softmax(m.square(x), -1).gather(-1, t.clamp(min=0)[..., None]).squeeze(-1),
    "given logits": lambda m, x, t: functional.cross_entropy(x[0], t[0]),
    "classes in the middle": lambda m, x, t: functional.cross_entropy(m.square(x).transpose(1, 2), t, reduction="none"),
    "classes in the middle, widened": lambda m, x, t: functional.cross_entropy(m.square(x).float().mT, t),
    "shifted": shifted,
    "shifted, not widened": lambda m, x, t: functional.cross_entropy(
        m.square(x)[:, :-1].reshape(-1, WIDTH), t[:, 1:].reshape(-1), reduction="none"
    ),
    "widened by Hugging Face": lambda m, x, t: functional.cross_entropy(
        m.square(x).float().view(-1, WIDTH), functional.pad(t, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_loss_becomes_a_kernel(name, dtype):
    model = Net(LOSSES[name], dtype)
    x = x_of(2, 5, WIDTH, dtype=dtype)
    (descriptor,) = check_applied("cross_entropy", model, x, TARGET, rtol=1e-5 if dtype is F32 else 1.6e-2).descriptors
    assert descriptor.config["shape"]


def test_a_shifted_loss_reads_the_narrow_logits_where_they_lie():
    (descriptor,) = check_applied(
        "cross_entropy", Net(shifted, BF16), x_of(2, 5, WIDTH, dtype=BF16), TARGET, rtol=1e-4
    ).descriptors
    assert {"float", "getitem", "contiguous", "view", "cross_entropy"} == set(descriptor.replaced)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no cross-entropy", lambda m, x, t: x.mean()),
        ("have weights", flat(lambda x, t: functional.cross_entropy(x, t, weight=x[0].abs()))),
        ("not int64", flat(lambda x, t: functional.cross_entropy(x, x.softmax(-1)))),
        ("not int64", lambda m, x, t: functional.cross_entropy(x[0, 0], t[0, 0])),
        ("its input comes from", flat(lambda x, t: functional.cross_entropy(torch.tanh(x / 30) * 30, t))),
        ("not contiguous", lambda m, x, t: functional.cross_entropy(x, t.new_zeros(2, WIDTH))),
        ("used elsewhere", flat(lambda x, t: (lambda p: (functional.nll_loss(p, t), p))(x.log_softmax(-1)))),
        ("directly", flat(lambda x, t: functional.nll_loss(torch.log(functional.softmax(x, -1)), t))),
        ("another dimension", flat(lambda x, t: functional.nll_loss(functional.log_softmax(x, 0), t))),
        ("written in between", lambda m, x, t: (lambda p: (x.add_(1), nn.NLLLoss()(p, t[0])))(x[0].log_softmax(1))),
        ("not one value", lambda m, x, t: x.log_softmax(-1).gather(-1, t.clamp(min=0)[..., None].expand(2, 5, 2))),
        ("float64", flat(lambda x, t: functional.cross_entropy(x.double(), t))),
    ],
    ids=[
        "none", "weights", "probabilities", "one token", "capped", "strided", "shared", "not directly", "other dim",
        "written", "two gathered", "double",
    ],
)  # fmt: skip
def test_a_loss_that_the_kernel_does_not_compute_is_refused(because, function):
    check_refused("cross_entropy", Net(function), X.clone(), TARGET, because=because)


# --- cumsum ----------------------------------------------------------------------------------------------------------

MASK = x_of(2, 5, WIDTH, seed=3) > 0

SUMS: dict[str, tuple[Any, bool, bool]] = {
    "function": (lambda m, x, k: torch.cumsum(x, dim=-1), False, False),
    "method": (lambda m, x, k: x.cumsum(2), False, False),
    "dtype": (lambda m, x, k: x.cumsum(-1, dtype=torch.float32), False, False),
    "of a linear": (lambda m, x, k: torch.cumsum(m.a(x), 2), False, False),
    "backwards": (lambda m, x, k: torch.cumsum(x.flip(2), dim=2).flip(2), True, False),
    "backwards, as functions": (
        lambda m, x, k: torch.flip(torch.cumsum(torch.flip(x, (-1,)), -1), dims=[-1]),
        True,
        False,
    ),
    "masked": (lambda m, x, k: torch.cumsum(x * k, dim=-1), False, True),
    "mask first": (lambda m, x, k: (k * x).cumsum(-1), False, True),
    "masked, backwards": (lambda m, x, k: torch.cumsum((x * k).flip(-1), -1).flip(-1), True, True),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_running_sum_becomes_a_kernel(name, dtype):
    function, is_reverse, has_mask = SUMS[name]
    x = x_of(2, 5, WIDTH, dtype=dtype)
    # Eager rounds each sum to bf16; the kernel's formula sums in fp32.
    rtol = 1e-5 if dtype is F32 else 0.1
    (descriptor,) = check_applied("cumsum", Net(function, dtype), x, MASK, rtol=rtol).descriptors
    assert (descriptor.config["is_reverse"], descriptor.config["has_mask"]) == (is_reverse, has_mask)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no cumsum", lambda m, x, k: torch.cumsum(x, 1)),
        ("no cumsum", lambda m, x, k: x.cumprod(-1)),
        ("int64", lambda m, x, k: torch.cumsum(k, -1)),
        ("its input comes from", lambda m, x, k: torch.cumsum(x * 2, -1)),
        ("its input comes from", lambda m, x, k: torch.cumsum(x.flip(-1), -1)),
        ("its input comes from", lambda m, x, k: torch.cumsum(x * (x > 0), -1)),
        ("is used by", lambda m, x, k: torch.cumsum(x, -1).exp()),
        ("rounded before", lambda m, x, k: torch.cumsum(x, -1, dtype=torch.bfloat16)),
        ("not contiguous", lambda m, x, k: torch.cumsum(x.mT, -1)),
    ],
    ids=["other dim", "product", "integers", "scaled", "one flip", "mask computed", "used", "narrower", "strided"],
)
def test_another_running_sum_is_refused(because, function):
    check_refused("cumsum", Net(function), X, MASK, because=because)
