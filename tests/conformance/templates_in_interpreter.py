"""Every template against fp64, in Triton's interpreter; run by test_templates.py in a process of its own.

TRITON_INTERPRET must be set before triton is imported, and would change every other test of the process.
"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.device import row_copy
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render

assert os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RTOL = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
EPS = 1e-6


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def problem(output: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Say how an output differs from the fp64 reference by the project's rule, or None."""
    rtol = RTOL[output.dtype]
    if output.shape != expected.shape:
        return f"shape {tuple(output.shape)} instead of {tuple(expected.shape)}"
    tolerance = rtol * (expected.pow(2).mean().sqrt() + expected.abs())
    share = float(((output.double() - expected).abs() <= tolerance).double().mean())
    return None if share >= 0.999 else f"only {share:.2%} of the elements are within {rtol}"


def edge_configs(template: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[KernelConfig]:
    """The first, last and default config, and one of the loop over blocks where there is one."""
    configs = registry.load(template).space(shape, str(dtype)).configs
    looped = [config for config in configs if config.params["BLOCK_N"] < shape[-1]][-1:]
    chosen = [configs[0], configs[-1], default_config(template, shape, str(dtype)), *looped]
    return list({config.key(): config for config in chosen}.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 77), (3, 1023), (2, 3, 64), (2, 2500), (33, 16)], ids=str)
@pytest.mark.parametrize("cast_before_weight", [True, False])
def test_rms_norm_agrees_with_fp64(shape: tuple[int, ...], dtype: torch.dtype, cast_before_weight: bool) -> None:
    template = registry.load("rms_norm")
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    for config in edge_configs("rms_norm", shape, dtype):
        call = render(config).call
        plain = call(x, weight, EPS, cast_before_weight=cast_before_weight)
        assert problem(plain, template.reference(x.double(), weight.double(), EPS)) is None, config.key()
        normed, summed = call(x, weight, EPS, residual, cast_before_weight=cast_before_weight)
        # The sum is an output of its own, so the norm is judged from the sum that was given out.
        assert problem(summed, x.double() + residual.double()) is None
        assert problem(normed, template.reference(summed.double(), weight.double(), EPS)) is None, config.key()


def test_rms_norm_takes_rows_longer_than_the_widest_block() -> None:
    template = registry.load("rms_norm")
    x, weight = torch.randn(2, 20001), torch.randn(20001)
    config = default_config("rms_norm", (2, 20001), "float32")
    assert config.params["BLOCK_N"] < 20001
    assert problem(render(config).call(x, weight, EPS), template.reference(x.double(), weight.double(), EPS)) is None


def test_rms_norm_rounds_before_or_after_the_weight_as_asked() -> None:
    template, shape = registry.load("rms_norm"), (16, 512)
    # fp16, because the interpreter truncates to bf16 where a device rounds.
    x, weight = torch.randn(shape).half(), torch.randn(shape[-1]).half()
    call = render(default_config("rms_norm", shape, "float16")).call
    for flag in (True, False):
        output = call(x, weight, EPS, cast_before_weight=flag)
        same = (output == template.reference(x, weight, EPS, cast_before_weight=flag)).double().mean()
        other = (output == template.reference(x, weight, EPS, cast_before_weight=not flag)).double().mean()
        assert same > 0.999 > other


def test_rms_norm_takes_row_strides_and_transposed_tensors() -> None:
    template = registry.load("rms_norm")
    weight = torch.randn(77)
    wide, turned = torch.randn(6, 200)[:, 50:127], torch.randn(77, 6).t()
    call = render(default_config("rms_norm", (6, 77), "float32")).call
    for x, residual in ((wide, turned), (turned, wide), (wide.view(2, 3, 77), torch.randn(2, 3, 77))):
        normed, summed = call(x, weight, EPS, residual)
        assert torch.equal(summed, x + residual)
        assert problem(normed, template.reference((x + residual).double(), weight.double(), EPS)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 77), (3, 1023), (2, 3, 64), (2, 2500), (33, 16)], ids=str)
