"""Nested values walked and rebuilt."""

import gc
import weakref

import torch

from agnitra_lab.benchmark.tree import map_tensors


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
