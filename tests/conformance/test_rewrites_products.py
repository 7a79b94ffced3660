"""split_gemm, linear_algebra and last_token_head: they fire on what a graph computes, refuse the rest, keep results."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_rewrites import Net, as_tuple, check_applied, check_refused, kernel, x_of
from torch import Tensor, nn
from torch.nn import functional

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.backend import Backend
from agnitra_lab.patch.install import install
from agnitra_lab.patch.matmuls import MatMul
from agnitra_lab.patch.rewrites import split_gemm

X = x_of(2, 5, 13)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


# --- split_gemm ------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def split_gemm_formula(
    a: Tensor,
    b: Tensor | None = None,
    bias: Tensor | None = None,
    b_exponent: Tensor | None = None,
    activation: str = "none",
    most_chunk: int = 128,
) -> Any:
    """What the template computes; a weight comes in parts of itself and of nothing."""
    if b is None:
        return torch.stack([a, torch.zeros_like(a)]), torch.zeros(a.shape[0], dtype=torch.int32)
    right = b if b_exponent is None else (b[0] + b[1]).t()
    out = a @ right
    return ACTIVATIONS[activation](out if bias is None else out + bias)


@pytest.fixture
def everything_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small products through, so that spellings can be tried on small tensors."""
    monkeypatch.setitem(__import__("test_rewrites").KERNELS, "split_gemm", kernel("split_gemm", split_gemm_formula))
    for name in ("_LEAST_SIDE", "_LEAST_VOLUME", "_LEAST_GAIN"):
        monkeypatch.setattr(split_gemm, name, 0)
    monkeypatch.setattr(split_gemm, "_sgemm_error", lambda product: 1.0)


PRODUCTS: dict[str, tuple[Any, bool]] = {
    "linear": (lambda m, x: m.a(x), True),
    "linear with bias": (lambda m, x: m.biased(x), True),
    "functional": (lambda m, x: functional.linear(x, weight=m.biased.weight, bias=m.biased.bias), True),
    "matmul": (lambda m, x: torch.matmul(x, m.square), True),
    "@ and T": (lambda m, x: x @ m.a.weight.T, True),
    "mT": (lambda m, x: x @ m.a.weight.mT, True),
    "method and t()": (lambda m, x: x.matmul(m.a.weight.t()), True),
    "transpose": (lambda m, x: x @ m.a.weight.transpose(-2, -1), True),
    "permute": (lambda m, x: x @ m.a.weight.permute(1, 0), True),
    "mm": (lambda m, x: torch.mm(x[0], m.square), True),
    "addmm": (lambda m, x: torch.addmm(m.biased.bias, x[0], m.biased.weight.t()), True),
    "einsum": (lambda m, x: torch.einsum("bik,kn->bin", x, m.square), True),
    "einsum with the weight turned": (lambda m, x: torch.einsum("bik,nk->bin", x, m.a.weight), True),
    "two inputs": (lambda m, x: x[0] @ x[1].T, False),
    "bmm": (lambda m, x: torch.bmm(x, x.transpose(1, 2)), False),
    "four dimensions": (lambda m, x: x.view(2, 1, 5, 13) @ x.view(2, 1, 5, 13).mT, False),
    "einsum of batches": (lambda m, x: torch.einsum("bik,bjk->bij", x, x), False),
    "a computed weight": (lambda m, x: functional.linear(x, m.a.weight * 2), False),
}


