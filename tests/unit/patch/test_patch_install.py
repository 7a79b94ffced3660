"""Install: names, refusals, failures that leave the model alone, and candidates side by side."""

from __future__ import annotations

import pytest
import torch
from patch_models import Attention, Block, GatedMLP, build, workload
from torch import nn

from agnitra_lab.errors import PatchError
from agnitra_lab.patch.backend import Backend
from agnitra_lab.patch.install import compile_mode, install
from agnitra_lab.patch.rewrites import gate_up_concat, qkv_concat
from agnitra_lab.patch.rollback import fingerprint

X = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)


def test_descriptors_have_deterministic_names_paths_and_source_lines(patched):
    names = []
    for _ in range(2):
        model = build(lambda: nn.Sequential(Block(), Block()))
        log = patched(model, ["qkv_concat", "gate_up_concat"], X).log()
        names.append([descriptor.name for descriptor in log.descriptors])
    assert names[0] == names[1]
    assert sorted(names[0]) == [
        "gate_up_concat__0.mlp.gate__0",
        "gate_up_concat__1.mlp.gate__0",
        "qkv_concat__0.attention.query__0",
        "qkv_concat__1.attention.query__0",
    ]
    assert all(descriptor.source.startswith("patch_models.py:") for descriptor in log.descriptors)
    assert log.descriptors[0].module_path == "0.mlp.gate"
    assert log.descriptors[0].replaced == ("linear", "linear")


def test_kernel_descriptors_name_the_kernel_and_its_hash(patched):
    log = patched(build(GatedMLP), "swiglu", X).log()
    (descriptor,) = log.descriptors
    assert descriptor.kind == "template"
    assert descriptor.kernel_hash == "swiglu".ljust(64, "0")
    assert descriptor.config["kernel"] == "swiglu/BLOCK_N=16"


def test_all_rewrites_together_agree_with_the_original(patched):
    model = build(lambda: nn.Sequential(Block(), Block()))
    patch = patched(model, ["swiglu", "rms_norm", "qkv_concat", "gate_up_concat", "conv_bn_fold"], X)
    counts = [descriptor.action for descriptor in patch.log().descriptors]
    assert {name: counts.count(name) for name in counts} == {
        "rms_norm": 4, "gate_up_concat": 2, "swiglu": 2, "qkv_concat": 2,
    }  # fmt: skip
    assert [refusal.action for refusal in patch.log().refusals] == ["conv_bn_fold"]
    with torch.no_grad():
        assert torch.allclose(patch.model(X), model(X), atol=1e-5)


def test_an_unknown_action_is_named_with_the_known_ones():
    with pytest.raises(PatchError, match=r"'turbo'.*qkv_concat"):
        install(workload(build(GatedMLP), X), ["turbo"], name="candidate")


def test_an_unknown_mode_is_named_with_the_known_ones():
    with pytest.raises(PatchError, match=r"'warp'.*reduce-overhead"):
        compile_mode(workload(build(GatedMLP), X), "warp")


def test_actions_that_need_a_gpu_are_refused_on_a_cpu(patched):
    log = patched(build(Attention), ["cuda_graph", "sdpa_backend"], X).log()
    assert {refusal.action for refusal in log.refusals} == {"cuda_graph", "sdpa_backend"}
    assert log.descriptors == ()


def test_option_actions_are_described_as_changes_of_the_whole_graph(patched):
    (descriptor,) = patched(build(GatedMLP), "max_autotune", X).log().descriptors
    assert (descriptor.kind, descriptor.node, descriptor.config["max_autotune"]) == ("options", "graph", True)


def test_a_rewrite_that_raises_half_way_is_dropped_and_the_others_stay(patched, monkeypatch):
    def breaks(graph_module, example_inputs, context):
        qkv_concat.apply(graph_module, example_inputs, context)
        raise ArithmeticError("half way")

    monkeypatch.setattr(gate_up_concat, "apply", breaks)
    model = build(Block)
    patch = patched(model, ["gate_up_concat", "qkv_concat"], X)
    assert [descriptor.name for descriptor in patch.log().descriptors] == ["qkv_concat__attention.query__0"]
    (refusal,) = patch.log().refusals
    assert refusal.action == "gate_up_concat"
    assert "half way" in refusal.reason
    with torch.no_grad():
        assert torch.allclose(patch.model(X), model(X), atol=1e-6)


def test_a_graph_that_inductor_cannot_take_raises_and_leaves_the_model_alone(monkeypatch):
    def fails(self, graph_module, example_inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(Backend, "_lower", fails)
    model = build(GatedMLP)
    before = fingerprint(model)
    with pytest.raises(PatchError, match="no such instruction"):
        install(workload(model, X), ["gate_up_concat"], name="candidate")
    assert fingerprint(model) == before


def test_a_model_with_a_graph_break_is_patched_in_every_graph(patched):
    class Breaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = GatedMLP(), GatedMLP()

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = build(Breaking)
    patch = patched(model, "gate_up_concat", X)
    log = patch.log()
    assert log.num_graphs == 2
    assert [descriptor.module_path for descriptor in log.descriptors] == ["first.gate", "second.gate"]
    with torch.no_grad():
        assert torch.allclose(patch.model(X), model(X), atol=1e-6)


def test_a_model_that_dynamo_skips_is_refused_and_still_runs(patched):
    class Hidden(GatedMLP):
        @torch._dynamo.disable
        def forward(self, x):
            return super().forward(x)

    model = build(Hidden)
    patch = patched(model, "gate_up_concat", X)
    assert patch.log().num_graphs == 0
    assert "no graph" in patch.log().refusals[0].reason
    with torch.no_grad():
        assert torch.equal(patch.model(X), model(X))


def test_more_candidates_than_the_recompile_limit_coexist(patched):
    model = build(GatedMLP)
    patches = [patched(model, ["gate_up_concat"], X) for _ in range(torch._dynamo.config.recompile_limit + 3)]
    with torch.no_grad():
        expected = model(X)
        assert all(torch.allclose(patch.model(X), expected, atol=1e-6) for patch in patches)
    assert [patch.log().num_graphs for patch in patches] == [1] * len(patches)
    assert patches[3].rollback().is_restored
    with torch.no_grad():
        patches[4].model(X)
    assert patches[4].log().num_graphs == 1


def test_the_users_own_compiled_copy_works_before_and_after(patched):
    graphs = []

    def users_backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    model = build(GatedMLP)
    users = torch.compile(model, backend=users_backend)
    with torch.no_grad():
        expected = users(X)
        patch = patched(model, "gate_up_concat", X)
        assert torch.equal(users(X), expected)
        patch.rollback()
        assert torch.equal(users(X), expected)
    assert len(graphs) == 1


def test_the_same_model_has_the_same_graph_whatever_is_patched_and_another_has_another(patched):
    found = [
        patched(build(model), actions, x).graph_sha256
        for model, actions, x in (
            (GatedMLP, ["gate_up_concat"], X), (GatedMLP, [], X), (GatedMLP, [], X[:1]), (Attention, [], X),
        )
    ]  # fmt: skip
    assert found[0] == found[1]
    assert len(set(found)) == 3
