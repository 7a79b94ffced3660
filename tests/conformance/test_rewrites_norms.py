"""The norm and gate rewrites: every spelling fires, what they cannot keep is refused, and results stay those of eager.

As in test_rewrites.py a kernel is its plain formula here, in the layout that the template promises.
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

C = 6


def layer_norm_formula(x, weight, bias, eps, residual=None, num_dims=1):
    assert x.is_contiguous()
    summed = x if residual is None else x + residual
    affine = [None if tensor is None else tensor.float() for tensor in (weight, bias)]
    out = functional.layer_norm(summed.float(), x.shape[-num_dims:], *affine, eps).to(x.dtype)
    return out if residual is None else (out, summed)


def channel_norm_formula(x, weight, bias, eps, kind="rms", dim=1, is_channels_last=False):
    wide = x.float()
    if kind == "l2":
        out = wide / wide.norm(dim=dim, keepdim=True).clamp_min(eps)
    else:
        wide = wide - wide.mean(dim, keepdim=True) if kind == "layer" else wide
        out = wide * torch.rsqrt(wide.square().mean(dim, keepdim=True) + eps)
    along = [-1 if place == dim else 1 for place in range(x.dim())]
    out = out if weight is None else out * weight.float().view(along)
    out = (out if bias is None else out + bias.float().view(along)).to(x.dtype)
    return out.movedim(dim, -1).contiguous().movedim(-1, dim) if is_channels_last else out.contiguous()


def group_norm_formula(x, num_groups, weight, bias, eps, is_silu=False):
    assert x.is_contiguous()
    affine = [None if tensor is None else tensor.float() for tensor in (weight, bias)]
    out = functional.group_norm(x.float(), num_groups, *affine, eps)
    return (functional.silu(out) if is_silu else out).to(x.dtype)


def swiglu_formula(gate, up, round_silu=True, activation="silu"):
    gelus = {"gelu": "none", "gelu_tanh": "tanh"}
    if activation in gelus:
        return functional.gelu(gate, approximate=gelus[activation]) * up
    return getattr(functional, activation)(gate) * up


FORMULAS = {
    "layer_norm": layer_norm_formula,
    "channel_norm": channel_norm_formula,
    "group_norm": group_norm_formula,
    "swiglu": swiglu_formula,
}
SHAPES: list[tuple[int, ...]] = []


def kernel_of(template: str, shape: tuple[int, ...], dtype: str) -> Kernel | None:
    SHAPES.append(shape)
    config = KernelConfig(template=template, params={"BLOCK_N": 16})
    return Kernel(config, "", "0" * 64, FORMULAS[template]) if template in FORMULAS else None


@pytest.fixture(autouse=True)
def fresh_dynamo():
    SHAPES.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A module whose forward is the function given, over a fixed set of weights."""

    def __init__(self, function: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.rand(C) + 0.5), nn.Parameter(torch.randn(C))
        self.tall = nn.Parameter(torch.rand(1, C, 1, 1) + 0.5)
        self.linear, self.up = nn.Linear(C, C), nn.Linear(C, C)
        self.ln = nn.LayerNorm(C)
        self.wide_ln = nn.LayerNorm((C, 3, 5))
        self.bare_ln = nn.LayerNorm(C, elementwise_affine=False)
        self.gn, self.instance = nn.GroupNorm(3, C), nn.InstanceNorm2d(C, affine=True)
        self.tracked = nn.InstanceNorm2d(C, track_running_stats=True)
        with torch.no_grad():
            for norm in (self.ln, self.wide_ln, self.gn, self.instance):
                norm.weight.uniform_(0.5, 2)
                norm.bias.uniform_(-1, 1)
        self.to(dtype).eval()

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def x_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ROWS = x_of(2, 5, C)
IMAGE = x_of(2, C, 3, 5)


