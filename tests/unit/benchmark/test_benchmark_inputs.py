"""Redrawn inputs look like the given ones; copies live elsewhere."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.benchmark.inputs import fixed_tensors, num_bytes, redraw, shifted_copy
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.graph.tree import leaves, map_tensors, tensors

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass(frozen=True)
class Record:
    value: torch.Tensor
    label: str


def _drawn(tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return redraw(Workload("w", torch.nn.Identity(), (tensor,)), seed)[0][0]


LOOKS = {
    "contiguous": torch.randn(6, 8),
    "transposed": torch.randn(8, 6).T,
    "expanded": torch.randn(6, 1).expand(6, 8),
    "window": torch.randn(10, 10)[2:8, 1:9],
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "bfloat16": torch.randn(6, 8).bfloat16(),
    "complex": torch.randn(6, 8, dtype=torch.complex64),
    "token ids": torch.randint(0, 50, (4, 16)),
    "bool": torch.rand(6, 8) > 0.5,
    "expanded mask": torch.full((6, 6), -1e9).triu(1)[None, None].expand(3, 1, 6, 6),
    "expanded bool": (torch.rand(1, 8) > 0.5).expand(6, 8),
    "mask in a window": torch.full((9, 9), -1e9).triu(1)[1:7, 2:8],
    "overlapping mask": torch.full((12,), -1e9).unfold(0, 4, 2),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("copy", [_drawn, lambda tensor: shifted_copy(((tensor,), {}))[0][0]])
def test_shape_dtype_device_and_strides_are_kept(look: str, copy: Any) -> None:
    given_tensor = LOOKS[look]
    made = copy(given_tensor)
    assert (made.shape, made.dtype, made.device) == (given_tensor.shape, given_tensor.dtype, given_tensor.device)
    assert made.stride() == given_tensor.stride()


@pytest.mark.parametrize("look", ["contiguous", "transposed", "expanded", "window", "bfloat16", "complex", "token ids"])
def test_another_seed_draws_other_values_and_the_same_seed_the_same(look: str) -> None:
    first, again, other = _drawn(LOOKS[look], 1), _drawn(LOOKS[look], 1), _drawn(LOOKS[look], 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_floats_keep_mean_and_spread() -> None:
    made = _drawn(torch.randn(100, 100) * 3 + 5)
    assert made.mean().item() == pytest.approx(5, abs=0.2)
    assert made.std().item() == pytest.approx(3, abs=0.2)


@given(values=st.lists(st.integers(-100, 100), min_size=1, max_size=30), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_integers_stay_within_the_values_that_were_seen(values: list[int], seed: int) -> None:
    assert set(_drawn(torch.tensor(values), seed).tolist()) <= set(values)


@pytest.mark.parametrize("tensor", [torch.arange(12), torch.tensor([0, 3, 3, 9]), torch.zeros(5, dtype=torch.int32)])
def test_positions_offsets_and_constants_are_not_shuffled(tensor: torch.Tensor) -> None:
    assert torch.equal(_drawn(tensor), tensor)


@pytest.mark.parametrize("floating", [False, True])
def test_no_row_of_a_mask_loses_its_last_entry(floating: bool) -> None:
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    tensor = torch.zeros(16, 16).masked_fill(~mask, float("-inf")) if floating else mask
    made = _drawn(tensor)
    is_open = made == 0 if floating else made
    assert is_open.any(dim=1).all()
    assert sorted(is_open.sum(dim=1).tolist()) == list(range(1, 17))


def test_probabilities_stay_probabilities_and_sizes_stay_positive() -> None:
    probabilities = _drawn(torch.rand(1000))
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    assert _drawn(torch.rand(1000) * 50).min() >= 0


def test_nested_inputs_keep_their_structure_and_their_other_values() -> None:
    cache = SimpleNamespace(layers=[{"key": torch.randn(4)}], size=3)
    workload = Workload(
        "w", torch.nn.Identity(), ([torch.randn(4), "text"], Pair(torch.randn(4), None)),
        {"record": Record(torch.randn(4), "label"), "cache": cache},
    )  # fmt: skip
    (items, pair), kwargs = redraw(workload, 0)
    assert items[1] == "text"
    assert isinstance(pair, Pair)
    assert pair.right is None
    assert kwargs["record"].label == "label"
    assert kwargs["cache"].size == 3
    assert kwargs["cache"] is not cache
    assert not torch.equal(kwargs["cache"].layers[0]["key"], cache.layers[0]["key"])


def test_make_inputs_decides_when_there_is_one() -> None:
    workload = Workload("w", torch.nn.Identity(), make_inputs=lambda seed: ((torch.full((2,), float(seed)),), {}))
    assert redraw(workload, 7)[0][0].tolist() == [7.0, 7.0]


def test_one_tensor_given_twice_stays_one_tensor() -> None:
    shared = torch.randn(3)
    (left, right), _ = shifted_copy(((shared, shared), {}))
    assert left is right


@pytest.mark.parametrize("look", [name for name in LOOKS if name != "empty"])
def test_copies_that_live_together_have_addresses_of_their_own_and_equal_values(look: str) -> None:
    inputs = ((LOOKS[look],), {})
    copies = [shifted_copy(inputs)[0][0] for _ in range(3)]
    assert len({copy.data_ptr() for copy in [LOOKS[look], *copies]}) == 4
    assert all(torch.equal(copy, LOOKS[look]) for copy in copies)


def test_what_a_caller_promised_not_to_move_stays_in_its_place_with_new_values() -> None:
    cache, x = torch.zeros(4), torch.zeros(4)
    torch._dynamo.mark_static_address(cache)
    workload = Workload("w", torch.nn.Identity(), (x, [cache, cache]))
    fresh = redraw(workload, 3)
    (moved, kept), _ = shifted_copy(fresh, fixed_tensors(workload))
    assert kept[0] is cache and kept[1] is cache and torch.equal(cache, fresh[0][1][0])
    assert moved is not x and not x.any()
    (_, elsewhere), _ = shifted_copy(fresh)
    assert elsewhere[0] is not cache


def test_leaves_carry_the_path_that_a_reader_would_write() -> None:
    value = {"a": [torch.zeros(1), 3], "b": Record(torch.zeros(1), "x")}
    assert [path for path, _ in leaves(value)] == ["['a'][0]", "['a'][1]", "['b'].value", "['b'].label"]
    assert [path for path, _ in tensors(value)] == ["['a'][0]", "['b'].value"]


def test_objects_that_refer_to_each_other_end_the_walk() -> None:
    left, right = SimpleNamespace(), SimpleNamespace()
    left.other, right.other = right, left
    assert map_tensors(left, torch.clone) is left


def test_bytes_are_counted_over_all_tensors() -> None:
    assert num_bytes(((torch.zeros(3), [torch.zeros(2, dtype=torch.int64)]), {"x": torch.zeros(1)})) == 32
