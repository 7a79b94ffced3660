"""The depthwise rewrite: every spelling fires, what it cannot keep is refused, and results stay those of eager.

A kernel is its plain formula here, in the layout that the template promises.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from agnitra_lab.contracts import Kernel, KernelConfig, Workload
from agnitra_lab.patch.install import install

CALLS: list[dict[str, Any]] = []
SHAPES: list[tuple[int, ...]] = []
C = 6


def formula(x, weight, bias, taps, stride, padding, dilation, size, activation="none", is_channels_last=False):
    assert x.stride(1) == 1 if is_channels_last else True
    CALLS.append({"activation": activation, "is_channels_last": is_channels_last, "weight": tuple(weight.shape)})
    channels, rank = weight.numel() // math.prod(taps), len(taps)
    weight = (weight.t() if weight.dim() == 2 else weight).reshape(channels, 1, *taps)
    spans = [(n - 1) * s + r * (k - 1) + 1 for n, s, r, k in zip(size, stride, dilation, taps, strict=True)]
    for place, (before, span) in enumerate(zip(padding, spans, strict=True)):
        after = max(0, span - x.shape[2 + place] - before)
        x = functional.pad(x, [0, 0] * (rank - 1 - place) + [before, after])
    out = getattr(functional, f"conv{rank}d")(x, weight, bias, stride, 0, dilation, x.shape[1])
    out = out[(..., *(slice(n) for n in size))]
    if activation != "none":
        out = functional.gelu(out) if activation == "gelu" else getattr(functional, activation)(out)
    return out.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last else out.contiguous()


def kernel_of(template: str, shape: tuple[int, ...], dtype: str) -> Kernel | None:
    SHAPES.append(shape)
    return Kernel(KernelConfig(template=template, params={"BLOCK_W": 4}), "", "0" * 64, formula)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    CALLS.clear()
    SHAPES.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A module whose forward is the function given, over a fixed set of layers."""

    def __init__(self, function: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.image = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.wide = nn.Conv2d(C, 2 * C, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=C, bias=False)
        self.same = nn.Conv2d(C, C, (4, 3), padding="same", dilation=(1, 2), groups=C)
        self.reflected = nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect", groups=C)
        self.row, self.bare_row = nn.Conv1d(C, C, 4, padding=3, groups=C), nn.Conv1d(C, C, 4, groups=C)
        self.clip = nn.Conv3d(C, C, 3, padding=1, groups=C)
        self.full, self.grouped = nn.Conv2d(C, C, 3), nn.Conv2d(C, C, 3, groups=2)
        self.one = nn.Conv2d(1, 4, 3)
        self.linear, self.norm = nn.Linear(C, C), nn.LayerNorm(C)
        self.to(dtype).eval()

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


IMAGE, ROW, CLIP = x_of(2, C, 7, 9), x_of(2, C, 12), x_of(1, C, 4, 6, 5)
TOKENS = x_of(2, 12, C)
LAST = IMAGE.to(memory_format=torch.channels_last)


def check(function: Any, *args: Tensor, expected: int = 1, actions: Any = ("depthwise_conv",), **options: Any) -> Any:
    """Install the rewrite, compare with eager (values, shapes, dtypes, strides), and return patch and model."""
    model = Net(function, args[0].dtype)
    args = tuple(arg.clone(memory_format=torch.preserve_format) for arg in args)
    twin, twin_args = copy.deepcopy((model, args))
    options = {"is_lowered": False, "kernels": kernel_of} | options
    patch = install(Workload("case", model, args), list(actions), name="candidate", **options)
    compare(patch, twin, args, twin_args)
    made = [found for found in patch.log().descriptors if found.action == "depthwise_conv"]
    assert len(made) == expected, patch.log().refusals
    return patch, model


def compare(patch: Any, twin: Any, args: Any, twin_args: Any) -> None:
    with torch.no_grad():
        ours, theirs = patch.model(*args), twin(*twin_args)
    leaves = torch.utils._pytree.tree_leaves
    rtol = 4e-2 if args[0].dtype == torch.bfloat16 else 1e-4
    for left, right in zip(leaves(ours), leaves(theirs), strict=True):
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())
        torch.testing.assert_close(left, right, rtol=rtol, atol=rtol)
    for left, right in zip(args, twin_args, strict=True):
        torch.testing.assert_close(left, right)
    assert patch.model.num_guard_misses == 0