class Products(Net):
    """The weights of Net, with a square matrix that is a Parameter of its own."""

    def __init__(self, function: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(function, dtype)
        self.square = nn.Parameter(torch.randn(13, 13).to(dtype))


@pytest.mark.usefixtures("everything_gains")
@pytest.mark.parametrize("name", PRODUCTS)
def test_an_fp32_product_becomes_a_kernel(name):
    function, is_kept = PRODUCTS[name]
    (descriptor,) = check_applied("split_gemm", Products(function), X).descriptors
    assert descriptor.config["is_weight_split_before"] is is_kept


@pytest.mark.usefixtures("everything_gains")
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", lambda m, x: functional.relu(m.biased(x))),
        ("relu", lambda m, x: nn.ReLU(inplace=True)(m.biased(x)) * 2),
        ("sigmoid", lambda m, x: torch.sigmoid(m.a(x)) + 1),
        ("silu", lambda m, x: nn.SiLU()(m.a(x))),
        ("gelu", lambda m, x: nn.GELU()(m.biased(x))),
        ("gelu_tanh", lambda m, x: functional.gelu(m.a(x), approximate="tanh")),
        ("none", lambda m, x: (lambda y: y.relu() + y)(m.a(x))),
        ("none", lambda m, x: m.a(x).tanh()),
    ],
)
def test_the_activation_after_a_product_is_part_of_it(activation, function):
    (descriptor,) = check_applied("split_gemm", Products(function), X).descriptors
    assert descriptor.config["activation"] == activation


@pytest.mark.usefixtures("everything_gains")
def test_a_product_reads_what_the_one_before_it_gave_after_its_activation():
    model = Products(lambda m, x: torch.relu(x @ m.square) @ m.square)
    made = check_applied("split_gemm", model, X, expected=2).descriptors
    assert [descriptor.config["activation"] for descriptor in made] == ["relu", "none"]


@pytest.mark.usefixtures("everything_gains")
def test_merged_weights_are_split_and_follow_what_they_were_merged_of():
    model = Products(lambda m, x: m.a(x) * 2 + m.b(x).relu())
    patch = install(
        Workload("case", model, (X,)),
        ["qkv_concat", "split_gemm"],
        name="candidate",
        kernels=lambda template, shape, dtype: kernel(template, split_gemm_formula),
        is_lowered=False,
    )
    assert [descriptor.action for descriptor in patch.log().descriptors] == ["qkv_concat", "split_gemm"]
    with torch.no_grad():
        torch.testing.assert_close(patch.model(X), model(X))
        model.b.weight.mul_(3)
        torch.testing.assert_close(patch.model(X), model(X))


@pytest.mark.usefixtures("everything_gains")
@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("not float32", lambda m, x: x.double() @ m.square.double()),
        ("not float32", lambda m, x: x.bfloat16() @ m.square.bfloat16()),
        ("no product", lambda m, x: x[0] @ m.square[0]),
        ("no product", lambda m, x: x[0] @ torch.stack([m.square, m.square])),
        ("no product", lambda m, x: torch.addmm(m.biased.bias, x[0], m.biased.weight.t(), beta=2)),
        ("no product", lambda m, x: torch.einsum("bik,kn->nbi", x, m.square)),
    ],
    ids=["fp64", "bf16", "a vector", "a broadcast left operand", "beta", "a turned result"],
)
def test_other_products_keep_their_ops(because, function):
    check_refused("split_gemm", Products(function), X, because=because)


@pytest.mark.usefixtures("everything_gains")
def test_where_tf32_is_allowed_products_keep_their_ops():
    torch.set_float32_matmul_precision("high")
    try:
        check_refused("split_gemm", Products(lambda m, x: m.a(x)), X, because="TF32 is allowed")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("because", "sizes"),
    [
        ("too short a side", (13, 13, 13)),
        ("too short a side", (16, 65536, 512)),
        ("too short a side", (4096, 4096, 32)),
        ("short chains", (512, 768, 1024)),
        ("not bound by arithmetic", (2048, 4096, 64)),
    ],
)
def test_a_product_that_is_too_small_keeps_its_op(because, sizes):
    num_m, num_n, num_k = sizes
    with torch.device("meta"):
        a, b = torch.empty(num_m, num_k), torch.empty(num_k, num_n)
    refusals = refusals_of(lambda left, right: left @ right, a, b)
    assert any(because in refusal.reason for refusal in refusals), refusals


def refusals_of(function: Any, *args: Tensor) -> list[Any]:
    """Trace a function over tensors without values, rewrite its graph and return what was refused."""
    backend = Backend(["split_gemm"], kernels=lambda *site: None, is_lowered=False)
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=False)(*args)
    return backend.refusals


