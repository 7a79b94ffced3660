"""Attention whose scores are capped by a tanh becomes one flex-attention call with the same values, or is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.flex import BLOCK, blocks_of
from agnitra_lab.patch.install import install
from agnitra_lab.patch.masks import Band

BATCH, HEADS, STEPS, SIZE = 2, 3, 130, 16
INF = float("-inf")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A module whose forward is the function given, over what attention layers keep in buffers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.bias_table = nn.Parameter(torch.randn(HEADS, STEPS, STEPS))
        self.register_buffer("tril", torch.ones(STEPS, STEPS, dtype=torch.bool).tril())
        self.register_buffer("hidden", torch.full((STEPS, STEPS), torch.finfo(torch.bfloat16).min).triu(1))
        self.eval()

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def heads(seed: int, dtype: torch.dtype = torch.float32, *, steps: int = STEPS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(BATCH, HEADS, steps, SIZE, generator=generator)).to(dtype)


Q, K, V = map(heads, (1, 2, 3))
PADDING = torch.ones(BATCH, STEPS, dtype=torch.int64)
PADDING[0, 90:] = 0


def check(function: Any, *args: Tensor, expected: int = 1, tolerance: float = 1e-5, is_lowered: bool = False) -> Any:
    """Install the rewrite, compare with eager (values, strides), and return patch and log."""
    torch.manual_seed(0)
    model = Net(function)
    twin, twin_args = copy.deepcopy((model, args))
    patch = install(Workload("case", model, args), ["capped_attention"], name="candidate", is_lowered=is_lowered)
    log = patch.log()
    assert len(log.descriptors) == expected, log.refusals
    with torch.no_grad():
        ours, theirs = patch.model(*args), twin(*twin_args)
    assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    return patch, log


def check_refused(function: Any, *args: Tensor, because: str) -> None:
    _, log = check(function, *args, expected=0)
    assert any(because in refusal.reason for refusal in log.refusals), log.refusals


def capped(scores: Tensor, cap: float = 5.0) -> Tensor:
    return torch.tanh(scores / cap) * cap


def attend(scores: Tensor, value: Tensor) -> Tensor:
    return scores.softmax(-1) @ value


def by_distance(m: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    steps = torch.arange(q.size(-2), device=q.device)
    distance = steps[:, None] - steps
    scores = capped(q @ k.mT * SIZE**-0.5)
    return attend(scores.masked_fill((distance < 0) | (distance >= 12), INF), v)


SPELLINGS = {
    "Gemma 2": lambda m, q, k, v: attend(capped(torch.matmul(q, k.transpose(2, 3)) * SIZE**-0.5), v),
    "methods": lambda m, q, k, v: (q @ k.mT).mul(0.1).tanh().mul(20.0).softmax(-1).matmul(v),
    "in place": lambda m, q, k, v: (q @ k.mT).mul_(0.1).tanh_().mul_(20.0).softmax(-1) @ v,
    "nn.Tanh": lambda m, q, k, v: attend(4.0 * nn.Tanh()(q @ k.mT / 9.0), v),
    "einsum": lambda m, q, k, v: torch.einsum(
        "bhij,bhjd->bihd", capped(torch.einsum("bhid,bhjd->bhij", q, k)).softmax(-1), v
    ),
    "grouped heads": lambda m, q, k, v: attend(
        capped(q @ k[:, :1].expand(-1, HEADS, -1, -1).mT * SIZE**-0.5), v[:, :1].expand(-1, HEADS, -1, -1)
    ),
    "softmax in float": lambda m, q, k, v: torch.softmax(capped(q @ k.mT), -1, dtype=torch.float32).to(q.dtype) @ v,
}
MASKS = {
    "causal buffer": (lambda m, q, k, v: attend(capped(q @ k.mT).masked_fill(~m.tril, INF), v), (None, 0)),
    "causal sum": (lambda m, q, k, v: attend(capped(q @ k.mT) + m.hidden, v), (None, 0)),
    "a window": (by_distance, (11, 0)),
    "bias": (lambda m, q, k, v: attend(capped(q @ k.mT) + m.bias_table, v), None),
    "bias and causal": (
        lambda m, q, k, v: attend((capped(q @ k.mT) + m.bias_table).masked_fill(~m.tril, INF), v), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
def test_capped_attention_in_any_spelling_becomes_one_call(function):
    check(function, Q, K, V)


@pytest.mark.parametrize(("function", "band"), MASKS.values(), ids=MASKS)
def test_masks_become_skipped_blocks_where_they_are_a_band_and_a_bias_elsewhere(function, band):
    _, log = check(function, Q, K, V)
    (descriptor,) = log.descriptors
    assert descriptor.config["has_bias"] is (band is None)
    if band is not None:
        assert (descriptor.config["left"], descriptor.config["right"]) == band


@pytest.mark.parametrize("is_lowered", [False, True])
def test_padding_that_comes_with_the_call_hides_its_keys(is_lowered):
    def padded(m, q, k, v, padding):
        return attend(capped(q @ k.mT) + (1.0 - padding[:, None, None].to(q.dtype)) * -1e9, v)

    check(padded, Q, K, V, PADDING, is_lowered=is_lowered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_as_close_to_fp64_as_the_single_steps(dtype):
    def gemma(m, q, k, v):
        return attend(capped(q @ k.mT * SIZE**-0.5, 50.0).masked_fill(~m.tril, INF), v)

    args = tuple(heads(seed, dtype) for seed in (1, 2, 3))
    torch.manual_seed(0)
    model = Net(gemma)
    patch = install(Workload("case", model, args), ["capped_attention"], name="candidate")
    assert len(patch.log().descriptors) == 1
    with torch.no_grad():
        exact = model(*(each.double() for each in args))
        ours, theirs = patch.model(*args), model(*args)

    def error(given: Tensor) -> float:
        return float((given.double() - exact).norm())

    assert error(ours) <= 1.25 * error(theirs)


def filled(m, q, k, v, padding, fill):
    return attend(capped(q @ k.mT).masked_fill(padding[:, None, None] == 0, fill), v)


def added(m, q, k, v, padding, fill):
    hidden = torch.zeros_like(padding, dtype=q.dtype).masked_fill(padding == 0, fill)
    return attend(capped(q @ k.mT) + hidden[:, None, None], v)


LOWEST = torch.finfo(torch.float32).min
BLIND = {
    "-inf": (filled, INF, False), "lowest": (filled, LOWEST, False), "-1e9": (filled, -1e9, False),
    "-inf added": (added, INF, False), "lowest added": (added, LOWEST, False), "-inf compiled": (filled, INF, True),
    "lowest added, compiled": (added, LOWEST, True),
}  # fmt: skip


@pytest.mark.parametrize(("function", "fill", "is_lowered"), BLIND.values(), ids=BLIND)
def test_a_row_that_sees_no_key_stays_what_it_was(function, fill, is_lowered):
    blind = PADDING.clone()
    blind[1] = 0
    check(lambda *args: function(*args, fill), Q, K, V, blind, is_lowered=is_lowered)


def test_pointwise_ops_may_follow_the_compiled_call():
    check(lambda m, q, k, v: torch.relu(attend(capped(q @ k.mT), v)) + q, Q, K, V, is_lowered=True)


def test_a_mask_in_a_buffer_that_changes_later_is_seen():
    patch, _ = check(MASKS["causal buffer"][0], Q, K, V)
    with torch.no_grad():
        patch.model.tril.fill_(True)
        expected = attend(capped(Q @ K.mT), V)
        torch.testing.assert_close(patch.model(Q, K, V), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("no attention whose scores", lambda m, q, k, v: attend(q @ k.mT, v)),
        ("no attention whose scores", lambda m, q, k, v: attend(capped(q @ k.mT + 3.0), v)),
        ("no attention whose scores", lambda m, q, k, v: attend(capped(q @ k.mT + m.bias_table), v)),
        ("no attention whose scores", lambda m, q, k, v: attend(capped(capped(q @ k.mT)), v)),
        ("head sizes", lambda m, q, k, v: attend(capped(q @ k.mT), v[..., :8])),
        ("queries leave few scores", lambda m, q, k, v: attend(capped(q[..., :4, :] @ k.mT), v)),
        ("written between", lambda m, q, k, v: (lambda s: (k.add_(1), attend(s, v))[1])(capped(q @ k.mT))),
    ],
    ids=["no cap", "shifted", "capped bias", "capped twice", "head sizes", "few queries", "written"],
)
def test_what_flex_attention_would_not_compute_alike_is_refused(because, function):
    check_refused(function, Q, K.clone(), V, because=because)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400), st.integers(1, 400), st.none() | st.integers(0, 400), st.none() | st.integers(0, 400)
)  # fmt: skip
def test_every_block_that_a_band_reaches_is_listed_once_and_as_whole_only_if_all_of_it_is_seen(
    num_queries, num_keys, left, right
):
    distance = torch.arange(num_keys) - torch.arange(num_queries)[:, None]
    seen = (distance >= (-math.inf if left is None else -left)) & (distance <= (math.inf if right is None else right))
    assume(bool(seen.any(1).all()))
    num_part, part, num_whole, whole = (
        each[0, 0] for each in blocks_of(Band(left, right), num_queries, num_keys, "cpu")
    )
    for row, strip in enumerate(seen.split(BLOCK)):
        blocks = strip.split(BLOCK, dim=1)
        reached = {column for column, block in enumerate(blocks) if block.any()}
        all_seen = {column for column, block in enumerate(blocks) if block.all() and block.shape[1] == BLOCK}
        listed = [*part[row, : num_part[row]].tolist(), *whole[row, : num_whole[row]].tolist()]
        assert sorted(listed) == sorted(reached)
        assert set(whole[row, : num_whole[row]].tolist()) == all_seen
