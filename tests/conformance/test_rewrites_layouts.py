"""Convolutions that change layout and layers that stay opaque: the same values, strides and weights that follow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from agnitra_lab.contracts import Kernel, KernelConfig, Workload
from agnitra_lab.generate import registry
from agnitra_lab.patch import convolutions
from agnitra_lab.patch.convolutions import LayoutTimes
from agnitra_lab.patch.install import install
from agnitra_lab.patch.opaque import conv_as_is
from agnitra_lab.patch.rewrites import keep_eager

IMAGE = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(1))
CLIP = torch.randn(1, 3, 4, 6, 5, generator=torch.Generator().manual_seed(2))
LINE = torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.fixture
def channels_last_is_faster(monkeypatch):
    monkeypatch.setattr(LayoutTimes, "of", lambda self, node: (2.0, 1.0))
    monkeypatch.setattr(LayoutTimes, "conversion_ms", lambda self, fake: 0.0)


class Net(nn.Module):
    """A module whose forward is the function given, over a set of layers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.next = nn.Conv2d(4, 6, 3, stride=2, bias=False)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1)
        self.norm, self.groups = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.conv3, self.next3 = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(4, 4, 3, stride=(1, 2, 2))
        self.up3 = nn.ConvTranspose3d(4, 2, 2, stride=2)
        self.conv1, self.next1 = nn.Conv1d(3, 4, 3, padding="same", dilation=2), nn.Conv1d(4, 6, 3, stride=2, groups=2)
        self.up1 = nn.ConvTranspose1d(4, 3, 4, stride=2, padding=1, output_padding=1, dilation=2)
        self.norm1 = nn.LayerNorm(4)
        self.norm.running_mean.uniform_(-1, 1)
        self.lstm = nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True)
        self.projected = nn.LSTM(5, 6, proj_size=3)
        self.gru, self.rnn = nn.GRU(5, 6, batch_first=True), nn.RNN(5, 6, nonlinearity="relu", bias=False)
        self.head = nn.Linear(24, 3)
        self.eval()

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def check(actions: list[str], function: Any, *args: Tensor, is_lowered: bool = False) -> Any:
    model = Net(function)
    twin, twin_args = copy.deepcopy((model, args))
    patch = install(Workload("case", model, args), actions, name="candidate", is_lowered=is_lowered)
    compare(patch, twin, args, twin_args)
    return patch, model


def compare(patch: Any, twin: Any, args: Any, twin_args: Any) -> None:
    with torch.no_grad():
        ours, theirs = patch.model(*args), twin(*twin_args)
    for left, right in zip(leaves(ours), leaves(theirs), strict=True):
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    assert patch.model.num_guard_misses == 0


