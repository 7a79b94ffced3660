"""Every rewrite: fires on what the graph computes in any spelling, refuses with a reason, and keeps the result.

On the CPU a template's kernel is its plain formula, so matching and dataflow are tested here and the Triton kernels
themselves in the template suite.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from agnitra_lab.contracts import Kernel, KernelConfig, Workload
from agnitra_lab.patch.install import install

WIDTH = 13


def rms_norm_formula(x, weight, eps, residual=None, cast_before_weight=True):
    summed = x if residual is None else x + residual
    wide = summed.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out = normed.to(x.dtype) * weight if cast_before_weight else (normed * weight.float()).to(x.dtype)
    return out if residual is None else (out, summed)


def swiglu_formula(gate, up):
    return functional.silu(gate) * up


def kernel(name: str, call: Any) -> Kernel:
    return Kernel(KernelConfig(template=name, params={"BLOCK_N": 16}), "", "0" * 64, call)


KERNELS = {"rms_norm": kernel("rms_norm", rms_norm_formula), "swiglu": kernel("swiglu", swiglu_formula)}


def kernel_of(template: str, shape: tuple[int, ...], dtype: str) -> Kernel | None:
    return KERNELS.get(template)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def check_applied(action: str, model: Any, *args: Any, expected: int | None = 1, rtol: float = 1e-5) -> Any:
    """Install one rewrite, compare with eager (values, shapes, dtypes, strides), and return the log."""
    workload = Workload("case", model, args)
    twin, twin_args = copy.deepcopy((model, args))
    patch = install(workload, [action], name="candidate", kernels=kernel_of, is_lowered=False)
    log = patch.log()
    with torch.no_grad():
        ours, theirs = patch.model(*args), twin(*twin_args)
    for left, right in zip(as_tuple(ours), as_tuple(theirs), strict=True):
        assert left.shape == right.shape
        assert left.dtype == right.dtype
        assert left.stride() == right.stride()
        torch.testing.assert_close(left, right, rtol=rtol, atol=rtol)
    for left, right in zip(args, twin_args, strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=rtol)
    assert patch.model.num_guard_misses == 0
    if expected is not None:
        assert len(log.descriptors) == expected, log.refusals
    return log


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def check_refused(action: str, model: Any, *args: Any, because: str) -> None:
    log = check_applied(action, model, *args, expected=0)
    assert any(because in refusal.reason for refusal in log.refusals), log.refusals


class Net(nn.Module):
    """A module whose forward is the function given, over a fixed set of weights."""

    def __init__(self, function: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a = nn.Linear(WIDTH, 7, bias=False)
        self.b = nn.Linear(WIDTH, 7, bias=False)
        self.c = nn.Linear(WIDTH, 3, bias=False)
        self.biased = nn.Linear(WIDTH, 5)
        self.other = nn.Linear(WIDTH, 7)
        self.square = nn.Linear(WIDTH, WIDTH, bias=False)
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.tall = nn.Parameter(torch.randn(WIDTH, 7))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.plain_conv = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.grouped_conv = nn.Conv2d(4, 4, 3, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.bare_norm = nn.BatchNorm2d(4, affine=False)
        self.batch_norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.rms = nn.RMSNorm(WIDTH, eps=1e-5)
        self.default_rms = nn.RMSNorm(WIDTH)
        for norm in (self.norm, self.bare_norm):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2)
            self.norm.bias.uniform_(-1, 1)
            self.rms.weight.uniform_(0.5, 2)
        self.to(dtype).eval()

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def x_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X = x_of(2, 5, WIDTH)
IMAGE = x_of(2, 3, 9, 7)


# --- qkv_concat ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (m.a(x).sum(-1), m.b(x).sum(-1), m.c(x).sum(-1)),
        lambda m, x: (
            functional.linear(x, m.a.weight).sum(-1) + torch.nn.functional.linear(x, weight=m.c.weight).sum(-1)
        ),
        lambda m, x: (m.biased(x).relu(), m.other(x).relu()),
        lambda m, x: (m.a(x).relu(), m.biased(x).relu(), m.b(x)),
        lambda m, x: m.a(x).mul_(2) + m.b(x),
        lambda m, x: x @ m.a.weight.T + torch.matmul(x, m.b.weight.t()),
        lambda m, x: (x @ m.tall).relu() + m.a(x),
    ],
    ids=[
        "modules",
        "functions",
        "biases",
        "one bias of three",
        "a result written in place",
        "matmul",
        "a turned weight",
    ],
)
@pytest.mark.parametrize("shape", [(2, 5, WIDTH), (1, WIDTH), (WIDTH,)])
def test_linears_with_one_input_become_one(function, shape):
    log = check_applied("qkv_concat", Net(function), x_of(*shape))
    assert log.descriptors[0].replacement.startswith("linear(concat of")


def test_a_view_that_merges_rows_with_columns_still_fits_a_merged_result():
    check_applied("qkv_concat", Net(lambda m, x: (m.a(x).view(-1).relu(), m.c(x).view(2, 5, 3, 1).relu())), X)


def test_results_that_leave_the_graph_keep_their_strides():
    check_applied("qkv_concat", Net(lambda m, x: (m.a(x), m.c(x).transpose(0, 1), m.b(x)[..., :2])), X)


def test_two_inputs_make_two_groups():
    check_applied("qkv_concat", Net(lambda m, x, y: (m.a(x) + m.b(x)) * (m.a(y) - m.b(y))), X, X + 1, expected=2)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("share an input", lambda m, x: m.a(x) + m.b(x + 1)),
        ("share an input", lambda m, x: functional.silu(m.a(x)) * m.b(x)),
        ("computed in the graph", lambda m, x: (m.a(x), functional.linear(x, m.b.weight * 2))),
        ("written between", lambda m, x: (m.a(x), x.add_(1), m.b(x))),
        ("written between", lambda m, x: (m.a(x), x[0].mul_(2), m.b(x))),
        ("writes to a weight", lambda m, x: (m.a(x), m.b(x), m.b.weight.clamp_(-9, 9))),
    ],
    ids=["other input", "gate and up", "computed weight", "input written", "view of it written", "weight"],
)
def test_linears_that_cannot_be_merged_are_refused(because, function):
    check_refused("qkv_concat", Net(function), X.clone(), because=because)


# --- gate_up_concat --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: functional.silu(m.a(x)) * m.b(x),
        lambda m, x: m.b(x) * functional.silu(m.a(x)),
        lambda m, x: functional.gelu(m.a(x), approximate="tanh") * m.b(x),
        lambda m, x: (lambda g, u: g * torch.sigmoid(g) * u)(m.a(x), m.b(x)),
        lambda m, x: (lambda g, u: torch.mul(u, g.sigmoid() * g))(m.a(x), m.b(x)),
        lambda m, x: m.c(x).sum() + functional.silu(m.a(x)) * m.b(x),
    ],
    ids=["silu", "up first", "gelu", "sigmoid", "torch.mul", "with a third linear"],
)
def test_gate_and_up_become_one(function):
    (descriptor,) = check_applied("gate_up_concat", Net(function), X).descriptors
    assert descriptor.config["out_features"] == [7, 7]


def test_linears_that_do_not_meet_in_a_gate_are_refused():
    check_refused("gate_up_concat", Net(lambda m, x: m.a(x) * m.b(x)), X, because="act(gate) * up")


# --- swiglu ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, g, u: functional.silu(g) * u,
        lambda m, g, u: u * functional.silu(g),
        lambda m, g, u: g * torch.sigmoid(g) * u,
        lambda m, g, u: torch.mul(g.sigmoid() * g, u),
        lambda m, g, u: nn.SiLU()(g).mul(u),
    ],
    ids=["silu", "up first", "sigmoid", "torch.mul", "module and method"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_product_becomes_a_kernel(function, dtype):
    rtol = 1e-5 if dtype is torch.float32 else 1.6e-2
    check_applied("swiglu", Net(function), x_of(2, 3, 7, dtype=dtype), x_of(2, 3, 7, dtype=dtype, seed=2), rtol=rtol)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("shape or dtype", lambda m, g, u: functional.silu(g) * u[:1]),
        ("shape or dtype", lambda m, g, u: functional.silu(g) * u.double()),
        ("used elsewhere", lambda m, g, u: (lambda s: s * u + s)(functional.silu(g))),
        ("is written", lambda m, g, u: (lambda s: (u.add_(1), s * u))(functional.silu(g))),
        ("in place", lambda m, g, u: functional.silu(g, inplace=True) * u),
        ("no act(gate)", lambda m, g, u: torch.tanh(g) * u),
    ],
    ids=["shape", "dtype", "shared activation", "up written", "in place", "tanh"],
)
def test_other_products_are_refused(because, function):
    check_refused("swiglu", Net(function), x_of(2, 3, 7), x_of(2, 3, 7, seed=2), because=because)


# --- rms_norm --------------------------------------------------------------------------------------------------------


def chain(x: Tensor, square: Any, eps: float = 1e-6) -> Tensor:
    return torch.rsqrt(square(x).mean(-1, keepdim=True) + eps)


SPELLINGS: dict[str, tuple[Any, bool]] = {
    "llama": (lambda m, x: m.weight * (x.float() * chain(x.float(), lambda h: h.pow(2))).to(x.dtype), True),
    "weight last": (lambda m, x: (x.float() * chain(x.float(), lambda h: h * h)).type_as(x) * m.weight, True),
    "operands swapped": (lambda m, x: m.weight * (chain(x.float(), torch.square) * x.float()).to(x.dtype), True),
    "scale in fp32": (
        lambda m, x: (x.float() * chain(x.float(), lambda h: h.pow(2)) * m.weight.float()).to(x.dtype),
        False,
    ),
    "one variable": (
        lambda m, x: (lambda h: (m.weight * (h * chain(h, lambda v: torch.pow(v, 2)))).to(x.dtype))(
            x.to(torch.float32)
        ),
        False,
    ),
    "pow -0.5": (
        lambda m, x: (
            m.weight * (x.float() * (1e-6 + x.float().pow(2).mean(dim=(-1,), keepdim=True)).pow(-0.5)).to(x.dtype)
        ),
        True,
    ),
    "divided by the root": (
        lambda m, x: m.weight * (x.float() / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype),
        True,
    ),
    "one over the root": (
        lambda m, x: (
            m.weight * (x.float() * (1 / (torch.mean(x.float() ** 2, -1, keepdim=True) + 1e-6).sqrt())).type_as(x)
        ),
        True,
    ),
    "one plus the weight": (
        lambda m, x: (x.float() * chain(x.float(), lambda h: h.pow(2)) * (1.0 + m.weight.float())).to(x.dtype),
        False,
    ),
    "F.rms_norm": (lambda m, x: functional.rms_norm(x, (WIDTH,), m.weight, 1e-6), False),
    "nn.RMSNorm": (lambda m, x: m.rms(x), False),
    "nn.RMSNorm, default eps": (lambda m, x: m.default_rms(x), False),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_an_rms_norm_becomes_a_kernel(name, dtype, scale):
    function, is_cast_first = SPELLINGS[name]
    rtol = 1e-5 if dtype is torch.float32 else 1.6e-2
    model = Net(function, dtype)
    (descriptor,) = check_applied("rms_norm", model, (x_of(2, 5, WIDTH) * scale).to(dtype), rtol=rtol).descriptors
    assert descriptor.config["is_residual_fused"] is False
    if dtype is torch.bfloat16:
        assert descriptor.config["cast_before_weight"] is is_cast_first


# A weight that the graph computes stands after the sum, until fold_weights has made it one of the graph's own.
@pytest.mark.parametrize("name", [name for name in SPELLINGS if name != "one plus the weight"])
def test_the_residual_add_is_fused_and_its_other_users_read_the_sum(name):
    function, _ = SPELLINGS[name]

    def residual(m, x, r):
        h = x + m.square(r)
        out = function(m, h)
        return out, h * 2

    (descriptor,) = check_applied("rms_norm", Net(residual), X, X * 0.5).descriptors
    assert descriptor.config["is_residual_fused"] is True
    assert "add" in descriptor.replaced


def test_a_tower_of_residual_norms_is_fused_throughout():
    def tower(m, x):
        for _ in range(3):
            x = x + m.square(functional.rms_norm(x, (WIDTH,), m.weight, 1e-6))
        return functional.rms_norm(x, (WIDTH,), m.weight, 1e-6)

    log = check_applied("rms_norm", Net(tower), X, expected=4)
    fused = [descriptor.config["is_residual_fused"] for descriptor in log.descriptors]
    assert fused == [False, True, True, True]


def test_an_rms_norm_that_reads_an_rms_norm_is_a_kernel_too():
    def twice(m, x):
        inner = functional.rms_norm(x + m.square(x), (WIDTH,), m.weight, 1e-6)
        return functional.rms_norm(inner, (WIDTH,), m.weight, 1e-6)

    check_applied("rms_norm", Net(twice), X, expected=2)


def test_the_rows_of_a_slice_are_normed_where_they_lie():
    """As in DeepSeek's latent keys and values, the first part of a projection."""
    check_applied("rms_norm", Net(lambda m, x: m.rms(x[..., :WIDTH]) * 2), x_of(2, 5, WIDTH + 3))


