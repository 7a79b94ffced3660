"""The telemetry JSON of a profile: the seed's four keys, and what gives them meaning.

A document with the seed's keys alone is valid; everything else is optional and absent values are null.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from agnitra_lab.contracts.base import Contract, Count, NonNegative, Share
from agnitra_lab.contracts.device import DeviceInfo, DevicePeaks, GpuSample


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


Owner = Literal["fx_node", "param_grad", "optimizer", "outside_graph"]
"""Which part of the program spent the time.

fx_node: a node (or set of nodes) of a captured graph; where the graph is not known, the module says where.
param_grad: accumulation into one parameter's gradient. optimizer: an optimiser's step or zero_grad.
outside_graph: code that ran outside of any module, such as a loss written in the training loop.
"""

Method = Literal[
    "order", "partial_order", "sequence_number", "hook", "range", "provenance", "replay", "reference", "region",
    "module", "fx_node", "outside_graph",
]  # fmt: skip
"""How it is known: order (the ops of a module call are the graph's, one by one), partial_order (most of them),
sequence_number (a backward op by its forward op), hook (a hook on the parameter), range (a range that torch opens),
provenance (the source of Inductor's kernel), replay (a place in a CUDA graph's launch order), reference (the same
kernels in another capture), region (one compiled region as a whole), module (a module marker alone), outside_graph
(no module was running). Schema v1 wrote fx_node for order.
"""


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
    method: Method | None = "outside_graph"
    owner: Owner | None = None
    """None: it is not known what spent this time; the residual."""
    confidence: Share | None = None


class KernelEvent(Contract):
    """One row of the kernel table: a GPU kernel summed over its launches."""

    kernel: str
    device_ms: NonNegative
    num_launches: Count
    op: str | None = None
    node: str | None = None
    module_path: str | None = None
    owner: Owner | None = None
    method: Method | None = None
    confidence: Share | None = None


class NodeEvent(Contract):
    """One row of the node table: what one graph node, set of fused nodes, or other owner costs, of one call."""

    node: str | None
    """Name of the node; names joined by " + " for a fused set; "param_grad:NAME" and "optimizer:NAME" for those
    owners; None for time of a module, or of no owner, that is tied to no node."""
    op: str | None
    latency_ms: NonNegative
    cpu_ms: NonNegative
    device_ms: NonNegative | None
    share: Share
    num_calls: Count
    num_nodes: Count = 1
    owner: Owner | None = None
    method: Method | None = None
    confidence: Share | None = None
    module_path: str | None = None
    source: str | None = None
    phase: Literal["prefill", "decode"] | None = None
    shape: tuple[int, ...] = ()
    dtype: str | None = None
    flops: NonNegative | None = None
    bytes_moved: NonNegative | None = None
    intensity_flop_per_byte: NonNegative | None = None
    tflop_per_s: NonNegative | None = None
    gb_per_s: NonNegative | None = None
    roofline_share: NonNegative | None = None
    """The time that the measured ceilings allow over the time spent; above 1 only when a cache beat the ceiling."""


class Hotspot(Contract):
    """Equal places of numbered layers as one: what "layers.*.mlp.up_proj" costs in all, by op and kernel."""

    place: str
    """Module path with "*" for the numbers of layers; else the name of the owner."""
    op: str
    kernel: str | None = None
    """None for time of the op that no kernel has."""
    latency_ms: NonNegative
    share: Share
    num_calls: Count
    num_places: Count = 1


class OwnerShares(Contract):
    """Shares of the self time, 0 to 1; the five sum to 1."""

    fx_node: Share
    param_grad: Share
    optimizer: Share
    outside_graph: Share
    residual: Share
    """Of no known owner."""
    exact_node: Share
    """Of `fx_node`, what is tied to a node or set of nodes rather than to a module alone; not part of the sum."""


class Overhead(Contract):
    """What profiling cost, calibrated in the same process."""

    marker_us: NonNegative | None = None
    """One module marker, entered and left under the profiler."""
    num_markers: Count | None = None
    event_us: NonNegative | None = None
    """The profiler's own cost of one op event."""
    launch_us: NonNegative | None = None
    """Beside its op event, the profiler's cost of one kernel launch; None without a GPU."""
    num_launches: Count | None = None
    marker_ms: NonNegative | None = None
    """All markers of one call."""
    share: Share | None = None
    """Of the profiled wall time, what profiling took."""
    is_measured: bool = False
    """Whether `share` compares with plain calls; else it is estimated from the unit costs."""
    read_ms: NonNegative | None = None
    """From the end of the code to the tables, CPU time of the process."""
    graph_ms: NonNegative | None = None
    """Of it, tracing the graph."""


class IdleTime(Contract):
    """The device's time without a kernel, by cause; the parts sum to idle_ms."""

    idle_ms: NonNegative
    host_wait_ms: NonNegative
    """The next kernel had not been launched yet: launch-bound."""
    kernel_wait_ms: NonNegative
    """The next kernel was launched already: dependencies and the device's own launch latency."""
    unknown_ms: NonNegative
    """The launch of the next kernel is not in the capture."""
    launch_bound_share: Share | None = None
    """host_wait_ms over the wall time."""
    num_gaps: Count = 0


class Timeline(Contract):
    """The capture in equal bins, for a picture."""

    bin_ms: NonNegative
    host_busy: tuple[Share, ...] = ()
    """Share of each bin in which the profiled thread was inside an op."""
    device_busy: tuple[Share, ...] = ()
    """Share of each bin in which a kernel ran; empty without a GPU."""


class PhaseTime(Contract):
    """One phase of a language model's calls: prefill or decode."""

    phase: Literal["prefill", "decode"]
    num_calls: Count
    wall_ms: NonNegative
    """Host time inside the calls."""
    latency_ms: NonNegative
    """Self time: kernels on a GPU, ops on a CPU."""
    num_tokens: Count | None = None
    tokens_per_second: NonNegative | None = None


class GpmMetrics(Contract):
    """Hopper's own counters over the capture (NVML GPM), each a share of its peak. An absent value is None."""

    sm_utilisation: NonNegative | None = None
    sm_occupancy: NonNegative | None = None
    tensor_utilisation: NonNegative | None = None
    dram_bandwidth_utilisation: NonNegative | None = None
    fp32_utilisation: NonNegative | None = None
    reason: str | None = None
    """Why values are None."""


class GpuTelemetry(Contract):
    """GPU truth of the capture. `gpu_utilisation` is the union of kernel intervals over wall time."""

    gpu_utilisation: Share | None = None
    reason: str | None = None
    """Why a value is null, in plain words."""
    busy_ms: NonNegative | None = None
    sample_period_ms: NonNegative | None = None
    samples: tuple[GpuSample, ...] = ()
    num_samples: Count | None = None
    energy_j: NonNegative | None = None
    """Of the whole capture, from the driver's counter."""
    energy_reason: str | None = None
    throttle: tuple[str, ...] = ()
    """Every reason for lower clocks that a sample showed, in the driver's words."""
    gpm: GpmMetrics | None = None
    idle: IdleTime | None = None


class Behavior(Contract):
    """How the device behaved over the capture."""

    gpu_util_mean: Share | None = None
    """Mean of the NVML readings; their window is 1/6 to 1 s, so short captures have none."""
    reason: str | None = None
    power_w_mean: NonNegative | None = None
    cpu_utilisation: NonNegative | None = None
    """CPU seconds over wall seconds: above 1 when several threads worked."""


class MemoryShare(Contract):
    """Bytes alive at the peak that one node (or other place) had allocated."""

    node: str | None
    module_path: str | None
    num_bytes: Count


class MemoryTelemetry(Contract):
    """Memory over the capture, in bytes."""

    peak_memory_bytes: Count | None = None
    allocated_before_bytes: Count | None = None
    allocated_after_bytes: Count | None = None
    parameter_bytes: Count | None = None
    source: str | None = None
    peak_nodes: tuple[MemoryShare, ...] = ()
    """What was alive at the peak, largest first; empty unless a memory pass ran."""
    reason: str | None = None
    """Why a value is null."""


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
    nodes: tuple[NodeEvent, ...] = ()
    hotspots: tuple[Hotspot, ...] = ()
    owners: OwnerShares | None = None
    phases: tuple[PhaseTime, ...] = ()
    timeline: Timeline | None = None
    peaks: DevicePeaks | None = None
    """The device's measured ceilings, where they were measured: what `roofline_share` compares with."""
    overhead: Overhead | None = None
    num_events: Count | None = None
    num_dropped_events: Count | None = None
    num_graph_nodes: Count | None = None
    graph_note: str | None = None
    """Why there is no FX graph, when there is none."""
    notes: tuple[str, ...] = ()
    parquet: Annotated[str | None, Field(description="Path of the full event table, relative to this file.")] = None
