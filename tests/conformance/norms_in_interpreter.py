"""The norm templates and the other gates against fp64, in Triton's interpreter; run by test_templates.py on its own."""

import math
import os

import pytest
import torch

from agnitra_lab.contracts.search import KernelConfig
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
    """The first, last and default config, one of the loop over a row, and one that splits it."""
    configs = registry.load(template).space(shape, str(dtype)).configs
    looped = [config for config in configs if config.params["num_stages"] > 1][-1:]
    split = [config for config in configs if config.params.get("SPLIT", 1) > 1]
    chosen = [configs[0], configs[-1], default_config(template, shape, str(dtype)), *looped, *split[:1], *split[-1:]]
    return list({config.key(): config for config in chosen}.values())


def wide(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 77), (2, 3, 64), (2, 2500), (33, 16)], ids=str)
def test_layer_norm_agrees_with_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    template = registry.load("layer_norm")
    x, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
    for config in edge_configs("layer_norm", shape, dtype):
        call = render(config).call
        for affine in ((weight, bias), (weight, None), (None, bias.float()), (None, None)):
            expected = template.reference(x.double(), *wide(*affine), EPS)
            assert problem(call(x, *affine, EPS), expected) is None, config.key()
        normed, summed = call(x, weight, bias, EPS, residual)
        # The sum is an output of its own, so the norm is judged from the sum that was given out.
        assert problem(summed, x.double() + residual.double()) is None
        assert problem(normed, template.reference(summed.double(), *wide(weight, bias), EPS)) is None, config.key()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_over_several_dimensions_is_split_over_programs(dtype: torch.dtype) -> None:
    template, shape = registry.load("layer_norm"), (2, 3, 71, 97)
    x, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[1:]).to(dtype) for _ in range(2))
    configs = edge_configs("layer_norm", (2, 3 * 71 * 97), dtype)
    assert any(config.params["SPLIT"] > 1 for config in configs)
    for config in configs:
        call = render(config).call
        normed, summed = call(x, weight, bias, EPS, residual, num_dims=3)
        expected = template.reference(summed.double(), *wide(weight, bias), EPS, num_dims=3)
        assert problem(normed, expected) is None, config.key()
        plain = call(x, None, None, EPS, num_dims=3)
        assert problem(plain, template.reference(x.double(), None, None, EPS, num_dims=3)) is None, config.key()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("cols", [77, 2500, 20001])
def test_rows_far_from_zero_lose_no_more_than_in_eager(cols: int, offset: float) -> None:
    x = torch.randn(2, cols) + offset
    expected = torch.nn.functional.layer_norm(x.double(), (cols,), eps=EPS)
    eager = float((torch.nn.functional.layer_norm(x, (cols,), eps=EPS).double() - expected).abs().mean())
    for config in edge_configs("layer_norm", (2, cols), torch.float32):
        error = float((render(config).call(x, None, None, EPS).double() - expected).abs().mean())
        assert error <= 1.25 * eager, config.key()


def test_layer_norm_takes_row_strides_and_gives_contiguous_rows() -> None:
    template, weight = registry.load("layer_norm"), torch.randn(77)
    call = render(default_config("layer_norm", (6, 77), "float32")).call
    for x in (torch.randn(6, 200)[:, 50:127], torch.randn(77, 6).t(), torch.randn(2, 3, 77)[:, ::2]):
        output = call(x, weight, None, EPS)
        assert output.is_contiguous()
        assert problem(output, template.reference(x.double(), weight.double(), None, EPS)) is None


def test_a_row_with_a_nan_or_an_infinity_is_lost_whole_and_alone() -> None:
    x = torch.randn(4, 300)
    x[1, 7], x[2, 299] = float("nan"), float("inf")
    for name in ("layer_norm", "channel_norm"):
        shape = (4, 300, 1) if name == "channel_norm" else (4, 300)
        for config in edge_configs(name, shape, torch.float32):
            options = {"kind": "layer"} if name == "channel_norm" else {}
            output = render(config).call(x, None, None, EPS, **options)
            assert torch.isnan(output).all(1).tolist() == [False, True, True, False], config.key()
            assert torch.isfinite(output[[0, 3]]).all()


