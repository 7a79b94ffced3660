"""The templates of the decode path against fp64, in Triton's interpreter; run by test_templates.py.

The interpreter multiplies the bits of bf16 as whole numbers in tl.dot, so kernels with a dot run in fp32 and fp16 here;
bf16 runs on a device in tests/gpu.
"""

import importlib.util
import itertools
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render

assert os.environ.get("TRITON_INTERPRET") == "1"

RTOL = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
EPS = 1e-5
REDUCED = {"BLOCK_N": 2, "BLOCK_K": 256, "SPLIT": 1, "PDL": 1, "num_warps": 1, "num_stages": 1}
DOTTED = {"BLOCK_N": 16, "BLOCK_K": 64, "SPLIT": 1, "PDL": 1, "num_warps": 4, "num_stages": 3}
ATTENTION = {"BLOCK_N": 16, "SPLIT": 1, "num_warps": 2, "num_stages": 2}


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def kernel(template: str, params: dict[str, int], **changed: int):
    return render(KernelConfig(template=template, params=params | changed)).call


def problem(output: torch.Tensor, expected: torch.Tensor, slack: float = 1.0) -> str | None:
    """Say how an output differs from the fp64 reference by the project's rule, or None."""
    rtol = RTOL[output.dtype] * slack
    if output.shape != expected.shape:
        return f"shape {tuple(output.shape)} instead of {tuple(expected.shape)}"
    tolerance = rtol * (expected.pow(2).mean().sqrt() + expected.abs())
    share = float(((output.double() - expected).abs() <= tolerance).double().mean())
    return None if share >= 0.999 else f"only {share:.2%} of the elements are within {rtol}"


def in_fp64(template: str, *tensors, **options) -> torch.Tensor:
    def wide(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return registry.load(template).reference(
        *map(wide, tensors), **{name: wide(value) for name, value in options.items()}
    )


def product_case(rows: int, out: int, cols: int, dtype: torch.dtype, gate: str):
    x = torch.randn(rows, cols).to(dtype)
    weight = (torch.randn(out, cols) / cols**0.5).to(dtype)
    bias = torch.randn(out).to(dtype)
    residual = torch.randn(rows, out // 2 if gate != "none" else out).to(dtype)
    return x, weight, bias, residual


CASES = list(itertools.product(("none", "gate_first", "up_first"), (False, True), (1, 2)))


@pytest.mark.parametrize(("gate", "is_normed", "split"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 6, 300), (7, 10, 520)], ids=str)
def test_a_product_of_a_few_rows_agrees_with_fp64(shape, dtype, gate, is_normed, split) -> None:
    tensors = product_case(*shape, dtype, gate)
    options = {"activation": "silu", "gate": gate}
    if is_normed:
        options |= {"norm_weight": torch.randn(shape[-1]).to(dtype), "eps": EPS}
    output = kernel("skinny_gemm", REDUCED, SPLIT=split)(*tensors, **options)
    # The interpreter truncates to bf16 at each rounding where a device rounds.
    slack = 2.0 if dtype == torch.bfloat16 else 1.0
    assert output.is_contiguous()
    assert problem(output, in_fp64("skinny_gemm", *tensors, **options), slack) is None


@pytest.mark.parametrize(("gate", "is_normed", "split"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 38, 130), (16, 8, 60)], ids=str)
def test_a_product_of_more_rows_agrees_with_fp64(shape, dtype, gate, is_normed, split) -> None:
    tensors = product_case(*shape, dtype, gate)
    options = {"activation": "gelu", "gate": gate}
    if is_normed:
        options |= {"norm_weight": torch.randn(shape[-1]).to(dtype), "eps": EPS, "cast_before_weight": False}
    output = kernel("skinny_gemm", DOTTED, SPLIT=split)(*tensors, **options)
    assert problem(output, in_fp64("skinny_gemm", *tensors, **options)) is None


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid"])
@pytest.mark.parametrize("rows", [2, 5])
def test_every_activation_is_that_of_torch_at_its_limits_too(activation: str, rows: int) -> None:
    x = torch.linspace(-30, 30, rows * 64).view(rows, 64)
    weight = torch.eye(64)
    params = REDUCED if rows <= 4 else DOTTED
    output = kernel("skinny_gemm", params)(x, weight, activation=activation)
    expected = registry.load("skinny_gemm").reference(x, weight, activation=activation)
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flag", [True, False])
def test_the_norm_before_a_tensor_core_product_rounds_where_the_model_does(flag: bool) -> None:
    # The identity as weight gives the normed row itself; fp16, because the interpreter truncates to bf16.
    x, norm = torch.randn(6, 256).half(), torch.randn(256).half()
    options = {"norm_weight": norm, "eps": EPS}
    output = kernel("skinny_gemm", DOTTED)(x, torch.eye(256).half(), **options, cast_before_weight=flag)
    reference = registry.load("skinny_gemm").reference
    same = reference(x, torch.eye(256).half(), **options, cast_before_weight=flag)
    other = reference(x, torch.eye(256).half(), **options, cast_before_weight=not flag)
    assert float((output == same).double().mean()) > 0.99
    assert float((output == other).double().mean()) < 0.99


