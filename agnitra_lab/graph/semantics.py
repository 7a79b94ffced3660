"""Conclude from a captured graph what kind of workload it is, which phase it runs, and what it costs by its shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from pydantic import JsonValue

from agnitra_lab.contracts import GraphHandoff, GraphNode, MatchedPattern, WorkloadProfile, WorkloadType
from agnitra_lab.graph.patterns import match_patterns

Phase = Literal["prefill", "decode"]
Sensitivity = Literal["high", "medium", "low"]


def analyse(handoff: GraphHandoff, phase: Phase | None = None) -> WorkloadProfile:
    """Analyse a graph: workload type with its confidence, patterns, phase, FLOPs, bytes and their ratio.

    Args:
        handoff: what `graph.capture` gave.
        phase: what the caller knows; otherwise one query token that attends to more keys means decode.

    Returns:
        The profile. `optimization_hints["actions"]` lists the actions that the matched patterns allow, most
        frequent pattern first.
    """
    nodes = handoff.graph.nodes
    patterns = match_patterns(handoff)
    workload_type, confidence = _classify(nodes, patterns)
    total_flops = float(sum(node.flops or 0.0 for node in nodes))
    total_bytes = float(sum(node.bytes_moved or 0.0 for node in nodes))
    found_phase = phase or _phase(nodes, patterns, workload_type)
    return WorkloadProfile(
        workload_type=workload_type,
        patterns=patterns,
        confidence=confidence,
        phase=found_phase,
        compute_intensity=total_flops / total_bytes if total_bytes else None,
        total_flops=total_flops if nodes else None,
        total_bytes=total_bytes if nodes else None,
        latency_sensitivity=_sensitivity(workload_type, found_phase),
        optimization_hints=_hints(patterns),
    )


def _classify(nodes: tuple[GraphNode, ...], patterns: tuple[MatchedPattern, ...]) -> tuple[WorkloadType, float]:
    facts = {pattern.pattern_name for pattern in patterns}
    if any(node.op == "aten::embedding" for node in nodes):
        facts.add("token_embedding")
    for is_so, workload_type, confidence in _RULES:
        if is_so(facts):
            return workload_type, confidence
    return WorkloadType.UNKNOWN, 0.0


def _has(*needed: str, lacks: tuple[str, ...] = ()) -> Callable[[set[str]], bool]:
    return lambda facts: facts.issuperset(needed) and facts.isdisjoint(lacks)


# Read from the top: the first rule that holds decides. A recommender has lookups and no attention; a language model
# has both; an image enters through convolutions.
_RULES: tuple[tuple[Callable[[set[str]], bool], WorkloadType, float], ...] = (
    (_has("recsys_interaction", lacks=("transformer_attention",)), WorkloadType.RECSYS, 0.95),
    (_has("patch_embedding", "token_embedding", "transformer_attention"), WorkloadType.MULTIMODAL, 0.9),
    (_has("conv", "token_embedding", "transformer_attention"), WorkloadType.MULTIMODAL, 0.7),
    (_has("transformer_attention", "token_embedding", "kv_cache"), WorkloadType.LLM, 0.98),
    (_has("transformer_attention", "token_embedding", "lm_head"), WorkloadType.LLM, 0.95),
    (_has("transformer_attention", "token_embedding"), WorkloadType.LLM, 0.85),
    (_has("patch_embedding", "transformer_attention"), WorkloadType.VISION, 0.95),
    (_has("conv", lacks=("token_embedding",)), WorkloadType.VISION, 0.9),
    (_has("conv"), WorkloadType.VISION, 0.6),
    (_has("transformer_attention", "gated_mlp"), WorkloadType.LLM, 0.6),
    (_has("transformer_attention"), WorkloadType.LLM, 0.5),
)


def _phase(
    nodes: tuple[GraphNode, ...], patterns: tuple[MatchedPattern, ...], workload_type: WorkloadType
) -> Phase | None:
    names = {pattern.pattern_name for pattern in patterns}
    is_generator = workload_type is WorkloadType.LLM and not names.isdisjoint({"lm_head", "kv_cache", "gated_mlp"})
    if not is_generator:
        return None
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        if node.op == "aten::scaled_dot_product_attention" and len(node.shape) >= 2:
            keys = by_name.get(node.inputs[1]) if len(node.inputs) > 1 else None
            has_more_keys = keys is not None and len(keys.shape) >= 2 and keys.shape[-2] > 1
            is_decode = node.shape[-2] == 1 and (has_more_keys or "kv_cache" in names)
            return "decode" if is_decode else "prefill"
    scores = next((node for node in nodes if node.op in ("aten::softmax", "aten::_softmax") and node.shape), None)
    if scores is None or len(scores.shape) < 2:
        return None
    return "decode" if scores.shape[-2] == 1 and scores.shape[-1] > 1 else "prefill"


def _sensitivity(workload_type: WorkloadType, phase: Phase | None) -> Sensitivity:
    if phase == "decode" or workload_type is WorkloadType.RECSYS:
        return "high"
    return "medium"


def _hints(patterns: tuple[MatchedPattern, ...]) -> dict[str, JsonValue]:
    allowed: Counter[str] = Counter()
    for pattern in patterns:
        actions = pattern.optimization_hints.get("actions")
        if isinstance(actions, list):
            allowed.update(str(action) for action in actions)
    return {"actions": [action for action, _ in allowed.most_common()]} if allowed else {}