CHANNELS = [(1, 1, 1), (2, 5, 21), (2, 300, 18), (1, 3, 40), (3, 64, 1), (2, 5000, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CHANNELS, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
def test_channel_norm_agrees_with_fp64_in_every_layout(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    template = registry.load("channel_norm")
    x = (torch.randn(shape) + 0.5).to(dtype)
    turned = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1])
    for config in edge_configs("channel_norm", shape, dtype):
        call = render(config).call
        for source, affine, is_last in (
            (x, (weight, bias), False),
            (x, (None, None), True),
            (turned, (weight, None), True),
            (turned, (None, bias), False),
        ):
            output = call(source, *affine, EPS, kind, 1, is_last)
            expected = template.reference(source.double(), *wide(*affine), EPS, kind, 1, is_last)
            assert problem(output, expected) is None, config.key()
            assert (output.movedim(1, -1) if is_last else output).is_contiguous()


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_channel_norm_takes_any_dimension(dim: int) -> None:
    x = torch.randn(3, 4, 5, 6)
    outer, inner = x.shape[:dim].numel(), x.shape[dim + 1 :].numel()
    call = render(default_config("channel_norm", (outer, x.shape[dim], inner), "float32")).call
    output = call(x, None, None, 1e-12, "l2", dim)
    assert torch.allclose(output, torch.nn.functional.normalize(x, dim=dim), rtol=1e-5, atol=1e-6)


def test_a_length_below_eps_is_divided_by_eps() -> None:
    x = torch.zeros(1, 4, 32)
    x[0, 0, :16] = 1e-8
    call = render(default_config("channel_norm", (1, 4, 32), "float32")).call
    assert torch.equal(call(x, None, None, 1e-6, "l2"), torch.nn.functional.normalize(x, dim=1, eps=1e-6))
    assert torch.isnan(call(x, None, None, 0.0, "l2")[0, :, 16:]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "num_groups"), [((2, 6, 5, 7), 3), ((3, 8), 2), ((1, 4, 20001), 2), ((2, 6, 9), 6), ((2, 5, 3), 1)]
)
def test_group_norm_agrees_with_fp64(shape: tuple[int, ...], num_groups: int, dtype: torch.dtype) -> None:
    template = registry.load("group_norm")
    x, weight, bias = torch.randn(shape).to(dtype) + 1, torch.randn(shape[1]).to(dtype), torch.randn(shape[1])
    site = (shape[0] * num_groups, shape[1] // num_groups, math.prod(shape[2:]))
    for config in edge_configs("group_norm", site, dtype):
        call = render(config).call
        for affine, is_silu in (((weight, bias), True), ((None, None), False), ((weight, None), False)):
            expected = template.reference(x.double(), num_groups, *wide(*affine), EPS, is_silu)
            assert problem(call(x, num_groups, *affine, EPS, is_silu), expected) is None, config.key()


# Parts of several blocks, read again after the wait, and of one block, held in registers.
WAITING = {"_waiting_kernel": {"BLOCK_N": 64, "NUM_STAGES": 1}, "_relay_kernel": {"BLOCK_N": 256}}


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("has_residual", "spatial"), [(True, 0), (False, 80), (False, 3)])
def test_programs_that_wait_for_each_other_agree_with_fp64(
    name: str, dtype: torch.dtype, has_residual: bool, spatial: int
) -> None:
    rows, cols, groups, split = 2, 720, 2, 3
    x, residual = (torch.randn(rows, cols + 7) + 1).to(dtype)[:, :cols], torch.randn(rows, cols).to(dtype)
    weight, bias = torch.randn(groups * cols), torch.randn(groups * cols).to(dtype)
    if not spatial:
        groups, weight, bias = 1, weight[:cols], bias[:cols]
    elif groups * cols // spatial < len(weight):
        weight, bias = weight[: groups * cols // spatial], bias[: groups * cols // spatial]
    out, summed = torch.full((rows, cols), math.nan).to(dtype), torch.full((rows, cols), math.nan).to(dtype)
    moments = torch.full((rows, split, 3), math.nan)
    (kernel,) = [each for each in registry.load("group_norm").kernel if each.fn.__name__ == name]
    for _ in range(2):
        # Programs run one by one here: all have arrived before the first waits, and the second launch has all moments.
        arrived = torch.full((rows + 1,), split, dtype=torch.int32)
        arrived[0] = 0
        counts = (rows, cols) if name == "_relay_kernel" else (cols,)
        kernel[(rows * split,)](
            x, residual, weight, bias, out, summed if has_residual else x, moments, arrived, *counts, groups,
            x.stride(0), cols, EPS, HAS_RESIDUAL=has_residual, HAS_WEIGHT=True, HAS_BIAS=True, IS_SILU=True,
            SPATIAL=spatial, SPLIT=split, SPLIT_LANES=1 << (split - 1).bit_length(), **WAITING[name],
        )  # fmt: skip
    h = (x + residual) if has_residual else x
    channels = [tensor.double().repeat_interleave(spatial or 1).view(groups, cols) for tensor in (weight, bias)]
    scale, shift = (tensor.repeat(rows // groups, 1) for tensor in channels)
    normed = torch.nn.functional.layer_norm(h.double(), (cols,), eps=EPS)
    assert problem(out, torch.nn.functional.silu(normed * scale + shift)) is None
    assert not has_residual or problem(summed, h.double()) is None


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_gate_agrees_with_fp64_and_keeps_its_limits(activation: str, dtype: torch.dtype) -> None:
    template = registry.load("swiglu")
    gate, up = (2 * torch.randn(5, 77)).to(dtype), torch.randn(5, 77).to(dtype)
    call = render(default_config("swiglu", (5, 77), str(dtype))).call
    for round_silu in (True, False):
        output = call(gate, up, round_silu=round_silu, activation=activation)
        assert problem(output, template.reference(gate.double(), up.double(), activation=activation)) is None
    ends = torch.tensor([[-200.0, -9.0, 0.0, 9.0, 200.0, float("inf"), float("nan")]], dtype=dtype)
    output = call(ends, torch.ones_like(ends), activation=activation).float()
    expected = template.reference(ends.float(), torch.ones(1, 7), activation=activation)
    assert torch.allclose(output, expected, rtol=1e-2, atol=1e-6, equal_nan=True)


PLANTED = {
    "the squares are not centred": ("layer_norm", "tl.sum(centred * centred, axis=1)", "tl.sum(h * h, axis=1)"),
    "masked columns are centred too": (
        "layer_norm",
        "tl.where(offs_n < num_cols, h - mean[:, None], 0.0)",
        "h - mean[:, None]",
    ),
    "the bias is forgotten": ("layer_norm", "normed * weight + bias", "normed * weight"),
    "a lane counts one block too many": (
        "layer_norm_split",
        "num_cols - part * BLOCK_N - lanes, 0)",
        "num_cols - part * BLOCK_N - lanes, 0) + SPLIT * BLOCK_N",
    ),
    "the spread between lanes is forgotten": (
        "layer_norm_split",
        "tl.sum(m2 + offset * offset * count, axis=0)",
        "tl.sum(m2, axis=0)",
    ),
    "the chunks of all rows are one": (
        "layer_norm_split",
        "moments = moments_ptr + (row * SPLIT + parts) * 3",
        "moments = moments_ptr + (0 * row * SPLIT + parts) * 3",
    ),
    "the last cycle counts whole": (
        "layer_norm_split",
        "tl.minimum(tl.maximum(rest, 0), BLOCK_N)",
        "tl.where(rest > 0, BLOCK_N, 0)",
    ),
    "the first block is left out": (
        "layer_norm_split",
        "first + (num_steps - 1 - step) * CYCLE",
        "first + (num_steps - step) * CYCLE",
    ),
}


def run_source(source: str, name: str) -> str | None:
    """Run the kernels of rendered source text as a stranger would, into guarded NaN buffers."""
    import linecache

    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    module: dict = {"__name__": name}
    exec(compile(source, name, "exec"), module)
    rows, cols = 3, 1500 if 'SPLIT": 1,' in source else 9001
    constants, options = module["CONSTANTS"], module["OPTIONS"]
    x = torch.randn(rows, cols + 9)[:, :cols] * torch.linspace(0.5, 2, cols) + torch.linspace(0, 3, cols)
    x, weight, bias = x.contiguous(), torch.randn(cols), torch.randn(cols)
    buffer = torch.full((rows * cols + 9000,), float("nan"))
    affine = {"HAS_WEIGHT": True, "HAS_BIAS": True, "IS_SILU": False, "SPATIAL": 0}
    block = {"BLOCK_N": constants["BLOCK_N"], "NUM_STAGES": constants["NUM_STAGES"], **options}
    split = constants["SPLIT"]
    if split == 1:
        del block["NUM_STAGES"]
        module["_block_kernel"][(rows,)](
            x, x, weight, bias, buffer, x, rows, cols, 1, cols, 0, EPS, HAS_RESIDUAL=False, ROWS_PER_PROGRAM=1,
            **affine, **block,
        )  # fmt: skip
    else:
        moments = torch.full((rows, split, 3), float("nan"))
        grid = (rows * split,)
        module["_chunk_kernel"][grid](x, x, x, moments, rows, cols, cols, 0, HAS_RESIDUAL=False, SPLIT=split, **block)
        module["_apply_kernel"][grid](
            x,
            moments,
            weight,
            bias,
            buffer,
            rows,
            cols,
            1,
            cols,
            EPS,
            SPLIT=split,
            SPLIT_LANES=split,
            **affine,
            **block,
        )
    if not torch.isnan(buffer[rows * cols :]).all():
        return "it wrote past the end of the output"
    expected = registry.load("layer_norm").reference(x.double(), weight.double(), bias.double(), EPS)
    return problem(buffer[: rows * cols].view(rows, cols), expected)


def source_of(name: str) -> str:
    split = 4 if name == "layer_norm_split" else 1
    params = {
        "BLOCK_N": 512 if split > 1 else 2048,
        "ROWS_PER_PROGRAM": 1,
        "SPLIT": split,
        "num_warps": 4,
        "num_stages": 1,
    }
    return render(KernelConfig(template="layer_norm", params=params)).source


@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_split"])
def test_rendered_source_runs_on_its_own(name: str) -> None:
    assert run_source(source_of(name), f"/right/{name}.py") is None


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught_by_the_same_check(bug: str) -> None:
    name, right, wrong = PLANTED[bug]
    source = source_of(name)
    assert right in source
    assert run_source(source.replace(right, wrong), f"/planted/{list(PLANTED).index(bug)}.py") is not None