@pytest.mark.parametrize(
    ("sizes", "can_keep_b", "gains"),
    [
        ((1, 4096, 4096, 4096), True, True),
        ((1, 4096, 4096, 4096), False, True),
        ((1, 1024, 1024, 1024), True, True),
        ((1, 2048, 8192, 64), False, False),
        ((1, 16384, 16384, 64), False, True),
        ((1, 16, 4096, 4096), True, False),
        ((1, 256, 256, 256), True, False),
        ((16, 2048, 2048, 512), False, True),
        ((8, 1024, 1024, 128), False, False),
    ],
)
def test_the_roofline_says_what_gains(sizes, can_keep_b, gains):
    node: Any = None
    product = MatMul(node, node, node, None, True, *sizes)
    assert (split_gemm.estimated_gain(product, can_keep_b=can_keep_b) > split_gemm._LEAST_GAIN) is gains


@pytest.mark.parametrize(
    ("error", "num_k", "expected"),
    [(1e-6, 4096, 128), (3e-7, 1024, 64), (1.95e-7, 256, 64), (1.38e-7, 128, 32), (9.7e-8, 64, 32), (6.9e-8, 32, None),
     (1.0e-7, 8192, None)],
)  # fmt: skip
def test_chunks_are_as_long_as_the_error_of_sgemm_allows(
    monkeypatch: pytest.MonkeyPatch, error: float, num_k: int, expected: int | None
) -> None:
    """Errors of sums of one sign on an H200; the last is that of a sum of 8192 which SGEMM splits."""
    monkeypatch.setattr(split_gemm, "_sgemm_error", lambda product: error)
    node: Any = None
    product = MatMul(node, node, node, None, True, 1, 512, 512, num_k)
    assert split_gemm._most_chunk(product, product) == expected


def test_a_product_with_blocks_enough_is_tried_with_the_shortest_chunk_whatever_sgemm_does_with_one_sign(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(split_gemm, "_sgemm_error", lambda product: 1.0e-7)
    node: Any = None
    many, few = (MatMul(node, node, node, None, True, 1, side, side, 4096) for side in (2048, 512))
    assert split_gemm._most_chunk(many, many) == 32
    assert split_gemm._most_chunk(few, few) is None


def test_parts_of_a_sum_average_their_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_gemm, "_sgemm_error", lambda product: 1.72e-7)
    node: Any = None
    whole = MatMul(node, node, node, None, False, 1, 256, 256, 524_288)
    assert split_gemm._most_chunk(whole, whole) is None
    assert split_gemm._most_chunk(whole, dataclasses.replace(whole, num_batches=64, num_k=8192)) == 32


def parts_of(num_m: int, num_n: int, num_k: int, *, can_keep_b: bool = False) -> tuple[int, int]:
    with torch.device("meta"):
        graph = torch.fx.Graph()
        a = graph.placeholder("a")
        a.meta["example_value"] = torch.empty(num_m, num_k)
    part = split_gemm._part_of(MatMul(a, a, a, None, False, 1, num_m, num_n, num_k), can_keep_b=can_keep_b)
    return part.num_batches, part.num_k


def test_long_sums_with_few_blocks_of_a_result_are_cut_into_as_many_as_fill_the_gpu_twice() -> None:
    assert parts_of(256, 256, 524_288) == (64, 8192)
    assert parts_of(1024, 1024, 65_536) == (4, 16_384)
    assert parts_of(512, 768, 8192) == (8, 1024)
    assert parts_of(512, 768, 8192, can_keep_b=True) == (1, 8192)
    assert parts_of(256, 256, 524_288 + 8) == (1, 524_296)
    assert parts_of(4096, 4096, 65_536) == (1, 65_536)


