"""The tables of a profile as pandas frames with fixed columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agnitra_lab.contracts import Contract, GpuSample, KernelEvent, NodeEvent, OpEvent
from agnitra_lab.profiler.event_table import Kind
from agnitra_lab.profiler.memory import MEMORY_COLUMNS
from agnitra_lab.profiler.places import METHODS, OWNERS, Attribution

if TYPE_CHECKING:
    import pandas as pd

OP_COLUMNS = tuple(OpEvent.model_fields)
KERNEL_COLUMNS = tuple(KernelEvent.model_fields)
NODE_COLUMNS = tuple(NodeEvent.model_fields)
GPU_COLUMNS = tuple(GpuSample.model_fields)
MODULE_COLUMNS = ("module_path", "latency_ms", "cpu_ms", "device_ms", "share", "num_calls", "num_nodes")
EVENT_COLUMNS = ("name", "kind", "thread", "start_ns", "duration_ns", "correlation", "linked", "sequence",
                 "owner", "method", "module_path", "node")  # fmt: skip

__all__ = ["EVENT_COLUMNS", "GPU_COLUMNS", "KERNEL_COLUMNS", "MEMORY_COLUMNS", "MODULE_COLUMNS", "NODE_COLUMNS",
           "OP_COLUMNS", "contract_frame", "event_frame", "module_frame", "write_events"]  # fmt: skip


def contract_frame(rows: Sequence[Contract], columns: Sequence[str]) -> pd.DataFrame:
    """Return contracts as a frame, one row each, with `columns` even when there are no rows."""
    import pandas as pd

    return pd.DataFrame({name: [getattr(row, name) for row in rows] for name in columns}, columns=list(columns))


def module_frame(ops: Sequence[OpEvent]) -> pd.DataFrame:
    """Return one row per module: what its own ops took, without those of the modules inside it; largest first."""
    import pandas as pd

    groups: dict[str | None, list[OpEvent]] = {}
    for row in ops:
        groups.setdefault(row.module_path, []).append(row)
    rows = []
    for path, mine in groups.items():
        device = [row.device_ms for row in mine if row.device_ms is not None]
        num_nodes = len({row.node for row in mine if row.node is not None})
        rows.append(
            (
                path, sum(row.latency_ms for row in mine), sum(row.cpu_ms for row in mine),
                sum(device) if device else None, sum(row.share for row in mine),
                sum(row.num_calls for row in mine), num_nodes,
            )
        )  # fmt: skip
    rows.sort(key=lambda entry: -entry[1])
    return pd.DataFrame(rows, columns=list(MODULE_COLUMNS))


def event_frame(attribution: Attribution | None) -> pd.DataFrame:
    """Return every event of the profile with its place, in time order: what `events.parquet` holds."""
    import pandas as pd

    if attribution is None:
        return pd.DataFrame(columns=list(EVENT_COLUMNS))
    table, places = attribution.table, attribution.places
    order = np.argsort(table.start_ns, kind="stable")
    kinds = [kind.name.lower() for kind in Kind]
    origin_ns = int(table.start_ns.min()) if len(table) else 0

    def category(codes: Any, names: Sequence[str]) -> Any:
        distinct = dict.fromkeys(names)
        if len(distinct) == len(names):
            return pd.Categorical.from_codes(codes[order], categories=pd.Index(list(names), dtype=object))
        index = {name: place for place, name in enumerate(distinct)}
        renumbered = np.array([*(index[name] for name in names), -1], np.int32)
        return pd.Categorical.from_codes(renumbered[codes[order]], categories=pd.Index(list(distinct), dtype=object))

    return pd.DataFrame(
        {
            "name": category(table.name, table.names),
            "kind": category(table.kind, kinds),
            "thread": table.thread[order],
            "start_ns": table.start_ns[order] - origin_ns,
            "duration_ns": table.duration_ns[order],
            "correlation": table.correlation[order],
            "linked": table.linked[order],
            "sequence": table.sequence[order],
            "owner": category(places.owner, OWNERS),
            "method": category(places.method, METHODS),
            "module_path": category(places.path, places.paths),
            "node": category(places.label, [label.text for label in places.labels]),
        }
    )


def write_events(events: pd.DataFrame, path: Any) -> None:
    """Write an event frame as Parquet in 12 bytes an event or less, from a thousand events on.

    Args:
        events: from `event_frame`.
        path: the file.

    Source: start times as differences, the other numbers with equal bytes together: zstd then finds the leading zeros
        (10.2 bytes an event instead of 15 for 3,546 events of a compiled prefill, of which pandas' own notes were 1.2).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(events, preserve_index=False).replace_schema_metadata(None)
    names = [name for name in EVENT_COLUMNS if isinstance(events[name].dtype, _category_type())]
    numbers = [name for name in EVENT_COLUMNS if name not in names]
    encodings = dict.fromkeys(numbers, "BYTE_STREAM_SPLIT") | {"start_ns": "DELTA_BINARY_PACKED"}
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=names,
        column_encoding=encodings,
        write_statistics=False,
        row_group_size=1 << 20,
    )


def _category_type() -> Any:
    import pandas as pd

    return pd.CategoricalDtype
