"""Telemetry: what a profile gives to its user, as the seed's JSON record and as pandas frames built when asked for."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agnitra_lab.contracts import (
    Bottleneck,
    GraphHandoff,
    KernelEvent,
    NodeEvent,
    OpEvent,
    TelemetryRecord,
)
from agnitra_lab.errors import RunStoreError
from agnitra_lab.profiler import frames
from agnitra_lab.profiler.places import Attribution
from agnitra_lab.redact import redact, redact_texts

if TYPE_CHECKING:
    import pandas as pd

JSON_FILE = "telemetry.json"
PARQUET_FILE = "events.parquet"


@dataclass(eq=False, repr=False)
class Telemetry:
    """One profile.

    Attributes:
        record: the telemetry JSON as a contract; its `events` and `kernels` hold the 50 largest rows.
        value: what the profiled callable returned.
        all_ops: every row of the op table, largest first; they sum to `record.total_self_ms`.
        all_kernels: every row of the kernel table, largest first.
        all_nodes: every row of the node table, in graph order; their times sum to `record.total_self_ms`.
        graph: the captured graph of the root module that took the most time, None when there is none.
        graph_capture_ms: what tracing the graphs took, after the profile.
        attribution: every event with its place, None when the body ran unprofiled.
        memory_timeline: of the memory pass, None without one.
    """

    record: TelemetryRecord
    value: Any = None
    all_ops: tuple[OpEvent, ...] = ()
    all_kernels: tuple[KernelEvent, ...] = ()
    all_nodes: tuple[NodeEvent, ...] = ()
    graph: GraphHandoff | None = None
    graph_capture_ms: float = 0.0
    attribution: Attribution | None = None
    memory_timeline: pd.DataFrame | None = None

    @property
    def bottleneck(self) -> Bottleneck | None:
        """The row that takes the largest self time, None when nothing ran."""
        return self.record.bottleneck

    @cached_property
    def ops(self) -> pd.DataFrame:
        """One row per op at a node (or in a module), largest first. Columns: `frames.OP_COLUMNS`."""
        return frames.contract_frame(self.all_ops, frames.OP_COLUMNS)

    @cached_property
    def kernels(self) -> pd.DataFrame:
        """One row per GPU kernel, launching op and node; empty on a CPU. Columns: `frames.KERNEL_COLUMNS`."""
        return frames.contract_frame(self.all_kernels, frames.KERNEL_COLUMNS)

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """One row per graph node, fused set, parameter and other owner. Columns: `frames.NODE_COLUMNS`."""
        return frames.contract_frame(self.all_nodes, frames.NODE_COLUMNS)

    @cached_property
    def modules(self) -> pd.DataFrame:
        """One row per module, by the time of its own ops. Columns: `frames.MODULE_COLUMNS`."""
        return frames.module_frame(self.all_ops)

    @cached_property
    def memory(self) -> pd.DataFrame:
        """One row per allocation and free of the memory pass, in time order. Columns: `frames.MEMORY_COLUMNS`.

        Empty without such a pass: a cell that runs once has none unless asked (`%%agnitra_profile --memory`).
        """
        if self.memory_timeline is not None:
            return self.memory_timeline
        return frames.contract_frame((), frames.MEMORY_COLUMNS)

    @cached_property
    def gpu(self) -> pd.DataFrame:
        """One row per NVML sample; empty without a GPU. Columns: `frames.GPU_COLUMNS`."""
        return frames.contract_frame(self.record.gpu.samples, frames.GPU_COLUMNS)

    @cached_property
    def events(self) -> pd.DataFrame:
        """Every event, as in the Parquet file. Columns: `frames.EVENT_COLUMNS`."""
        return frames.event_frame(self.attribution)

    def to_json(self) -> str:
        """Return the telemetry JSON, redacted."""
        return _json_of(self.record)

    def compare(self, candidate: Telemetry) -> pd.DataFrame:
        """Compare with another capture of the same work, node by node; this one is the baseline.

        Args:
            candidate: the other capture.

        Returns:
            One row per node of either, the largest difference first. Columns: `compare.COMPARE_COLUMNS`.
        """
        from agnitra_lab.profiler.compare import compare_nodes

        return compare_nodes(self.nodes, candidate.nodes)

    def export_trace(self, path: str | os.PathLike[str]) -> Path:
        """Write the events as a Chrome trace, for Perfetto and HolisticTraceAnalysis.

        Args:
            path: of the file, ending in .json or .json.gz.

        Raises:
            UsageError: when it ends otherwise.
            RunStoreError: when it cannot be written.
        """
        from agnitra_lab.profiler.trace import write_trace

        device = self.record.device
        return write_trace(self.events, path, device_name=device.name if device is not None else None)

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write telemetry.json and events.parquet.

        Args:
            directory: made when missing.

        Returns:
            The paths of the two files.

        Raises:
            RunStoreError: when the directory cannot be made or written.
        """
        folder = Path(directory)
        record_path, events_path = folder / JSON_FILE, folder / PARQUET_FILE
        record = self.record.model_copy(update={"parquet": PARQUET_FILE})
        events = self.events.copy()
        for column in ("name", "node", "module_path"):
            events[column] = events[column].astype("category")
            events[column] = events[column].cat.rename_categories(redact_categories(events[column].cat.categories))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(events_path, lambda path: frames.write_events(events, path))
            _replace(record_path, lambda path: path.write_text(_json_of(record) + "\n", encoding="utf-8"))
        except OSError as error:
            raise RunStoreError(
                f"Telemetry cannot be written to {folder} ({error.strerror or error}).",
                hint="Give a folder that you may write to.",
            ) from error
        return [record_path, events_path]

    def __repr__(self) -> str:
        record = self.record
        name = f"{record.name!r}, " if record.name else ""
        wall = f"{record.wall_ms:.3f} ms" if record.wall_ms is not None else "not timed"
        if record.bottleneck is None:
            return f"Telemetry({name}{wall}, no op ran)"
        path = record.bottleneck.module_path
        place = record.bottleneck.node or (path or "the root module" if path is not None else "no module")
        share = f", {record.bottleneck.share:.0%} of {record.total_self_ms:.3f} ms" if record.bottleneck.share else ""
        return f"Telemetry({name}{wall}, bottleneck {record.bottleneck.op} at {place}{share})"


def redact_categories(categories: Any) -> list[str]:
    """Return category names without credentials; names that become equal stay apart by a counter."""
    seen: dict[str, int] = {}
    names = []
    for name in redact_texts(map(str, categories)):
        count = seen[name] = seen.get(name, 0) + 1
        names.append(name if count == 1 else f"{name} ({count})")
    return names


def _json_of(record: TelemetryRecord) -> str:
    return json.dumps(redact(record.model_dump(mode="json")), indent=2, ensure_ascii=False)


def _replace(path: Path, write: Any) -> None:
    """Write to a temporary name first, so that a file that has its name is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