@pytest.mark.usefixtures("everything_gains")
@pytest.mark.parametrize(
    "function",
    [
        lambda m, a, b: a @ b,
        lambda m, a, b: torch.relu(torch.addmm(m.biased.bias[:5], a, b)),
        lambda m, a, b: torch.matmul(a, b.t().contiguous().t()),
        lambda m, a, b: torch.matmul(a.t().contiguous().t(), b) * 2,
        lambda m, a, b: functional.linear(a, b.t().contiguous()),
    ],
    ids=["matmul", "with bias and activation", "right operand turned", "left operand turned", "linear"],
)
def test_a_sum_of_parts_is_the_product(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    monkeypatch.setattr(split_gemm, "_LEAST_PART", 16)
    (descriptor,) = check_applied(
        "split_gemm", Products(function), x_of(3, 1024), x_of(1024, 5, seed=3), rtol=1e-4
    ).descriptors
    assert descriptor.config["shape"] == [64, 3, 5, 16]


# --- last_token_head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.biased(x)[:, -1],
        lambda m, x: m.biased(x)[:, -1, :] / 0.7,
        lambda m, x: m.biased(x)[:, -1:, :],
        lambda m, x: m.biased(x)[:, [-1]],
        lambda m, x: m.biased(x)[:, -1, None],
        lambda m, x: torch.softmax(m.biased(x).float()[..., -1, :], -1),
        lambda m, x: m.biased(x).select(1, -1).argmax(-1),
        lambda m, x: m.biased(x).narrow(1, 4, 1),
        lambda m, x: torch.index_select(m.biased(x), 1, torch.tensor([4])),
        lambda m, x: (torch.tanh(m.a(x) / 30) * 30)[:, -1],
        lambda m, x: (m.a(x) + m.other.bias)[:, -1],
        lambda m, x: m.biased(x)[torch.arange(2), torch.tensor([1, 3])],
        lambda m, x: (x @ m.a.weight.T)[0, -1],
        lambda m, x: torch.addmm(m.biased.bias, x[0], m.biased.weight.t())[-1],
        lambda m, x: torch.einsum("bik,nk->bin", x, m.a.weight)[:, -1],
        lambda m, x: (m.biased(x) * 2).double()[1:, ::3].sum(),
    ],
    ids=[
        "row", "row and scale", "slice", "list", "new dimension", "ellipsis and cast", "select", "narrow",
        "index_select",
        "soft cap", "shift of columns", "row of each", "matmul", "addmm", "einsum", "steps",
    ],
)  # fmt: skip
def test_only_the_rows_that_are_read_are_computed(function):
    (descriptor,) = check_applied("last_token_head", Net(function), X).descriptors
    assert descriptor.config["num_rows"] > descriptor.config["num_rows_kept"]


def test_every_reading_gets_its_own_rows():
    check_applied("last_token_head", Net(lambda m, x: (lambda y: (y[0, -1], y[1, -1:]))(m.biased(x))), X, expected=2)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("read at some", lambda m, x: m.biased(x)[..., -1]),
        ("read at some", lambda m, x: m.biased(x)[:, -1, 2:]),
        ("read at some", lambda m, x: m.biased(x)[0, 1, 2]),
        ("read at some", lambda m, x: (lambda y: (y[:, -1], y.sum()))(m.biased(x))),
        ("read at some", lambda m, x: torch.softmax(m.biased(x), 1)[:, -1]),
        ("read at some", lambda m, x: m.biased(x)[x[..., 0] > 0]),
        ("read at some", lambda m, x: (m.a(x) + x[..., :7])[:, -1]),
        ("read at some", lambda m, x: (lambda y: (y.mul_(2), y[:, -1])[1])(m.biased(x))),
        ("writes to", lambda m, x: (lambda y: (y[:, -1].mul_(2), y[:, -1])[1])(m.biased(x))),
        ("writes to", lambda m, x: (lambda y: (x.mul_(2), y[:, -1])[1])(m.biased(x))),
        ("8 of the 10 rows", lambda m, x: m.biased(x)[:, 1:]),
    ],
    ids=[
        "columns", "some columns", "an element", "all rows too", "softmax over rows", "mask", "a shift of rows",
        "written whole", "written row", "input written", "most rows",
    ],
)  # fmt: skip
def test_a_product_that_is_needed_whole_stays(because, function):
    check_refused("last_token_head", Net(function), X.clone(), because=because)


