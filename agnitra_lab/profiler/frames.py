"""The tables of a profile as pandas frames with fixed columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agnitra_lab.contracts import Contract, GpuSample, GraphNode, KernelEvent, MemoryTelemetry, OpEvent
from agnitra_lab.profiler.attribution import Attribution
from agnitra_lab.profiler.event_table import Kind

if TYPE_CHECKING:
    import pandas as pd

OP_COLUMNS = tuple(OpEvent.model_fields)
KERNEL_COLUMNS = tuple(KernelEvent.model_fields)
GPU_COLUMNS = tuple(GpuSample.model_fields)
MEMORY_COLUMNS = ("quantity", "bytes")
MODULE_COLUMNS = ("module_path", "latency_ms", "cpu_ms", "device_ms", "share", "num_calls", "num_nodes")
NODE_COLUMNS = ("node", "op", "module_path", "source", "latency_ms", "cpu_ms", "device_ms", "share", "num_calls",
                "shape", "dtype", "flops", "bytes_moved", "tflop_per_s", "gb_per_s")  # fmt: skip
EVENT_COLUMNS = ("name", "kind", "thread", "start_ns", "duration_ns", "self_ns", "correlation", "linked", "sequence",
                 "method", "module_path", "node")  # fmt: skip


def contract_frame(rows: Sequence[Contract], columns: Sequence[str]) -> pd.DataFrame:
    """Return contracts as a frame, one row each, with `columns` even when there are no rows."""
    import pandas as pd

    return pd.DataFrame([{name: getattr(row, name) for name in columns} for row in rows], columns=list(columns))


def node_frame(ops: Sequence[OpEvent], nodes: Sequence[tuple[str, GraphNode]]) -> pd.DataFrame:
    """Return one row per graph node in graph order: its time, its cost by shapes, and the rates that follow.

    Args:
        ops: the full op table.
        nodes: (printed name, node) of every captured graph.
    """
    import pandas as pd

    spent: dict[str, list[OpEvent]] = {}
    for row in ops:
        if row.node is not None:
            spent.setdefault(row.node, []).append(row)
    rows = []
    for printed, node in nodes:
        mine = spent.get(printed, [])
        latency_ms = sum(row.latency_ms for row in mine)
        rows.append(
            (
                printed, node.op, node.module_path, node.source, latency_ms, *_sums(mine),
                _num_calls(node, mine), node.shape, node.dtype, node.flops, node.bytes_moved,
                _rate(node.flops, latency_ms, 1e9), _rate(node.bytes_moved, latency_ms, 1e6),
            )
        )  # fmt: skip
    return pd.DataFrame(rows, columns=list(NODE_COLUMNS))


def module_frame(ops: Sequence[OpEvent]) -> pd.DataFrame:
    """Return one row per module: what its own ops took, without those of the modules inside it; largest first."""
    import pandas as pd

    groups: dict[str | None, list[OpEvent]] = {}
    for row in ops:
        groups.setdefault(row.module_path, []).append(row)
    rows = []
    for path, mine in groups.items():
        num_nodes = len({row.node for row in mine if row.node is not None})
        latency_ms = sum(row.latency_ms for row in mine)
        rows.append((path, latency_ms, *_sums(mine), sum(row.num_calls for row in mine), num_nodes))
    rows.sort(key=lambda entry: -entry[1])
    return pd.DataFrame(rows, columns=list(MODULE_COLUMNS))


def memory_frame(memory: MemoryTelemetry | None) -> pd.DataFrame:
    """Return memory quantities as rows; a quantity that is not known is missing, never 0."""
    import pandas as pd

    known = memory.model_dump(exclude={"source"}, exclude_none=True) if memory is not None else {}
    rows = [(name.removesuffix("_bytes"), value) for name, value in known.items()]
    return pd.DataFrame(rows, columns=list(MEMORY_COLUMNS))


def event_frame(attribution: Attribution | None) -> pd.DataFrame:
    """Return every event of the profile with its place: what `events.parquet` holds."""
    import pandas as pd

    if attribution is None:
        return pd.DataFrame(columns=list(EVENT_COLUMNS))
    table, nesting, places = attribution.table, attribution.nesting, attribution.places
    kinds = np.array([kind.name.lower() for kind in Kind])
    columns: dict[str, Any] = {
        "name": pd.Categorical(table.name),
        "kind": pd.Categorical(kinds[table.kind]),
        "thread": table.thread,
        "start_ns": table.start_ns - (int(table.start_ns.min()) if len(table) else 0),
        "duration_ns": table.duration_ns,
        "self_ns": nesting.self_ns,
        "correlation": table.correlation,
        "linked": table.linked,
        "sequence": table.sequence,
        "method": pd.Categorical([place.method for place in places]),
        "module_path": pd.Categorical([place.module_path for place in places]),
        "node": pd.Categorical([place.node for place in places]),
    }
    return pd.DataFrame(columns)


def _num_calls(node: GraphNode, rows: Sequence[OpEvent]) -> int:
    # The node's own op tells how often it ran; the ops inside it may run more often.
    own = [row.num_calls for row in rows if row.op == node.op]
    return max(own or [row.num_calls for row in rows], default=0)


def _sums(rows: Sequence[OpEvent]) -> tuple[float, float | None, float]:
    device = [row.device_ms for row in rows if row.device_ms is not None]
    return sum(row.cpu_ms for row in rows), sum(device) if device else None, sum(row.share for row in rows)


def _rate(amount: float | None, latency_ms: float, scale: float) -> float | None:
    return amount / (latency_ms * scale) if amount and latency_ms > 0 else None
