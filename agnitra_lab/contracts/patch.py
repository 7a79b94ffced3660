"""Patch descriptors: what was replaced at which node, and the proof that it can be undone."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from agnitra_lab.contracts.base import Contract, Count, Share


class PatchDescriptor(Contract):
    """One change to the graph. Names are deterministic, so two runs diff cleanly."""

    name: str
    """`<action>__<module path>__<ordinal>`."""
    action: str
    kind: Literal["rewrite", "template", "options"]
    node: str
    """FX node that was replaced; "graph" for a change of the whole graph."""
    module_path: str
    source: str | None
    replaced: tuple[str, ...]
    """Ops that went away, in graph order."""
    replacement: str
    config: dict[str, JsonValue]
    kernel_hash: str | None = None


class Refusal(Contract):
    """A suggested change that was not made, and why."""

    action: str
    reason: str


class RollbackProof(Contract):
    """That the original stands as it stood before: compared, not assumed."""

    is_restored: bool
    attributes_equal: bool
    hooks_equal: bool
    parameters_equal: bool
    outputs_equal: bool
    """Bit for bit, on the workload's own inputs; as near as its own calls are to each other where the original never
    gives the same twice (atomic sums on a GPU)."""
    num_parameters: Count
    state_sha256: str
    detail: str | None = None


class PatchLog(Contract):
    """The runtime patch log of one candidate."""

    candidate: str
    descriptors: tuple[PatchDescriptor, ...]
    refusals: tuple[Refusal, ...] = ()
    num_graphs: Count = 0
    num_guard_misses: Count = 0
    compile_s: float | None = None
    rollback: RollbackProof | None = None
    covered_share: Share | None = None
    schema_version: str = "agnitra.patch.v1"