def check_applied(
    action: str, function: Any, *args: Tensor, expected: int = 1, dtype: torch.dtype = torch.float32
) -> Any:
    """Install one rewrite, compare with eager (values, shapes, dtypes, strides), and return the log."""
    model = Net(function, dtype)
    args = tuple(arg.clone(memory_format=torch.preserve_format).to(dtype) for arg in args)
    twin, twin_args = copy.deepcopy((model, args))
    patch = install(Workload("case", model, args), [action], name="candidate", kernels=kernel_of, is_lowered=False)
    log = patch.log()
    with torch.no_grad():
        ours, theirs = patch.model(*args), twin(*twin_args)
    rtol = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    for left, right in zip(as_tuple(ours), as_tuple(theirs), strict=True):
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())
        torch.testing.assert_close(left, right, rtol=rtol, atol=rtol)
    for left, right in zip(args, twin_args, strict=True):
        torch.testing.assert_close(left, right)
    assert len(log.descriptors) == expected, log.refusals
    return log


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def check_refused(action: str, function: Any, *args: Tensor, because: str) -> None:
    log = check_applied(action, function, *args, expected=0)
    assert any(because in refusal.reason for refusal in log.refusals), log.refusals


# --- layer_norm ------------------------------------------------------------------------------------------------------


def by_hand(x: Tensor, variance: Any, dim: int = -1, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(dim, keepdim=True)
    return centred / torch.sqrt(variance(x) + eps)


LAYER_NORMS: dict[str, Any] = {
    "nn.LayerNorm": lambda m, x: m.ln(x),
    "no affine": lambda m, x: m.bare_ln(x),
    "F.layer_norm": lambda m, x: functional.layer_norm(x, (C,), m.weight),
    "torch.layer_norm": lambda m, x: torch.layer_norm(x, [C], bias=m.bias, eps=1e-3),
    "in fp32": lambda m, x: functional.layer_norm(x.float(), (C,), m.weight.float(), m.bias.float(), 1e-6).type_as(x),
    "by hand, var": lambda m, x: m.weight * by_hand(x, lambda v: v.var(-1, keepdim=True, unbiased=False)) + m.bias,
    "by hand, correction": lambda m, x: (
        by_hand(x, lambda v: torch.var(v, -1, correction=0, keepdim=True)) * m.weight + m.bias
    ),
    "by hand, squares": lambda m, x: by_hand(x, lambda v: ((v - v.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)),
    "by hand, rsqrt": lambda m, x: (lambda d: d * torch.rsqrt(1e-6 + (d * d).mean(2, True)) + m.bias)(
        x - torch.mean(x, 2, keepdim=True)
    ),
    "by hand, fp32 casts": lambda m, x: (
        by_hand(x.float(), lambda v: v.var(-1, keepdim=True, unbiased=False)).to(x.dtype) * m.weight
    ),
}


@pytest.mark.parametrize("name", LAYER_NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_norm_becomes_a_kernel(name, dtype):
    check_applied("layer_norm", LAYER_NORMS[name], ROWS, dtype=dtype)
    assert SHAPES == [(10, C)]


def test_a_layer_norm_over_several_dimensions_is_one_row_each():
    check_applied("layer_norm", lambda m, x: m.wide_ln(x), IMAGE)
    assert SHAPES == [(2, C * 15)]


@pytest.mark.parametrize("name", ["nn.LayerNorm", "no affine", "by hand, squares", "in fp32"])
def test_the_residual_add_is_fused_and_its_other_users_read_the_sum(name):
    def block(m, x, r):
        h = x + functional.dropout(m.linear(r), 0.1, training=False)
        return m.linear(LAYER_NORMS[name](m, h)), h * 2

    (descriptor,) = check_applied("layer_norm", block, ROWS, ROWS * 0.5).descriptors
    assert descriptor.config["is_residual_fused"] is True


def test_a_pre_norm_tower_is_fused_throughout():
    def tower(m, x):
        for _ in range(3):
            x = x + m.linear(m.ln(x))
        return m.ln(x)

    log = check_applied("layer_norm", tower, ROWS, expected=4)
    assert [descriptor.config["is_residual_fused"] for descriptor in log.descriptors] == [False, True, True, True]


def test_a_post_norm_tower_is_fused_throughout():
    def tower(m, x):
        for _ in range(2):
            x = m.ln(x + m.linear(x))
        return x

    log = check_applied("layer_norm", tower, ROWS, expected=2)
    assert all(descriptor.config["is_residual_fused"] for descriptor in log.descriptors)


def test_a_norm_that_reads_a_norm_is_a_kernel_too():
    """As in DETR's decoder, whose last norm follows that of its last layer."""

    def decoder(m, x):
        y = m.ln(x + m.linear(x))
        return m.up(m.bare_ln(y)), y

    log = check_applied("layer_norm", decoder, ROWS, expected=2)
    assert [descriptor.config["is_residual_fused"] for descriptor in log.descriptors] == [True, False]


def test_a_sum_that_is_written_before_its_norm_is_not_fused():
    def written(m, x, r):
        h = x + r
        h.mul_(2)
        return m.ln(h)

    check_refused("layer_norm", written, ROWS, ROWS * 0.5, because="pointwise ops")


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no LayerNorm", lambda m, x: m.linear(x)),
        ("no LayerNorm", lambda m, x: by_hand(x, lambda v: v.var(-1, keepdim=True))),
        ("no LayerNorm", lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)),
        ("no LayerNorm", lambda m, x: by_hand(x, lambda v: v.var(1, keepdim=True, unbiased=False))),
        ("no LayerNorm", lambda m, x: by_hand(x.double(), lambda v: v.var(-1, keepdim=True, unbiased=False)).float()),
        ("no LayerNorm", lambda m, x: (lambda u: (x - u) / torch.sqrt(((x - u) ** 2).mean(-1, True) + 1e-5) + u)(
            x.mean(-1, True))),
        ("not contiguous", lambda m, x: m.ln(x.transpose(0, 1)).contiguous()),
        ("comes from pointwise", lambda m, x: m.ln(functional.gelu(m.linear(x)))),
        ("comes from pointwise", lambda m, x: m.ln(x + m.weight)),
        ("a summand comes from", lambda m, x: m.ln(x + m.weight * m.linear(x))),
        ("only pointwise ops read", lambda m, x: m.linear(m.ln(x) * (1 + m.weight) + m.bias)),
        ("is written", lambda m, x: (lambda mean: (x.add_(1), (x - mean) / torch.sqrt(
            x.var(-1, keepdim=True, unbiased=False) + 1e-5))[1])(x.mean(-1, keepdim=True))),
    ],
    ids=["none", "unbiased", "std", "two dims", "fp64", "mean used", "strided", "gelu", "broadcast sum", "layer scale",
         "modulate", "written"],
)  # fmt: skip
def test_what_the_kernel_cannot_take_or_would_not_speed_up_is_refused(because, function):
    check_refused("layer_norm", function, ROWS, because=because)


