"""The depthwise convolution against fp64, in Triton's interpreter; run by test_templates.py in a process of its own."""

import itertools
import linecache
import math
import os
import random

import pytest
import torch

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render

assert os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RTOL = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
TEMPLATE = registry.load("depthwise_conv")


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


def site_of(x, channels, taps, stride, dilation, is_last):
    filled = [(1,) * (3 - len(taps)) + tuple(numbers) for numbers in (x.shape[2:], taps, stride, dilation)]
    return (x.shape[0], channels, *itertools.chain(*filled), 2 if is_last else 1)


def edge_configs(site, dtype) -> list[KernelConfig]:
    """The first, last and default config, and one between."""
    configs = TEMPLATE.space(site, str(dtype)).configs
    between = random.Random(0).sample(configs, 1)
    chosen = [configs[0], configs[-1], default_config("depthwise_conv", site, str(dtype)), *between]
    return list({config.key(): config for config in chosen}.values())


# x, channels of the result, taps, stride, padding, dilation, size.
CASES = {
    "3x3": ((2, 3, 9, 8), 3, (3, 3), (1, 1), (1, 1), (1, 1), (9, 8)),
    "3x3 stride 2": ((2, 6, 9, 16), 6, (3, 3), (2, 2), (1, 1), (1, 1), (5, 8)),
    "5x5 odd rows": ((1, 4, 7, 7), 4, (5, 5), (1, 1), (2, 2), (1, 1), (7, 7)),
    "7x7": ((1, 5, 10, 16), 5, (7, 7), (1, 1), (3, 3), (1, 1), (10, 16)),
    "no padding, uneven": ((1, 2, 11, 8), 2, (2, 4), (3, 2), (0, 0), (1, 1), (4, 3)),
    "dilated": ((1, 2, 9, 8), 2, (3, 3), (1, 1), (4, 2), (4, 2), (9, 8)),
    "dilated, strided": ((1, 3, 13, 16), 3, (3, 2), (2, 3), (2, 1), (2, 3), (7, 5)),
    "much padding": ((1, 1, 3, 4), 1, (3, 3), (1, 1), (4, 6), (1, 1), (9, 14)),
    "multiplier": ((2, 3, 6, 8), 6, (3, 3), (1, 1), (1, 1), (1, 1), (6, 8)),
    "9x11, in a loop": ((1, 2, 5, 8), 2, (9, 11), (1, 1), (4, 5), (1, 1), (5, 8)),
    "one tap": ((1, 3, 4, 4), 3, (1, 1), (2, 2), (0, 0), (1, 1), (2, 2)),
    "1-d causal": ((2, 16, 24), 16, (4,), (1,), (3,), (1,), (24,)),
    "1-d, odd": ((1, 5, 13), 5, (3,), (2,), (1,), (1,), (7,)),
    "3-d": ((1, 3, 5, 6, 8), 3, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), (5, 6, 8)),
    "3-d, strided": ((1, 2, 6, 5, 7), 2, (3, 1, 2), (2, 1, 2), (1, 0, 1), (1, 1, 2), (3, 5, 4)),
    "many channels": ((1, 33, 3, 4), 33, (3, 3), (1, 1), (1, 1), (1, 1), (3, 4)),
}


def tensors_of(name: str, dtype: torch.dtype):
    shape, channels, taps, *_ = CASES[name]
    return torch.randn(shape).to(dtype), torch.randn(channels, 1, *taps).to(dtype), torch.randn(channels).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_last", [False, True], ids=["planes", "channels innermost"])
