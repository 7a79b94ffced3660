import pytest
import torch
from torch import nn

from agnitra_lab.contracts import ComputationGraph, GraphHandoff, WorkloadType
from agnitra_lab.graph.capture import capture
from agnitra_lab.graph.patterns import PATTERNS, match_patterns
from agnitra_lab.graph.semantics import analyse


def names(handoff):
    return [pattern.pattern_name for pattern in match_patterns(handoff)]


def pattern(handoff, name):
    return next(found for found in match_patterns(handoff) if found.pattern_name == name)


def test_every_pattern_of_the_table_reports_under_its_own_name(prefill, decode):
    assert set(names(prefill)) | set(names(decode)) <= set(PATTERNS)


def test_attention_is_matched_with_its_four_projections(prefill):
    by_name = {node.name: node for node in prefill.graph.nodes}
    found = pattern(prefill, "transformer_attention")
    modules = [by_name[name].module_path for name in found.subgraph]
    assert {"query", "key", "value", "out"} <= set(modules)
    assert found.optimization_hints["actions"] == ["sdpa_backend", "qkv_concat"]


def test_attention_that_is_spelled_out_is_matched():
    class Spelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            scores = self.query(x) @ self.key(x).transpose(-1, -2) / 8**0.5
            return scores.softmax(-1) @ self.value(x)

    found = pattern(capture(Spelled(), (torch.zeros(1, 4, 8),)), "transformer_attention")
    assert found.metadata == {"is_fused": False}
    assert len([name for name in found.subgraph if name.startswith("linear")]) == 3


def test_a_gated_mlp_is_matched_only_when_both_halves_read_one_input(prefill):
    assert len(pattern(prefill, "gated_mlp").subgraph) == 5

    class Unrelated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return nn.functional.silu(self.gate(x)) * self.up(y)

    assert "gated_mlp" not in names(capture(Unrelated(), (torch.zeros(1, 4), torch.zeros(1, 4))))


def test_an_rms_norm_that_is_spelled_out_is_matched_whole(prefill):
    by_name = {node.name: node for node in prefill.graph.nodes}
    found = pattern(prefill, "rms_norm")
    ops = [by_name[name].op for name in found.subgraph]
    assert ops == ["aten::pow", "aten::mean", "aten::add", "aten::rsqrt", "aten::mul", "aten::mul"]
    assert {by_name[name].module_path for name in found.subgraph} == {"norm"}


def test_a_convolution_with_batch_norm_is_vision(conv_net):
    profile = analyse(capture(conv_net, (torch.zeros(1, 3, 8, 8),)))
    assert profile.workload_type is WorkloadType.VISION
    assert profile.has_pattern("conv_bn")
    assert profile.phase is None


def test_one_token_against_a_cache_is_decode_and_many_tokens_are_prefill(prefill, decode):
    assert (analyse(prefill).workload_type, analyse(prefill).phase) == (WorkloadType.LLM, "prefill")
    assert (analyse(decode).workload_type, analyse(decode).phase) == (WorkloadType.LLM, "decode")
    assert analyse(decode).has_pattern("kv_cache")
    assert analyse(decode).is_high_confidence()


def test_the_callers_phase_wins(prefill):
    assert analyse(prefill, phase="decode").phase == "decode"


def test_embedding_bags_without_attention_are_a_recommender():
    class Recommender(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.EmbeddingBag(20, 4) for _ in range(3))
            self.top = nn.Linear(12, 1)

        def forward(self, ids):
            return self.top(torch.cat([table(ids) for table in self.tables], 1))

    profile = analyse(capture(Recommender(), (torch.zeros(2, 3, dtype=torch.long),)))
    assert (profile.workload_type, profile.confidence) == (WorkloadType.RECSYS, 0.95)


def test_a_vision_transformer_has_a_patch_embedding():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4, 4)

        def forward(self, image):
            x = self.patch(image).flatten(2).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(x, x, x)

    profile = analyse(capture(Tiny(), (torch.zeros(1, 3, 16, 16),)))
    assert profile.workload_type is WorkloadType.VISION
    assert profile.has_pattern("patch_embedding")


def test_totals_are_the_sums_over_the_nodes(prefill):
    profile = analyse(prefill)
    assert profile.total_flops == sum(node.flops or 0 for node in prefill.graph.nodes)
    assert profile.compute_intensity == pytest.approx(profile.total_flops / profile.total_bytes)


def test_an_empty_graph_is_unknown():
    profile = analyse(GraphHandoff(graph=ComputationGraph(nodes=())))
    assert (profile.workload_type, profile.confidence, profile.total_flops) == (WorkloadType.UNKNOWN, 0.0, None)