def leaves(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


def made(patch: Any, action: str) -> list[Any]:
    return [descriptor for descriptor in patch.log().descriptors if descriptor.action == action]


# --- channels_last ---------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Any, Tensor, int]] = {
    "one convolution": (lambda m, x: m.conv(x), IMAGE, 1),
    "chain": (lambda m, x: m.next(m.norm(m.conv(x)).relu()), IMAGE, 2),
    "view after it": (lambda m, x: m.conv(x).view(2, -1).relu(), IMAGE, 1),
    "several views": (lambda m, x: (m.conv(x).view(2, 4, 63), m.conv(x).permute(0, 2, 3, 1)), IMAGE, 2),
    "transposed": (lambda m, x: m.up(m.depthwise(m.conv(x)) + m.conv(x)), IMAGE, 4),
    "group norm and pooling": (
        lambda m, x: functional.max_pool2d(functional.silu(m.groups(m.conv(x))), 2).mean((2, 3)), IMAGE, 1,
    ),
    "max pool with indices": (lambda m, x: functional.max_pool2d(m.conv(x), 2, return_indices=True), IMAGE, 1),
    "cat and interpolate": (
        lambda m, x: functional.interpolate(torch.cat([m.conv(x), x], 1), scale_factor=2), IMAGE, 1,
    ),
    "in place": (lambda m, x: functional.relu_(m.conv(x).add_(1.0)).mul_(2), IMAGE, 1),
    "strided view": (lambda m, x: m.conv(x).as_strided((2, 4), (252, 63)) * 2, IMAGE, 1),
    "functional, dilation": (
        lambda m, x: functional.conv2d(input=x, weight=m.conv.weight, bias=m.conv.bias, dilation=2), IMAGE, 1,
    ),
    "1-d": (lambda m, x: m.next1(m.conv1(x).relu()).flatten(1), LINE, 2),
    "1-d, transposed": (lambda m, x: m.up1(functional.silu(m.conv1(x))), LINE, 2),
    "1-d, a norm between": (
        lambda m, x: m.next1(m.norm1(m.conv1(x).transpose(1, 2)).transpose(1, 2)).transpose(1, 2), LINE, 2,
    ),
    "1-d, channels innermost before": (lambda m, x: m.conv1(x.transpose(1, 2).contiguous().transpose(1, 2)), LINE, 1),
    "1-d, functional": (
        lambda m, x: functional.conv1d(x, m.conv1.weight, stride=(2,), padding=(1,)).view(2, -1), LINE, 1,
    ),
    "3-d": (lambda m, x: m.next3(m.conv3(x).relu()).flatten(1), CLIP, 2),
    "3-d, transposed": (lambda m, x: m.up3(functional.silu(m.conv3(x))), CLIP, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_convolutions_change_layout_and_results_keep_their_strides(name, channels_last_is_faster):
    function, x, expected = MODELS[name]
    patch, _ = check(["channels_last"], function, x)
    assert len(made(patch, "channels_last")) == expected


def test_a_folded_weight_in_a_new_layout_follows_its_sources(channels_last_is_faster):
    function, x, _ = MODELS["chain"]
    patch, model = check(["conv_bn_fold", "channels_last"], function, x)
    assert len(made(patch, "conv_bn_fold")) == 1
    with torch.no_grad():
        model.conv.weight.mul_(-2)
        model.norm.running_var.add_(1)
        model.next.weight.add_(1)
    compare(patch, model, (x,), (x,))


@pytest.mark.slow
def test_a_changed_layout_goes_through_inductor(channels_last_is_faster):
    for name in ("3-d", "1-d, a norm between"):
        function, x, _ = MODELS[name]
        check(["channels_last"], function, x, is_lowered=True)
        torch._dynamo.reset()


def test_without_a_measured_gain_the_layout_stays(monkeypatch):
    monkeypatch.setattr(LayoutTimes, "of", lambda self, node: (1.0, 1.0))
    patch, _ = check(["channels_last"], lambda m, x: m.conv(x), IMAGE)
    assert "with the channels innermost" in patch.log().refusals[0].reason


def kernels(template: str, shape: tuple[int, ...], dtype: str) -> Kernel:
    return Kernel(KernelConfig(template=template, params={}), "", "0" * 64, registry.load(template).reference)


def test_copies_around_a_kernel_of_ours_count_for_it_takes_one_layout_alone(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(LayoutTimes, "of", lambda self, node: (2.0, 1.0))
    # Both convolutions gain 2 ms; the copies of the input and of the result cost 1.2, those around the softmax as much.
    monkeypatch.setattr(LayoutTimes, "conversion_ms", lambda self, fake: 0.6)
    for actions, num_changed in ((["channels_last"], 2), (["channels_last", "softmax"], 0)):
        case = Workload("case", Net(lambda m, x: m.next(torch.softmax(m.conv(x), -1))), (IMAGE,))
        patch = install(case, actions, name="candidate", kernels=kernels, is_lowered=False)
        assert len(made(patch, "channels_last")) == num_changed, patch.log()
        assert len(made(patch, "softmax")) == len(actions) - 1


@pytest.mark.parametrize(("last_ms", "num_kernels"), [(1.0, 0), (2.0, 1)])
def test_a_group_norm_of_contiguous_values_stays_where_convolutions_want_their_channels_innermost(
    last_ms, num_kernels, monkeypatch
):
    pytest.importorskip("triton")
    monkeypatch.setattr(LayoutTimes, "of", lambda self, node: (2.0, last_ms))
    case = Workload("case", Net(lambda m, x: m.next(m.groups(m.conv(x)))), (IMAGE,))
    patch = install(case, ["group_norm"], name="candidate", kernels=kernels, is_lowered=False)
    assert len(made(patch, "group_norm")) == num_kernels, patch.log()


def test_both_layouts_are_measured_on_the_machine_at_hand():
    patch, _ = check(["channels_last"], MODELS["chain"][0], IMAGE)
    log = patch.log()
    assert log.descriptors or "with the channels innermost" in log.refusals[0].reason


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no convolution", lambda m, x: x * 2),
        ("not a tensor that the graph is given", lambda m, x: functional.conv2d(x, m.conv.weight * 2)),
        ("writes to a weight", lambda m, x: (m.conv(x), m.conv.weight.clamp_(-9, 9))),
    ],
    ids=["none", "computed weight", "written weight"],
)
def test_convolutions_that_cannot_change_are_refused(because, function, channels_last_is_faster):
    patch, _ = check(["channels_last"], function, IMAGE)
    assert any(because in refusal.reason for refusal in patch.log().refusals), patch.log().refusals


def test_a_model_in_channels_last_already_is_refused(channels_last_is_faster):
    model = Net(lambda m, x: m.conv(x))
    model.conv.to(memory_format=torch.channels_last)
    x = IMAGE.to(memory_format=torch.channels_last)
    log = install(Workload("case", model, (x,)), ["channels_last"], name="candidate", is_lowered=False).log()
    assert "already" in log.refusals[0].reason


# --- keep_eager ------------------------------------------------------------------------------------------------------

RECURRENT = {
    "lstm": lambda m, x: m.lstm(x)[0].relu(),
    "lstm, all results": lambda m, x: m.lstm(x),
    "lstm, state given": lambda m, x: m.lstm(x, (x.new_ones(4, 2, 6), x.new_zeros(4, 2, 6)))[1][0] * 2,
    "lstm, projected": lambda m, x: m.projected(x),
    "lstm, one sequence": lambda m, x: m.projected(x[0])[0],
    "gru": lambda m, x: (m.gru(x)[0] + 1, m.gru(x)[1]),
    "rnn": lambda m, x: m.rnn(x),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_layer_is_one_call_in_one_graph(name):
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3))
    patch, _ = check(["keep_eager"], RECURRENT[name], x)
    assert len(made(patch, "keep_eager")) == (2 if name == "gru" else 1)
    assert patch.log().num_graphs == 1


