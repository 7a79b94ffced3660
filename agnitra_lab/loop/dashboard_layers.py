"""A filed profile -> its time by module, op and kernel, layer by layer, from every event that it recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.profiler.hotspots import place_of
from agnitra_lab.profiler.telemetry import PARQUET_FILE
from agnitra_lab.report.dashboard_record import LayerProfile, Source

REST = "rest"
ROOT = "the root module"
COMPILED = "compiled graph"
_OWNERS = {"param_grad": "parameter gradients", "optimizer": "optimizer", "outside_graph": "outside the graph"}
_RESIDUAL = "residual"
_NESTED = ("op", "marker", "annotation")
_COLUMNS = ("name", "kind", "thread", "start_ns", "duration_ns", "correlation", "linked", "owner", "module_path",
            "node")  # fmt: skip
_TOLERANCE = 1e-3

_Key = tuple[str, str, str | None]
_Spent = dict[_Key, tuple[float, float]]


def layer_profile(record: TelemetryRecord, directory: Path, *, run_id: str, topic: str) -> LayerProfile | None:
    """Split a profile's self time by module, op and kernel.

    Args:
        record: its telemetry.
        directory: of the run; its event table is read when it is there.
        run_id, topic: of the run.

    Returns:
        The rows; None when nothing ran. Sums of events that do not come to the record's self time are not used: the
        record's own sums then stand for them.
    """
    total_ms = record.total_self_ms or sum(event.latency_ms for event in record.events)
    if not total_ms:
        return None
    source: Source = "events"
    spent = _from_events(record, directory / PARQUET_FILE)
    if not spent or abs(_total(spent) - total_ms) > _TOLERANCE * total_ms:
        spent, source = _from_record(record), "hotspots" if record.hotspots else "rows"
    rest_ms = total_ms - _total(spent)
    if rest_ms > 1e-6 * total_ms:
        spent[REST, REST, None] = (rest_ms, 0.0)
    modules, ops, kernels = (list(dict.fromkeys(key[place] for key in spent)) for place in range(3))
    named = [kernel for kernel in kernels if kernel is not None]
    rows = sorted(
        (
            (modules.index(module), ops.index(op), -1 if kernel is None else named.index(kernel), time_ms, calls)
            for (module, op, kernel), (time_ms, calls) in spent.items()
        ),
        key=lambda row: -row[3],
    )
    return LayerProfile(
        run_id=run_id, topic=topic, device=record.device.name if record.device else None, wall_ms=record.wall_ms,
        total_self_ms=total_ms, source=source, modules=tuple(map(str, modules)), ops=tuple(map(str, ops)),
        kernels=tuple(named), rows=tuple(rows),
    )  # fmt: skip


def _total(spent: _Spent) -> float:
    return sum(time_ms for time_ms, _ in spent.values())


def _from_record(record: TelemetryRecord) -> _Spent:
    sums: dict[_Key, list[float]] = defaultdict(lambda: [0.0, 0.0])
    rows: Iterable[tuple[_Key, float, int]]
    if record.hotspots:
        rows = (((spot.place, spot.op, spot.kernel), spot.latency_ms, spot.num_calls) for spot in record.hotspots)
    else:
        rows = (
            ((event.module_path or place_of(event), event.op, None), event.latency_ms, event.num_calls)
            for event in record.events
        )
    for key, time_ms, calls in rows:
        sums[key][0] += time_ms
        sums[key][1] += calls
    return {key: (time_ms, calls) for key, (time_ms, calls) in sums.items()}


def _from_events(record: TelemetryRecord, file: Path) -> _Spent:
    """Sum the events: kernels where a device ran some, else the self times of ops. Empty when they cannot be read."""
    if not file.is_file():
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        present = [name for name in _COLUMNS if name in pq.read_schema(file).names]
        events = _dictionaries(pq.read_table(file, columns=present).to_pandas())
        num_repeats = max(record.num_repeats or 1, 1)
        return _summed(_kernels(events, record) if record.kernels else _ops(events), num_repeats)
    except (OSError, KeyError, pa.ArrowException):
        return {}


def _dictionaries(frame: Any) -> list[dict[str, Any]]:
    """The events that are summed. By pandas: Arrow takes 0.4 s to decode 18,000 of them to Python, this 0.03 s."""
    kept = frame[frame["kind"].isin(("kernel", *_NESTED))]
    columns = {name: _values(kept[name]) for name in kept.columns}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _values(column: Any) -> list[Any]:
    if not hasattr(column, "cat"):
        values: list[Any] = column.tolist()
        return values
    names = column.cat.categories.tolist()
    return [names[code] if code >= 0 else None for code in column.cat.codes.tolist()]


def _summed(rows: Iterable[tuple[_Key, int]], num_repeats: int) -> _Spent:
    sums: dict[_Key, list[int]] = defaultdict(lambda: [0, 0])
    for key, duration_ns in rows:
        sums[key][0] += duration_ns
        sums[key][1] += 1
    return {key: (time_ns / 1e6 / num_repeats, calls / num_repeats) for key, (time_ns, calls) in sums.items()}


def _kernels(events: list[dict[str, Any]], record: TelemetryRecord) -> Iterable[tuple[_Key, int]]:
    launchers = {event["correlation"]: event["name"] for event in events if event["kind"] in _NESTED}
    known = {spot.kernel: spot.op for spot in record.hotspots if spot.kernel is not None}
    for event in events:
        if event["kind"] == "kernel":
            kernel, op = event["name"], launchers.get(event["linked"])
            # A graph's launch is no op: what the same kernel was launched by elsewhere in the record says more.
            if op is None or not op.startswith(("aten::", "triton_", "agnitra")):
                op = known.get(kernel) or op or kernel
            yield (_place(event), op, kernel), event["duration_ns"]


def _ops(events: list[dict[str, Any]]) -> Iterable[tuple[_Key, int]]:
    """Self times: what no op, marker or annotation inside an event has, thread by thread."""
    own: dict[int, int] = {}
    nested = [place for place, event in enumerate(events) if event["kind"] in _NESTED]
    open_on: dict[int, list[int]] = defaultdict(list)
    for place in sorted(nested, key=lambda place: (events[place]["start_ns"], -events[place]["duration_ns"])):
        event, stack = events[place], open_on[events[place]["thread"]]
        while stack and _end(events[stack[-1]]) <= event["start_ns"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= event["duration_ns"]
        own[place] = event["duration_ns"]
        stack.append(place)
    for place, self_ns in own.items():
        event = events[place]
        if event["kind"] == "op" and self_ns > 0:
            yield (_place(event), event["name"], None), self_ns


def _end(event: Mapping[str, Any]) -> int:
    return int(event["start_ns"]) + int(event["duration_ns"])


def _place(event: Mapping[str, Any]) -> str:
    owner = event.get("owner", "fx_node")
    if owner == "optimizer" and event["node"] is not None:
        return str(event["node"])
    if owner != "fx_node":
        return _OWNERS.get(owner, _RESIDUAL)
    if event["module_path"] is None:
        return COMPILED
    return str(event["module_path"]) or ROOT
