"""What is known of single nodes of a graph."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch.nn import functional

from agnitra_lab.patch.ops import is_in_place


def node_of(target, *, kwargs=None):
    graph = fx.Graph()
    args = (graph.placeholder("x"), graph.placeholder("y"))
    if isinstance(target, str):
        return graph.call_method(target, args, kwargs or {})
    return graph.call_function(target, args, kwargs or {})


@pytest.mark.parametrize("target", [operator.iand, operator.setitem, torch.relu_, torch.ops.aten.add_.Tensor, "mul_"])
def test_a_node_that_writes_into_its_argument_is_in_place(target):
    assert is_in_place(node_of(target))


@pytest.mark.parametrize(
    "target",
    [operator.and_, operator.or_, operator.not_, operator.add, torch.add, torch.ops.aten.add.Tensor, "__and__"],
)
def test_a_node_that_makes_a_value_is_not_in_place_whatever_its_name_ends_in(target):
    assert not is_in_place(node_of(target))


def test_an_argument_that_asks_for_it_makes_a_node_in_place():
    assert is_in_place(node_of(functional.relu, kwargs={"inplace": True}))
    assert not is_in_place(node_of(functional.relu, kwargs={"inplace": False}))
