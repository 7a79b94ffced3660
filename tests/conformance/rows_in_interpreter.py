"""The row templates against fp64, in Triton's interpreter; run by test_templates.py in a process of its own.

The interpreter has no fused multiply-add, from which fp32 softmax gains its last digit, and runs programs one by one:
softmax's programs that wait for each other run as two kernels. Both are for tests/gpu/test_gpu_rows.py.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from templates_in_interpreter import DTYPES, edge_configs, problem

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry
from agnitra_lab.generate.render import render

SHAPES = [(1,), (1, 1), (5, 77), (2, 3, 64), (2, 2500), (33, 16)]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def config(template: str, **params: int) -> KernelConfig:
    point = {"BLOCK_N": 256, "ROWS_PER_PROGRAM": 1, "SPLIT": 1, "num_warps": 4, "num_stages": 1}
    return KernelConfig(template=template, params=point | params)


FORMS = {
    "whole rows": {"BLOCK_N": 1024, "ROWS_PER_PROGRAM": 2},
    "loop": {"ROWS_PER_PROGRAM": 2},
    "parts in one block": {"BLOCK_N": 512, "SPLIT": 2},
    "parts in a loop": {"SPLIT": 3, "num_stages": 2},
    "parts that are empty": {"SPLIT": 8},
}


# --- softmax ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_log", [False, True])
def test_softmax_agrees_with_fp64(shape: tuple[int, ...], dtype: torch.dtype, is_log: bool) -> None:
    template, x = registry.load("softmax"), (3 * torch.randn(shape)).to(dtype)
    expected = template.reference(x.double(), is_log=is_log)
    for chosen in edge_configs("softmax", shape, dtype):
        output = render(chosen).call(x, is_log=is_log)
        assert output.is_contiguous() and output.dtype is dtype
        assert problem(output, expected) is None, chosen.key()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_log", [False, True])
def test_every_form_of_softmax_keeps_infinities_and_nan_as_torch_does(form: str, is_log: bool) -> None:
    x = 5 * torch.randn(8, 700)
    lowest = torch.finfo(torch.float32).min
    x[1], x[2, 7], x[3, 690], x[4, :650], x[5], x[6, :300] = -INF, INF, NAN, -INF, lowest, lowest
    output = render(config("softmax", **FORMS[form])).call(x, is_log=is_log)
    expected = torch.log_softmax(x, -1) if is_log else torch.softmax(x, -1)
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_softmax_widens_and_narrows_as_asked(form: str) -> None:
    call = render(config("softmax", **FORMS[form])).call
    for dtype in DTYPES:
        x = (2 * torch.randn(3, 700)).to(dtype)
        exact = torch.softmax(x.double(), -1)
        for out_dtype in DTYPES:
            output = call(x, out_dtype=out_dtype)
            assert output.dtype is out_dtype and problem(output, exact) is None


def test_softmax_takes_row_strides_and_transposed_tensors() -> None:
    call = render(config("softmax", BLOCK_N=128)).call
    for x in (torch.randn(6, 200)[:, 50:127], torch.randn(77, 6).t(), torch.randn(2, 3, 99)[..., :77]):
        assert problem(call(x), torch.softmax(x.double(), -1)) is None


def test_a_row_template_refuses_what_it_cannot_give() -> None:
    x = torch.randn(3, 64)
    with pytest.raises(TemplateError, match=r"not torch\.float64"):
        render(config("softmax")).call(x, out_dtype=torch.float64)
    with pytest.raises(TemplateError, match=r"not torch\.int32"):
        render(config("cumsum")).call(x, out_dtype=torch.int32)
    with pytest.raises(TemplateError, match="not 'median'"):
        render(config("cross_entropy")).call(x, torch.zeros(3, dtype=torch.int64), reduction="median")


# --- cross_entropy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy_agrees_with_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    template, x = registry.load("cross_entropy"), (3 * torch.randn(shape)).to(dtype)
    target = torch.randint(0, shape[-1], shape[:-1])
    expected = template.reference(x.double(), target, reduction="none")
    for chosen in edge_configs("cross_entropy", shape, dtype):
        output = render(chosen).call(x, target, reduction="none", out_dtype=torch.float32)
        assert problem(output, expected) is None, chosen.key()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_form_of_cross_entropy_follows_torch(form: str, label_smoothing: float, reduction: str) -> None:
    call = render(config("cross_entropy", **FORMS[form])).call
    x, target = 5 * torch.randn(6, 700), torch.tensor([0, 699, 5, -100, 300, 123])
    rules: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
    for ignore_index in (-100, 5):
        counted = target.clamp(min=0) if ignore_index == 5 else target
        output = call(x, counted, ignore_index=ignore_index, **rules)
        exact = torch.nn.functional.cross_entropy(x.double(), counted, ignore_index=ignore_index, **rules)
        assert output.dtype is torch.float32 and torch.allclose(output.double(), exact, rtol=1e-6)
    assert torch.isnan(call(x, torch.full((6,), -100), **rules)).all() == (reduction == "mean")


@pytest.mark.parametrize("form", FORMS)
def test_cross_entropy_keeps_infinities_and_nan_as_torch_does(form: str) -> None:
    x, target = torch.randn(6, 700), torch.tensor([3, 3, 3, 3, 650, 3])
    x[0], x[1, 9], x[2, 690], x[3, 3], x[4, :600], x[5, 3] = -INF, INF, NAN, -INF, -INF, 80.0
    output = render(config("cross_entropy", **FORMS[form])).call(x, target, reduction="none")
    expected = torch.nn.functional.cross_entropy(x, target, reduction="none")
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_cross_entropy_reads_shifted_logits_where_they_lie(form: str) -> None:
    call = render(config("cross_entropy", **FORMS[form])).call
    x, target = torch.randn(3, 5, 704).bfloat16()[:, :-1, :700], torch.randint(0, 700, (3, 5))[:, 1:]
    expected = torch.nn.functional.cross_entropy(x.double().reshape(-1, 700), target.reshape(-1))
    assert torch.allclose(call(x, target, out_dtype=torch.float32).double(), expected, rtol=1e-6)
    assert call(x, target, reduction="none").shape == (3, 4)


# --- cumsum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_cumsum_agrees_with_fp64(shape: tuple[int, ...], dtype: torch.dtype, reverse: bool) -> None:
    template, x = registry.load("cumsum"), torch.randn(shape).to(dtype)
    mask = torch.rand(shape) > 0.3
    for chosen in edge_configs("cumsum", shape, dtype):
        for given in (None, mask):
            output = render(chosen).call(x, given, reverse=reverse)
            assert output.is_contiguous() and output.dtype is dtype
            assert problem(output, template.reference(x.double(), given, reverse=reverse)) is None, chosen.key()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_form_of_cumsum_keeps_infinities_and_nan_as_torch_does(form: str, reverse: bool) -> None:
    template, x = registry.load("cumsum"), torch.randn(5, 700)
    x[1, 400], x[2, 600], x[3, 20], x[3, 650] = INF, NAN, INF, -INF
    output = render(config("cumsum", **FORMS[form])).call(x, reverse=reverse)
    expected = template.reference(x.double(), reverse=reverse)
    assert torch.allclose(output.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_cumsum_takes_row_strides_and_widens() -> None:
    call = render(config("cumsum", BLOCK_N=32)).call
    x = torch.randn(6, 200).bfloat16()[:, 50:127]
    assert torch.allclose(call(x, out_dtype=torch.float32), x.float().cumsum(-1), rtol=1e-5, atol=1e-5)


# --- the rendered source ---------------------------------------------------------------------------------------------


def load_source(source: str, folder: Path, name: str) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_softmax(module: ModuleType) -> str | None:
    x, out = torch.randn(5, 700), torch.full((5 * 700 + 512,), NAN)
    flags = {"IS_LOG": False, "IS_FP32": True, "IS_ONE_BLOCK": False}
    constants = {name: value for name, value in module.CONSTANTS.items() if name != "SPLIT"}
    module._rows[(3,)](x, out, 5, 700, 700, **flags, **constants, **module.OPTIONS)
    return problem(out[:3500].view(5, 700), torch.softmax(x.double(), -1))


def run_cross_entropy(module: ModuleType) -> str | None:
    x, loss, target = torch.randn(5, 700), torch.full((6,), NAN), torch.tensor([0, 699, 5, -100, 300])
    flags = {"HAS_SMOOTHING": False, "IS_ONE_BLOCK": False}
    strides = (0, 700, -100, 0.0)
    module._tokens[(3,)](x, target, loss, x, 5, 700, 5, 768, *strides, **flags, **module.CONSTANTS, **module.OPTIONS)
    return problem(loss[:5], torch.nn.functional.cross_entropy(x.double(), target, reduction="none"))


def run_cumsum(module: ModuleType) -> str | None:
    x, out = torch.randn(5, 700), torch.full((5 * 700 + 512,), NAN)
    flags = {"HAS_MASK": False, "IS_REVERSE": False, "IS_ONE_BLOCK": False, "BLOCK_SPLIT": 1}
    module._scan[(3,)](x, x, x, out, 5, 700, 768, 700, 700, **flags, **module.CONSTANTS, **module.OPTIONS)
    return problem(out[:3500].view(5, 700), x.double().cumsum(-1))


RUNS = {"softmax": run_softmax, "cross_entropy": run_cross_entropy, "cumsum": run_cumsum}


@pytest.mark.parametrize("name", RUNS)
def test_rendered_source_of_several_functions_runs_on_its_own(name: str, tmp_path: Path) -> None:
    source = render(config(name, ROWS_PER_PROGRAM=2)).source
    assert RUNS[name](load_source(source, tmp_path, f"right_{name}")) is None


PLANTED = {
    "the maximum is not subtracted from the sum": ("softmax", "s * tl.exp(m - m_new)", "s"),
    "the last block is forgotten": (
        "softmax",
        "tl.range(0, num_cols, BLOCK_N",
        "tl.range(0, num_cols - BLOCK_N, BLOCK_N",
    ),
    "masked columns count": ("softmax", 'other=-float("inf")', "other=0.0"),
    "the low part has the wrong sign": ("softmax", "low * 0.6931471805599453", "power * 0.01"),
    "the next token's target": ("cross_entropy", "tl.load(target_ptr + offs_m, ", "tl.load(target_ptr + offs_m + 1, "),
    "the ignored class counts": ("cross_entropy", "target == ignore_index", "target == ignore_index - 1"),
    "the logarithm is forgotten": ("cross_entropy", "+ tl.log(s)\n    if", "\n    if"),
    "the carry is forgotten": ("cumsum", "reverse=IS_REVERSE) + carry", "reverse=IS_REVERSE)"),
    "the carry is the last block's": ("cumsum", "carry += tl.sum(x", "carry = tl.sum(x"),
    "rows are not masked in the load": ("cumsum", "offs_n < last)\n        x =", "offs_n < last - 1)\n        x ="),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_in_a_row_template_is_caught(bug: str, tmp_path: Path) -> None:
    name, right, wrong = PLANTED[bug]
    source = render(config(name, ROWS_PER_PROGRAM=2)).source
    assert right in source
    found = RUNS[name](load_source(source.replace(right, wrong), tmp_path, f"planted_{list(PLANTED).index(bug)}"))
    assert found is not None