@pytest.mark.parametrize("name", CASES)
def test_depthwise_conv_agrees_with_fp64(name: str, is_last: bool, dtype: torch.dtype) -> None:
    _, channels, taps, stride, padding, dilation, size = CASES[name]
    x, weight, bias = tensors_of(name, dtype)
    numbers = (taps, stride, padding, dilation, size)
    turned = x.movedim(1, -1).contiguous().movedim(-1, 1)
    laid_out = weight.reshape(channels, -1).t().contiguous()
    exact = TEMPLATE.reference(x.double(), weight.double(), bias.double(), *numbers)
    bare = TEMPLATE.reference(x.double(), weight.double(), None, *numbers)
    for config in edge_configs(site_of(x, channels, taps, stride, dilation, is_last), dtype):
        call = render(config).call
        output = call(turned if is_last else x, laid_out if is_last else weight, bias, *numbers, "none", is_last)
        assert problem(output, exact) is None, config.key()
        assert (output.movedim(1, -1) if is_last else output).is_contiguous()
        # The other layout of x and of the weight is copied.
        output = call(x if is_last else turned, weight if is_last else laid_out, None, *numbers, "none", is_last)
        assert problem(output, bare) is None, config.key()


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "sigmoid"])
@pytest.mark.parametrize("is_last", [False, True])
def test_an_activation_reads_the_rounded_sums(activation: str, is_last: bool) -> None:
    _, channels, *numbers = CASES["3x3"]
    # fp16, because the interpreter truncates to bf16 where a device rounds.
    x, weight, bias = tensors_of("3x3", torch.float16)
    config = default_config("depthwise_conv", site_of(x, channels, (3, 3), (1, 1), (1, 1), is_last), "float16")
    output = render(config).call(x, weight, bias, *numbers, activation, is_last)
    sums = render(config).call(x, weight, bias, *numbers, "none", is_last)
    name, options = ("gelu", {"approximate": "tanh"}) if activation == "gelu_tanh" else (activation, {})
    expected = getattr(torch.nn.functional, name)(sums.float(), **options).half()
    assert (output == expected).double().mean() > 0.99


def test_rows_with_a_stride_are_read_in_place() -> None:
    _, channels, *numbers = CASES["1-d causal"]
    merged = torch.randn(2, 24, 40)
    x, weight = merged[:, :, 8:24].transpose(1, 2), torch.randn(channels, 1, 4)
    config = default_config("depthwise_conv", site_of(x, channels, (4,), (1,), (1,), True), "float32")
    output = render(config).call(x, weight, None, *numbers, "none", True)
    assert problem(output, TEMPLATE.reference(x.double(), weight.double(), None, *numbers)) is None
    assert output.transpose(1, 2).is_contiguous()


def test_a_nan_or_an_infinity_reaches_what_reads_it_and_nothing_else() -> None:
    shape, channels, taps, stride, padding, dilation, size = CASES["3x3"]
    x, weight = torch.randn(shape), torch.rand(channels, 1, *taps) + 1
    x[0, 1, 4, 3], x[1, 2, 0, 0] = float("nan"), float("inf")
    expected = TEMPLATE.reference(x.double(), weight.double(), None, taps, stride, padding, dilation, size)
    for is_last in (False, True):
        for config in edge_configs(site_of(x, channels, taps, stride, dilation, is_last), torch.float32):
            output = render(config).call(x, weight, None, taps, stride, padding, dilation, size, "none", is_last)
            assert torch.equal(torch.isfinite(output), torch.isfinite(expected)), config.key()
            assert torch.equal(torch.isnan(output), torch.isnan(expected))


def test_what_it_cannot_compute_is_refused_with_the_reason() -> None:
    _, _, *numbers = CASES["3x3"]
    x, weight, bias = tensors_of("3x3", torch.float32)
    call = render(default_config("depthwise_conv", site_of(x, 3, (3, 3), (1, 1), (1, 1), False), "float32")).call
    for arguments, because in (
        ((x.double(), weight, bias, *numbers), "not torch.float64"),
        ((x, weight.half(), bias, *numbers), "alike"),
        ((x, weight[:2], bias, *numbers), "multiple of 3"),
        ((x, weight, bias.half(), *numbers), "bias"),
        ((x, weight, bias, (3, 3), (1, 1), (1, 1), (1, 1), (9,)), "one to three dimensions"),
        ((x, weight, bias, (3, 3), (0, 1), (1, 1), (1, 1), (9, 8)), "at least 1"),
        ((x, weight, bias, *numbers, "tanh"), "'tanh'"),
    ):
        with pytest.raises(TemplateError, match=because):
            call(*arguments)


