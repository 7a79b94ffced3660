"""What a caller gets of a compiled call's result: copies where memory is overwritten, in the containers that came."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from agnitra_lab.graph.tree import tensors
from agnitra_lab.patch.output_strides import OutputStrides, strides_of
from agnitra_lab.patch.returned import Places, Returned


class Layer:
    """A cache's layer: `more` is filled by some calls."""

    def __init__(self) -> None:
        self.keys, self.values = torch.randn(2, 3), torch.randn(2, 3)
        self.is_full = False
        self.more: list[Tensor] = []


class Cache:
    def __init__(self, num_layers: int = 2) -> None:
        self.layers = [Layer() for _ in range(num_layers)]
        self.parent = self


@dataclass
class Output:
    logits: Tensor
    cache: Cache | None
    states: tuple[Tensor, ...] = ()


def output(num_layers: int = 2) -> Output:
    return Output(torch.randn(3, 4), Cache(num_layers), (torch.randn(2), torch.randn(2)))


def overwritten(result: Any) -> Returned:
    """Every tensor of the result lives where the next call writes."""
    found = tensors(result)
    return Returned(result, OutputStrides(strides_of(result), result, [True] * len(found)), [True] * len(found))


def held(result: Any) -> list[Tensor]:
    return [tensor for _, tensor in tensors(result)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3),
        lambda: (torch.randn(3), [torch.randn(2), 7, {"a": torch.randn(1)}]),
        lambda: OrderedDict(a=torch.randn(3), note="n", nothing=None),
        output,
    ],
    ids=["a tensor", "nested", "a mapping", "a record with a cache"],
)
def test_places_are_read_in_the_order_of_the_walk_and_filled_in_it(make: Any) -> None:
    places = Places(make())
    other = make()
    found = places.read(other)
    assert found is not None and list(map(id, found)) == list(map(id, held(other)))
    new = [tensor + 1 for tensor in found]
    assert list(map(id, held(places.put(other, new)))) == list(map(id, new))


def test_tensors_are_replaced_in_the_very_cache_that_a_caller_holds() -> None:
    cache, logits = Cache(), torch.ones(4)
    for layer in cache.layers:
        layer.keys, layer.values = torch.ones(2), torch.ones(3)
    layers, value = cache.layers, {"logits": logits, "cache": cache, "pair": (logits, 7)}
    places = Places(value)
    result = places.put(value, [tensor * 2 for tensor in places.read(value) or ()])
    assert result["cache"] is cache and cache.layers is layers
    assert all(bool((tensor == 2).all()) for tensor in held(result))
    assert result["pair"][1] == 7


def test_an_object_that_refers_back_to_its_holder_is_filled_once() -> None:
    cache = Cache(1)
    assert cache.parent is cache
    places = Places(cache)
    places.put(cache, [torch.zeros_like(tensor) for tensor in places.read(cache) or ()])
    assert cache.layers[0].keys.sum() == 0 and cache.parent is cache


def test_what_is_built_otherwise_is_told_from_what_was_known() -> None:
    places = Places(output())
    longer, filled, without = output(3), output(), output()
    assert filled.cache is not None
    filled.cache.layers[0].more.append(torch.randn(1))
    without.cache = None
    flag_is_tensor = output()
    assert flag_is_tensor.cache is not None
    flag_is_tensor.cache.layers[1].is_full = torch.tensor(True)  # type: ignore[assignment]
    assert [places.read(each) for each in (longer, filled, without, flag_is_tensor)] == [None] * 4
    assert places.read(output()) is not None


def test_overwritten_tensors_are_copied_and_every_container_stays_the_same_object() -> None:
    make = overwritten(output())
    result = output()
    assert result.cache is not None
    cache, layers, layer = result.cache, result.cache.layers, result.cache.layers[0]
    before = held(result)
    found = make(result)
    assert found is result and found.cache is cache and cache.layers is layers and layers[0] is layer
    after = held(found)
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=True))
    assert {new.data_ptr() for new in after}.isdisjoint(old.data_ptr() for old in before)


def test_a_call_that_returns_more_than_the_first_one_keeps_nothing_that_is_overwritten() -> None:
    make = overwritten(output())
    result = output(4)
    before = held(result)
    after = held(make(result))
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=True))
    assert {new.data_ptr() for new in after}.isdisjoint(old.data_ptr() for old in before)


def test_a_tensor_that_is_returned_twice_is_one_copy() -> None:
    shared = torch.randn(3)
    make = overwritten([shared, shared, torch.randn(1)])
    first, second, _ = make([shared, shared, torch.randn(1)])
    assert first is second and first is not shared


def test_inputs_and_weights_among_a_result_are_no_copies() -> None:
    weight, other = torch.randn(3), torch.randn(3)
    make = Returned([weight, other], OutputStrides([None, None], [weight, other], [False, True]), [False, True])
    first, second = make([weight, other])
    assert first is weight
    assert second is not other and torch.equal(second, other)


def test_results_in_a_structure_get_the_strides_of_the_original_and_the_rest_stays_the_same_object() -> None:
    def ours() -> dict[str, Any]:
        return {"logits": torch.randn(3, 16)[:, :13], "loss": torch.tensor(1.0), "note": "n"}

    original = {"logits": torch.randn(3, 13), "loss": torch.tensor(1.0), "note": "n"}
    make = Returned(ours(), OutputStrides(strides_of(original), ours(), [True, True]), None)
    result = ours()
    loss = result["loss"]
    found = make(result)
    assert found["logits"].is_contiguous()
    assert found["loss"] is loss
    assert found["note"] == "n"


def test_nothing_to_copy_is_no_work() -> None:
    result = output()
    assert not Returned(result, OutputStrides(strides_of(result), result, [True] * len(held(result))), None)


def test_copies_of_many_tensors_keep_their_strides_and_dtypes() -> None:
    result = [torch.randn(4, 3).t(), torch.arange(5), torch.randn(2, 8)[:, :3], torch.randn(2, dtype=torch.float64)]
    found = overwritten(result)(list(result))
    assert [each.dtype for each in found] == [each.dtype for each in result]
    assert found[0].stride() == (1, 3)
    assert all(torch.equal(new, old) for new, old in zip(found, result, strict=True))
