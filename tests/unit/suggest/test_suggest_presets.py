"""The heuristics table: every rule is sound, and expectations follow the measured shares."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from suggest_samples import CPU, CUDA, decoder_profile, decoder_record, event, pattern, profile, record

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.graph import WorkloadType
from agnitra_lab.contracts.suggestion import Suggestion
from agnitra_lab.contracts.telemetry import Bottleneck, KernelEvent
from agnitra_lab.suggest import presets
from agnitra_lab.suggest.evidence import REQUIRED_PATTERN, possible_actions


def actions_of(suggestions: list[Suggestion]) -> list[str]:
    return [suggestion.action for suggestion in suggestions]


def expected_of(suggestions: list[Suggestion]) -> dict[str, float]:
    return {suggestion.action: suggestion.expected_latency_ms for suggestion in suggestions}


def test_rule_names_are_unique_and_every_action_has_a_rule():
    names = [rule.name for rule in presets.RULES]
    assert len(set(names)) == len(names)
    assert {rule.action for rule in presets.RULES} == set(ACTIONS)
    assert set(REQUIRED_PATTERN) <= set(ACTIONS)


def test_an_action_that_measures_while_it_rewrites_is_asked_for_by_a_pattern():
    """The survey of a graph leaves them out, so that nothing is timed twice."""
    assert {name for name, action in ACTIONS.items() if action.is_measured} <= set(REQUIRED_PATTERN)


def test_what_a_rewrite_makes_is_there_for_an_action_that_measures_it():
    by_hand = profile(pattern("transformer_attention", "matmul", actions=["qkv_concat"]))
    assert "sdpa_backend" not in possible_actions(decoder_record(), by_hand, CUDA, frozenset())
    for maker in ("attention_by_hand", "open_layers"):
        assert {"sdpa_backend", maker} <= set(possible_actions(decoder_record(), by_hand, CUDA, {maker}))
    assert "padded_linear" in possible_actions(decoder_record(), by_hand, CUDA, frozenset())


def test_kernels_as_short_as_their_launch_are_put_together_and_long_ones_are_not():
    for device_ms, is_asked in ((0.04, True), (4.0, False)):
        kernels = (KernelEvent(kernel="triton_poi_fused", device_ms=device_ms, num_launches=20),)
        record = decoder_record().model_copy(update={"kernels": kernels})
        assert ("combo_kernels" in actions_of(presets.suggest(record, decoder_profile(), CUDA))) is is_asked


def test_only_templates_come_with_a_kernel_config():
    for suggestion in presets.suggest(decoder_record(), decoder_profile(), CUDA):
        is_template = ACTIONS[suggestion.action].kind == "template"
        assert (suggestion.block_size is not None) == is_template
        assert (suggestion.tile_shape is not None) == is_template


def test_a_decoder_on_a_cpu_gets_the_actions_that_a_cpu_can_make():
    suggestions = presets.suggest(decoder_record(), decoder_profile(), CPU)
    assert set(actions_of(suggestions)) == {"qkv_concat", "gate_up_concat", "freezing", "max_autotune"}
    assert actions_of(suggestions)[-1] == "max_autotune"


def test_a_decoder_on_a_gpu_that_mostly_waits_gets_the_cuda_graph_first():
    suggestions = presets.suggest(decoder_record(utilisation=0.1), decoder_profile(), CUDA)
    assert actions_of(suggestions)[0] == "cuda_graph"
    assert {"rms_norm", "swiglu", "sdpa_backend"} <= set(actions_of(suggestions))


def test_a_gpu_that_never_waits_gets_no_cuda_graph():
    suggestions = presets.suggest(decoder_record(utilisation=0.99), decoder_profile(), CUDA)
    assert "cuda_graph" not in actions_of(suggestions)


def test_a_kernels_gain_shrinks_with_the_time_that_the_gpu_works():
    busy = expected_of(presets.suggest(decoder_record(utilisation=0.9), decoder_profile(), CUDA))
    idle = expected_of(presets.suggest(decoder_record(utilisation=0.1), decoder_profile(), CUDA))
    assert busy["rms_norm"] < idle["rms_norm"]
    assert idle["cuda_graph"] < busy["cuda_graph"]


def test_a_conv_net_gets_its_batch_norms_folded_by_the_share_that_they_take():
    measured = record(event("aten::mkldnn_convolution", 0.6), event("aten::native_batch_norm", 0.3), wall_ms=20.0)
    analysed = profile(pattern("conv_bn", "conv", "bn"), kind=WorkloadType.VISION)
    expected = expected_of(presets.suggest(measured, analysed, CPU))
    assert expected["conv_bn_fold"] == pytest.approx(20.0 * 0.7)
    assert not {"qkv_concat", "gate_up_concat"} & set(expected)


def test_a_multiply_outside_the_gate_is_not_counted_as_the_gates():
    few = record(event("aten::silu", 0.1, node="act"), event("aten::mul", 0.1, node="act_mul"))
    many = record(*few.events, event("aten::mul", 0.5, node="elsewhere"))
    analysed = profile(pattern("gated_mlp", "act", "act_mul"))
    assert expected_of(presets.suggest(few, analysed, CUDA))["swiglu"] == pytest.approx(
        expected_of(presets.suggest(many, analysed, CUDA))["swiglu"]
    )


def test_an_analysis_that_knows_its_variant_rules_an_action_out():
    analysed = profile(pattern("gated_mlp", "gate_proj", "act", "act_mul", actions=["gate_up_concat"]))
    actions = actions_of(presets.suggest(decoder_record(), analysed, CUDA))
    assert "gate_up_concat" in actions
    assert "swiglu" not in actions


def test_ops_betray_their_structure_where_no_graph_was_analysed():
    actions = actions_of(presets.suggest(decoder_record(), profile(), CPU))
    assert {"qkv_concat", "gate_up_concat"} <= set(actions)


def test_a_pointwise_kernel_cuts_long_rows_into_blocks():
    suggestions = presets.suggest(decoder_record(), decoder_profile(), CUDA)
    swiglu = next(suggestion for suggestion in suggestions if suggestion.action == "swiglu")
    assert (swiglu.block_size, swiglu.tile_shape, swiglu.num_warps) == (1024, (1, 1024), 4)


def test_a_row_kernel_starts_with_the_whole_row_in_one_block():
    measured = record(event("aten::rms_norm", 0.5, node="norm", shape=(7, 3000)))
    (norm, *_) = presets.suggest(measured, profile(pattern("rms_norm", "norm")), CUDA)
    assert (norm.action, norm.block_size, norm.tile_shape, norm.num_warps) == ("rms_norm", 4096, (1, 4096), 8)


def test_a_record_with_the_seeds_keys_alone_starts_from_its_bottleneck():
    bottleneck = Bottleneck(op="aten::matmul", latency_ms=12.4, shape=(1, 4096, 4096))
    seed = record(wall_ms=None, utilisation=0.71, bottleneck=bottleneck)
    suggestions = presets.suggest(seed, profile(), CUDA)
    assert {suggestion.target_latency_ms for suggestion in suggestions} == {12.4 * 0.85}


def test_a_profile_without_any_time_gets_no_expectation():
    assert presets.suggest(record(wall_ms=None), profile(), CUDA) == []


@given(
    shares=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    wall_ms=st.floats(1e-9, 1e9) | st.none(),
    utilisation=st.floats(0, 1) | st.none(),
    is_cuda=st.booleans(),
    width=st.integers(1, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_any_profile_gives_suggestions_within_the_contract_in_order(shares, wall_ms, utilisation, is_cuda, width):
    ops = ("addmm", "mul", "silu", "rsqrt", "mkldnn_convolution", "native_batch_norm")
    nodes = ("q_proj", "norm_mul", "act", None, None, None)
    events = [
        event(f"aten::{op}", share, node=node, shape=(width,))
        for op, share, node in zip(ops, shares, nodes, strict=True)
    ]
    measured = record(*events, wall_ms=wall_ms, utilisation=utilisation)
    suggestions = presets.suggest(measured, decoder_profile(), CUDA if is_cuda else CPU)
    expected = [suggestion.expected_latency_ms for suggestion in suggestions]
    assert expected == sorted(expected)
    assert len(set(actions_of(suggestions))) == len(suggestions)
    assert all(Suggestion.from_json(suggestion.to_json()) == suggestion for suggestion in suggestions)
    assert is_cuda or not any(ACTIONS[suggestion.action].needs_cuda for suggestion in suggestions)