PLANTED = {
    "the row after the last is read": (
        "planes",
        "< limit.to(tl.uint32))[:, None]",
        "< limit.to(tl.uint32) + 1)[:, None]",
    ),
    "the row above is not masked": (
        "planes",
        "((h_first + row).to(tl.uint32) < H_IN)",
        "((h_first + row) < H_IN)",
    ),
    "padding is one too many": (
        "planes",
        "h_block * (BLOCK_H * SH) - PH",
        "h_block * (BLOCK_H * SH) - PH - 1",
    ),
    "columns are read one to the right": (
        "planes",
        "columns[START + place",
        "columns[START + 1 + place",
    ),
    "the taps of a row lie together": (
        "planes",
        "k * RW], weights[TAP + k]",
        "k], weights[TAP + k]",
    ),
    "the bias is added twice": (
        "planes",
        "first += tl.load(bias_ptr + channel)",
        "first += 2 * tl.load(bias_ptr + channel)",
    ),
    "the bias is of another channel": (
        "planes",
        "tl.load(bias_ptr + channel)",
        "tl.load(bias_ptr + channel // 2)",
    ),
    "sums are rounded at each step": (
        "planes",
        "weights[TAP + k], value)",
        "weights[TAP + k], value).to(tl.float16).to(tl.float32)",
    ),
    "the weight is read backwards": (
        "planes",
        "tl.load(w_at + tap)",
        "tl.load(w_at + KD * KH * KW - 1 - tap)",
    ),
    "the tail of a row is not stored": (
        "planes",
        "mask = (h_out + h < H_OUT)[:, None]",
        "mask = (h_out + h < H_OUT - 1)[:, None]",
    ),
    "stores run over the end of a row": (
        "planes",
        "(w_out[:, None] + inner < W_OUT)",
        "(w_out[:, None] + inner < W_OUT + 1)",
    ),
    "planes follow without the multiplier": (
        "planes",
        "(plane // MULTIPLIER)",
        "(plane * MULTIPLIER // MULTIPLIER // 2)",
    ),
    "the dilation along a row is one": (
        "channels",
        "if column % RW == 0 and column // RW < KW",
        "if column < KW",
    ),
    "the height is dilated by one": (
        "channels",
        "step % KH * RH",
        "step % KH",
    ),
    "the left padding is off by one": (
        "channels",
        "w_block * (BLOCK_W * SW) - PW",
        "w_block * (BLOCK_W * SW) - PW + 1",
    ),
    "the right end is not masked": (
        "channels",
        "tl.where(is_inside, W_IN, 0)",
        "tl.where(is_inside, W_IN + 1, 0)",
    ),
    "channels past the last are stored": (
        "channels",
        "mask_c & (w_block",
        "(offs_c >= 0) & (w_block",
    ),
    "the tail of the places is left out": (
        "channels",
        "place = tl.minimum(place, num_places - 1)",
        "place = tl.minimum(place, num_places - 2)",
    ),
    "the last tap is left out": (
        "channels",
        "for step in tl.range(0, KD * KH)",
        "for step in tl.range(0, KD * KH - 1)",
    ),
    "bias twice, channels innermost": (
        "channels",
        "first += tl.load(bias_ptr + offs_c",
        "first += 2 * tl.load(bias_ptr + offs_c",
    ),
}

GUARD = 4096
PLANTED_TAPS, PLANTED_STRIDE, PLANTED_PADDING, PLANTED_DILATION = (1, 3, 3), (1, 1, 1), (0, 2, 3), (1, 2, 2)