@pytest.mark.slow
def test_a_recurrent_layer_stays_one_call_under_inductor_and_follows_its_weights():
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(3))
    patch, model = check(["keep_eager"], lambda m, x: m.lstm(x)[0].sum(-1, keepdim=True) * 2, x, is_lowered=True)
    with torch.no_grad():
        model.lstm.weight_hh_l0.mul_(-1)
    compare(patch, model, (x,), (x,))


def test_nothing_to_keep_is_refused():
    patch, _ = check(["keep_eager"], lambda m, x: m.conv(x), IMAGE)
    assert "no recurrent layer" in patch.log().refusals[0].reason


def test_convolutions_on_a_cpu_are_left_to_inductor():
    patch, _ = check(["keep_eager"], lambda m, x: m.depthwise(m.conv(x)), IMAGE)
    assert "CUDA" in patch.log().refusals[0].reason


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.depthwise(m.conv(x)),
        lambda m, x: m.up(m.conv(x)),
        lambda m, x: functional.conv_transpose2d(m.conv(x), m.up.weight, None, 3, output_padding=(1, 2), dilation=2),
        lambda m, x: functional.conv2d(m.conv(x), m.depthwise.weight, stride=(1, 2), groups=4, padding=1),
    ],
    ids=["depthwise", "transposed", "all options", "by keyword"],
)
def test_a_kept_convolution_computes_the_same(function, monkeypatch):
    # The rule asks for CUDA, the replacement itself is the same everywhere.
    kept = []

    def keep(node, times, together, context):
        arguments = keep_eager._aten_arguments(node)
        kept.append(arguments)
        return keep_eager._install(node, arguments, {}, context)

    monkeypatch.setattr(keep_eager, "_keep_convolution", keep)
    patch, _ = check(["keep_eager"], function, IMAGE)
    assert len(made(patch, "keep_eager")) == len(kept) == 1


