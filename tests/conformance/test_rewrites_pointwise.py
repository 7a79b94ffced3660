"""pointwise_conv and horizontal products: the same values, strides and weights, and a measurement that decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rewrites_layouts import made
from torch import Tensor, nn
from torch.nn import functional as F
from written_language import Formula

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.convolutions import LayoutTimes
from agnitra_lab.patch.install import install
from agnitra_lab.patch.rewrites import pointwise_conv


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "one": nn.Conv2d(4, 6, 1), "bare": nn.Conv2d(4, 5, 1, bias=False), "wide": nn.Conv2d(4, 4, 3, padding=1),
        "row": nn.Conv1d(4, 6, 1), "clip": nn.Conv3d(4, 3, 1), "strided": nn.Conv2d(4, 6, 1, stride=2),
        "padded": nn.Conv2d(4, 6, 1, padding=1), "same": nn.Conv2d(4, 6, 1, padding="same"),
        "grouped": nn.Conv2d(4, 6, 1, groups=2), "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "norm": nn.LayerNorm(4), "bn": nn.BatchNorm2d(6),
    }  # fmt: skip


def check(actions: list[str], function: Any, *args: Tensor, kernels: Any = None) -> Any:
    """Install rewrites, compare with eager (values, shapes, dtypes, strides), also after an update of the weights."""
    model = Formula(function, **layers()).eval()
    patch = install(Workload("case", model, args), actions, name="candidate", kernels=kernels, is_lowered=False)
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


IMAGE, ROW, CLIP = random(2, 4, 5, 3), random(2, 4, 7), random(2, 4, 3, 5, 2)
LAST = IMAGE.to(memory_format=torch.channels_last)
POINTWISE: dict[str, tuple[Any, Tensor, int]] = {
    "planes": (lambda m, x: m.one(x), IMAGE, 1),
    "planes without bias": (lambda m, x: m.bare(x).relu(), IMAGE, 1),
    "channels innermost": (lambda m, x: m.one(x), LAST, 1),
    "innermost without bias": (lambda m, x: (m.bare(x), m.bare(x).flatten(1)), LAST, 2),
    "one position": (lambda m, x: m.one(F.adaptive_avg_pool2d(x, 1)).sigmoid() * 2, IMAGE, 1),
    "one position, innermost": (lambda m, x: m.one(F.adaptive_avg_pool2d(x, 1)), LAST, 1),
    "rows": (lambda m, x: m.row(x), ROW, 1),
    "rows of a turned norm": (lambda m, x: m.row(m.norm(x.transpose(1, 2)).transpose(1, 2)).transpose(1, 2), ROW, 1),
    "clips": (lambda m, x: m.clip(x), CLIP, 1),
    "clips, innermost": (lambda m, x: m.clip(x).view(2, 3, -1) if x.is_contiguous() else m.clip(x),
                         CLIP.to(memory_format=torch.channels_last_3d), 1),
    "padding by name": (lambda m, x: m.same(x), IMAGE, 1),
    "functional": (lambda m, x: F.conv2d(x, weight=m.one.weight, bias=m.one.bias, dilation=3), IMAGE, 1),
    "between others": (lambda m, x: m.wide(m.bare(x)[:, :4]), IMAGE, 1),
    "written later": (lambda m, x: m.one(x).mul_(2), LAST, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", POINTWISE)
def test_a_convolution_with_one_tap_becomes_a_product_where_it_lies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise_conv, "measure", lambda *_: (2.0, 1.0))
    function, x, count = POINTWISE[name]
    assert len(made(check(["pointwise_conv"], function, x), "pointwise_conv")) == count


def test_after_a_change_of_layout_the_product_is_a_linear_over_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise_conv, "measure", lambda *_: (2.0, 1.0))
    monkeypatch.setattr(LayoutTimes, "of", lambda self, node: (2.0, 1.0))
    monkeypatch.setattr(LayoutTimes, "conversion_ms", lambda self, fake: 0.0)
    patch = check(
        ["conv_bn_fold", "channels_last", "pointwise_conv"], lambda m, x: m.bn(m.one(m.wide(x))).relu(), IMAGE
    )
    (found,) = made(patch, "pointwise_conv")
    assert found.replacement == "linear over the channels" and len(made(patch, "conv_bn_fold")) == 1


@pytest.mark.parametrize(
    ("because", "function", "x"),
    [
        ("single tap", lambda m, x: m.wide(x), IMAGE),
        ("single tap", lambda m, x: m.grouped(x), IMAGE),
        ("single tap", lambda m, x: m.one(x[0]), IMAGE),
        ("stride or padding", lambda m, x: m.strided(x), IMAGE),
        ("stride or padding", lambda m, x: m.padded(x), IMAGE),
        ("neither contiguous", lambda m, x: m.one(x[:, :, ::2]), IMAGE),
    ],
    ids=["more taps", "groups", "no batch", "stride", "padding", "a slice"],
)
def test_other_convolutions_stay(because: str, function: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise_conv, "measure", lambda *_: (2.0, 1.0))
    patch = check(["pointwise_conv"], function, x)
    assert any(because in refusal.reason for refusal in patch.log().refusals), patch.log().refusals


def test_the_measurement_decides_and_runs_on_the_machine_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = check(["pointwise_conv"], POINTWISE["channels innermost"][0], LAST)
    assert made(patch, "pointwise_conv") or "its product" in patch.log().refusals[0].reason
    torch._dynamo.reset()
    monkeypatch.setattr(pointwise_conv, "measure", lambda *_: (1.0, 1.0))
    assert "takes 1.0000 ms" in check(["pointwise_conv"], POINTWISE["planes"][0], IMAGE).log().refusals[0].reason


def test_a_depthwise_convolution_that_has_its_own_kernel_is_not_judged_by_its_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[Any] = []
    monkeypatch.setattr(LayoutTimes, "of", lambda self, node: judged.append(node) or (2.0, 1.0))
    monkeypatch.setattr(LayoutTimes, "conversion_ms", lambda self, fake: 0.0)
    for actions, count in ((["channels_last"], 2), (["channels_last", "depthwise_conv"], 1)):
        judged.clear()
        patch = check(actions, lambda m, x: m.depthwise(m.wide(x)).relu(), IMAGE, kernels=lambda *_: None)
        assert len(judged) == len(made(patch, "channels_last")) == count
        torch._dynamo.reset()
