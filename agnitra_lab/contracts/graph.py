"""Graphs as facts: what the lazy capture hands to the semantic analysis, and what that concludes (Genie seed)."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from pydantic import JsonValue

from agnitra_lab.contracts.base import Contract, NonNegative, Share


class WorkloadType(Enum):
    """What kind of model a graph is."""

    LLM = "llm"
    VISION = "vision"
    MULTIMODAL = "multimodal"
    RECSYS = "recsys"
    UNKNOWN = "unknown"


class GraphNode(Contract):
    """One call in the graph, with its origin in the user's model."""

    name: str
    op: str
    """The profiler's name of the op, such as "aten::linear"."""
    inputs: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str | None = None
    module_path: str | None = None
    source: str | None = None
    flops: NonNegative | None = None
    bytes_moved: NonNegative | None = None


class ComputationGraph(Contract):
    """Nodes in execution order."""

    nodes: tuple[GraphNode, ...]


class GraphHandoff(Contract):
    """Data passed from capture to semantic analysis."""

    graph: ComputationGraph
    materialization_frontier: tuple[str, ...] = ()
    """Names of the nodes whose values leave the graph."""
    metadata_version: str = "1.0"


class MatchedPattern(Contract):
    """A known structure found in a graph."""

    pattern_name: str
    confidence: Share
    subgraph: tuple[str, ...]
    """Names of the matched nodes."""
    optimization_hints: dict[str, JsonValue] = {}
    metadata: dict[str, JsonValue] = {}


class WorkloadProfile(Contract):
    """The semantic analysis of one workload."""

    workload_type: WorkloadType
    patterns: tuple[MatchedPattern, ...]
    confidence: Share
    phase: Literal["prefill", "decode"] | None = None
    compute_intensity: NonNegative | None = None
    """FLOPs per byte over the whole graph."""
    total_flops: NonNegative | None = None
    total_bytes: NonNegative | None = None
    latency_sensitivity: Literal["high", "medium", "low"] = "medium"
    optimization_hints: dict[str, JsonValue] = {}

    def is_high_confidence(self) -> bool:
        """Whether the analysis may steer decisions by itself."""
        return self.confidence >= 0.85

    def has_pattern(self, name: str) -> bool:
        """Whether a pattern of this name was matched."""
        return any(pattern.pattern_name == name for pattern in self.patterns)