def run_source(source: str, layout: str, name: str) -> str | None:
    """Run the kernels of rendered source text as a stranger would, between guards of NaN; say what is wrong."""
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    module: dict = {"__name__": name}
    exec(compile(source, name, "exec"), module)
    images, channels, extents = 2, 6, (1, 9, 12)
    size = tuple(
        n + 2 * p - r * (k - 1)
        for n, k, p, r in zip(extents, PLANTED_TAPS, PLANTED_PADDING, PLANTED_DILATION, strict=True)
    )
    flat = torch.full((images * channels * math.prod(extents) + 2 * GUARD,), 1e4)
    x = flat[GUARD:-GUARD].view(images, channels, *extents).normal_()
    roomy = torch.randn(2 * GUARD + channels * 9)
    weight, bias = roomy[GUARD : GUARD + channels * 9].view(channels, 1, *PLANTED_TAPS), torch.randn(channels + 60)
    out = torch.full((images * channels * math.prod(size) + 2 * GUARD,), float("nan"))
    inner = out[GUARD:-GUARD]
    constants = {"MULTIPLIER": 1, "HAS_BIAS": True, "ACTIVATION": 0, "LANES": 32 * module["OPTIONS"]["num_warps"]}
    for prefix, numbers in (
        ("K", PLANTED_TAPS), ("S", PLANTED_STRIDE), ("P", PLANTED_PADDING), ("R", PLANTED_DILATION),
    ):  # fmt: skip
        constants |= {prefix + axis: number for axis, number in zip("DHW", numbers, strict=True)}
    for suffix, numbers in (("_IN", extents), ("_OUT", size)):
        constants |= {axis + suffix: number for axis, number in zip("DHW", numbers, strict=True)}
    block = module["CONSTANTS"]
    constants |= {"BLOCK_W": block["BLOCK_W"], "NUM_CHANNELS": channels, **module["OPTIONS"]}
    blocks = -(-size[2] // block["BLOCK_W"])
    if layout == "planes":
        lanes = images * channels * -(-size[1] // block["BLOCK_H"]) * blocks
        module["_planes_kernel"][(-(-lanes // constants["LANES"]),)](
            x, weight, bias, inner, lanes, **constants, IS_UNROLLED=True, BLOCK_H=block["BLOCK_H"]
        )
        found = inner.view(images, channels, *size)
    else:
        # A dense copy between guards, and the weight as the kernel reads it.
        last = torch.full_like(flat, 1e4)
        last[GUARD:-GUARD] = x.movedim(1, -1).reshape(-1)
        laid_out = torch.full((channels * 9 + 2 * GUARD,), 1e4)
        laid_out[GUARD:-GUARD] = weight.reshape(channels, 9).t().reshape(-1)
        places = images * size[1] * blocks
        per_program, width = constants["LANES"] // block["LANES_C"], block["LANES_C"] * block["BLOCK_C"]
        strides = {"STRIDE_XN": 9 * 12 * channels, "STRIDE_XD": 0, "STRIDE_XH": 12 * channels, "STRIDE_XW": channels}
        module["_channels_kernel"][(-(-places // per_program) * -(-channels // width),)](
            last[GUARD:-GUARD], laid_out[GUARD:-GUARD], bias, inner, places, **constants, **strides,
            IS_WHOLE=channels % block["BLOCK_C"] == 0, BLOCK_C=block["BLOCK_C"], LANES_C=block["LANES_C"],
        )  # fmt: skip
        found = inner.view(images, *size, channels).movedim(-1, 1)
    if not torch.isnan(out[:GUARD]).all() or not torch.isnan(out[-GUARD:]).all():
        return "it wrote outside the output"
    numbers = (PLANTED_TAPS, PLANTED_STRIDE, PLANTED_PADDING, PLANTED_DILATION, size)
    exact = TEMPLATE.reference(x.double(), weight.double(), bias[:channels].double(), *numbers)
    return problem(found, exact)


def source_of(layout: str) -> str:
    params = {"BLOCK_W": 4, "BLOCK_H": 2, "BLOCK_C": 1, "LANES_C": 1, "num_warps": 2, "num_stages": 1}
    if layout == "channels":
        params |= {"BLOCK_H": 1, "BLOCK_C": 2, "LANES_C": 4}
    return render(KernelConfig(template="depthwise_conv", params=params)).source


@pytest.mark.parametrize("layout", ["planes", "channels"])
def test_rendered_source_runs_on_its_own(layout: str) -> None:
    assert run_source(source_of(layout), layout, f"/right/{layout}.py") is None


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught_by_the_same_check(bug: str) -> None:
    layout, right, wrong = PLANTED[bug]
    source = source_of(layout)
    assert right in source
    try:
        found = run_source(source.replace(right, wrong), layout, f"/planted/{list(PLANTED).index(bug)}.py")
    except Exception as error:
        found = str(error)
    assert found is not None
