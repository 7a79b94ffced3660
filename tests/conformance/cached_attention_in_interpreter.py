"""The kernel of a decoding step against fp64, in Triton's interpreter; run by test_templates.py.

What the new slots held before is NaN, and so is all memory around the caches: one element read or written beside its
place shows. bf16 runs too: the interpreter would multiply its bits as whole numbers, so they are widened before tl.dot,
as exact as a tensor core's products; where it stores bf16 it truncates.
"""

import copy
import importlib.util
import itertools
import os
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import decoding_steps as steps
import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from agnitra_lab.contracts import Kernel, Workload
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render
from agnitra_lab.generate.templates import cached_attention
from agnitra_lab.patch.install import install

assert os.environ.get("TRITON_INTERPRET") == "1"

RTOL = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EPS = (1e-5, 1e-6)
PARAMS = {"BLOCK_N": 16, "SPLIT": 1, "PDL": 2, "num_warps": 2, "num_stages": 2}
MASKS = ("none", "causal", "added", "a head", "nothing seen")
MARGIN = 4


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _true_products_of_bf16(monkeypatch):
    plain = interpreter.InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *others):
        return plain(self, widened(a), widened(b), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def kernel(**changed: int) -> Any:
    return render(KernelConfig(template="cached_attention", params=PARAMS | changed)).call


def problem(output: torch.Tensor, expected: torch.Tensor, slack: float = 1.0) -> str | None:
    """Say how an output differs from the fp64 reference by the project's rule, or None."""
    rtol = RTOL[output.dtype] * slack
    if output.shape != expected.shape:
        return f"shape {tuple(output.shape)} instead of {tuple(expected.shape)}"
    tolerance = rtol * (expected.pow(2).mean().sqrt() + expected.abs())
    share = float(((output.double() - expected).abs() <= tolerance).double().mean())
    return None if share >= 0.999 else f"only {share:.2%} of the elements are within {rtol}"


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class Case:
    """Arguments of one step, its caches in the middle of larger ones, and what fp64 makes of them.

    Args:
        shape: (B, H, G, L, S, D).
        turns: (form, how many values turn, angles).
        slots: of the new tokens; drawn by default.
    """

    def __init__(
        self, shape, dtype, turns=("none", 0, "each"), *, is_normed=False, slot_dim=2, mask="none", slots=None
    ) -> None:
        batch, heads, kv_heads, tokens, num_slots, size = shape
        form, rotary, angles = turns
        packed = torch.randn(batch, tokens, (heads + 2 * kv_heads) * size).to(dtype)
        parts = packed.split([heads * size, kv_heads * size, kv_heads * size], -1)
        self.new = [part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts]
        self.slots = torch.randperm(num_slots)[:tokens] if slots is None else torch.tensor(slots)
        sizes = (batch, kv_heads, num_slots, size) if slot_dim == 2 else (batch, num_slots, kv_heads, size)
        margins = tuple(number + 2 * MARGIN for number in sizes[1:])
        self.memory = [torch.full((batch, *margins), float("nan"), dtype=dtype) for _ in range(2)]
        index = (slice(None), *(slice(MARGIN, MARGIN + number) for number in sizes[1:]))
        self.caches = [memory[index] for memory in self.memory]
        self.is_new = torch.zeros(sizes, dtype=torch.bool).index_fill_(slot_dim, self.slots % num_slots, True)
        for cache in self.caches:
            cache.copy_(torch.randn(sizes)).masked_fill_(self.is_new, float("nan"))
        self.mask = {
            "none": None,
            "causal": torch.arange(num_slots) <= (self.slots % num_slots)[:, None],
            "added": torch.randn(batch, 1, tokens, num_slots).to(dtype),
            "a head": torch.rand(1, heads, 1, num_slots) > 0.4,
            "nothing seen": torch.zeros(1, num_slots, dtype=torch.bool),
        }[mask]
        width = max(1, rotary if angles == "each" else rotary // 2)
        angle = torch.randn(1, tokens, width)
        self.angles = (angle.cos().to(dtype), angle.sin().to(dtype)) if form != "none" else (None, None)
        self.options = {"slot_dim": slot_dim, "form": form, "rotary": rotary, "angles": angles}
        if is_normed:
            weights = (torch.randn(2, size).to(dtype) / 2 + 1).unbind()
            self.options |= {"q_weight": weights[0], "k_weight": weights[1], "eps": EPS}

    def problem(self, call: Any, *, slack: float = 1.0, **options: Any) -> str | None:
        """Run a kernel's call; say what is wrong with its result or with any byte of the caches' memory, or None."""
        arguments = (self.slots, self.mask, *self.angles)
        exact = [wide(cache) for cache in self.caches]
        given = {name: wide(value) for name, value in (self.options | options).items()}
        expected = cached_attention.reference(*map(wide, self.new), *exact, *map(wide, arguments), **given)
        before = [memory.clone() for memory in self.memory]
        output = call(*self.new, *self.caches, *arguments, **self.options, **options)
        for memory, old, cache, wanted in zip(self.memory, before, self.caches, exact, strict=True):
            if problem(cache[self.is_new], wanted[self.is_new], slack) is not None:
                return "the new slots do not hold the new keys or values"
            cache.masked_fill_(self.is_new, float("nan"))
            if not torch.equal(torch.nan_to_num(memory, 9e4), torch.nan_to_num(old, 9e4)):
                return "it wrote beside the new slots"
        return problem(output, expected, slack)


def turns_of(form: str, size: int) -> tuple[str, int, str]:
    """Return a rotation by the name of a model that has it."""
    whole, part = size // 2 * 2, size // 4 * 2
    return {
        "llama": ("halves", whole, "each"), "neox": ("halves", part, "halves"), "gpt-j": ("neighbours", part, "each"),
        "gpt-fast": ("neighbours", whole, "neighbours"), "none": ("none", 0, "each"),
    }[form]  # fmt: skip


FORMS = ("llama", "neox", "gpt-j", "gpt-fast", "none")
CASES = list(itertools.product(FORMS, (64, 128, 45), (1, 3), (1, 3)))
DETAILS = list(itertools.islice(itertools.cycle(itertools.product((False, True), (2, 1), MASKS)), len(CASES)))
random.Random(0).shuffle(DETAILS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("case", "details"), list(zip(CASES, DETAILS, strict=True)), ids=["-".join(map(str, case)) for case in CASES]
)
def test_a_decoding_step_agrees_with_fp64_and_writes_its_slots_alone(case, details, dtype) -> None:
    form, size, split, tokens = case
    is_normed, slot_dim, mask = details
    heads = 6 if tokens == 1 else 4
    step = Case(
        (2, heads, 2, tokens, 37, size), dtype, turns_of(form, size), is_normed=is_normed, slot_dim=slot_dim, mask=mask
    )
    assert step.problem(kernel(SPLIT=split), slack=2.0 if dtype == torch.bfloat16 else 1.0) is None


def test_half_precision_agrees_with_fp64() -> None:
    assert Case((1, 4, 2, 2, 37, 24), torch.float16, turns_of("llama", 24), is_normed=True).problem(kernel()) is None


@pytest.mark.parametrize(
    "slots", [[0], [36], [15, 16, 17], [-1, 0], [-37, 20, -21]], ids=["first", "last", "parts", "end", "negative"]
)
def test_slots_at_the_edges_of_parts_and_from_the_end_are_written(slots: list[int]) -> None:
    step = Case((1, 2, 1, len(slots), 37, 16), torch.float32, turns_of("neox", 16), slots=slots)
    for split in (1, 3):
        assert step.problem(kernel(SPLIT=split)) is None, split


def test_slots_may_be_a_number_or_of_32_bits() -> None:
    step = Case((1, 4, 2, 1, 20, 16), torch.float32, turns_of("gpt-j", 16), slots=[7])
    for slots in (torch.tensor(7), torch.tensor([7], dtype=torch.int32), torch.tensor([9, 7])[1:]):
        step.slots = slots
        assert step.problem(kernel(SPLIT=2)) is None
    pair = Case((1, 4, 2, 2, 20, 16), torch.float32, slots=[7, 8])
    pair.slots, wanted = None, pair.slots
    assert wanted.tolist() == [7, 8]
    assert pair.problem(kernel(SPLIT=2), first_position=7) is None


def test_a_part_without_keys_adds_nothing_and_an_own_scale_is_taken() -> None:
    step = Case((1, 2, 1, 1, 17, 16), torch.float32, turns_of("llama", 16))
    assert step.problem(kernel(SPLIT=4), scale=0.3) is None


def test_scores_that_would_overflow_keep_their_size() -> None:
    step = Case((1, 2, 2, 1, 40, 16), torch.float32)
    step.new[0], step.caches[0].data = 100 * step.new[0], step.caches[0].mul_(100).data
    for split in (1, 2):
        assert step.problem(kernel(SPLIT=split)) is None


def test_the_result_has_the_strides_that_were_asked_for() -> None:
    step = Case((1, 4, 2, 3, 20, 16), torch.float32)
    outputs = []

    def call(*tensors, **options):
        outputs.append(kernel(SPLIT=2)(*tensors, **options))
        return outputs[-1]

    assert step.problem(call, out_stride=(192, 16, 64, 1)) is None
    assert outputs[0].stride() == (192, 16, 64, 1)


@pytest.mark.parametrize("shape", [(1, 1, 1, 5, 3), (2, 3, 8, 130, 24)], ids=str)
def test_the_first_last_and_default_config_of_a_space_all_work(shape: tuple[int, ...]) -> None:
    batch, kv_heads, rows, slots, size = shape
    space = registry.load("cached_attention").space(shape, "float32")
    chosen = (space.configs[0], space.configs[-1], default_config("cached_attention", shape, "float32"))
    step = Case((batch, kv_heads * rows, kv_heads, 1, slots, size), torch.float32, turns_of("llama", size))
    for config in {config.key(): config for config in chosen}.values():
        assert step.problem(render(config).call) is None, config.key()


def test_a_step_refuses_to_run_under_grad() -> None:
    step = Case((1, 2, 1, 1, 9, 8), torch.float32)
    with torch.enable_grad(), pytest.raises(TemplateError, match="no backward"):
        step.problem(lambda q, *tensors, **options: kernel()(q.requires_grad_(), *tensors, **options))


# --- compiled --------------------------------------------------------------------------------------------------------


def rendered(template: str, shape: tuple[int, ...], dtype: str) -> Kernel:
    return render(default_config(template, shape, dtype))


@pytest.mark.parametrize("formula", [steps.hugging_face, steps.gpt_fast], ids=["index_copy_", "setitem"])
def test_inductor_writes_the_caches_where_they_lie(formula, monkeypatch) -> None:
    from torch._inductor import compile_fx
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    whole, told = compile_fx.compile_fx, []

    def listening(*given, config_patches=None, **named):
        told.extend([config_patches] if config_patches else [])
        return whole(*given, config_patches=config_patches, **named)

    monkeypatch.setattr(compile_fx, "compile_fx", listening)
    model, args = steps.Step(formula), steps.inputs(2)
    twin = copy.deepcopy(model)
    places = [cache.data_ptr() for cache in (model.k_cache, model.v_cache)]

    def compiled():
        workload = Workload("case", model, args)
        patch = install(workload, ["cached_attention"], name="candidate", kernels=rendered, is_lowered=True)
        return patch, patch.model(*args)

    (patch, output), codes = run_and_get_code(compiled)
    code = "\n".join(codes)
    assert patch.log().descriptors and "agnitra.cached_attention" in code
    assert [options["score_fusion_memory_threshold"] for options in told] == [8]
    shape = ", ".join(map(str, model.k_cache.shape))
    assert f"empty_strided_cpu(({shape})" not in code and ".copy_(" not in code and "clone" not in code
    torch.testing.assert_close(output, twin(*args))
    torch.testing.assert_close(tuple(model.buffers()), tuple(twin.buffers()))
    assert places == [cache.data_ptr() for cache in (model.k_cache, model.v_cache)]


# --- planted bugs ----------------------------------------------------------------------------------------------------


def run_source(source: str, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Launch rendered source text as the template launches its own; say what is wrong with the step."""
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(cached_attention, "attend", module.attend)
    monkeypatch.setattr(cached_attention, "add_parts", module.add_parts)
    turns, slots = ("halves", 12, "each"), [8, -3, 20]
    masked = Case((2, 4, 2, 3, 37, 20), torch.float32, turns, is_normed=True, mask="causal", slots=slots)
    # Without a mask, and with parts of more than one block.
    found = masked.problem(kernel(SPLIT=3))
    return found or Case((1, 4, 2, 3, 37, 20), torch.float32, turns, slots=slots).problem(kernel(SPLIT=2))


def source() -> str:
    return render(KernelConfig(template="cached_attention", params=PARAMS | {"SPLIT": 3})).source


def test_rendered_source_runs_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_source(source(), tmp_path, "right_step", monkeypatch) is None


SLOT_MASK = "mask_n = mask_n & (offs_n != slots[t])"
PLANTED = {
    "the key goes to the next slot": ("k_rows + slots[t] * stride_kcs", "k_rows + (slots[t] + 1) * stride_kcs"),
    "the value goes to the slot before": ("v_rows + slots[t] * stride_vcs", "v_rows + (slots[t] - 1) * stride_vcs"),
    "each token goes to the first one's slot": ("position_ptr + t * stride_p", "position_ptr"),
    "slots are not counted from the end": ("tl.where(slot < 0, slot + num_keys, slot)", "slot"),
    "the part that owns the slot reads what it held": (SLOT_MASK, "mask_n = mask_n & (offs_n >= 0)"),
    "what the slot held meets a weight of zero": ("v = tl.where(mask_n[:, None], v, 0.0)", "v = v"),
    "the neighbour of the slot is left out instead": (SLOT_MASK, "mask_n = mask_n & (offs_n != slots[t] + 1)"),
    "only the first new slot is left out": (SLOT_MASK, "mask_n = mask_n & (offs_n != slots[0])"),
    "the last key of a part is not seen": ("mask_n = offs_n < end", "mask_n = offs_n < end - 1"),
    "the first key of the next part is seen": ("mask_n = offs_n < end", "mask_n = offs_n < end + 1"),
    "a slot at a part's start belongs to none": ("(slot >= start)", "(slot > start + 4)"),
    "every part adds the new keys": ("score = tl.where(owns[t], score,", "score = tl.where(owns[t] | True, score,"),
    "no part adds the new keys": ("score = tl.where(owns[t], score,", "score = tl.where(owns[t] & False, score,"),
    "the mask is one key late": (
        "offs_n.to(tl.int64)[None, :] * stride_ms", "(offs_n.to(tl.int64)[None, :] - 1) * stride_ms",
    ),
    "the new keys are always seen": ("tl.where(sights[t] != 0, score", "tl.where(sights[t] < 2, score"),
    "it turns the other way": ("tl.where(is_first[None, :], -y, y)", "tl.where(is_first[None, :], y, -y)"),
    "both halves turn alike": ("tl.where(is_first[None, :], -y, y)", "y"),
    "the halves are those of the head": ("tl.constexpr = ROTARY // 2", "tl.constexpr = HEAD_SIZE // 2"),
    "neighbours turn instead of halves": ("offs_d + HALF, offs_d - HALF", "offs_d ^ 1, offs_d ^ 1"),
    "the whole head turns": ("is_turned = offs_d < ROTARY", "is_turned = offs_d < HEAD_SIZE"),
    "all tokens turn by the first one's sine": ("sin_rows + query * stride_sl", "sin_rows + query * 0"),
    "new keys turn by the first one's cosine": ("cos_rows + t * stride_cl + zero", "cos_rows + zero"),
    "the partner has the weight of the value": ("weight_ptr + other", "weight_ptr + offs_d"),
    "the mean is over the padded head": ("scale / HEAD_SIZE", "scale / BLOCK_D"),
    "keys are not normed": ("BLOCK_D, HAS_K_NORM", "BLOCK_D, False"),
    "keys have the weight of queries": ("k_norm_ptr, one", "q_norm_ptr, one"),
    "a group of heads shares its first query": ("head * stride_qh", "kv_head * stride_qh"),
    "all heads write the first one's values": ("v_ptr + batch * stride_vb + kv_head * stride_vh", "v_ptr"),
    "the sum is not scaled to the new maximum": ("acc * shrink[:, None], input_precision", "acc, input_precision"),
    "parts weigh the same": ("share = tl.exp2(highest - base)", "share = tl.where(mask_p, 1.0, 0.0)"),
    "the last part is forgotten": ("mask_p = offs_p < SPLIT", "mask_p = offs_p < SPLIT - 1"),
    "the first row's parts are added for each": ("row.to(tl.int64) * SPLIT + offs_p", "row.to(tl.int64) * 0 + offs_p"),
    "all rows go to a group's first head": ("+ r // NUM_QUERIES\n    offs_p", "+ r * 0\n    offs_p"),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught_by_the_same_check(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = PLANTED[bug]
    text = source()
    assert right in text
    name = "planted_" + str(list(PLANTED).index(bug))
    assert run_source(text.replace(right, wrong), tmp_path, name, monkeypatch) is not None