def test_two_norms_of_one_sum_both_read_it():
    def both(m, x, r):
        h = x + r
        return m.rms(h) + functional.rms_norm(h, (WIDTH,), m.weight, 1e-6)

    check_applied("rms_norm", Net(both), X, X * 0.5, expected=2)


def test_a_sum_written_later_is_not_fused_early():
    def written(m, x, r):
        h = x + r
        h.mul_(2)
        return m.rms(h)

    (descriptor,) = check_applied("rms_norm", Net(written), X, X * 0.5).descriptors
    assert descriptor.config["is_residual_fused"] is False


def test_a_broadcast_sum_is_not_fused():
    (descriptor,) = check_applied("rms_norm", Net(lambda m, x, r: m.rms(x + r)), X, X[:1]).descriptors
    assert descriptor.config["is_residual_fused"] is False


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no RMSNorm", lambda m, x: x * chain(x, lambda h: h.pow(2))),
        ("no RMSNorm", lambda m, x: m.weight * (x * chain(x, lambda h: h.pow(3).abs()))),
        ("no RMSNorm", lambda m, x: m.weight * ((x + 1) * chain(x, lambda h: h.pow(2)))),
        ("no RMSNorm", lambda m, x: m.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))),
        ("no RMSNorm", lambda m, x: functional.rms_norm(x, (5, WIDTH), x[0], 1e-6)),
        ("differ in dtype", lambda m, x: m.weight.double() * (x.double() * chain(x.double(), lambda h: h.pow(2)))),
        ("not contiguous", lambda m, x: m.rms(x.transpose(0, 1)).contiguous()),
    ],
    ids=["no weight", "cube", "other numerator", "other dim", "two dims", "dtype", "strided"],
)
def test_what_is_no_rms_norm_is_refused(because, function):
    check_refused("rms_norm", Net(function), X, because=because)