@pytest.mark.parametrize(
    ("border_ms", "function", "num_turned", "num_kept"),
    [
        (0.0, lambda m, x: m.next(m.conv(x)).relu(), 2, 0),
        (1.0, lambda m, x: m.next(m.conv(x)).relu(), 0, 2),
        (1.0, lambda m, x: m.next(m.conv(x)), 0, 2),
        # The copy in and the copy out cost more than turning gains; the one in alone does not.
        (0.15, lambda m, x: m.next(m.conv(x)).relu(), 0, 0),
        (0.15, lambda m, x: m.next(m.conv(x)), 0, 2),
    ],
    ids=["no copies", "a copy in", "copies on both sides", "relu writes what is wanted", "nothing writes it"],
)
def test_convolutions_that_are_slower_turned_with_the_copies_around_them_keep_their_layout(
    border_ms, function, num_turned, num_kept, monkeypatch
):
    monkeypatch.setattr(LayoutTimes, "of", lambda self, node: (1.0, 0.9))
    monkeypatch.setattr(LayoutTimes, "conversion_ms", lambda self, fake: border_ms)
    monkeypatch.setattr(keep_eager, "_is_on_cuda", lambda node: True)
    patch, _ = check(["channels_last", "keep_eager"], function, IMAGE)
    assert len(made(patch, "channels_last")) == num_turned
    assert len(made(patch, "keep_eager")) == num_kept


def test_a_convolution_that_would_lose_digits_with_its_channels_innermost_keeps_its_layout(monkeypatch):
    monkeypatch.setattr(convolutions, "_loses_digits", lambda node, fake, memory_format: True)
    monkeypatch.setattr(convolutions, "_time_ms", lambda node, device, memory_format: 1.0)
    monkeypatch.setattr(keep_eager, "_is_on_cuda", lambda node: True)
    patch, _ = check(["channels_last", "keep_eager"], lambda m, x: m.next(m.conv(x)).relu(), IMAGE)
    assert made(patch, "channels_last") == []
    assert [each.config for each in made(patch, "keep_eager")] == [{"is_tf32_with_channels_last": True}] * 2


def test_the_opaque_operations_hold_what_they_promise():
    weight = torch.randn(4, 1, 3, 3)
    x = torch.randn(2, 4, 5, 6)
    torch.library.opcheck(conv_as_is, (x, weight, [1, 2], [1, 1], [1, 1], False, [0, 0], 4), test_utils="test_schema")
    torch.library.opcheck(
        conv_as_is, (x, weight, [1, 2], [1, 1], [1, 1], False, [0, 0], 4), test_utils="test_faketensor"
    )
    lstm = nn.LSTM(5, 6, batch_first=True)
    state = torch.zeros(1, 2, 6)
    arguments = (torch.randn(2, 3, 5), [state, state], lstm._flat_weights, "lstm", True, 1, 0.0, False, False, True)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.agnitra.recurrent.default, arguments, test_utils="test_faketensor")
