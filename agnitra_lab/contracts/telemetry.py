"""The telemetry JSON of a profile: the seed's four keys, and what gives them meaning.

A document with the seed's keys alone is valid; everything else is optional and absent values are null.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from agnitra_lab.contracts.base import Contract, Count, NonNegative, Share
from agnitra_lab.contracts.device import DeviceInfo, GpuSample


class Bottleneck(Contract):
    """The op (or graph node) that takes the largest self time."""

    op: str
    latency_ms: NonNegative
    shape: tuple[int, ...]
    node: str | None = None
    """FX node name, None when the code could not be traced."""
    module_path: str | None = None
    source: str | None = None
    """file:line of the user's code."""
    share: Share | None = None
    """Of the profile's total self time."""
    num_calls: Count | None = None
    confidence: Share | None = None


class OpEvent(Contract):
    """One row of the op table: an op at a graph node (or in a module), summed over its calls."""

    op: str
    latency_ms: NonNegative
    """Self time: CPU self time without a GPU, else the time of the kernels it launched."""
    cpu_ms: NonNegative
    device_ms: NonNegative | None
    num_calls: Count
    share: Share
    shape: tuple[int, ...] = ()
    node: str | None = None
    module_path: str | None = None
    method: Literal["fx_node", "module", "outside_graph"] = "outside_graph"


class KernelEvent(Contract):
    """One row of the kernel table: a GPU kernel summed over its launches."""

    kernel: str
    device_ms: NonNegative
    num_launches: Count
    op: str | None = None
    node: str | None = None


class GpuTelemetry(Contract):
    """GPU truth of the capture. `gpu_utilisation` is the union of kernel intervals over wall time."""

    gpu_utilisation: Share | None = None
    reason: str | None = None
    """Why a value is null, in plain words."""
    busy_ms: NonNegative | None = None
    sample_period_ms: NonNegative | None = None
    samples: tuple[GpuSample, ...] = ()


class Behavior(Contract):
    """How the device behaved over the capture."""

    gpu_util_mean: Share | None = None
    """Mean of the NVML readings; their window is 1/6 to 1 s, so short captures have none."""
    reason: str | None = None
    power_w_mean: NonNegative | None = None
    cpu_utilisation: NonNegative | None = None
    """CPU seconds over wall seconds: above 1 when several threads worked."""


class MemoryTelemetry(Contract):
    """Memory over the capture, in bytes."""

    peak_memory_bytes: Count | None = None
    allocated_before_bytes: Count | None = None
    allocated_after_bytes: Count | None = None
    parameter_bytes: Count | None = None
    source: str | None = None


class TelemetryRecord(Contract):
    """The seed's telemetry JSON."""

    bottleneck: Bottleneck | None
    events: tuple[OpEvent, ...]
    gpu: GpuTelemetry
    behavior: Behavior
    schema_version: str = "agnitra.telemetry.v1"
    name: str | None = None
    workload: str | None = None
    phase: Literal["prefill", "decode"] | None = None
    wall_ms: NonNegative | None = None
    """Of one call, without the profiler, where the target can be repeated; else of the profiled cell."""
    profiled_ms: NonNegative | None = None
    num_repeats: Count | None = None
    items_per_call: Count | None = None
    item_unit: str | None = None
    tokens_per_second: NonNegative | None = None
    total_self_ms: NonNegative | None = None
    attributed_share: Share | None = None
    kernels: tuple[KernelEvent, ...] = ()
    memory: MemoryTelemetry | None = None
    device: DeviceInfo | None = None
    num_events: Count | None = None
    num_graph_nodes: Count | None = None
    graph_note: str | None = None
    """Why there is no FX graph, when there is none."""
    notes: tuple[str, ...] = ()
    parquet: Annotated[str | None, Field(description="Path of the full event table, relative to this file.")] = None