def test_without_a_kernel_the_templates_are_refused():
    workload = Workload("case", Net(lambda m, x: m.rms(x) * functional.silu(x)), (X,))
    log = install(workload, ["rms_norm", "swiglu"], name="candidate", is_lowered=False).log()
    assert [refusal.reason for refusal in log.refusals] == [
        "no rms_norm kernel was given for the shape (10, 13) and float32",
        "no swiglu kernel was given for the shape (10, 13) and float32",
    ]


# --- conv_bn_fold ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.norm(m.conv(x)),
        lambda m, x: m.bare_norm(m.plain_conv(x)).relu(),
        lambda m, x: functional.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, None, m.norm.bias),
        lambda m, x: m.norm(functional.conv2d(x, m.conv.weight, m.conv.bias, dilation=2)),
    ],
    ids=["modules", "no bias, no affine, stride", "function, no weight", "dilation"],
)
def test_a_batch_norm_after_a_convolution_is_folded(function):
    check_applied("conv_bn_fold", Net(function), IMAGE)


def test_a_chain_of_convolutions_is_folded_and_keeps_channels_last():
    model = Net(lambda m, x: m.bare_norm(m.grouped_conv(m.norm(m.conv(x)).relu())))
    check_applied(
        "conv_bn_fold",
        model.to(memory_format=torch.channels_last),
        IMAGE.to(memory_format=torch.channels_last),
        expected=2,
    )


