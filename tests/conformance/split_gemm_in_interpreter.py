"""split_gemm against fp64 and against fp32 products, in Triton's interpreter; run by test_templates.py.

TRITON_INTERPRET must be set before triton is imported, and would change every other test of the process.
"""

import os

import numpy as np
import pytest
import torch

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render
from agnitra_lab.generate.templates.fp16_parts import split_fp16

assert os.environ.get("TRITON_INTERPRET") == "1"

TEMPLATE = registry.load("split_gemm")
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad(), np.errstate(all="ignore"):
        yield


def call_of(a: torch.Tensor, num_n: int, **changes: int):
    shape = (1, a.shape[-2], num_n, a.shape[-1])
    params = default_config("split_gemm", shape, "float32").params | changes
    return render(KernelConfig(template="split_gemm", params=params)).call


def largest_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error in units of what its row and column are made of."""
    return float((output.double() - expected).abs().max() / expected.abs().mean())


def check(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, **options) -> None:
    output = call_of(a, b.shape[-1])(a, b, bias, **options)
    expected = TEMPLATE.reference(a.double(), b.double(), None if bias is None else bias.double(), **options)
    assert output.is_contiguous() and output.shape == expected.shape
    assert largest_error(output, expected) < 2e-6


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (37, 70, 203), (128, 64, 64), (65, 129, 100)], ids=str)
def test_a_product_agrees_with_fp64(sizes: tuple[int, int, int]) -> None:
    num_m, num_n, num_k = sizes
    check(torch.randn(num_m, num_k), torch.randn(num_k, num_n))


@pytest.mark.parametrize(
    "changes",
    [
        {"BLOCK_K": 32, "K_CHUNK": 64},
        {"BLOCK_K": 32, "K_CHUNK": 128},
        {"BLOCK_K": 64, "K_CHUNK": 128},
        {"BLOCK_M": 128, "BLOCK_N": 64, "GROUP_M": 2},
        {"GROUP_M": 1},
    ],
    ids=str,
)
def test_every_way_through_the_loop_gives_the_same(changes: dict[str, int]) -> None:
    a, b = torch.randn(150, 330), torch.randn(330, 200)
    assert largest_error(call_of(a, 200, **changes)(a, b), a.double() @ b.double()) < 2e-6


def test_operands_are_taken_in_any_layout() -> None:
    a, b = torch.randn(37, 203), torch.randn(203, 40)
    wide = torch.randn(37, 500)[:, 9:212]
    for left in (a, torch.randn(203, 37).t(), wide, torch.randn(37, 406)[:, ::2]):
        for right in (b, torch.randn(40, 203).t(), torch.randn(203, 90)[:, 7:47]):
            check(left, right)


def test_leading_dimensions_are_rows_or_batches() -> None:
    check(torch.randn(2, 3, 5, 40), torch.randn(40, 9))
    check(torch.randn(2, 3, 5, 40), torch.randn(2, 3, 40, 9))
    check(torch.randn(3, 5, 40), torch.randn(3, 9, 40).transpose(1, 2))
    check(torch.randn(5, 3, 40).transpose(0, 1), torch.randn(40, 9))


@pytest.mark.parametrize("activation", TEMPLATE.ACTIVATIONS)
def test_bias_and_activation_are_applied_to_the_result(activation: str) -> None:
    check(torch.randn(9, 70), torch.randn(70, 20), torch.randn(20), activation=activation)


def test_a_weight_split_ahead_gives_the_same_bits() -> None:
    a, weight = torch.randn(37, 203), torch.randn(70, 203)
    call = call_of(a, 70)
    parts, exponent = call(weight)
    assert torch.equal(call(a, parts, None, exponent), call(a, weight.t()))
    assert torch.allclose(TEMPLATE.reference(a, parts, None, exponent), a @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("num_k", [5, 1000, 9000])
def test_the_parts_add_up_to_the_value(num_k: int, is_turned: bool) -> None:
    x = torch.randn(3, num_k) * torch.logspace(-30, 30, 3)[:, None]
    given = x.t().contiguous().t() if is_turned else x
    parts, exponent = split_fp16(given[None])
    again = torch.ldexp(parts[0].double() + parts[1].double() / 2048, -exponent[:, None])[:, :num_k]
    assert (again - x.double()).abs().max(dim=1).values.le(2.0**-22 * x.abs().max(dim=1).values).all()
    assert ((again - x.double()).abs() <= 2.0**-22 * x.abs() + 2.0**-50 * x.abs().amax(1, True)).all()


def test_rows_and_columns_of_any_magnitude_keep_their_accuracy() -> None:
    a = torch.randn(37, 200) * torch.logspace(-37, 18, 37)[:, None]
    b = torch.randn(200, 20) * torch.logspace(-18, 18, 20)
    expected = a.double() @ b.double()
    output, eager = call_of(a, 20)(a, b).double(), (a @ b).double()
    is_normal = (expected.abs() > 1e-36) & (expected.abs() < 1e38)
    assert is_normal.double().mean() > 0.6
    sizes = (a.abs().double() @ b.abs().double())[is_normal]
    errors = [((found - expected)[is_normal].abs() / sizes) for found in (output, eager)]
    assert errors[0].mean() <= 1.25 * errors[1].mean()
    assert torch.equal(output.isinf(), eager.isinf())


def test_the_largest_and_least_numbers_are_no_special_case() -> None:
    a = torch.tensor([[3e38], [-1e-45], [0.0], [1e-38], [-1.5]])
    b = torch.tensor([[1.0, 1e-45, 3e38, -2e-40, 0.0]])
    assert torch.allclose(call_of(a, 5)(a, b), (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-44)
    # Sums of both ends of the range of one row.
    a, b = torch.tensor([[3e38, -3e38, 1e33]]), torch.tensor([[1.0], [0.5], [4.0]])
    assert torch.allclose(call_of(a, 1)(a, b), (a.double() @ b.double()).float(), rtol=1e-6)


def test_infinities_and_nans_meet_what_they_meet_in_fp32() -> None:
    a, b = torch.randn(8, 100), torch.randn(100, 6)
    a[0, 3], a[1, 4], a[2, 5], a[3, 6], a[3, 7] = INF, NAN, -INF, INF, -INF
    a[4], a[5] = 0.0, 0.0
    a[5, 3] = INF
    b[3, 0], b[3, 1], b[3, 2], b[5, 3], b[9, 4] = 0.0, 1e-30, -1e-44, INF, NAN
    output, eager = call_of(a, 6)(a, b), a @ b
    is_finite = eager.isfinite()
    assert torch.equal(output.isfinite(), is_finite)
    assert torch.equal(output[~is_finite].nan_to_num(), eager[~is_finite].nan_to_num())
    assert torch.allclose(output[is_finite], eager[is_finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["normal", "positive"])
@pytest.mark.parametrize("num_k", [256, 2048])
def test_the_error_is_under_that_of_a_chain_of_fp32_additions(kind: str, num_k: int) -> None:
    """SGEMM adds along K one after the other; the interpreter's dot rounds where tensor cores cut off."""
    a, b = torch.randn(16, num_k), torch.randn(num_k, 16)
    if kind == "positive":
        a, b = a.abs(), b.abs()
    chain = np.zeros((16, 16), dtype=np.float32)
    for k in range(num_k):
        chain += a[:, k : k + 1].numpy() * b[k : k + 1].numpy()
    expected = a.double() @ b.double()
    ours = (call_of(a, 16)(a, b).double() - expected).abs()
    theirs = (torch.from_numpy(chain).double() - expected).abs()
    assert ours.mean() <= theirs.mean() and ours.max() <= theirs.max()


def test_a_product_refuses_to_run_under_grad() -> None:
    a, b = torch.randn(4, 8), torch.randn(8, 4, requires_grad=True)
    with torch.enable_grad(), pytest.raises(TemplateError, match="no backward"):
        call_of(a, 4)(a, b)