def test_a_long_row_is_taken_even_between_pointwise_ops():
    def chain(m, x):
        return functional.layer_norm(x * 2, x.shape[1:]).relu()

    check_applied("layer_norm", chain, x_of(2, 3, 6000))
    assert SHAPES == [(2, 18000)]


# --- channel_norm ----------------------------------------------------------------------------------------------------


def convnext(x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6)


CHANNEL_NORMS: dict[str, Any] = {
    "rms": lambda m, x: x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + 1e-5),
    "rms, rsqrt and weight": lambda m, x: (
        x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * m.weight.view(1, -1, 1, 1)
    ),
    "rms, tall weight": lambda m, x: m.tall * (x / (x.square().mean((1,), True) + 1e-5).sqrt()),
    "rms, no eps": lambda m, x: x / torch.sqrt((x * x).mean(-3, keepdim=True)),
    "convnext": lambda m, x: m.weight[:, None, None] * convnext(x) + m.bias[:, None, None],
    "var_mean": lambda m, x: (lambda v, u: (x - u) * torch.rsqrt(v + 1e-6))(
        *torch.var_mean(x, dim=1, keepdim=True, unbiased=False)
    ),
    "F.normalize": lambda m, x: functional.normalize(x, dim=1),
    "length": lambda m, x: x / x.norm(dim=1, keepdim=True),
    "length at least eps": lambda m, x: x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-6),
    "length by hand": lambda m, x: x / x.pow(2).sum(1, keepdim=True).sqrt() * m.tall,
    "in fp32": lambda m, x: (
        x.float() * torch.rsqrt(x.float().pow(2).mean(1, keepdim=True) + 1e-5)
    ).to(x.dtype) + m.bias[:, None, None],
    "permuted": lambda m, x: m.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "permuted into a linear": lambda m, x: m.linear(m.ln(x.permute(0, 2, 3, 1))),
    "moved": lambda m, x: functional.layer_norm(torch.movedim(x, 1, -1), (C,)).movedim(-1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANNEL_NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_over_channels_becomes_a_kernel(name, dtype):
    check_applied("channel_norm", CHANNEL_NORMS[name], IMAGE, dtype=dtype)
    assert SHAPES == [(2, C, 15)]


@pytest.mark.parametrize("name", [name for name in CHANNEL_NORMS if not name.startswith(("permuted", "moved"))])
def test_a_norm_over_the_channels_of_channels_last_images_keeps_their_layout(name):
    image = IMAGE.to(memory_format=torch.channels_last)
    (descriptor,) = check_applied("channel_norm", CHANNEL_NORMS[name], image).descriptors
    assert descriptor.config["is_channels_last"] is True


def test_signals_are_turned_and_normed():
    check_applied("channel_norm", lambda m, x: m.ln(x.transpose(1, 2)).transpose(1, 2), x_of(2, C, 7))
    assert SHAPES == [(2, C, 7)]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: functional.normalize(x, dim=-1),
        lambda m, x: x / x.norm(p=2, dim=-1, keepdim=True),
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    ],
)
def test_a_bare_norm_over_the_last_dimension_becomes_a_kernel_of_rows(function):
    check_applied("channel_norm", function, ROWS)
    assert SHAPES == [(10, C, 1)]


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no norm", lambda m, x: m.ln(x.permute(0, 2, 3, 1).contiguous())),
        ("no norm", lambda m, x: x / x.norm(p=1, dim=1, keepdim=True)),
        ("no norm", lambda m, x: x / (x.norm(dim=1, keepdim=True) + 1e-6)),
        ("no norm", lambda m, x: x / torch.linalg.norm(x, ord=2, dim=(2, 3), keepdim=True)),
        ("no norm", lambda m, x: x / torch.sqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-6)),
        ("no norm", lambda m, x: (lambda r: x / r + r)(torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))),
        ("neither contiguous", lambda m, x: functional.normalize(x.transpose(2, 3), dim=1).contiguous()),
        ("no permutation", lambda m, x: m.ln(x.permute(0, 3, 2, 1)).contiguous()),
    ],
    ids=["copied", "sum of absolutes", "eps outside", "matrix norm", "two dims", "root used", "strided", "reversed"],
)
def test_what_is_no_norm_over_one_dimension_is_refused(because, function):
    check_refused("channel_norm", function, IMAGE, because=because)


