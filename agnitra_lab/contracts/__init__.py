"""Contracts: the frozen, versioned records that travel between stages. Importing them loads pydantic and no more."""

from agnitra_lab.contracts.actions import ACTIONS, Action
from agnitra_lab.contracts.base import Contract
from agnitra_lab.contracts.device import DeviceInfo, DevicePeaks, GpuSample
from agnitra_lab.contracts.events import Event
from agnitra_lab.contracts.graph import (
    ComputationGraph,
    GraphHandoff,
    GraphNode,
    MatchedPattern,
    WorkloadProfile,
    WorkloadType,
)
from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.measurement import CandidateResult, Comparison, Equivalence, Latency, Ratio
from agnitra_lab.contracts.patch import PatchDescriptor, PatchLog, Refusal, RollbackProof
from agnitra_lab.contracts.report import STAGES, AgentNotes, Checkpoint, Report
from agnitra_lab.contracts.run import Budget, Manifest, Meta, Results, RunSummary
from agnitra_lab.contracts.search import KernelConfig, SearchResult, SearchSpace, Trial
from agnitra_lab.contracts.suggestion import (
    Fallback,
    LLMUsage,
    Proposal,
    Rejected,
    Suggestion,
    SuggestionRound,
    TokenPrices,
)
from agnitra_lab.contracts.suite import SuiteAssignment, SuiteFigures, SuiteResult, SuiteSide
from agnitra_lab.contracts.telemetry import (
    Behavior,
    Bottleneck,
    GpmMetrics,
    GpuTelemetry,
    Hotspot,
    IdleTime,
    KernelEvent,
    MemoryShare,
    MemoryTelemetry,
    NodeEvent,
    OpEvent,
    Overhead,
    OwnerShares,
    PhaseTime,
    TelemetryRecord,
    Timeline,
)
from agnitra_lab.contracts.usage import UsageEvent
from agnitra_lab.contracts.workload import Workload

PUBLISHED: dict[str, type[Contract]] = {
    "telemetry": TelemetryRecord,
    "suggestion": Suggestion,
    "proposal": Proposal,
    "search": SearchResult,
    "patch": PatchLog,
    "comparison": Comparison,
    "usage": UsageEvent,
    "summary": RunSummary,
    "manifest": Manifest,
    "event": Event,
    "report": Report,
    "suite": SuiteResult,
}
"""What `agnitra schemas` exports: one JSON Schema a name."""

__all__ = [
    "ACTIONS",
    "PUBLISHED",
    "STAGES",
    "Action",
    "AgentNotes",
    "Behavior",
    "Bottleneck",
    "Budget",
    "CandidateResult",
    "Checkpoint",
    "Comparison",
    "ComputationGraph",
    "Contract",
    "DeviceInfo",
    "DevicePeaks",
    "Equivalence",
    "Event",
    "Fallback",
    "GpmMetrics",
    "GpuSample",
    "GpuTelemetry",
    "GraphHandoff",
    "GraphNode",
    "Hotspot",
    "IdleTime",
    "Kernel",
    "KernelConfig",
    "KernelEvent",
    "LLMUsage",
    "Latency",
    "Manifest",
    "MatchedPattern",
    "MemoryShare",
    "MemoryTelemetry",
    "Meta",
    "NodeEvent",
    "OpEvent",
    "Overhead",
    "OwnerShares",
    "PatchDescriptor",
    "PatchLog",
    "PhaseTime",
    "Proposal",
    "Ratio",
    "Refusal",
    "Rejected",
    "Report",
    "Results",
    "RollbackProof",
    "RunSummary",
    "SearchResult",
    "SearchSpace",
    "Suggestion",
    "SuggestionRound",
    "SuiteAssignment",
    "SuiteFigures",
    "SuiteResult",
    "SuiteSide",
    "TelemetryRecord",
    "Timeline",
    "TokenPrices",
    "Trial",
    "UsageEvent",
    "Workload",
    "WorkloadProfile",
    "WorkloadType",
]
