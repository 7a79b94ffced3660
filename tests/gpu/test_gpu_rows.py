"""The row templates on a real device: fp64 agreement, eager's accuracy, operator contract, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from agnitra_lab.contracts.search import KernelConfig  # noqa: E402
from agnitra_lab.generate import registry  # noqa: E402
from agnitra_lab.generate.defaults import default_config  # noqa: E402
from agnitra_lab.generate.render import render  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RTOL = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
SHAPES = [(1,), (5, 77), (3, 1023), (257, 2048), (33, 16), (5000, 8), (64, 32_768), (7, 50_257), (4, 131_072)]
LONG = [(2, 1_000_000), (1, 3_000_001)]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.cuda.synchronize()


def random(*shape: int, dtype=torch.float32, scale: float = 1.0):
    return (scale * torch.randn(shape, device="cuda")).to(dtype)


def problem(output, expected) -> str | None:
    """Say how an output differs from the fp64 reference by the project's rule, or None."""
    rtol = RTOL[output.dtype]
    if output.shape != expected.shape:
        return f"shape {tuple(output.shape)} instead of {tuple(expected.shape)}"
    # Half a step of the format: what a softmax over a million columns leaves in fp16 is subnormal.
    step = torch.finfo(output.dtype).smallest_normal * torch.finfo(output.dtype).eps
    tolerance = rtol * (expected.pow(2).mean().sqrt() + expected.abs()) + 0.51 * step
    share = float(((output.double() - expected).abs() <= tolerance).double().mean())
    return None if share >= 0.999 else f"only {share:.2%} of the elements are within {rtol}"


def error_ratio(output, eager, exact) -> float:
    """Error against fp64 over eager's own, by the project's rule (at most 1.25)."""
    size = exact.pow(2).mean().sqrt()
    ours, theirs = (float((value.double() - exact).pow(2).mean().sqrt() / size) for value in (output, eager))
    return max(0.0, ours - 1e-8) / max(theirs, 1e-12)


def configs(template: str, shape: tuple[int, ...], dtype) -> list[KernelConfig]:
    """The default config, and the first and last of every form: whole rows, loop, and both with parts."""
    chosen = {default_config(template, shape, str(dtype)).key(): default_config(template, shape, str(dtype))}
    forms: dict[tuple[bool, bool], list[KernelConfig]] = {}
    for config in registry.load(template).space(shape, str(dtype)).configs:
        block, split = config.params["BLOCK_N"], config.params["SPLIT"]
        forms.setdefault((split > 1, block * split >= shape[-1]), []).append(config)
    chosen |= {config.key(): config for form in forms.values() for config in (form[0], form[-1])}
    return list(chosen.values())


def cases(shapes: list[tuple[int, ...]]) -> list[Any]:
    return [pytest.param(shape, dtype, id=f"{shape}-{dtype}") for shape in shapes for dtype in DTYPES]


@pytest.mark.parametrize(("shape", "dtype"), cases([*SHAPES, *LONG]))
def test_softmax_agrees_with_fp64_in_every_form(shape, dtype) -> None:
    x = random(*shape, dtype=dtype, scale=2.0)
    for is_log in (False, True):
        exact = registry.load("softmax").reference(x.double(), is_log=is_log)
        for config in configs("softmax", shape, dtype):
            assert problem(render(config).call(x, is_log=is_log), exact) is None, config.key()


