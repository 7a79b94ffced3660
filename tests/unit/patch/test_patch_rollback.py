"""Rollback is identity, and the proof can tell when it is not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patch_models import Attention, Block, GatedMLP, build, formula_kernels, workload
from torch import nn

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.install import eager, install
from agnitra_lab.patch.rollback import MutableState, fingerprint, keep_outputs, prove, run_original, same_bits

ACTIONS = ["qkv_concat", "gate_up_concat", "rms_norm", "swiglu", "conv_bn_fold"]
X = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    actions=st.lists(st.sampled_from(ACTIONS), unique=True),
    num_calls=st.integers(0, 3),
    num_rows=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_install_then_rollback_is_identity(actions, num_calls, num_rows, seed):
    model = build(Block, seed=seed)
    x = torch.randn(num_rows, 3, 12)
    before = fingerprint(model)
    with torch.no_grad():
        expected = model(x)
    patch = install(workload(model, x), actions, name="candidate", kernels=formula_kernels(), is_lowered=False)
    with torch.no_grad():
        for _ in range(num_calls):
            patch.model(x)
    proof = patch.rollback()
    assert proof.is_restored, proof.detail
    assert fingerprint(model) == before
    with torch.no_grad():
        assert torch.equal(patch.model(x), expected)
    assert not patch.model.is_optimized
    torch._dynamo.reset()


def test_rolling_back_twice_gives_the_same_proof(patched):
    patch = patched(build(GatedMLP), "gate_up_concat", X)
    assert patch.rollback() is patch.rollback()
    assert patch.log().rollback is patch.rollback()


def test_rollback_releases_the_derived_weights(patched):
    patch = patched(build(GatedMLP), "gate_up_concat", X)
    (weight,) = patch._backend._shared.values()
    merged = weakref.ref(weight.value)
    del weight
    patch.rollback()
    gc.collect()
    assert merged() is None


def test_dynamo_leaves_no_mark_on_the_weights(patched):
    model = build(GatedMLP)
    patched(model, "gate_up_concat", X).rollback()
    assert all(not parameter.__dict__ for parameter in model.parameters())


def test_install_leaves_buffers_and_arguments_as_they_were(patched):
    class Counting(GatedMLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("num_calls", torch.zeros(()))

        def forward(self, x, total):
            self.num_calls.add_(1)
            total.add_(x.sum())
            return super().forward(x) + self.num_calls

    model, total = build(Counting), torch.zeros(())
    patch = patched(model, "gate_up_concat", X, total)
    assert model.num_calls.item() == 0
    assert total.item() == 0
    assert patch.rollback().is_restored
    assert model.num_calls.item() == 0


class Atomic(GatedMLP):
    """Stands in for sums whose order is another one at each call."""

    def __init__(self):
        super().__init__()
        self.drawn = torch.Generator()

    def forward(self, x):
        y = super().forward(x)
        return y + 1e-6 * torch.randn(y.shape, generator=self.drawn)


def test_an_original_that_never_gives_the_same_twice_is_restored_where_it_is_as_near_as_ever():
    patch = eager(workload(build(Atomic), X))
    assert patch.prove_rollback().is_restored


def test_an_original_that_never_gives_the_same_twice_is_still_told_from_a_changed_one():
    patch = eager(workload(build(Atomic), X))
    patch._before.outputs = patch._before.outputs + 1e-3
    proof = patch.prove_rollback()
    assert not proof.is_restored
    assert "outputs on the workload's inputs" in proof.detail


def test_the_random_generator_is_left_alone(patched):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Identity())
    patched(model, [], X).rollback()
    assert torch.equal(torch.rand(3), expected)


def prove_after(change):
    model = build(Attention)
    target = workload(model, X)
    outputs, before = keep_outputs(run_original(target)), fingerprint(model)
    change(model)
    return prove(target, before, outputs, MutableState(), model)


def test_the_proof_notices_a_changed_weight():
    proof = prove_after(lambda model: model.key.weight.data.view(-1)[7:8].add_(1e-6))
    assert not proof.parameters_equal
    assert not proof.is_restored
    assert "parameters" in proof.detail


def test_the_proof_notices_a_left_over_forward():
    proof = prove_after(lambda model: setattr(model.query, "forward", model.query.forward))
    assert not proof.attributes_equal
    assert proof.outputs_equal
    assert "'query'" in proof.detail


def test_the_proof_notices_a_left_over_hook():
    proof = prove_after(lambda model: model.value.register_forward_hook(lambda *given: None))
    assert not proof.hooks_equal
    assert "'value'" in proof.detail


def test_the_proof_notices_training_mode():
    assert not prove_after(lambda model: model.query.train()).attributes_equal


def test_bitwise_comparison_tells_zero_signs_and_dtypes_apart_and_accepts_nan():
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits((nan, 3), (nan.clone(), 3))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.ones(2), torch.ones(2).double())
    assert not same_bits((nan, 3), (nan, 4))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.data())
def test_weighted_sums_notice_any_single_changed_byte(values, data):
    from agnitra_lab.patch.rollback import _weighted_sums

    flat = torch.tensor(values, dtype=torch.uint8)
    changed = flat.clone()
    index = data.draw(st.integers(0, len(values) - 1))
    changed[index] ^= data.draw(st.integers(1, 255))
    assert [value.item() for value in _weighted_sums(flat)] != [value.item() for value in _weighted_sums(changed)]


def test_eager_is_the_original_behind_the_drop_in():
    model = build(GatedMLP)
    patch = eager(workload(model, X))
    with torch.no_grad():
        assert torch.equal(patch.model(X), model(X))
    assert patch.log().descriptors == ()
    assert patch.compile_s is None
    assert patch.rollback().is_restored


def test_a_cache_slot_that_is_filled_with_what_it_holds_counts_as_written() -> None:
    from agnitra_lab.patch.rollback import MutableState
    from agnitra_lab.workloads.demos import demo

    workload = demo("llama-decode", scale="tiny", device="cpu")
    run_original(workload)
    state = MutableState.of(workload)
    run_original(workload)
    caches = {id(tensor) for name, tensor in workload.model.named_buffers() if "cache" in name}
    assert {id(tensor) for tensor in state.only_written().tensors} == caches


@pytest.mark.parametrize("kind", ["plain", "leaf", "parameter", "inference", "float8"])
def test_a_written_argument_of_any_kind_gets_its_values_back(kind: str) -> None:
    with torch.inference_mode(kind == "inference"):
        tensor = torch.ones(2)
    if kind == "leaf":
        tensor.requires_grad_()
    elif kind == "parameter":
        tensor = nn.Parameter(tensor)
    elif kind == "float8":
        tensor = tensor.to(torch.float8_e4m3fn)
    state = MutableState.of(Workload("case", nn.Identity(), (tensor,)))
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.zero_()
    state.only_written().restore()
    assert tensor.float().sum() == 2