# --- linear_algebra --------------------------------------------------------------------------------------------------

ROWS = x_of(2, 20, 13)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, a, b: torch.diag(a) @ b,
        lambda m, a, b: torch.matmul(b.t(), torch.diag(a)),
        lambda m, a, b: torch.mm(torch.diag_embed(a), b),
        lambda m, a, b: torch.diag(a) @ a,
        lambda m, a, b: a.diag() @ b.t().contiguous().t(),
        lambda m, a, b: torch.diag(a) @ torch.stack([b, b * 2]),
    ],
    ids=["left", "right", "diag_embed", "vector", "turned", "batch"],
)
def test_a_product_with_a_diagonal_matrix_scales_rows(function):
    check_applied("linear_algebra", Net(function), x_of(13), x_of(13, 6, seed=2), rtol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.square(x).sum(-1),
        lambda m, x: torch.sum(torch.matmul(x, m.square.weight.T) / 2, dim=2, keepdim=True) * 1.5,
        lambda m, x: ((functional.linear(x, m.square.weight, m.weight) - m.weight * 2 + 1) * 3).mean(dim=-1),
        lambda m, x: (3 - functional.linear(x, m.square.weight, m.weight)).mean(),
        lambda m, x: torch.neg(m.biased(x)).sum((1, 2), keepdim=True),
        lambda m, x: m.biased(x).mean(1),
        lambda m, x: (m.biased(x) * 2 + m.biased.bias).sum((0, 1)),
        lambda m, x: (x @ torch.relu(m.square.weight)).sum(-1),
        lambda m, x: m.square(x).double().mean(-1),
    ],
    ids=[
        "columns", "divided", "shifted", "everything", "rows and columns", "rows", "rows summed", "computed", "cast",
    ],
)  # fmt: skip
def test_a_sum_after_a_linear_is_taken_before_it(function):
    check_applied("linear_algebra", Net(function), ROWS)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.mean(1).mean(1),
        lambda m, x: x.mean((2, 3), keepdim=True).mean(1, keepdim=True),
        lambda m, x: x.sum(1, keepdim=True).sum(-1),
        lambda m, x: torch.mean(functional.adaptive_avg_pool2d(x, 1), dim=1),
    ],
)
def test_means_of_means_become_one(function):
    check_applied("linear_algebra", Net(function), x_of(2, 9, 8, 3))


class Pooled(nn.Module):
    """A convolution and a pooling after it."""

    def __init__(self, conv: Any, function: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.bias = nn.Parameter(torch.randn(conv.out_channels, 1, 1))
        self.function = function or (lambda m, x: m.pool(m.conv(x) * 0.5 + m.bias))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "dilation", "output_padding"),
    [
        (3, 1, 1, 1, 0),
        (3, 2, 1, 1, 1),
        (4, 2, 0, 1, 0),
        (3, 2, 2, 2, 1),
        (5, 3, 1, 1, 2),
        (1, 1, 0, 1, 0),
        (2, 3, 1, 1, 0),
    ],
)
def test_the_mean_of_a_transposed_convolution_comes_from_window_sums(
    kernel_size, stride, padding, dilation, output_padding
):
    conv = nn.ConvTranspose2d(3, 4, kernel_size, stride, padding, output_padding, dilation=dilation)
    check_applied("linear_algebra", Pooled(conv), x_of(2, 3, 9, 7))


@pytest.mark.parametrize(
    ("kernel_size", "padding", "dilation"),
    [(3, 1, 1), (3, 0, 1), (3, "same", 2), (1, 0, 1), (5, 2, 1), ((3, 1), (2, 0), 1), (7, 6, 1), (3, "valid", 1)],
)
def test_the_mean_of_a_convolution_comes_from_window_sums(kernel_size, padding, dilation):
    conv = nn.Conv2d(3, 4, kernel_size, padding=padding, dilation=dilation)
    check_applied(
        "linear_algebra", Pooled(conv, lambda m, x: torch.mean(m.conv(x) + m.bias, dim=[2, 3])), x_of(2, 3, 9, 7)
    )