def test_a_normalisation_of_rows_between_pointwise_ops_stays():
    check_refused("channel_norm", lambda m, x: functional.normalize(x * 2, dim=-1), ROWS, because="pointwise")


# --- group_norm ------------------------------------------------------------------------------------------------------

GROUP_NORMS: dict[str, tuple[Any, int, bool]] = {
    "nn.GroupNorm": (lambda m, x: m.gn(x), 3, False),
    "F.group_norm": (lambda m, x: functional.group_norm(x, 2, m.weight, eps=1e-3), 2, False),
    "torch.group_norm": (lambda m, x: torch.group_norm(x, 1, bias=m.bias), 1, False),
    "SiLU": (lambda m, x: functional.silu(m.gn(x)), 3, True),
    "swish by hand": (lambda m, x: (lambda y: y * torch.sigmoid(y))(m.gn(x)), 3, True),
    "in fp32": (
        lambda m, x: functional.silu(
            functional.group_norm(x.float(), 3, m.weight.float(), m.bias.float()).type(x.dtype)
        ),
        3,
        True,
    ),
    "nn.InstanceNorm2d": (lambda m, x: m.instance(x), C, False),
}


@pytest.mark.parametrize("name", GROUP_NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_norm_becomes_a_kernel_with_its_silu(name, dtype):
    function, num_groups, is_silu = GROUP_NORMS[name]
    (descriptor,) = check_applied("group_norm", function, IMAGE, dtype=dtype).descriptors
    assert (descriptor.config["num_groups"], descriptor.config["is_silu"]) == (num_groups, is_silu)
    (found,) = SHAPES
    assert found == (2 * num_groups, C // num_groups, 15)


def test_a_silu_that_others_share_stays_outside():
    function = lambda m, x: (lambda y: (y, functional.silu(y)))(m.gn(x))  # noqa: E731
    (descriptor,) = check_applied("group_norm", function, IMAGE).descriptors
    assert descriptor.config["is_silu"] is False


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no GroupNorm", lambda m, x: m.tracked(x)),
        ("no GroupNorm", lambda m, x: x.relu()),
        ("not contiguous", lambda m, x: m.gn(x.transpose(2, 3))),
        ("comes from pointwise", lambda m, x: m.gn(x + 1)),
        ("only pointwise", lambda m, x: m.gn(x) * 2 + 1),
        ("another dtype", lambda m, x: functional.group_norm(x.double(), 3).float()),
    ],
    ids=["running statistics", "none", "strided", "pointwise before", "pointwise after", "fp64"],
)
def test_what_is_no_group_norm_or_would_not_be_faster_is_refused(because, function):
    check_refused("group_norm", function, IMAGE, because=because)