FIRING: dict[str, tuple[Any, Tensor, str, bool]] = {
    "image": (lambda m, x: m.image(x), IMAGE, "none", False),
    "image, channels innermost": (lambda m, x: m.image(x), LAST, "none", True),
    "stride, dilation, multiplier": (lambda m, x: m.wide(x), IMAGE, "none", False),
    "multiplier, channels innermost": (lambda m, x: m.wide(x), LAST, "none", True),
    "padding by name": (lambda m, x: m.same(x), IMAGE, "none", False),
    "reflected borders": (lambda m, x: m.reflected(x), IMAGE, "none", False),
    "functional": (
        lambda m, x: functional.conv2d(x, weight=m.image.weight, groups=C, padding=(0, 2), stride=2), IMAGE, "none",
        False,
    ),
    "clip": (lambda m, x: m.clip(x), CLIP, "none", False),
    "row": (lambda m, x: m.row(x), ROW, "none", False),
    "causal": (lambda m, x: m.row(x)[..., : x.shape[-1]] + 1, ROW, "none", False),
    "causal by negative end": (lambda m, x: m.row(x)[:, :, :-3] * 2, ROW, "none", False),
    "causal by narrow": (lambda m, x: m.row(x).narrow(-1, 0, 12).exp(), ROW, "none", False),
    "causal by pad": (lambda m, x: m.bare_row(functional.pad(x, (3, 0))), ROW, "none", False),
    "causal, as a view": (lambda m, x: m.row(x)[..., :12].transpose(1, 2), ROW, "none", False),
    "causal with silu": (lambda m, x: functional.silu(m.row(x)[..., :12]), ROW, "silu", False),
    "mamba": (
        lambda m, x: functional.silu(m.row(m.linear(x).transpose(1, 2))[..., :12].transpose(1, 2)), TOKENS, "silu",
        True,
    ),
    "mamba 1": (lambda m, x: m.linear(m.row(x.transpose(1, 2))[..., :12].transpose(1, 2).relu()), TOKENS, "relu", True),
    "relu in place": (lambda m, x: functional.relu(m.image(x), inplace=True), IMAGE, "relu", False),
    "silu by hand": (lambda m, x: (y := m.image(x)) * torch.sigmoid(y), LAST, "silu", True),
    "gelu": (lambda m, x: functional.gelu(m.image(x)), LAST, "gelu", True),
    "read twice": (lambda m, x: (y := m.image(x)) + functional.relu(y), IMAGE, "none", False),
    "convnext": (
        lambda m, x: x + m.linear(m.norm(m.image(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2), IMAGE, "none", False,
    ),
    "written later": (lambda m, x: (m.image(x), x.mul_(2)), IMAGE, "none", False),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRING)
def test_a_depthwise_convolution_becomes_one_kernel(name: str) -> None:
    function, x, activation, is_last = FIRING[name]
    check(function, x)
    # One call while the graph was traced is possible too: the last one is the patch's own.
    assert (CALLS[-1]["activation"], CALLS[-1]["is_channels_last"]) == (activation, is_last)
    assert len(CALLS[-1]["weight"]) == (2 if is_last else x.dim())


def test_a_bf16_model_is_patched_too() -> None:
    check(lambda m, x: functional.silu(m.image(x)), IMAGE.bfloat16())


def test_a_slice_shortens_what_is_computed_and_a_pad_goes_away() -> None:
    patch, _ = check(lambda m, x: m.bare_row(functional.pad(x, (3, 0)))[..., :5] + 1, ROW)
    (found,) = patch.log().descriptors
    assert found.config["size"] == [5] and found.config["padding"] == [3]
    assert "pad" in found.replaced and len(found.replaced) == 3


def test_the_site_names_extents_taps_and_layout() -> None:
    check(lambda m, x: m.wide(x), LAST)
    assert SHAPES[-1] == (2, 2 * C, 1, 7, 9, 1, 3, 5, 1, 2, 1, 1, 1, 2, 2)


def test_a_pad_that_is_written_to_or_read_elsewhere_keeps_its_place() -> None:
    check(lambda m, x: m.bare_row(functional.pad(x, (3, 0)).mul_(2)), ROW)
    check(lambda m, x: (m.bare_row(p := functional.pad(x, (3, 0))), p + 1), ROW)
    check(lambda m, x: m.bare_row(functional.pad(x, (3, 0), value=1.0)), ROW)

    def writes_x(m, x):
        padded = functional.pad(x * 1, (3, 0))
        return m.bare_row(padded)

    check(writes_x, ROW)


def test_a_laid_out_weight_follows_its_source() -> None:
    patch, model = check(lambda m, x: m.image(x), LAST)
    with torch.no_grad():
        model.image.weight.mul_(-2)
    compare(patch, model, (LAST,), (LAST,))


def test_a_weight_that_the_graph_writes_is_read_as_it_is() -> None:
    check(lambda m, x: functional.conv2d(x, m.image.weight.clone().mul_(2), groups=C), LAST)
    assert len(CALLS[-1]["weight"]) == 4


def test_neighbours_follow_a_result_in_a_new_layout() -> None:
    # Eager gives planes for rows with channels innermost on some devices, and torch says which in the fake result.
    def function(m, x):
        y = m.row(x.transpose(1, 2))
        return y.flatten(1), y.transpose(1, 2), y.view(2, -1, 3) if y.is_contiguous() else y.reshape(2, -1, 3)

    check(function, TOKENS)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("group for each channel", lambda m, x: m.full(x)),
        ("group for each channel", lambda m, x: m.grouped(x)),
        ("group for each channel", lambda m, x: m.one(x[:, :1])),
        ("group for each channel", lambda m, x: m.image(x[0])),
        ("differ in dtype", lambda m, x: functional.conv2d(x.double(), m.image.weight.double(), groups=C)),
        (
            "taps along a row",
            lambda m, x: functional.conv2d(functional.pad(x, (40, 40)), x.new_ones(C, 1, 1, 70), groups=C),
        ),
    ],
    ids=["full", "grouped", "one channel", "no batch", "double", "long rows of taps"],
)
def test_other_convolutions_are_refused(because: str, function: Any) -> None:
    patch, _ = check(function, IMAGE, expected=0)
    assert any(because in refusal.reason for refusal in patch.log().refusals), patch.log().refusals


def test_without_a_kernel_the_convolution_stays() -> None:
    patch, _ = check(lambda m, x: m.image(x), IMAGE, expected=0, kernels=lambda *_: None)
    assert "kernel was given" in patch.log().refusals[0].reason


@pytest.mark.slow
def test_a_patched_graph_goes_through_inductor() -> None:
    check(FIRING["mamba"][0], TOKENS, is_lowered=True)
