"""linear_cross_entropy against fp64, in Triton's interpreter; run by test_templates.py in a process of its own.

The interpreter multiplies bf16 as if it were whole numbers, so the products here are of fp16.
"""

import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rows_in_interpreter import load_source
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render

TEMPLATE = registry.load("linear_cross_entropy")
INF, NAN = float("inf"), float("nan")
POINT = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "SPLIT": 1, "FLATTEN": 1, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def config(**params: int) -> KernelConfig:
    return KernelConfig(template="linear_cross_entropy", params=POINT | params)


def head(num_tokens: int, num_k: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = torch.randn(num_classes, num_k) * 3 * num_k**-0.5
    return torch.randn(num_tokens, num_k).half(), weight.half(), torch.randint(0, num_classes, (num_tokens,))


FORMS = {
    "one part": {},
    "two parts": {"SPLIT": 2},
    "parts of several tiles": {"SPLIT": 4},
    "a part that is empty": {"SPLIT": 16},
    "wide tiles": {"BLOCK_N": 256, "FLATTEN": 2},
    "short steps": {"BLOCK_K": 16, "BLOCK_M": 32},
}


@pytest.mark.parametrize("shape", [(1, 8, 1), (5, 64, 77), (33, 40, 300), (2, 128, 1000), (130, 16, 65)], ids=str)
def test_a_heads_loss_agrees_with_fp64(shape: tuple[int, int, int]) -> None:
    x, weight, target = head(*shape)
    expected = TEMPLATE.reference(x.double(), weight.double(), target, reduction="none")
    space = TEMPLATE.space(shape, "float16")
    for chosen in (space.configs[0], space.configs[-1], default_config("linear_cross_entropy", shape, "float16")):
        output = render(chosen).call(x, weight, target, reduction="none", out_dtype=torch.float32)
        assert torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-5), chosen.key()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("label_smoothing", "reduction"), itertools.product([0.0, 0.1], ["none", "mean", "sum"]))
