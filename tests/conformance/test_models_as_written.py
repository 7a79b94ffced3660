"""Models that the optimiser was not tuned on: no rewrite raises, what they give is eager's, and the intended ones fire.

The table says where a rewrite must fire; the project's own gate judges the outputs, on new inputs too. A kernel is its
template's plain formula here.
"""

from __future__ import annotations

import pytest
import torch
from written_language import LANGUAGE
from written_others import OTHERS
from written_vision import VISION, with_statistics

from agnitra_lab.benchmark.equivalence import check
from agnitra_lab.contracts import Kernel, KernelConfig, Workload
from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.generate import registry
from agnitra_lab.patch.convolutions import LayoutTimes
from agnitra_lab.patch.install import install
from agnitra_lab.patch.rewrites import REWRITES, pointwise_conv
from agnitra_lab.patch.survey import survey

pytest.importorskip("triton")

MODELS = {**LANGUAGE, **VISION, **OTHERS}

FIRING: dict[str, set[str]] = {
    "gemma": {"fold_weights", "last_token_head", "gate_up_concat", "qkv_concat", "rms_norm", "swiglu"},
    "neox": {"attention_by_hand", "layer_norm"},
    "llama layer": {"attention_by_hand", "gate_up_concat", "qkv_concat", "rms_norm", "swiglu"},
    "llama loss": {"rms_norm", "cross_entropy"},
    "alibi by baddbmm": {"attention_by_hand"},
    "alibi by distances": {"attention_by_hand", "qkv_concat"},
    "t5 attention": {"fold_weights", "attention_by_hand", "qkv_concat", "rms_norm"},
    "bert layer": {"attention_by_hand", "qkv_concat", "layer_norm"},
    "cross attention": {"attention_by_hand", "qkv_concat"},
    "linear attention": {"qkv_concat"},
    "cache by cat": {"gate_up_concat", "qkv_concat", "skinny_gemm", "decode_attention"},
    "encoder layer of torch": {"open_layers", "layer_norm"},
    "multihead attention of torch": {"open_layers", "attention_by_hand"},
    "norm of TensorFlow": {"layer_norm"},
    "norm by var": {"layer_norm"},
    "norm by var_mean": {"layer_norm"},
    "geglu by chunk": {"swiglu"},
    "reglu by split": {"swiglu"},
    "packed swiglu": {"swiglu"},
    "experts in a loop": {"qkv_concat", "batched_linears"},
    "clip": {"fold_weights", "batched_linears"},
    "swin block": {"fold_weights", "attention_by_hand", "layer_norm"},
    "vit block": {"attention_by_hand", "layer_norm"},
    "unet block": {"group_norm", "channels_last", "pointwise_conv"},
    "unet block, channels innermost": {"pointwise_conv"},
    "convnext v2": {"depthwise_conv", "channel_norm"},
    "mobilenet v3 block": {"conv_bn_fold", "depthwise_conv", "pointwise_conv"},
    "wavenet": {"pointwise_conv"},
    "netvlad": {"conv_bn_fold"},
    "latent attention": {"qkv_concat", "rms_norm"},
    "detr encoder": {"open_layers", "attention_by_hand", "layer_norm"},
    "merged lora": {"fold_weights", "qkv_concat"},
    "standardised convolution": {"fold_weights"},
    "shufflenet block": {"conv_bn_fold", "pointwise_conv", "depthwise_conv"},
    "rwkv channel mix": {"fold_weights"},
    "inception block": {"channels_last", "pointwise_conv"},
    "transformer-xl attention": {"fold_weights", "attention_by_hand", "qkv_concat"},
    "one key head": {"attention_by_hand", "qkv_concat"},
    "perceiver": {"open_layers", "layer_norm"},
    "loss of an embedding": {"cross_entropy"},
    "cosine attention": {"fold_weights", "attention_by_hand"},
    "segmentation head": {"pointwise_conv"},
    "towers": {"batched_linears"},
    "conformer convolution": {"layer_norm", "swiglu", "depthwise_conv", "conv_bn_fold", "pointwise_conv"},
    "resnet block": {"conv_bn_fold", "channels_last"},
    "mlp mixer": {"layer_norm"},
    "batch norm mlp": {"conv_bn_fold"},
    "pointnet": {"conv_bn_fold", "pointwise_conv"},
}
"""Model -> rewrites that must fire in it, in fp32."""
FORBIDDEN = {"annotated norm": {"layer_norm", "rms_norm"}, "linear attention": {"attention_by_hand", "softmax"}}
"""Models that look like something that a kernel computes, and are not."""


def kernel_of(template: str, shape: tuple[int, ...], dtype: str) -> Kernel:
    config = KernelConfig(template=template, params={"BLOCK_N": 16})
    return Kernel(config, "", "0" * 64, registry.load(template).reference)


@pytest.fixture(autouse=True)
def _fixed_layouts(monkeypatch: pytest.MonkeyPatch):
    """Let every layout change pay: what is measured on two shared cores would differ from run to run."""
    monkeypatch.setattr(LayoutTimes, "of", lambda self, node: (2.0, 1.0))
    monkeypatch.setattr(LayoutTimes, "conversion_ms", lambda self, fake: 0.0)
    monkeypatch.setattr(pointwise_conv, "measure", lambda *_: (2.0, 1.0))
    yield
    torch._dynamo.reset()


def workload_of(name: str, dtype: torch.dtype = torch.float32) -> Workload:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with_statistics(model).eval().to(dtype)
    return Workload(name, model, tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs))


@pytest.mark.parametrize("name", MODELS)
def test_every_rewrite_together_keeps_the_outputs_and_the_intended_ones_fire(name: str) -> None:
    workload = workload_of(name)
    patch = install(workload, list(REWRITES), name="candidate", kernels=kernel_of, is_lowered=False)
    log = patch.log()
    fired = {descriptor.action for descriptor in log.descriptors}
    assert not [refusal for refusal in log.refusals if "failed and was dropped" in refusal.reason]
    assert fired >= FIRING.get(name, set()), log.refusals
    assert not fired & FORBIDDEN.get(name, set())
    found = check(workload, patch.model, seeds=(0, 1))
    assert found.is_equivalent, found.problems
    assert patch.model.num_guard_misses == 0


@pytest.mark.parametrize("name", MODELS)
def test_each_rewrite_that_a_survey_finds_keeps_the_outputs_by_itself(name: str) -> None:
    workload = workload_of(name, torch.bfloat16)
    found = survey(workload, list(REWRITES), kernel_of)
    assert not [refusal for refusal in found.refusals if refusal.action == "survey"]
    for action in sorted(found.actions):
        torch._dynamo.reset()
        patch = install(workload, [action], name="candidate", kernels=kernel_of, is_lowered=False)
        verdict = check(workload, patch.model, seeds=(0,))
        assert verdict.is_equivalent, (action, verdict.problems)


def test_the_table_names_models_and_actions_that_exist() -> None:
    assert set(FIRING) | set(FORBIDDEN) <= set(MODELS)
    assert set().union(*FIRING.values()) <= set(ACTIONS)
    assert len(MODELS) >= 50