def test_a_batch_norm_that_is_used_twice_is_folded_twice():
    check_applied("conv_bn_fold", Net(lambda m, x: (m.norm(m.conv(x)), m.norm(m.plain_conv(x)))), IMAGE, expected=2)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("does not follow", lambda m, x: m.norm(m.conv(x).relu())),
        ("used elsewhere", lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x))),
        ("batch statistics", lambda m, x: m.batch_norm(m.conv(x))),
        ("not a tensor that the graph is given", lambda m, x: m.norm(functional.conv2d(x, m.conv.weight * 2))),
        ("writes to", lambda m, x: (m.norm(m.conv(x)), m.norm.running_mean.add_(1))),
        ("no batch norm", lambda m, x: m.conv(x)),
    ],
    ids=["relu between", "two users", "batch statistics", "computed weight", "written statistics", "none"],
)
def test_a_batch_norm_that_cannot_be_folded_is_refused(because, function):
    check_refused("conv_bn_fold", Net(function), IMAGE, because=because)


def test_a_batch_norm_in_training_mode_is_refused():
    model = Net(lambda m, x: m.norm(m.conv(x)))
    model.norm.train()
    check_refused("conv_bn_fold", model, IMAGE, because="batch statistics")


# --- sdpa_backend ----------------------------------------------------------------------------------------------------


def test_attention_on_a_cpu_is_refused():
    model = Net(lambda m, q: functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    check_refused("sdpa_backend", model, x_of(1, 2, 5, 8), because="CUDA")
