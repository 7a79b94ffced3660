"""cached_attention fires on a decoding step however it is spelt, refuses with a reason, and keeps result and caches.

On the CPU a kernel is its template's plain formula; the kernel itself is tested in cached_attention_in_interpreter.py.
"""

from __future__ import annotations

import copy
from typing import Any

import decoding_steps as steps
import pytest
import torch
from decoding_steps import HEADS, KV_HEADS, SIZE, SLOTS, Formula, Step, attend, heads, rotated, tokens_first, write
from torch import Tensor
from torch.nn import functional

from agnitra_lab.contracts import Kernel, KernelConfig, Workload
from agnitra_lab.generate import registry
from agnitra_lab.patch.install import install

pytest.importorskip("triton")

TOKENS_FIRST = (steps.BATCH, SLOTS, KV_HEADS, SIZE)


def kernel_of(template: str, shape: tuple[int, ...], dtype: str) -> Kernel:
    config = KernelConfig(template=template, params={"BLOCK_N": 16})
    return Kernel(config, "", "0" * 64, registry.load(template).reference)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def applied(model: Step, *args: Tensor, rtol: float = 1e-5, actions: tuple[str, ...] = ("cached_attention",)) -> Any:
    """Install the rewrite, compare with eager (values, strides, arguments and all buffers, twice), return the log."""
    twin, twin_args = copy.deepcopy((model, args))
    patch = install(Workload("case", model, args), actions, name="candidate", kernels=kernel_of, is_lowered=False)
    log = patch.log()
    for _ in range(2):
        with torch.no_grad():
            ours, theirs = patch.model(*args), twin(*twin_args)
        ours, theirs = (value if isinstance(value, tuple) else (value,) for value in (ours, theirs))
        pairs = zip((*ours, *args, *model.buffers()), (*theirs, *twin_args, *twin.buffers()), strict=True)
        for left, right in pairs:
            assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())
            torch.testing.assert_close(left, right, rtol=rtol, atol=rtol)
        # Other slots the second time: nothing of the first call is baked in.
        for position in (args[1], twin_args[1]):
            position.add_(1)
    assert patch.model.num_guard_misses == 0
    return log


def one(log: Any) -> dict[str, Any]:
    assert len(log.descriptors) == 1, (log.descriptors, log.refusals)
    return log.descriptors[0].config


def refused(log: Any) -> str:
    assert not log.descriptors, log.descriptors
    return "; ".join(refusal.reason for refusal in log.refusals)


WHOLE = {"form": "halves", "rotary": SIZE, "has_norms": [False, False], "is_repetition_dropped": False}
SPELLINGS: dict[str, tuple[Formula, dict[str, Any]]] = {
    "transformers, index_copy_": (steps.hugging_face, {"is_repetition_dropped": True, "has_mask": True}),
    "transformers, setitem": (
        lambda m, x, p: steps.hugging_face(m, x, p, steps.set_items),
        {"is_repetition_dropped": True, "has_mask": True},
    ),
    "Qwen's norms of heads": (steps.qwen, {"has_norms": [True, True]}),
    "NeoX's part of a head": (steps.neox, {"rotary": steps.PART}),
    "gpt-fast's pairs": (steps.gpt_fast, {"form": "neighbours", "is_repetition_dropped": True}),
    "GPT-J's tokens before heads": (steps.gpt_j, {"form": "neighbours"}),
    "static slices": (steps.static_slices, {"has_mask": False}),
    "no rotation": (steps.without_rotation, {"form": "none", "rotary": 0}),
    "halves apart, queries scaled": (steps.halves_apart, {}),
}


MORE_TOKENS = ("Qwen's norms of heads", "gpt-fast's pairs")