def test_the_norm_before_a_product_in_registers_rounds_nothing() -> None:
    x, norm = torch.randn(2, 256).half(), torch.randn(256).half()
    options = {"norm_weight": norm, "eps": EPS}
    output = kernel("skinny_gemm", REDUCED)(x, torch.eye(256).half(), **options)
    exact = torch.nn.functional.rms_norm(x.double(), (256,), norm.double(), EPS)
    assert float((output == exact.half()).double().mean()) > 0.99
    rounded = registry.load("skinny_gemm").reference(x, torch.eye(256).half(), **options)
    assert float((output == rounded).double().mean()) < 0.99


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_strides_of_x_weight_and_residual_are_followed(rows: int) -> None:
    x = torch.randn(rows, 200)[:, 50:150]
    weight = (torch.randn(9, 140) / 10)[:, 7:107]
    residual = torch.randn(9, rows).t()
    params = REDUCED if rows <= 4 else DOTTED
    output = kernel("skinny_gemm", params)(x, weight, None, residual)
    assert problem(output, in_fp64("skinny_gemm", x, weight, None, residual)) is None
    folded = kernel("skinny_gemm", params)(x.reshape(1, rows, 100), weight)
    assert folded.shape == (1, rows, 9)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 40), (4, 5, 700), (16, 3, 5), (6, 70, 300)], ids=str)
def test_the_first_last_and_default_config_of_a_space_all_work(shape: tuple[int, ...]) -> None:
    space = registry.load("skinny_gemm").space(shape, "float32")
    x, weight, bias, _ = product_case(*shape, torch.float32, "none")
    chosen = (space.configs[0], space.configs[-1], default_config("skinny_gemm", shape, "float32"))
    for config in {config.key(): config for config in chosen}.values():
        assert problem(render(config).call(x, weight, bias), in_fp64("skinny_gemm", x, weight, bias)) is None


def test_a_skinny_product_refuses_to_run_under_grad() -> None:
    with torch.enable_grad(), pytest.raises(TemplateError, match="no backward"):
        kernel("skinny_gemm", REDUCED)(torch.randn(1, 256), torch.randn(4, 256, requires_grad=True))


def attention_case(shape, dtype, mask: str):
    batch, heads, kv_heads, queries, keys, size = shape
    q = torch.randn(batch, queries, heads, size).to(dtype).transpose(1, 2)
    k = torch.randn(batch, keys, kv_heads, size).to(dtype).transpose(1, 2)
    v = torch.randn(batch, kv_heads, keys, size + 3).to(dtype)[..., :size]
    masks = {
        "none": None,
        "boolean": torch.rand(queries, keys) > 0.5,
        "added": torch.randn(batch, 1, queries, keys).to(dtype),
        "a head": torch.randn(1, heads, 1, keys).to(dtype),
        "nothing seen": torch.zeros(1, keys, dtype=torch.bool),
    }
    return q, k, v, masks[mask]


