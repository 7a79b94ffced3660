"""The drop-in: fits where the original fitted, and never gives another answer than the original."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from patch_models import Attention, Block, GatedMLP, build
from torch import nn

X = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)


def same(left, right):
    return torch.equal(left, right)


def test_state_parameters_and_names_are_the_originals(patched):
    model = build(Block)
    drop_in = patched(model, "qkv_concat", X).model
    assert list(drop_in.state_dict()) == list(model.state_dict())
    assert [id(p) for p in drop_in.parameters()] == [id(p) for p in model.parameters()]
    assert [name for name, _ in drop_in.named_modules()] == [name for name, _ in model.named_modules()]
    assert drop_in.attention is model.attention
    assert isinstance(drop_in, nn.Module)


def test_setting_an_attribute_sets_it_on_the_original(patched):
    model = build(GatedMLP)
    drop_in = patched(model, "gate_up_concat", X).model
    drop_in.label = "mine"
    assert model.label == "mine"
    del drop_in.label
    assert not hasattr(model, "label")


def test_a_copy_and_a_pickle_are_of_the_original(patched):
    model = build(GatedMLP)
    drop_in = patched(model, "gate_up_concat", X).model
    assert type(copy.deepcopy(drop_in)) is GatedMLP
    assert type(pickle.loads(pickle.dumps(drop_in))) is GatedMLP


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_take_the_compiled_path(patched, mode):
    patch = patched(build(GatedMLP), "gate_up_concat", X)
    with mode():
        patch.model(X)
    assert patch.model.num_guard_misses == 0
    assert patch.log().num_graphs == 1


def test_inference_tensors_take_the_compiled_path_and_agree(patched):
    model = build(GatedMLP)
    patch = patched(model, "gate_up_concat", X)
    with torch.inference_mode():
        x = X.clone()
        assert torch.allclose(patch.model(x), model(x), atol=1e-6)
    assert patch.model.num_guard_misses == 0


def test_enabled_gradients_run_the_original_and_warn_once(patched):
    model = build(GatedMLP)
    patch = patched(model, "gate_up_concat", X)
    with pytest.warns(UserWarning, match=r"torch\.no_grad"):
        out = patch.model(X)
    assert out.requires_grad
    assert same(out, model(X))
    patch.model(X)
    assert patch.model.guard_misses == {"gradients enabled": 2}


@pytest.mark.parametrize(
    ("reason", "other"),
    [
        ("shape", X[:1]),
        ("dtype", X.double()),
        ("strides", X.transpose(0, 1).contiguous().transpose(0, 1)),
        ("requires_grad", X.clone().requires_grad_()),
    ],
)
def test_another_kind_of_input_runs_the_original_bit_for_bit(patched, reason, other):
    model = build(GatedMLP)
    patch = patched(model, "gate_up_concat", X)
    if reason == "dtype":
        model.double()
    with torch.no_grad():
        assert same(patch.model(other), model(other))
    assert patch.model.guard_misses == {reason: 1}


def test_training_mode_runs_the_original(patched):
    class Dropping(GatedMLP):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    model = build(Dropping)
    patch = patched(model, "gate_up_concat", X)
    patch.model.train()
    with torch.no_grad():
        torch.manual_seed(3)
        ours = patch.model(X)
        torch.manual_seed(3)
        assert same(ours, model(X))
    assert patch.model.guard_misses == {"training mode": 1}
    patch.model.eval()
    with torch.no_grad():
        patch.model(X)
    assert patch.model.num_guard_misses == 1


def test_autocast_runs_the_original(patched):
    model = build(GatedMLP)
    patch = patched(model, "gate_up_concat", X)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert same(patch.model(X), model(X))
    assert patch.model.guard_misses == {"autocast": 1}


def test_a_hook_added_later_fires(patched):
    model = build(GatedMLP)
    patch = patched(model, "gate_up_concat", X)
    seen = []
    hook = model.up.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        assert same(patch.model(X), model(X))
    assert len(seen) == 2
    assert patch.model.guard_misses == {"hooks changed": 1}
    hook.remove()
    with torch.no_grad():
        patch.model(X)
    assert patch.model.num_guard_misses == 1


def test_a_hook_that_was_there_before_still_changes_the_result(patched):
    model = build(GatedMLP)
    model.up.register_forward_hook(lambda module, args, out: out * 2)
    patch = patched(model, "gate_up_concat", X)
    with torch.no_grad():
        assert torch.allclose(patch.model(X), model(X), atol=1e-6)


def test_a_hook_that_was_there_before_runs_at_each_call(patched):
    model, seen = build(GatedMLP), []
    model.up.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    patch = patched(model, "gate_up_concat", X)
    seen.clear()
    with torch.no_grad():
        for _ in range(3):
            patch.model(X)
    assert len(seen) == 3


def test_keyword_and_container_arguments_are_compared(patched):
    class Pair(GatedMLP):
        def forward(self, pair, *, scale):
            return super().forward(pair[0]) * scale + pair[1]

    model = build(Pair)
    patch = patched(model, "gate_up_concat", (X, X), scale=2)
    with torch.no_grad():
        patch.model((X, X), scale=2)
        assert patch.model.num_guard_misses == 0
        assert same(patch.model((X, X), scale=3), model((X, X), scale=3))
        assert same(patch.model((X, X[:1]), scale=2), model((X, X[:1]), scale=2))
    assert patch.model.guard_misses == {"value": 1, "shape": 1}


def test_a_wrong_call_raises_what_the_original_raises(patched):
    patch = patched(build(GatedMLP), "gate_up_concat", X)
    with torch.no_grad(), pytest.raises(TypeError, match="positional"):
        patch.model(X, X)


def test_a_cache_written_with_index_copy_keeps_its_semantics(patched):
    class Caching(Attention):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(2, 9, 6))

        def forward(self, x, position):
            self.cache.index_copy_(1, position, self.key(x))
            return self.query(x).sum(-1) + self.cache.sum() + self.value(x).sum(-1), self.cache

    model = build(Caching)
    patch = patched(model, "qkv_concat", X[:, :1].contiguous(), torch.tensor([0]))
    assert len(patch.log().descriptors) == 1
    assert model.cache.count_nonzero() == 0
    twin = build(Caching)
    with torch.no_grad():
        for step in range(4):
            x, position = X[:, step : step + 1] + step, torch.tensor([step])
            ours, cache = patch.model(x, position)
            theirs, _ = twin(x, position)
            assert torch.allclose(ours, theirs, atol=1e-5)
            assert cache.data_ptr() == model.cache.data_ptr()
    assert torch.allclose(model.cache, twin.cache, atol=1e-6)
    assert patch.model.num_guard_misses == 0


def test_a_plain_function_can_be_patched(patched):
    model = build(GatedMLP)
    patch = patched(lambda x: model(x) + 1, "gate_up_concat", X)
    assert len(patch.log().descriptors) == 1
    with torch.no_grad():
        assert torch.allclose(patch.model(X), model(X) + 1, atol=1e-6)
    assert patch.rollback().outputs_equal