@pytest.mark.parametrize(
    ("name", "tokens"), [*((name, 1) for name in SPELLINGS), *((name, 3) for name in MORE_TOKENS)], ids=str
)
def test_a_decoding_step_is_one_kernel_however_it_is_spelt(name: str, tokens: int) -> None:
    formula, expected = SPELLINGS[name]
    model = Step(formula, *((TOKENS_FIRST,) if formula is steps.gpt_j else ()))
    before = model.k_cache.clone()
    config = one(applied(model, *steps.inputs(tokens)))
    assert (WHOLE | expected).items() <= config.items()
    assert config["shape"] == [steps.BATCH, KV_HEADS, HEADS // KV_HEADS * tokens, SLOTS, SIZE]
    assert not torch.equal(model.k_cache, before)


def test_a_step_by_hand_is_one_kernel_once_its_attention_is_one_call() -> None:
    log = applied(Step(steps.by_hand), *steps.inputs(1), actions=("attention_by_hand", "cached_attention"))
    assert [descriptor.action for descriptor in log.descriptors] == ["attention_by_hand", "cached_attention"]
    assert log.descriptors[1].config["is_repetition_dropped"] is True


def test_half_precision_keeps_its_result_and_caches() -> None:
    model = Step(steps.qwen).bfloat16()
    assert one(applied(model, *steps.inputs(1, torch.bfloat16), rtol=1.6e-2))


def test_norms_rotation_writes_and_attention_all_go_into_it() -> None:
    (descriptor,) = applied(Step(steps.qwen), *steps.inputs(1)).descriptors
    assert {"rms_norm", "cat", "index_copy_", "sdpa"} <= set(descriptor.replaced)


def _with(change: Formula) -> Formula:
    """Make a step whose queries, keys, values and angles are changed before the caches are written."""

    def formula(m: Step, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = heads(m, x)
        cos, sin = m.cos[position], m.sin[position]
        return change(m, position, q, k, v, cos, sin)

    return formula


def _backwards(m, p, q, k, v, cos, sin):
    sin = -sin
    return attend(m, rotated(q, cos, sin), *write(m, p, rotated(k, cos, sin), v))


def _in_caches_of_the_caller(m: Step, x: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    return attend(m, q, k_cache.index_copy_(2, position, k), v_cache.index_copy_(2, position, v))


def _keys_returned(m: Step, x: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    q, k, v = heads(m, x)
    cos, sin = m.cos[position], m.sin[position]
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    return attend(m, q, *write(m, position, k, v)), k, m.k_cache.sum()


def _old_cache_read(m: Step, x: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    q, k, v = heads(m, x)
    old = m.k_cache.clone()
    return attend(m, q, *write(m, position, k, v)), old


def _from_the_end(m: Step, x: Tensor, position: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    slots = position - SLOTS
    m.k_cache[:, :, slots] = k
    m.v_cache[:, :, slots] = v
    return attend(m, q, m.k_cache, m.v_cache)


FURTHER: dict[str, Formula] = {
    "a negative sine": _with(_backwards),
    "keys returned too": _keys_returned,
    "the old cache is copied before": _old_cache_read,
    "slots from the end": _from_the_end,
    "a mask that is added": lambda m, x, p: (
        lambda q, k, v: attend(m, q, *write(m, p, k, v), torch.where(steps.seen(p), 0.0, -1e9))
    )(*heads(m, x)),
    "int32 slots": lambda m, x, p: (lambda q, k, v: attend(m, q, *steps.set_items(m, p.int(), k, v)))(*heads(m, x)),
}


@pytest.mark.parametrize("name", FURTHER)
def test_what_is_around_a_step_keeps_its_values(name: str) -> None:
    assert one(applied(Step(FURTHER[name]), *steps.inputs(2)))


class OwnCaches(Step):
    """Takes its caches as arguments."""

    def forward(self, x: Tensor, position: Tensor, *caches: Tensor) -> Any:
        return self.formula(self, x, position, *caches)


def test_the_caches_may_be_arguments() -> None:
    caches = [torch.randn(steps.BATCH, KV_HEADS, SLOTS, SIZE) for _ in range(2)]
    assert one(applied(OwnCaches(_in_caches_of_the_caller), *steps.inputs(2), *caches))


def test_two_steps_over_the_same_caches_stay_in_order() -> None:
    def layers(m: Step, x: Tensor, position: Tensor) -> Tensor:
        return steps.qwen(m, steps.qwen(m, x, position), position + 1)

    log = applied(Step(layers), *steps.inputs(1))
    assert len(log.descriptors) == 2, log.refusals


def test_an_attention_that_reads_the_caches_of_another_one_sees_its_slots() -> None:
    def read_again(m: Step, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = heads(m, x)
        y = attend(m, q, *write(m, position, k, v))
        return y + attend(m, 2 * q, m.k_cache, m.v_cache)

    log = applied(Step(read_again), *steps.inputs(1))
    assert len(log.descriptors) == 1


def test_both_attention_rewrites_leave_each_step_to_one() -> None:
    log = applied(Step(steps.qwen), *steps.inputs(1), actions=("cached_attention", "decode_attention"))
    assert [descriptor.action for descriptor in log.descriptors] == ["cached_attention"]


# --- what is left alone ----------------------------------------------------------------------------------------------


def _then(change: Formula) -> Formula:
    """Make a step that does something between the writes and the attention."""

    def formula(m: Step, x: Tensor, position: Tensor) -> Any:
        q, k, v = heads(m, x)
        k_cache, v_cache = write(m, position, k, v)
        extra = change(m, q, k, position)
        y = attend(m, q, k_cache, v_cache)
        return (y, extra) if isinstance(extra, Tensor) else y

    return formula


def _in_one_buffer(m: Step, x: Tensor, position: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    k_cache, v_cache = m.k_cache[:, :1], m.k_cache[:, 1:]
    k_cache[:, :, position] = k[:, :1]
    v_cache[:, :, position] = v[:, :1]
    return attend(m, q, k_cache, v_cache)


def _one_cache(m: Step, x: Tensor, position: Tensor) -> Tensor:
    q, k, _ = heads(m, x)
    m.k_cache.index_copy_(2, position, k)
    return attend(m, q, m.k_cache, m.k_cache)


def _new_caches(m: Step, x: Tensor, position: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    return attend(m, q, m.k_cache.index_copy(2, position, k), m.v_cache.index_copy(2, position, v))


def _made_here(m: Step, x: Tensor, position: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    caches = torch.zeros_like(m.k_cache), torch.zeros_like(m.v_cache)
    return attend(m, q, caches[0].index_copy_(2, position, k), caches[1].index_copy_(2, position, v))


def _by_heads(m: Step, x: Tensor, position: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    m.k_cache[:, :1, position] = k[:, :1]
    m.v_cache[:, :1, position] = v[:, :1]
    return attend(m, q, m.k_cache, m.v_cache)


def _other_way(m, p, q, k, v, cos, sin):
    q, k = (x * cos - steps.rotate_half(x) * sin for x in (q, k))
    return attend(m, q, *write(m, p, k, v))


OTHERS: dict[str, tuple[str, Formula]] = {
    "no cache": ("do not come out of a cache", lambda m, x, p: attend(m, *heads(m, x))),
    "caches that are copied for the write": ("do not come out of a cache", _new_caches),
    "caches that the graph makes": ("made in the graph itself", _made_here),
    "one cache for both": ("lie in one cache", _one_cache),
    "two parts of one buffer": ("part of the cache", _in_one_buffer),
    "a part of the slots is read": (
        "a part of the cache",
        lambda m, x, p: (lambda q, k, v: attend(m, q, *(cache[:, :, : SLOTS - 4] for cache in write(m, p, k, v))))(
            *heads(m, x)
        ),
    ),
    "some heads are written": ("is not understood", _by_heads),
    "slots are added to": (
        "is not understood",
        lambda m, x, p: (lambda q, k, v: attend(m, q, m.k_cache.index_add_(2, p, k), m.v_cache.index_add_(2, p, v)))(
            *heads(m, x)
        ),
    ),
    "different positions": (
        "different positions",
        lambda m, x, p: (
            lambda q, k, v: attend(m, q, m.k_cache.index_copy_(2, p, k), m.v_cache.index_copy_(2, p + 1, v))
        )(*heads(m, x)),
    ),
    "the cache is read in between": ("used between", _then(lambda m, q, k, p: m.k_cache.sum())),
    "the cache is written again": ("is not understood", _then(lambda m, q, k, p: m.k_cache.mul_(0.5))),
    "the positions are changed after the write": (
        "written before the attention",
        lambda m, x, p: (
            lambda slots, qkv: (lambda caches: (slots.add_(1), attend(m, qkv[0], *caches))[1])(
                write(m, slots, *qkv[1:])
            )
        )(p * 1, heads(m, x)),
    ),
    "keys are changed after the write": ("written before the attention", _then(lambda m, q, k, p: k.mul_(2).sum())),
    "queries turn by other angles": (
        "the same angles",
        _with(lambda m, p, q, k, v, c, s: attend(m, rotated(q, s, c), *write(m, p, rotated(k, c, s), v))),
    ),
    "only keys turn": (
        "the same angles",
        _with(lambda m, p, q, k, v, c, s: attend(m, q, *write(m, p, rotated(k, c, s), v))),
    ),
    "the other way round": ("no rotation of pairs", _with(_other_way)),
    "keys are scaled after the rotation": (
        "keys are scaled",
        _with(lambda m, p, q, k, v, c, s: attend(m, rotated(q, c, s), *write(m, p, 2 * rotated(k, c, s), v))),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_such_step_keeps_its_ops_and_the_reason_is_said(name: str) -> None:
    because, formula = OTHERS[name]
    assert because in refused(applied(Step(formula), *steps.inputs(2)))


def test_five_tokens_are_too_many() -> None:
    assert "more than 4 queries" in refused(applied(Step(steps.qwen), *steps.inputs(5)))


def test_a_cache_of_another_dtype_is_refused() -> None:
    def narrow(m: Step, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = heads(m, x)
        caches = write(m, position, k.half(), v.half())
        return attend(m, q, *(cache.float() for cache in caches))

    model = Step(narrow)
    model.k_cache, model.v_cache = model.k_cache.half(), model.v_cache.half()
    assert "a copy of it" in refused(applied(model, *steps.inputs(1)))


def test_keys_before_heads_in_one_cache_alone_are_refused() -> None:
    def mixed(m: Step, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = tokens_first(m, x)
        m.k_cache.index_copy_(2, position, k.transpose(1, 2))
        m.v_cache.index_copy_(1, position, v)
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), m.k_cache, m.v_cache.transpose(1, 2), enable_gqa=True
        )
        return m.o(out.transpose(1, 2).flatten(2))

    model = Step(mixed)
    model.v_cache = model.v_cache.transpose(1, 2).contiguous()
    assert "different layouts" in refused(applied(model, *steps.inputs(1)))