def test_every_form_follows_torch(form: str, label_smoothing: float, reduction: str) -> None:
    x, weight, target = head(20, 40, 300)
    target[:4] = torch.tensor([0, 299, 5, -100])
    bias, call = torch.randn(300), render(config(**FORMS[form])).call
    rules: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
    for given, ignore_index in itertools.product((None, bias, bias.half()), (-100, 5)):
        counted = target.clamp(min=0) if ignore_index == 5 else target
        output = call(x, weight, counted, given, ignore_index=ignore_index, out_dtype=torch.float32, **rules)
        logits = functional.linear(x.double(), weight.double(), None if given is None else given.double())
        exact = functional.cross_entropy(logits, counted, ignore_index=ignore_index, **rules)
        assert output.dtype is torch.float32 and torch.allclose(output.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.isnan(call(x, weight, torch.full((20,), -100), **rules)).all() == (reduction == "mean")


@pytest.mark.parametrize("form", FORMS)
def test_infinities_and_nan_are_kept_as_torch_does(form: str) -> None:
    x, weight, target = head(6, 40, 300)
    bias = torch.zeros(300)
    bias[7], bias[200], x[2, 3], x[3, 5] = -INF, -INF, NAN, INF
    target[:2] = torch.tensor([7, 200])
    output = render(config(**FORMS[form])).call(x, weight, target, bias, reduction="none", out_dtype=torch.float32)
    exact = functional.cross_entropy(functional.linear(x.float(), weight.float(), bias), target, reduction="none")
    assert torch.allclose(output, exact, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_leading_dimensions_strides_and_the_kind_of_result_are_the_callers() -> None:
    x, weight, target = torch.randn(3, 5, 48).half(), torch.randn(90, 96).half()[:, :48], torch.randint(0, 90, (3, 5))
    call = render(config()).call
    output = call(x[:, :-1], weight, target[:, 1:], reduction="none", out_dtype=torch.float32)
    exact = TEMPLATE.reference(x[:, :-1].double(), weight.double(), target[:, 1:], reduction="none")
    assert output.shape == (3, 4) and torch.allclose(output.double(), exact, rtol=1e-5)
    assert call(x, weight, target).dtype is torch.float16


def test_a_class_that_does_not_exist_gives_nan_and_grad_is_refused() -> None:
    x, weight, target = head(3, 16, 40)
    target[1] = 40
    assert torch.isnan(render(config()).call(x, weight, target, reduction="none")).tolist() == [False, True, False]
    with torch.enable_grad(), pytest.raises(TemplateError, match="no backward"):
        render(config()).call(x, weight.requires_grad_(), target)
    with pytest.raises(TemplateError, match="reductions"):
        render(config()).call(x, weight.detach(), target, reduction="median")


# --- the rendered source ---------------------------------------------------------------------------------------------


def run(module: ModuleType) -> str | None:
    """Run rendered source text as a stranger would; say how its losses differ from fp64."""
    x, weight, target = head(20, 40, 300)
    target[3] = -100
    bias, split = torch.randn(300), module.CONSTANTS["SPLIT"]
    exact = functional.cross_entropy(
        functional.linear(x.double(), weight.double(), bias.double()), target, reduction="none", label_smoothing=0.1
    )
    part, loss = torch.full((4, split, 20), NAN), torch.full((21,), NAN)
    flags = {"HAS_SMOOTHING": True, "SPLIT": split}
    blocks = (module.CONSTANTS["BLOCK_M"], module.CONSTANTS["BLOCK_N"], module.CONSTANTS["BLOCK_K"])
    descriptors = (
        TensorDescriptor.from_tensor(x, [blocks[0], blocks[2]]),
        TensorDescriptor.from_tensor(weight, [blocks[1], blocks[2]]),
    )
    numbers = (20, 300, 40, 2, (-(-300 // blocks[1]) + split - 1) // split, 20 * split)
    module._parts[(2 * split,)](
        *descriptors, bias, target, part, *numbers, HAS_BIAS=True, **(flags | module.CONSTANTS), **module.OPTIONS
    )
    module._join[(3,)](target, loss, part, 20, 300, 20 * split, -100, 0.1, **flags, BLOCK_SPLIT=4, BLOCK_T=8)
    if not torch.isnan(loss[20]):
        return "it wrote past the end of the losses"
    is_same = torch.allclose(loss[:20].double(), exact, rtol=1e-4, atol=1e-4)
    return None if is_same else f"off by {float((loss[:20] - exact).abs().max()):.3g}"


PLANTED = {
    "a tile forgets its bias": ("acc += tl.load(bias_ptr", "0.0 * tl.load(bias_ptr"),
    "the last step of K is forgotten": ("tl.range(0, num_k, BLOCK_K", "tl.range(0, num_k - BLOCK_K, BLOCK_K"),
    "every tile is the first": ("weight_desc.load([tile * BLOCK_N, k])", "weight_desc.load([first * BLOCK_N, k])"),
    "classes past the end count": ("tl.where(mask_n[None, :], acc, -float(\"inf\"))", "acc"),
    "the running sum is not rescaled": ("s = s * tl.exp(m - m_new) + ", "s = s + "),
    "the maximum is not subtracted": ("tl.exp(acc - m_new[:, None])", "tl.exp(acc)"),
    "the target's logit is the next one's": ("offs_n[None, :] == target", "offs_n[None, :] - 1 == target"),
    "the target's logit is the last tile's": ("picked += tl.sum", "picked = tl.sum"),
    "the sum of logits counts the padding": (
        "tl.sum(tl.where(mask_n[None, :], acc, 0.0), axis=1)", "tl.sum(acc + 1.0, axis=1)",
    ),
    "all blocks read the first tokens": ("x_desc.load([pid_m * BLOCK_M, k])", "x_desc.load([0 * pid_m, k])"),
    "parts are joined without their maxima": ("tl.sum(s * tl.exp(m - m_row[None, :]), axis=0)", "tl.sum(s, axis=0)"),
    "a part is forgotten": ("(parts < SPLIT)", "(parts < SPLIT - 1)"),
    "parts overlap": ("first = part * tiles_per_part", "first = part * (tiles_per_part - 1)"),
    "the planes are one short": ("part_ptr + 2 * plane + offs, mask=mask", "part_ptr + plane + offs, mask=mask"),
    "the ignored class counts": ("target == ignore_index", "target == ignore_index - 1"),
    "smoothing takes the mean of the maximum": ("num_cols * (m + tl.log(s)) - total", "num_cols * (m + tl.log(s))"),
}  # fmt: skip


def test_rendered_source_runs_on_its_own(tmp_path: Path) -> None:
    for split in (1, 3):
        assert run(load_source(render(config(SPLIT=split)).source, tmp_path, f"right_loss_{split}")) is None


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_in_a_heads_loss_is_caught(bug: str, tmp_path: Path) -> None:
    right, wrong = PLANTED[bug]
    source = render(config(SPLIT=3)).source
    assert right in source
    assert run(load_source(source.replace(right, wrong), tmp_path, f"loss_{list(PLANTED).index(bug)}")) is not None