def test_swiglu_agrees_with_fp64_on_halves_of_a_merged_projection(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    template = registry.load("swiglu")
    gate, up = torch.randn((*shape[:-1], 2 * shape[-1])).to(dtype).chunk(2, dim=-1)
    expected = template.reference(gate.double(), up.double())
    for config in edge_configs("swiglu", shape, dtype):
        for round_silu in (True, False):
            output = render(config).call(gate, up, round_silu=round_silu)
            assert output.is_contiguous()
            assert problem(output, expected) is None, config.key()


def test_swiglu_keeps_the_limits_of_silu() -> None:
    gate = torch.tensor([[-200.0, -88.0, 0.0, 88.0, 200.0, float("inf"), float("nan")]])
    output = render(default_config("swiglu", (1, 7), "float32")).call(gate, torch.ones_like(gate))
    expected = torch.nn.functional.silu(gate)
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
@pytest.mark.parametrize("columns", [row_copy.BLOCK, row_copy.BLOCK + 1, 2 * row_copy.BLOCK + 5])
def test_rows_leave_padded_memory_as_they_were(columns: int, dtype: torch.dtype) -> None:
    leaf = torch.arange(2 * 3 * (columns + 7)).to(dtype).view(2, 3, columns + 7)[:, :, :columns]
    out = torch.zeros(2 * 3 * columns + 64, dtype=dtype)
    stride = row_copy.row_stride(leaf)
    assert stride is not None
    row_copy.gather(leaf, stride, out[: leaf.numel()].view(leaf.shape))
    assert torch.equal(out[: leaf.numel()].view(leaf.shape), leaf)
    assert not out[leaf.numel() :].any()


def test_a_template_refuses_to_run_under_grad() -> None:
    weight = torch.randn(64, requires_grad=True)
    call = render(default_config("rms_norm", (4, 64), "float32")).call
    with torch.enable_grad(), pytest.raises(TemplateError, match="no backward"):
        call(torch.randn(4, 64), weight, EPS)
    assert call(torch.randn(4, 64), weight, EPS).shape == (4, 64)


GUARD = 16384
"""Elements around every buffer: a planted bug must be seen in the result, and not end the process."""


def roomy(rows: int, cols: int) -> torch.Tensor:
    """Random values, with as many more on both sides of them."""
    return torch.randn(rows * cols + 2 * GUARD)[GUARD : GUARD + rows * cols].view(rows, cols)


def run_source(source: str, folder: Path, name: str) -> str | None:
    """Run rendered source text as a stranger would, into guarded NaN buffers; say what is wrong with the result."""
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows, cols = 5, 1500
    tile = module.CONSTANTS["ROWS_PER_PROGRAM"]
    buffer = torch.full((rows * cols + GUARD,), float("nan"))
    options = {**module.CONSTANTS, **module.OPTIONS}
    if "ROUND_SILU" in source:
        merged = roomy(rows, 2 * cols)
        gate, up = merged.chunk(2, dim=-1)
        grid = (-(-rows // tile) * -(-cols // module.CONSTANTS["BLOCK_N"]),)
        module.kernel[grid](gate, up, buffer, rows, cols, 2 * cols, 2 * cols, ROUND_SILU=True, **options)
        expected = registry.load("swiglu").reference(gate.double(), up.double())
    else:
        x, weight = roomy(rows, cols + 9)[:, :cols], roomy(1, cols)[0]
        flags = {"HAS_RESIDUAL": False, "CAST_BEFORE_WEIGHT": True, "IS_ONE_BLOCK": cols <= options["BLOCK_N"]}
        module.kernel[(-(-rows // tile),)](x, x, weight, buffer, x, rows, cols, cols + 9, 0, EPS, **flags, **options)
        expected = registry.load("rms_norm").reference(x.double(), weight.double(), EPS)
    if not torch.isnan(buffer[rows * cols :]).all():
        return "it wrote past the end of the output"
    return problem(buffer[: rows * cols].view(rows, cols), expected)


def source_of(template: str, block_n: int, rows: int) -> str:
    params = {"BLOCK_N": block_n, "ROWS_PER_PROGRAM": rows, "num_warps": 4, "num_stages": 1}
    return render(KernelConfig(template=template, params=params)).source


SOURCES = {
    "rms_norm_one_block": ("rms_norm", 2048, 2),
    "rms_norm_loop": ("rms_norm", 1024, 2),
    "swiglu": ("swiglu", 512, 2),
}


@pytest.mark.parametrize("name", SOURCES)
def test_rendered_source_runs_on_its_own(name: str, tmp_path: Path) -> None:
    assert run_source(source_of(*SOURCES[name]), tmp_path, f"right_{name}") is None


PLANTED = {
    "rows are not masked": ("swiglu", "(offs_m < num_rows)", "(offs_m < num_rows + 1)"),
    "columns are not masked": ("swiglu", "(offs_n < num_cols)", "(offs_n < BLOCK_N * num_blocks)"),
    "the stride of gate is its width": ("swiglu", "offs_m[:, None] * stride_gm", "offs_m[:, None] * num_cols"),
    "up is read from gate": ("swiglu", "tl.load(up_ptr", "tl.load(gate_ptr"),
    "silu is a sigmoid": ("swiglu", "activated = gate / ", "activated = 1.0 / "),
    "the mean is over the block": ("rms_norm_one_block", "axis=1) / num_cols", "axis=1) / BLOCK_N"),
    "eps is forgotten and the root too": ("rms_norm_one_block", "tl.rsqrt(tl.sum(h * h", "(tl.sum(h * h"),
    "masked columns count": (
        "rms_norm_one_block",
        "mask=mask, other=0.0).to(tl.float32)",
        "mask=mask, other=1.0).to(tl.float32)",
    ),
    "the weight is forgotten": ("rms_norm_one_block", "normed * weight[None, :]", "normed"),
    "the last block is forgotten": (
        "rms_norm_loop",
        "tl.range(0, num_cols, BLOCK_N",
        "tl.range(0, num_cols - BLOCK_N, BLOCK_N",
    ),
    "the second block starts at 0": ("rms_norm_loop", "offs_n = start + tl.arange", "offs_n = 0 * start + tl.arange"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught_by_the_same_check(bug: str, tmp_path: Path) -> None:
    name, right, wrong = PLANTED[bug]
    source = source_of(*SOURCES[name])
    assert right in source
    found = run_source(source.replace(right, wrong), tmp_path, "planted_" + str(list(PLANTED).index(bug)))
    assert found is not None