@pytest.mark.parametrize(
    ("conv", "shape", "function"),
    [
        (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9), lambda m, x: m.conv(x).mean(-1)),
        (nn.Conv3d(3, 4, 3, bias=False), (2, 3, 4, 5, 6), lambda m, x: functional.adaptive_avg_pool3d(m.conv(x), 1)),
        (nn.ConvTranspose3d(3, 4, 3, 2, 1), (2, 3, 4, 5, 6), lambda m, x: m.conv(x).sum((2, 3, 4))),
        (nn.ConvTranspose2d(3, 4, 3), (2, 3, 4, 5), lambda m, x: m.conv(x).mean((2, 3), True).mean((2, 3), True)),
    ],
    ids=["1d", "3d", "transposed 3d", "pooled twice"],
)
def test_convolutions_of_any_rank_are_pooled_early(conv, shape, function):
    check_applied("linear_algebra", Pooled(conv, function), x_of(*shape), expected=None)


@pytest.mark.parametrize(
    ("because", "model", "shape"),
    [
        ("no sum or mean", Net(lambda m, x: m.square(x).relu().sum(-1)), (2, 5, 13)),
        ("no sum or mean", Net(lambda m, x: x.mean(1).sum(1)), (2, 9, 13)),
        ("no sum or mean", Net(lambda m, x: (lambda d: d @ d)(torch.diag(x))), (13, 13)),
        ("something else reads", Net(lambda m, x: (lambda y: (y, y.sum(-1)))(m.square(x))), (2, 5, 13)),
        ("writes to", Net(lambda m, x: (lambda y: (x.add_(1), y.sum(-1))[1])(m.square(x))), (2, 5, 13)),
        ("over 5 elements", Net(lambda m, x: m.square(x).mean(1)), (2, 5, 13)),
        ("skips positions", Pooled(nn.Conv2d(3, 4, 3, stride=2), lambda m, x: m.conv(x).mean((2, 3))), (2, 3, 9, 7)),
        ("has groups", Pooled(nn.Conv2d(3, 3, 3, groups=3), lambda m, x: m.conv(x).mean((2, 3))), (2, 3, 9, 7)),
        ("not over all", Pooled(nn.Conv2d(3, 4, 3), lambda m, x: m.conv(x).mean(3)), (2, 3, 9, 7)),
    ],
    ids=["relu", "mean of sum", "no vector", "two readers", "written", "few", "stride", "groups", "one dimension"],
)
def test_sums_that_cannot_move_stay(because, model, shape):
    check_refused("linear_algebra", model, x_of(*shape), because=because)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [lambda m, x: m.square(x).sum(-1), lambda m, x: m.biased(x).mean(1), lambda m, x: x.mean(2).mean(1)],
    ids=["columns", "rows", "means"],
)
def test_the_error_against_fp64_does_not_grow(function, dtype):
    x = x_of(16, 300, 13, dtype=dtype) + 1
    model = Net(function, dtype)
    patch = install(Workload("case", model, (x,)), ["linear_algebra"], name="candidate", is_lowered=False)
    with torch.no_grad():
        ours, theirs = as_tuple(patch.model(x))[0], model(x)
        exact = model.double()(x.double())
    assert (ours.double() - exact).abs().mean() <= 1.25 * (theirs.double() - exact).abs().mean() + 1e-9


def test_updated_weights_reach_every_sum():
    model = Net(
        lambda m, x: (
            m.biased(x).sum(-1),
            m.square(x).mean(1),
            m.conv(m.square(x)[:, None].expand(2, 3, 20, 13)).mean((2, 3)),
        )
    )
    patch = install(Workload("case", model, (ROWS,)), ["linear_algebra"], name="candidate", is_lowered=False)
    assert len(patch.log().descriptors) == 2
    with torch.no_grad():
        for weight in (model.biased.weight, model.biased.bias, model.conv.weight):
            weight.mul_(2)
        for left, right in zip(patch.model(ROWS), model(ROWS), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