@pytest.mark.parametrize("mask", ["none", "boolean", "added", "a head", "nothing seen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 2, 1, 70, 16), (2, 3, 3, 2, 33, 24), (1, 8, 1, 3, 50, 8)], ids=str)
def test_attention_of_few_queries_agrees_with_fp64(shape, dtype, mask) -> None:
    q, k, v, given = attention_case(shape, dtype, mask)
    expected = in_fp64("decode_attention", q, k, v, given)
    for split in (1, 3):
        stride = (q.shape[1] * q.shape[2] * q.shape[3], q.shape[3], q.shape[1] * q.shape[3], 1)
        output = kernel("decode_attention", ATTENTION, SPLIT=split)(q, k, v, given, out_stride=stride)
        assert output.stride() == stride
        assert problem(output, expected, 2.0) is None, split


def test_a_part_without_keys_adds_nothing() -> None:
    q, k, v, _ = attention_case((1, 2, 1, 1, 17, 16), torch.float32, "none")
    output = kernel("decode_attention", ATTENTION, SPLIT=4)(q, k, v, scale=0.3)
    assert problem(output, in_fp64("decode_attention", q, k, v, scale=0.3)) is None


def test_attention_keeps_the_size_of_scores_that_would_overflow() -> None:
    q, k, v, _ = attention_case((1, 2, 2, 1, 40, 16), torch.float32, "none")
    for split in (1, 2):
        output = kernel("decode_attention", ATTENTION, SPLIT=split)(100 * q, 100 * k, v)
        assert problem(output, in_fp64("decode_attention", 100 * q, 100 * k, v)) is None


GUARD = 4096


def run_source(source: str, folder: Path, name: str) -> str | None:
    """Run rendered source text as a stranger would, into guarded NaN buffers; say what is wrong with the result."""
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows, out, cols = (3, 9, 520) if "BLOCK_K=256" in source else (6, 21, 150)
    x, weight = (
        torch.randn(rows + 1, cols + 8)[:rows, :cols],
        (torch.randn(2 * out + 9, cols + 4) / 20)[: 2 * out, :cols],
    )
    # One row and some columns more than are meant: a planted bug must be seen, and read no stranger's memory.
    norm, residual, bias = torch.randn(cols + 8)[:cols], torch.randn(rows + 1, out)[:rows], torch.randn(2 * out + 1)
    buffer = torch.full((rows * out + GUARD,), float("nan"))
    constants = module.CONSTANTS
    num_tiles = -(-cols // constants["BLOCK_K"])
    flags = {
        "NUM_TILES": num_tiles, "IS_EVEN": False, "HAS_BIAS": True, "HAS_NORM": True,
        "HAS_RESIDUAL": True, "ACTIVATION": 4, "GATED": 1,
    }  # fmt: skip
    if rows <= 4:
        function, outs = module.reduce, max(1, constants["BLOCK_N"] // 2)
        flags |= {"NUM_ROWS": rows, "ROWS_AT_ONCE": 2, "NUM_ALL_TILES": num_tiles}
        constants = {key: value for key, value in constants.items() if key != "NUM_STAGES"}
    else:
        function, outs = module.dot, max(16, constants["BLOCK_N"] // 2)
        flags["CAST_BEFORE_WEIGHT"] = True
    strides = (x.stride(0), weight.stride(0), residual.stride(0), EPS)
    tensors = (x, weight, bias, norm, residual, buffer, buffer)
    function[(-(-out // outs), 1)](*tensors, rows, out, cols, *strides, **flags, **constants, **module.OPTIONS)
    if not torch.isnan(buffer[rows * out :]).all():
        return "it wrote past the end of the output"
    expected = in_fp64(
        "skinny_gemm",
        x,
        weight,
        bias[: 2 * out],
        residual,
        norm_weight=norm,
        eps=EPS,
        activation="silu",
        gate="gate_first",
    )
    return problem(buffer[: rows * out].view(rows, out), expected)


SOURCES = {"reduce": REDUCED | {"BLOCK_N": 8}, "dot": DOTTED}


def source_of(name: str) -> str:
    return render(KernelConfig(template="skinny_gemm", params=SOURCES[name])).source


@pytest.mark.parametrize("name", SOURCES)
def test_rendered_source_runs_on_its_own(name: str, tmp_path: Path) -> None:
    assert run_source(source_of(name), tmp_path, f"right_{name}") is None


PLANTED = {
    "up is the gate": ("reduce", "up_tiles[t].to", "tiles[t].to"),
    "the last tile is not masked": ("reduce", "mask=cols < num_cols", "mask=cols < num_cols + 8"),
    "rows of W are not masked": ("reduce", "mask_n = offs_n < num_out", "mask_n = offs_n < num_out + 1"),
    "the mean is over the tiles": ("reduce", "axis=0) / num_cols", "axis=0) / (NUM_ALL_TILES * BLOCK_K)"),
    "eps is forgotten": ("reduce", "num_cols + tl.cast(eps, tl.float32)", "num_cols + 1.0"),
    "the residual is forgotten": ("reduce", "y += residual", "y += 0.0 * residual"),
    "the bias of up is forgotten": ("reduce", "up += up_bias", "up += bias"),
    "the second row reads the first": ("reduce", "x_ptr + (first + i) * stride_xm", "x_ptr"),
    "the stride of W is its width": ("dot", "[:, None] * stride_wn", "[:, None] * num_cols"),
    "rows of x are not masked": ("dot", "mask_m = offs_m < num_rows", "mask_m = offs_m < num_rows + 1"),
    "the weight of the norm is forgotten": ("dot", "normed * norm[None, :]", "normed"),
    "the last block is forgotten": ("dot", "tl.range(start, end, BLOCK_K", "tl.range(start, end - BLOCK_K, BLOCK_K"),
    "silu is a sigmoid": ("dot", "y = y / (1.0 + tl.exp(-y))", "y = 1.0 / (1.0 + tl.exp(-y))"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught_by_the_same_check(bug: str, tmp_path: Path) -> None:
    name, right, wrong = PLANTED[bug]
    source = source_of(name)
    assert right in source
    found = run_source(source.replace(right, wrong), tmp_path, "planted_" + str(list(PLANTED).index(bug)))
    assert found is not None
