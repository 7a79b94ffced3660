"""Derived weights follow their sources: no update of a weight leaves a stale result."""

from __future__ import annotations

import pytest
import torch
from patch_models import Attention, GatedMLP, build
from torch import nn

X = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)


def in_place(model):
    model.gate.weight.mul_(1.5)


def swap_data(model):
    model.up.weight.data = model.up.weight.data * 0.5 + 1


def load(model):
    model.load_state_dict({name: value + 0.25 for name, value in model.state_dict().items()})


def new_parameter(model):
    model.gate.weight = nn.Parameter(model.gate.weight.detach() * -1)


def new_module(model):
    model.up = nn.Linear(12, 20, bias=False).eval()


@pytest.mark.parametrize("update", [in_place, swap_data, load, new_parameter, new_module])
def test_an_updated_weight_gives_the_new_result(patched, update):
    model = build(GatedMLP)
    patch = patched(model, "gate_up_concat", X)
    with torch.no_grad():
        before = patch.model(X)
        update(model)
        after = patch.model(X)
        assert torch.allclose(after, model(X), atol=1e-6)
        assert not torch.allclose(after, before, atol=1e-3)


def test_loading_through_the_drop_in_gives_the_new_result(patched):
    model, other = build(GatedMLP), build(GatedMLP, seed=1)
    patch = patched(model, "gate_up_concat", X)
    patch.model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.allclose(patch.model(X), other(X), atol=1e-6)


def test_nothing_is_rebuilt_while_weights_stand_still(patched):
    patch = patched(build(GatedMLP), "gate_up_concat", X)
    with torch.no_grad():
        for _ in range(3):
            patch.model(X)
    assert [guard.num_refreshes for guard in patch._backend.guards] == [0]


def test_a_write_that_no_counter_sees_is_taken_up_by_refresh(patched):
    model = build(GatedMLP)
    alias = model.gate.weight.data
    patch = patched(model, "gate_up_concat", X)
    alias.mul_(3)
    patch.refresh()
    with torch.no_grad():
        assert torch.allclose(patch.model(X), model(X), atol=1e-5)


def test_weights_made_in_inference_mode_are_refused(patched):
    with torch.inference_mode():
        model = build(Attention)
    patch = patched(model, ["qkv_concat", "freezing"], X)
    assert {refusal.action for refusal in patch.log().refusals} == {"qkv_concat", "freezing"}
    assert all("version counter" in refusal.reason for refusal in patch.log().refusals)
    assert patch.log().descriptors == ()


def test_updated_bn_statistics_give_the_new_result(patched):
    model = build(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    image = torch.linspace(-1, 1, 2 * 3 * 49).reshape(2, 3, 7, 7)
    patch = patched(model, "conv_bn_fold", image)
    with torch.no_grad():
        model[1].running_mean.add_(1)
        model[1].running_var.mul_(4)
        assert torch.allclose(patch.model(image), model(image), atol=1e-5)
