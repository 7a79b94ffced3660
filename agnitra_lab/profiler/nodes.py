"""The node table: what each graph node, set of fused nodes and other owner costs, against what the device allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agnitra_lab.contracts import DevicePeaks, GraphNode, NodeEvent, OpEvent
from agnitra_lab.graph.compiled import node_set_cost
from agnitra_lab.profiler.graphs import RootGraphs
from agnitra_lab.profiler.places import Attribution, Label
from agnitra_lab.profiler.regions import REGION
from agnitra_lab.profiler.rows import OpTables


@dataclass
class _Entry:
    """Rows of the op table that share a place."""

    label: Label | None
    rows: list[OpEvent]


def node_events(
    attribution: Attribution, tables: OpTables, graphs: RootGraphs, peaks: DevicePeaks | None = None
) -> tuple[NodeEvent, ...]:
    """Sum the op table by place.

    Args:
        attribution: the events.
        tables: their op table.
        graphs: the graphs of the profile's roots.
        peaks: measured ceilings, for the share of the roofline.

    Returns:
        Nodes of eager graphs in execution order (those that took no time as well), then fused sets, parameters,
        optimisers, modules, code outside of the graph and the residual, each by time. Their times sum to the total of
        the op table. FLOPs and bytes are of one execution; rates and the share of the roofline compare them with the
        time of the forward pass alone.
    """
    entries = _entries(attribution, tables)
    events = []
    for root, graph in graphs.graphs.items():
        if graph.is_compiled:
            continue
        for node in graph.nodes:
            label = Label(graph.prefix + node.name, (node,), root)
            entry = entries.pop(label.text, _Entry(label, []))
            events.append(_event(entry, graphs, peaks))
    rest = sorted(entries.values(), key=lambda entry: -sum(row.latency_ms for row in entry.rows))
    return tuple([*events, *(_event(entry, graphs, peaks) for entry in rest)])


def _entries(attribution: Attribution, tables: OpTables) -> dict[object, _Entry]:
    places = attribution.places
    entries: dict[object, _Entry] = {}
    for row, entry in zip(tables.ops, tables.sums, strict=True):
        label_id = int(places.label[entry.row])
        label = places.labels[label_id] if label_id >= 0 else None
        key: object = label.text if label is not None else (row.owner, row.module_path, row.method)
        entries.setdefault(key, _Entry(label, [])).rows.append(row)
    return entries


def _event(entry: _Entry, graphs: RootGraphs, peaks: DevicePeaks | None) -> NodeEvent:
    label, rows = entry.label, entry.rows
    nodes = label.nodes if label is not None else ()
    last = nodes[-1] if nodes else None
    largest = max(rows, key=lambda row: row.latency_ms, default=None)
    latency_ms = sum(row.latency_ms for row in rows)
    device = [row.device_ms for row in rows if row.device_ms is not None]
    num_calls = _num_calls(_op(label, largest), rows)
    flops, bytes_moved = _cost(label, graphs)
    forward_ms = sum(row.latency_ms for row in rows if row.method != "sequence_number")
    each_ms = forward_ms / num_calls if num_calls else 0.0
    return NodeEvent(
        node=label.text if label is not None else None,
        op=_op(label, largest),
        latency_ms=latency_ms,
        cpu_ms=sum(row.cpu_ms for row in rows),
        device_ms=sum(device) if device else None,
        share=min(1.0, sum(row.share for row in rows)),
        num_calls=num_calls,
        num_nodes=len(nodes),
        owner=largest.owner if largest is not None else "fx_node",
        method=largest.method if largest is not None else None,
        confidence=largest.confidence if largest is not None else None,
        module_path=largest.module_path if largest is not None else last.module_path if last is not None else None,
        source=next((node.source for node in nodes if node.source), None),
        phase=graphs.phases.get(label.root) if label is not None else None,
        shape=last.shape if last is not None else (),
        dtype=last.dtype if last is not None else None,
        flops=flops,
        bytes_moved=bytes_moved,
        intensity_flop_per_byte=flops / bytes_moved if flops and bytes_moved else None,
        tflop_per_s=_rate(flops, each_ms, 1e9),
        gb_per_s=_rate(bytes_moved, each_ms, 1e6),
        roofline_share=_roofline_share(flops, bytes_moved, each_ms, peaks),
    )


def _cost(label: Label | None, graphs: RootGraphs) -> tuple[float | None, float | None]:
    # A region as a whole stands for what none of its kernels has: its nodes' work is counted with them.
    if label is None or not label.nodes or label.op == REGION:
        return None, None
    if len(label.nodes) == 1:
        return label.nodes[0].flops, label.nodes[0].bytes_moved
    handoff = graphs.handoffs.get(label.root)
    if handoff is None:
        return None, None
    return node_set_cost(handoff, [node.name for node in label.nodes])


def _op(label: Label | None, largest: OpEvent | None) -> str | None:
    if label is not None and label.op is not None:
        return label.op
    if label is not None and label.nodes:
        return label.nodes[-1].op
    return largest.op if largest is not None else None


def _num_calls(op: str | None, rows: Sequence[OpEvent]) -> int:
    # The node's own op tells how often it ran; the ops inside it may run more often.
    own = [row.num_calls for row in rows if row.op == op]
    return max(own or [row.num_calls for row in rows], default=0)


def _rate(amount: float | None, latency_ms: float, scale: float) -> float | None:
    return amount / (latency_ms * scale) if amount and latency_ms > 0 else None


def _roofline_share(
    flops: float | None, bytes_moved: float | None, latency_ms: float, peaks: DevicePeaks | None
) -> float | None:
    if peaks is None or latency_ms <= 0:
        return None
    floors_ms = []
    if flops and peaks.gemm_tflop_per_s:
        floors_ms.append(flops / (peaks.gemm_tflop_per_s * 1e9))
    if bytes_moved and peaks.copy_bandwidth_gb_per_s:
        floors_ms.append(bytes_moved / (peaks.copy_bandwidth_gb_per_s * 1e6))
    return max(floors_ms) / latency_ms if floors_ms else None


def peak_dtype(nodes: Sequence[GraphNode]) -> str | None:
    """Return the dtype in which most of the FLOPs are done, None without FLOPs."""
    spent: dict[str, float] = {}
    for node in nodes:
        if node.flops and node.dtype:
            spent[node.dtype] = spent.get(node.dtype, 0.0) + node.flops
    return max(spent, key=lambda dtype: spent[dtype], default=None)
