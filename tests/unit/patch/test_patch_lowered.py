"""The whole way through Inductor on a CPU: rewrites, freezing, and a torch.compile mode."""

from __future__ import annotations

import pytest
import torch
from patch_models import Block, build, formula_kernels, workload

from agnitra_lab.patch.install import compile_mode, install

pytestmark = pytest.mark.slow
X = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)
ACTIONS = ["rms_norm", "gate_up_concat", "swiglu", "qkv_concat"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def test_a_rewritten_block_compiles_follows_its_weights_and_rolls_back():
    model = build(Block)
    patch = install(workload(model, X), ACTIONS, name="candidate", kernels=formula_kernels())
    log = patch.log()
    assert len(log.descriptors) == 5
    assert log.compile_s > 0
    with torch.no_grad():
        torch.testing.assert_close(patch.model(X), model(X))
        original = model.mlp.gate.weight.clone()
        model.mlp.gate.weight.mul_(2)
        torch.testing.assert_close(patch.model(X), model(X))
        model.mlp.gate.weight.copy_(original)
    assert patch.model.num_guard_misses == 0
    proof = patch.rollback()
    assert proof.is_restored, proof.detail


def test_frozen_weights_that_change_send_calls_to_the_original():
    model = build(Block)
    patch = install(workload(model, X), ["freezing", "qkv_concat", "gate_up_concat"], name="candidate")
    assert [descriptor.action for descriptor in patch.log().descriptors].count("qkv_concat") == 1
    with torch.no_grad():
        torch.testing.assert_close(patch.model(X), model(X))
        assert patch.model.num_guard_misses == 0
        model.attention.key.weight.add_(0.5)
        assert torch.equal(patch.model(X), model(X))
    assert patch.model.guard_misses == {"weights changed": 1}


def test_a_mode_of_torch_compile_stands_behind_the_same_drop_in():
    model = build(Block)
    patch = compile_mode(workload(model, X), "default")
    with torch.no_grad():
        torch.testing.assert_close(patch.model(X), model(X))
    log = patch.log()
    assert (log.descriptors, log.num_graphs) == ((), 1)
    assert patch.rollback().is_restored