@pytest.mark.parametrize("shape", [(512, 1000), (1024, 4096), (64, 32_768), (16, 131_072), (4, 1_000_000)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("is_log", [False, True])
def test_fp32_softmax_is_as_near_to_fp64_as_torch(shape, scale, is_log) -> None:
    x = random(*shape, scale=scale)
    exact, eager = (torch.log_softmax(value, -1) if is_log else torch.softmax(value, -1) for value in (x.double(), x))
    ratios = {
        config.key(): error_ratio(render(config).call(x, is_log=is_log), eager, exact)
        for config in configs("softmax", shape, torch.float32)
    }
    assert max(ratios.values()) <= 1.25, ratios


@pytest.mark.parametrize("num_cols", [700, 40_000, 300_001])
def test_softmax_keeps_infinities_and_nan_as_torch_does(num_cols) -> None:
    for is_log in (False, True):
        x = random(8, num_cols, scale=5.0)
        x[1], x[2, 7], x[3, num_cols - 10], x[4, : num_cols - 50] = -INF, INF, NAN, -INF
        x[5], x[6, :300] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
        expected = torch.log_softmax(x, -1) if is_log else torch.softmax(x, -1)
        for config in configs("softmax", (8, num_cols), torch.float32):
            output = render(config).call(x, is_log=is_log)
            assert torch.allclose(output, expected, rtol=1e-5, atol=1e-12, equal_nan=True), config.key()


def test_programs_that_wait_for_each_other_give_the_same_each_time() -> None:
    params = {"BLOCK_N": 16384, "ROWS_PER_PROGRAM": 1, "SPLIT": 24, "num_warps": 16, "num_stages": 1}
    call = render(KernelConfig(template="softmax", params=params)).call
    x = random(600, 393_216, dtype=torch.bfloat16)
    exact = torch.softmax(x[-3:].double(), -1)
    first = call(x)
    assert problem(first[-3:], exact) is None
    for _ in range(20):
        assert torch.equal(call(x), first)


@pytest.mark.parametrize(("shape", "dtype"), cases([*SHAPES, *LONG]))
def test_cross_entropy_agrees_with_fp64_in_every_form(shape, dtype) -> None:
    template, x = registry.load("cross_entropy"), random(*shape, dtype=dtype, scale=2.0)
    target = torch.randint(0, shape[-1], shape[:-1], device="cuda")
    for label_smoothing in (0.0, 0.1):
        rules = {"reduction": "none", "label_smoothing": label_smoothing}
        exact = template.reference(x.double(), target, **rules)
        for config in configs("cross_entropy", shape, dtype):
            output = render(config).call(x, target, out_dtype=torch.float32, **rules)
            assert problem(output, exact) is None, config.key()


@pytest.mark.parametrize("shape", [(1024, 128_256), (8192, 32_000), (4096, 1000), (512, 50_257)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_is_as_near_to_fp64_as_torch(shape, dtype, reduction) -> None:
    x, target = random(*shape, dtype=dtype, scale=3.0), torch.randint(0, shape[-1], shape[:-1], device="cuda")
    target[::7] = -100
    # A few tokens at a time: all logits in fp64 would take 8 bytes each, twice over.
    exact = torch.cat(
        [
            torch.nn.functional.cross_entropy(part.double(), own, reduction="none")
            for part, own in zip(x.split(256), target.split(256), strict=True)
        ]
    )
    eager = torch.nn.functional.cross_entropy(x.float(), target, reduction=reduction)
    if reduction != "none":
        exact = exact.sum() / ((target != -100).sum() if reduction == "mean" else 1)
    for config in configs("cross_entropy", shape, dtype):
        output = render(config).call(x, target, reduction=reduction, out_dtype=torch.float32)
        assert torch.allclose(output.double(), exact, rtol=1e-6, atol=1e-6), config.key()
        if reduction == "none":
            assert error_ratio(output, eager, exact) <= 1.25, config.key()


@pytest.mark.parametrize(("shape", "dtype"), cases(SHAPES))
@pytest.mark.parametrize("reverse", [False, True])
def test_cumsum_agrees_with_fp64_in_every_form(shape, dtype, reverse) -> None:
    template, x = registry.load("cumsum"), random(*shape, dtype=dtype)
    mask = torch.rand(shape, device="cuda") > 0.4
    for config in configs("cumsum", shape, dtype):
        for given in (None, mask):
            exact = template.reference(x.double(), given, reverse=reverse)
            assert problem(render(config).call(x, given, reverse=reverse), exact) is None, config.key()


@pytest.mark.parametrize("shape", [(2048, 32_768), (128, 4000), (4, 1_000_000)], ids=str)
@pytest.mark.parametrize("is_positive", [False, True])
def test_fp32_cumsum_is_as_near_to_fp64_as_torch(shape, is_positive) -> None:
    x = random(*shape).abs() if is_positive else random(*shape)
    exact, eager = x.double().cumsum(-1), x.cumsum(-1)
    ratios = {
        config.key(): error_ratio(render(config).call(x), eager, exact)
        for config in configs("cumsum", shape, torch.float32)
    }
    assert max(ratios.values()) <= 1.25, ratios


def operator_cases() -> dict[str, list[tuple[Any, ...]]]:
    x, target = random(6, 700), torch.randint(0, 700, (6,), device="cuda")
    mask = x > 0
    return {
        "softmax": [
            (x, False, torch.float32, 1024, 2, 1, 4, 1),
            (x, True, torch.bfloat16, 256, 1, 1, 4, 2),
            (x, False, torch.float32, 256, 1, 3, 4, 1),
            (x, False, torch.float32, 256, 1, 2, 4, 2),
        ],
        "cross_entropy": [
            (x, target, -100, 0.0, torch.float32, 1024, 2, 1, 4, 1),
            (x, target, -100, 0.1, torch.float32, 256, 1, 2, 4, 2),
        ],
        "cumsum": [
            (x, None, False, torch.float32, 1024, 2, 1, 4, 1),
            (x, mask, True, torch.bfloat16, 256, 1, 2, 4, 2),
        ],
    }


@pytest.mark.parametrize("name", ["softmax", "cross_entropy", "cumsum"])
def test_a_row_operator_keeps_the_contract_of_torch(name) -> None:
    registry.load(name)
    for case in operator_cases()[name]:
        torch.library.opcheck(getattr(torch.ops.agnitra, name).default, case)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("num_cols", [2048, 65_536])
def test_a_function_of_all_row_templates_compiles_as_one_graph(mode, num_cols) -> None:
    torch._dynamo.reset()
    shape = (32, num_cols)
    names = ("softmax", "cross_entropy", "cumsum")
    softmax, loss, sums = (render(default_config(name, shape, "bfloat16")).call for name in names)

    def function(x, target):
        return softmax(x * 1.5, out_dtype=torch.float32), loss(x, target, out_dtype=torch.float32), sums(x) + 1

    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for _ in range(4):
        x, target = random(*shape, dtype=torch.bfloat16), torch.randint(0, num_cols, (32,), device="cuda")
        before = x.clone()
        outputs = [output.clone() for output in compiled(x, target)]
        assert problem(outputs[0], torch.softmax((x * 1.5).double(), -1)) is None
        exact = torch.nn.functional.cross_entropy(x.double(), target)
        assert torch.allclose(outputs[1].double(), exact, rtol=1e-5)
        assert problem(outputs[2], x.double().cumsum(-1) + 1) is None
        assert torch.equal(x, before)


def test_row_offsets_pass_two_to_the_31() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of device memory")
    rows, cols = 2**18 + 8, 8192
    x = torch.empty(rows, cols, device="cuda", dtype=torch.bfloat16).normal_()
    target = torch.randint(0, cols, (rows,), device="cuda")
    softmax, loss, sums = (
        render(default_config(name, (rows, cols), "bfloat16")).call for name in ("softmax", "cross_entropy", "cumsum")
    )
    assert problem(softmax(x)[-4:], torch.softmax(x[-4:].double(), -1)) is None
    exact = torch.nn.functional.cross_entropy(x[-4:].double(), target[-4:], reduction="none")
    assert problem(loss(x, target, reduction="none", out_dtype=torch.float32)[-4:], exact) is None
    assert problem(sums(x)[-4:], x[-4:].double().cumsum(-1)) is None
