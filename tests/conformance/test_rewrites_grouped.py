"""grouped_conv: groups as convolutions or products of their own, the same values, strides and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rewrites_layouts import made
from torch import Tensor, nn
from torch.nn import functional
from written_language import Formula

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.install import install
from agnitra_lab.patch.rewrites import grouped_conv

SPLIT, INNERMOST, PRODUCT = grouped_conv._SPLIT, grouped_conv._INNERMOST, grouped_conv._PRODUCT


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "line": nn.Conv1d(8, 12, 4, padding=2, groups=4), "same": nn.Conv1d(8, 8, 5, padding="same", groups=2),
        "plane": nn.Conv2d(8, 6, 3, stride=(1, 2), padding=1, groups=2),
        "bare": nn.Conv2d(8, 8, 3, groups=4, bias=False),
        "clip": nn.Conv3d(8, 4, 2, groups=2), "tap": nn.Conv2d(8, 12, 1, groups=4), "dense": nn.Conv2d(8, 8, 3),
        "bare_tap": nn.Conv1d(8, 6, 1, groups=2, bias=False), "deep": nn.Conv2d(8, 8, 3, groups=8),
        "many": nn.Conv2d(256, 256, 1, groups=128), "strided": nn.Conv2d(8, 8, 1, stride=2, groups=2),
        "norm": nn.BatchNorm2d(12),
    }  # fmt: skip


def check(
    actions: list[str], function: Any, *args: Tensor, layers: dict[str, nn.Module], is_lowered: bool = False
) -> Any:
    """Install rewrites, compare with eager (values, shapes, dtypes, strides), also after an update of the weights."""
    model = Formula(function, **layers).eval()
    patch = install(Workload("case", model, args), actions, name="candidate", is_lowered=is_lowered)
    with torch.no_grad():
        for _ in range(2):
            leaves = torch.utils._pytree.tree_leaves
            for left, right in zip(leaves(patch.model(*args)), leaves(model(*args)), strict=True):
                assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())
                torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
            for parameter in model.parameters():
                parameter.mul_(1.25)
    assert patch.model.num_guard_misses == 0
    return patch


LINE, IMAGE, CLIP = random(2, 8, 9), random(3, 8, 5, 6), random(2, 8, 3, 4, 2)
LAST = IMAGE.to(memory_format=torch.channels_last)
CASES: dict[str, tuple[Any, Tensor]] = {
    "line": (lambda m, x: m.line(x), LINE),
    "line, padded by name": (lambda m, x: functional.gelu(m.same(x)).transpose(1, 2), LINE),
    "line, turned": (lambda m, x: m.line(x.transpose(1, 2).contiguous().transpose(1, 2)).transpose(1, 2), LINE),
    "plane": (lambda m, x: m.plane(x).relu(), IMAGE),
    "plane, channels innermost": (lambda m, x: m.plane(x), LAST),
    "without a bias": (lambda m, x: m.bare(x).flatten(1), IMAGE),
    "clip": (lambda m, x: m.clip(x), CLIP),
    "functional": (
        lambda m, x: functional.conv2d(x, weight=m.bare.weight, bias=m.dense.bias, dilation=2, groups=4), IMAGE,
    ),
    "written later": (lambda m, x: m.plane(x).mul_(2), IMAGE),
}  # fmt: skip
PRODUCTS: dict[str, tuple[Any, Tensor]] = {
    "one tap": (lambda m, x: m.tap(x), IMAGE),
    "one tap, a norm after it": (lambda m, x: m.norm(m.tap(x)).relu(), IMAGE),
    "one tap of a line": (lambda m, x: m.bare_tap(x).relu(), LINE),
}


def choose(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_conv, "measure", lambda *_: {"grouped": 2.0, form: 1.0})


@pytest.mark.parametrize("form", [SPLIT, INNERMOST])
@pytest.mark.parametrize("name", CASES)
def test_groups_become_convolutions_of_their_own(name, form, monkeypatch):
    choose(form, monkeypatch)
    (found,) = made(check(["grouped_conv"], *CASES[name], layers=layers()), "grouped_conv")
    assert found.replacement == form


@pytest.mark.parametrize("name", PRODUCTS)
def test_groups_with_one_tap_become_one_batched_product(name, monkeypatch):
    choose(PRODUCT, monkeypatch)
    assert len(made(check(["conv_bn_fold", "grouped_conv"], *PRODUCTS[name], layers=layers()), "grouped_conv")) == 1


@pytest.mark.slow
def test_split_groups_go_through_inductor(monkeypatch):
    choose(INNERMOST, monkeypatch)
    check(["grouped_conv", "channels_last"], *CASES["line, padded by name"], layers=layers(), is_lowered=True)


@pytest.mark.parametrize(
    ("because", "function", "x"),
    [
        ("no convolution with groups", lambda m, x: m.dense(x), IMAGE),
        ("no convolution with groups", lambda m, x: m.deep(x), IMAGE),
        ("no convolution with groups", lambda m, x: m.line(x[0]), LINE),
        ("128 groups", lambda m, x: m.many(x), random(1, 256, 2, 2)),
        ("not a tensor that the graph is given", lambda m, x: functional.conv2d(x, m.bare.weight * 2, groups=4), IMAGE),
        ("writes to a weight", lambda m, x: (m.bare(x), m.bare.weight.clamp_(-9, 9)), IMAGE),
    ],
    ids=["dense", "depthwise", "no batch", "many groups", "computed weight", "written weight"],
)
def test_other_convolutions_stay(because, function, x, monkeypatch):
    choose(SPLIT, monkeypatch)
    patch = check(["grouped_conv"], function, x, layers=layers())
    assert any(because in refusal.reason for refusal in patch.log().refusals), patch.log().refusals
    assert not made(patch, "grouped_conv")


@pytest.mark.parametrize(("name", "has_product"), [("tap", True), ("strided", False), ("plane", False)])
def test_every_form_computes_the_convolution(name, has_product):
    layer = layers()[name]
    graph = torch.fx.Graph()
    sources = [graph.placeholder(each) for each in ("x", "weight", "bias")]
    node = graph.call_function(torch.conv2d, (*sources, layer.stride, layer.padding, (1, 1), layer.groups))
    for source, value in zip(sources, (IMAGE, layer.weight, layer.bias), strict=True):
        source.meta["example_value"] = value
    node.meta["example_value"] = layer(IMAGE)
    forms = grouped_conv._forms(node, layer.groups)
    assert (PRODUCT in forms) is has_product
    for form, run in forms.items():
        weight = grouped_conv._laid_out(layer.weight) if form == INNERMOST else layer.weight
        torch.testing.assert_close(run(IMAGE, weight, layer.bias), layer(IMAGE), rtol=1e-5, atol=1e-5)


def test_the_measurement_decides_and_runs_on_the_machine_at_hand(monkeypatch):
    patch = check(["grouped_conv"], *PRODUCTS["one tap"], layers=layers())
    assert made(patch, "grouped_conv") or "one for each group" in patch.log().refusals[0].reason
    torch._dynamo.reset()
    monkeypatch.setattr(grouped_conv, "measure", lambda *_: {"grouped": 1.0, SPLIT: 1.0})
    assert "takes 1.0000 ms" in check(["grouped_conv"], *CASES["plane"], layers=layers()).log().refusals[0].reason