# --- swiglu: the other gates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", lambda g, u: functional.gelu(g) * u),
        ("gelu", lambda g, u: u * nn.GELU()(g)),
        ("gelu_tanh", lambda g, u: functional.gelu(g, approximate="tanh") * u),
        ("relu", lambda g, u: torch.relu(g) * u),
        ("sigmoid", lambda g, u: u * g.sigmoid()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_gates_become_the_same_kernel(activation, function, dtype):
    gated = lambda m, x: m.linear(function(m.linear(x), m.up(x)))  # noqa: E731
    (descriptor,) = check_applied("swiglu", gated, ROWS, dtype=dtype).descriptors
    assert descriptor.config["activation"] == activation


@pytest.mark.parametrize(
    "halves", [lambda y: y.chunk(2, -1), lambda y: (y[..., :3], y[..., 3:])], ids=["chunk", "slice"]
)
def test_halves_of_one_projection_are_gated_in_place(halves):
    def geglu(m, x):
        up, gate = halves(m.linear(x))
        return torch.cat((up * functional.gelu(gate), up), dim=-1)

    check_applied("swiglu", geglu, ROWS)


@pytest.mark.parametrize(("dim", "shape"), [(-1, (10, 3)), (1, (2, 5 * C))])
def test_a_glu_is_gated_by_its_second_half(dim, shape):
    check_applied("swiglu", lambda m, x: functional.glu(x, dim), x_of(2, 10, C) if dim == 1 else ROWS)
    (found,) = SHAPES
    assert found == shape


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no act(gate)", lambda m, x: x * torch.sigmoid(x)),
        ("chain of pointwise", lambda m, x: torch.sigmoid(m.linear(x)) * torch.tanh(m.up(x))),
        ("chain of pointwise", lambda m, x: torch.relu(m.linear(x)) * m.up(x) + x),
        ("no tensor of rows", lambda m, x: functional.gelu(x.transpose(0, 1)) * x.transpose(0, 1)[:, :]),
    ],
    ids=["silu itself", "cell gates", "sum after", "turned"],
)
def test_gates_that_the_compiler_fuses_better_stay(because, function):
    check_refused("swiglu", function, ROWS, because=because)
