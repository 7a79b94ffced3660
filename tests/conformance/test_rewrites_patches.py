"""patch_conv: convolutions over patches as products of gathered windows, the same values, strides and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rewrites_grouped import check, random
from test_rewrites_layouts import made
from torch import nn
from torch.nn import functional

from agnitra_lab.patch.rewrites import patch_conv


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.fixture
def a_product_is_faster(monkeypatch):
    monkeypatch.setattr(patch_conv, "measure", lambda *_: (2.0, 1.0))


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "embed": nn.Conv2d(3, 8, 4, stride=4), "oblong": nn.Conv2d(3, 8, (2, 3), stride=(2, 3), bias=False),
        "spread": nn.Conv2d(3, 8, 2, stride=3), "down": nn.Conv2d(8, 6, 2, stride=2), "line": nn.Conv1d(3, 4, 5, 5),
        "sound": nn.Conv1d(1, 8, 10, stride=5), "mixed": nn.Conv2d(1, 4, (3, 2), stride=(1, 2), padding="valid"),
        "clip": nn.Conv3d(3, 4, (1, 2, 2), stride=(1, 2, 2)), "plain": nn.Conv2d(3, 8, 3), "wide": nn.Conv2d(8, 8, 3),
        "padded": nn.Conv2d(3, 8, 2, stride=2, padding=1), "dilated": nn.Conv2d(3, 8, 2, stride=4, dilation=2),
        "grouped": nn.Conv2d(8, 8, 2, stride=2, groups=2), "norm": nn.LayerNorm(8), "group": nn.GroupNorm(2, 8),
        "tap": nn.Conv2d(8, 8, 1),
    }  # fmt: skip


IMAGE, WIDE, LINE, CLIP = random(2, 3, 9, 12), random(2, 8, 6, 7), random(2, 3, 13), random(2, 3, 3, 5, 4)
CASES: dict[str, tuple[Any, torch.Tensor, int]] = {
    "patch embedding": (lambda m, x: m.norm(m.embed(x).flatten(2).transpose(1, 2)), IMAGE, 1),
    "oblong, no bias": (lambda m, x: m.oblong(x).relu(), IMAGE, 1),
    "gaps between windows": (lambda m, x: m.spread(x), IMAGE, 1),
    "windows of few values": (lambda m, x: m.plain(x).flatten(1), IMAGE, 1),
    "stem and downsampling": (lambda m, x: m.down(m.group(m.embed(x)).relu()), random(2, 3, 16, 24), 2),
    "channels innermost": (lambda m, x: m.down(x), WIDE.to(memory_format=torch.channels_last), 1),
    "line": (lambda m, x: m.line(x).transpose(1, 2), LINE, 1),
    "sound": (lambda m, x: functional.gelu(m.sound(x)), random(2, 1, 43), 1),
    "overlapping along one side": (lambda m, x: m.mixed(x), random(2, 1, 6, 7), 1),
    "clip": (lambda m, x: m.clip(x), CLIP, 1),
    "functional": (lambda m, x: functional.conv2d(x, m.embed.weight, stride=(4,)).mul_(2), IMAGE, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_convolution_over_patches_becomes_a_product(name, a_product_is_faster):
    function, x, count = CASES[name]
    assert len(made(check(["patch_conv"], function, x, layers=layers()), "patch_conv")) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stem and downsampling", "sound"])
def test_gathered_windows_go_through_inductor(name, a_product_is_faster):
    check(["patch_conv", "channels_last"], *CASES[name][:2], layers=layers(), is_lowered=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.wide(m.tap(x)), lambda m, x: m.tap(x), lambda m, x: m.grouped(x),
        lambda m, x: m.padded(x[:, :3]), lambda m, x: m.dilated(x[:, :3]), lambda m, x: m.embed(x[0, :3]),
    ],
    ids=["many values that overlap", "one tap", "groups", "padding", "dilation", "no batch"],
)  # fmt: skip
def test_other_convolutions_stay(function, a_product_is_faster):
    patch = check(["patch_conv"], function, WIDE, layers=layers())
    assert not made(patch, "patch_conv")
    assert "windows lie apart" in patch.log().refusals[0].reason


def test_the_measurement_decides_and_runs_on_the_machine_at_hand(monkeypatch):
    patch = check(["patch_conv"], *CASES["patch embedding"][:2], layers=layers())
    assert made(patch, "patch_conv") or "its product" in patch.log().refusals[0].reason
    torch._dynamo.reset()
    monkeypatch.setattr(patch_conv, "measure", lambda *_: (1.0, 1.0))
    patch = check(["patch_conv"], *CASES["clip"][:2], layers=layers())
    assert "takes 1.0000 ms" in patch.log().refusals[0].reason
