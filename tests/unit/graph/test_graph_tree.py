"""Nested values walked and rebuilt."""

import gc
import weakref

import pytest
import torch

from agnitra_lab.graph.tree import Containers, map_tensors, tensors, untouched


def test_a_rebuilt_value_dies_with_its_last_reference_while_the_collector_is_off():
    gc.collect()
    gc.disable()
    try:
        copied = map_tensors(([torch.ones(3)], {"x": torch.ones(2)}), torch.clone)
        alive = [weakref.ref(copied[0][0]), weakref.ref(copied[1]["x"])]
        del copied
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


def test_a_tensor_met_twice_stays_one_tensor():
    x = torch.ones(2)
    left, right = map_tensors((x, x), torch.clone)
    assert left is right and left is not x


class Layer:
    def __init__(self, keys):
        self.keys = keys


class Cache:
    """As transformers' caches: a plain object with a list of layers."""

    def __init__(self, *keys):
        self.layers = [Layer(each) for each in keys]
        self.length = 0


def test_an_object_that_refers_back_to_its_holder_ends_the_walk():
    cache = Cache(torch.ones(2))
    cache.layers[0].cache = cache
    assert [path for path, _ in tensors(cache)] == [".layers[0].keys"]
    assert map_tensors(cache, torch.zeros_like).layers[0].keys.sum() == 0


def test_an_empty_cache_is_copied_too_so_that_what_fills_the_copy_leaves_it_empty():
    cache = Cache()
    map_tensors((cache,), torch.clone)[0].layers.append(Layer(torch.ones(2)))
    assert not cache.layers


def test_containers_put_back_what_a_call_has_exchanged_added_or_taken_away():
    keys = torch.ones(2)
    cache, names = Cache(keys), {"first": keys}
    before = Containers((cache, names))
    cache.layers[0].keys = torch.cat([keys, keys])
    cache.layers.append(Layer(keys))
    cache.length, cache.extra = 5, keys
    names.clear()
    before.restore()
    assert len(cache.layers) == 1 and cache.layers[0].keys is keys
    assert cache.length == 0 and not hasattr(cache, "extra")
    assert names["first"] is keys


def test_what_a_block_does_to_a_value_that_it_was_not_given_is_put_back():
    cache, nan = Cache(torch.ones(2)), torch.tensor([float("nan"), 1.0])
    keys = cache.layers[0].keys
    with pytest.raises(RuntimeError, match="out of luck"), untouched((cache, nan)):
        keys.zero_()
        nan.zero_()
        cache.layers[0].keys = torch.zeros(5)
        raise RuntimeError("out of luck")
    assert cache.layers[0].keys is keys and bool((keys == 1).all())
    assert nan.isnan().tolist() == [True, False]


ODD = {
    "expanded": lambda: torch.tensor([[float("nan")]]).expand(4, 3),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)], layout=torch.jagged),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(3, device="meta"),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_a_tensor_that_cannot_be_put_back_is_left_alone(make):
    odd, plain = make(), torch.ones(2)
    with untouched((odd, plain)):
        plain.zero_()
    assert bool((plain == 1).all())
