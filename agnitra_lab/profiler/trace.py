"""Write a profile's events as a Chrome trace, which Perfetto, chrome://tracing and HolisticTraceAnalysis read."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.errors import RunStoreError, UsageError
from agnitra_lab.profiler.markers import MARKER_PREFIX
from agnitra_lab.redact import redact

if TYPE_CHECKING:
    import pandas as pd

Int64 = NDArray[np.int64]
Texts = NDArray[np.object_]

COLUMNS = ("name", "kind", "thread", "start_ns", "duration_ns")
KINDS = ("op", "marker", "annotation", "runtime", "kernel", "memory")
SUFFIXES = (".json", ".json.gz")

_CATEGORIES = (
    "cpu_op", "user_annotation", "cuda_runtime", "cuda_driver", "cpu_instant_event", "overhead",
    "kernel", "gpu_memcpy", "gpu_memset", "cuda_sync", "gpu_user_annotation", "marker",
)  # fmt: skip
_OP, _ANNOTATION, _RUNTIME, _DRIVER, _INSTANT, _OVERHEAD, _KERNEL, _COPY, _FILL, _SYNC, _GPU_ANNOTATION, _MARKER = (
    range(len(_CATEGORIES))
)
_IDS = {"correlation": 0, "linked": 0, "sequence": -1, "device": 0, "num_bytes": 0}
_PLACES = {"node": "node", "module_path": "module", "owner": "owner", "method": "method"}
_PROFILER_WORK = (
    "Activity Buffer Request", "Buffer Flush", "Command Buffer Full", "Instrumentation", "Lazy Function Loading",
    "Resource", "Runtime Triggered Module Loading",
)  # fmt: skip
_SYNC_NAMES = ("Context Sync", "Event Sync", "Stream Sync", "Stream Wait Event")
_DRIVER_CALL = re.compile(r"cu[A-Z]")
_ENGINE = "autograd::engine::evaluate_function: "
# An end binds to the slice that is open there ("bp"), as a start does.
_FLOW_ENDS = {"source": '"s"', "target": '"f","bp":"e"'}
_HEADS = [f'{{"ph":"X","cat":"{category}","name":' for category in _CATEGORIES]
_HEADS[_INSTANT] = '{"ph":"i","s":"t","cat":"cpu_instant_event","name":'
# Bounds the text held in memory (about 300 bytes an event) while the frame may have millions of rows.
_BLOCK = 50_000
# 100,000 events: 0.1 s and 35 bytes an event; level 9 takes 0.7 s for 26 bytes (one of two CPU cores).
_GZIP_LEVEL = 3


def write_trace(
    events: pd.DataFrame,
    path: str | os.PathLike[str],
    *,
    process_name: str = "agnitra",
    device_name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the events of a profile as a Chrome trace, without our own markers.

    Slices that overlap without nesting get a track of their own, since Perfetto drops them otherwise; their times,
    streams and ids stay what they were. HolisticTraceAnalysis 0.5 rounds to whole microseconds, which gives short
    kernels negative times and stops its breakdowns: set HTA_DISABLE_NS_ROUNDING=1 for it.

    Args:
        events: `telemetry.events`: name, kind, thread, start_ns and duration_ns. Read as far as they are there:
            correlation, linked, sequence, node, module_path, owner, method, num_bytes (of an allocation) and device
            (index of the GPU).
        path: ends in .json, or in .json.gz for a compressed file; its folder is made when missing.
        process_name: what viewers call the process.
        device_name: the GPU's product name.
        metadata: further entries for the head of the file, as JSON values; they win over ours.

    Returns:
        The path.

    Raises:
        UsageError: a name with another ending, a frame without the columns, metadata that is not JSON.
        RunStoreError: when the file cannot be written.

    Source: the Trace Event Format (catapult); torch's names within it from libkineto's `output_json.cpp`.
    """
    target = Path(path)
    if not target.name.endswith(SUFFIXES):
        raise UsageError(
            f"A trace is written as {' or '.join(SUFFIXES)}, and {target.name!r} ends in neither.",
            hint="Viewers go by the ending: name the file trace.json.gz.",
        )
    head = _head(target.name, device_name, metadata)
    slices = _read(events)
    tracks = _lay_out(slices, process_name, device_name)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                _write(file, target.name.endswith(".gz"), chain([head, ",\n".join(tracks)], _blocks(events, slices)))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RunStoreError(
            f"The trace cannot be written to {target} ({error.strerror or error}).",
            hint="Give a file in a folder that you may write to.",
        ) from error
    return target


def _write(file: BinaryIO, is_compressed: bool, texts: Iterable[str]) -> None:
    # No name and no time in the archive: the same events make the same bytes.
    stream = gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) if is_compressed else nullcontext(file)
    with stream as out:
        for text in texts:
            out.write(text.encode())
        out.write(b"\n]\n}\n")


def _head(name: str, device_name: str | None, metadata: Mapping[str, Any] | None) -> str:
    head: dict[str, Any] = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": redact(device_name)}] if device_name else [],
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": 0,
        # HolisticTraceAnalysis asks for the rank and finds it by `"rank":\s+`, so the file's head has its spaces.
        "distributedInfo": {"rank": 0, "world_size": 1, "backend": "none"},
        "traceName": redact(name),
    }
    head.update(redact(dict(metadata or {})))
    if "traceEvents" in head:
        raise UsageError("The metadata of a trace has an entry traceEvents: those are the frame's.", hint="Rename it.")
    try:
        entries = [f"{json.dumps(str(key))}: {json.dumps(value, allow_nan=False)},\n" for key, value in head.items()]
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"The metadata of a trace is written as JSON, and {error}.",
            hint="Give strings, finite numbers, lists and dicts.",
        ) from error
    return "{\n" + "".join(entries) + '"traceEvents": [\n'


def _read(events: pd.DataFrame) -> pd.DataFrame:
    """Return the slices of the trace, outer before inner: the frame's columns and row, with codes for names."""
    import pandas as pd

    missing = [column for column in COLUMNS if column not in events.columns]
    if missing:
        raise UsageError(
            f"A trace needs the columns {', '.join(COLUMNS)}, and the frame lacks {', '.join(missing)}.",
            hint="Give telemetry.events, or the frame read from events.parquet.",
        )
    names, name = _categories(events["name"])
    kinds, kind = _categories(events["kind"])
    unknown = [repr(entry) for entry in kinds if entry not in KINDS] + ["null"] * bool((kind < 0).any())
    if unknown:
        raise UsageError(
            f"An event is one of {', '.join(KINDS)}, and the frame has {', '.join(unknown)}.",
            hint="Give telemetry.events, or the frame read from events.parquet.",
        )
    table = np.array([[_category(entry, text) for text in names] for entry in kinds]).reshape(len(kinds), len(names))
    columns = {"row": np.arange(len(events)), "name": name, "category": table[kind, name]}
    columns |= {column: events[column].to_numpy(np.int64) for column in ("thread", "start_ns", "duration_ns")}
    for column, default in _IDS.items():
        given = events[column].fillna(default) if column in events.columns else pd.Series(default, events.index)
        columns[column] = given.to_numpy(np.int64)
    slices = pd.DataFrame(columns)
    slices["duration_ns"] = slices["duration_ns"].clip(lower=0)
    slices = slices[slices["category"] != _MARKER]
    slices = slices.iloc[np.lexsort((-slices["duration_ns"], slices["start_ns"]))].reset_index(drop=True)
    # CUPTI repeats an annotation on the GPU, later, under the same id and name: from its first to its last kernel.
    annotations = slices[(slices["category"] == _ANNOTATION) & (slices["correlation"] > 0)]
    on_gpu = annotations.index[annotations.duplicated(["name", "correlation"])]
    slices.loc[on_gpu, "category"] = _GPU_ANNOTATION
    return slices


def _categories(column: pd.Series[Any]) -> tuple[list[str], Int64]:
    categorical = column.astype("category").cat
    return [str(name) for name in categorical.categories], np.asarray(categorical.codes, np.int64)


def _category(kind: str, name: str) -> int:
    if kind == "marker" or name.startswith(MARKER_PREFIX):
        return _MARKER
    if kind == "runtime":
        if name.startswith(_PROFILER_WORK):
            return _OVERHEAD
        return _DRIVER if _DRIVER_CALL.match(name) else _RUNTIME
    if kind == "kernel":
        return _SYNC if name in _SYNC_NAMES else {"Memcpy": _COPY, "Memset": _FILL}.get(name.split(" ")[0], _KERNEL)
    return {"op": _OP, "annotation": _ANNOTATION, "memory": _INSTANT}[kind]


def _lay_out(slices: pd.DataFrame, process_name: str, device_name: str | None) -> list[str]:
    """Give every slice its `pid` and `tid`, and return the metadata events that name and order the tracks."""
    category, host = slices["category"].to_numpy(), os.getpid()
    # As torch has it: a GPU is the process of its index, and a stream its thread.
    pid = np.where(category >= _KERNEL, slices["device"], host)
    tid = np.where(category == _GPU_ANNOTATION, _streams(slices), slices["thread"]).astype(np.int64)
    # Torch has process -1 for the profiler's own work, which Perfetto takes for process 0, a GPU.
    profiler = int(tid.max(initial=0)) + 1
    tid[category == _OVERHEAD] = profiler
    keys, track = np.unique(np.stack([pid, tid, _lanes(pid, tid, slices)]), axis=1, return_inverse=True)
    final_tid, free = keys[1].copy(), profiler + 1
    lines = _process(host, process_name, "CPU", 0)
    for process in np.unique(pid[pid != host]).tolist():
        label = f"GPU {process}"
        lines += _process(process, f"{label}: {device_name}" if device_name else label, label, 5_000_000 + process)
    for index, (process, thread, number) in enumerate(keys.T.tolist()):
        title = "profiler" if thread == profiler else f"{'thread' if process == host else 'stream'} {thread}"
        if number:
            final_tid[index], title = free, f"{title}, overlapping {number}"
            free += 1
        lines.append(_named("thread_name", process, final_tid[index], name=title))
        lines.append(_named("thread_sort_index", process, final_tid[index], sort_index=index))
    slices["pid"], slices["tid"] = pid, final_tid[track.reshape(-1)]
    return lines


def _streams(slices: pd.DataFrame) -> Int64:
    # The frame has no stream for the GPU's copy of an annotation, but it begins with its first kernel.
    work = slices[slices["category"].isin([_KERNEL, _COPY, _FILL])].drop_duplicates(["device", "start_ns"])
    found = slices[["device", "start_ns"]].merge(work[["device", "start_ns", "thread"]], "left")["thread"]
    return found.fillna(0).to_numpy(np.int64)


def _process(pid: int, name: str, label: str, order: int) -> list[str]:
    return [
        _named("process_name", pid, 0, name=redact(name)),
        _named("process_labels", pid, 0, labels=label),
        _named("process_sort_index", pid, 0, sort_index=order),
    ]


def _named(event: str, pid: int, tid: int, **args: Any) -> str:
    return json.dumps({"ph": "M", "name": event, "ts": 0, "pid": int(pid), "tid": int(tid), "args": args})


def _lanes(pid: Int64, tid: Int64, slices: pd.DataFrame) -> Int64:
    """Return 0 for every slice that nests on its track, else the number of the extra track on which it does.

    Kernels of one stream do overlap: on Hopper a kernel may start while the one before it drains.
    """
    start_ns = slices["start_ns"].to_numpy()
    end_ns = start_ns + slices["duration_ns"].to_numpy()
    lane = np.zeros(len(slices), np.int64)
    pending = np.flatnonzero(slices["category"] != _INSTANT)
    number = 0
    while len(pending):
        lane[pending] = number
        pending = pending[np.lexsort((pending, tid[pending], pid[pending]))]
        columns = (pending, pid[pending], tid[pending], start_ns[pending], end_ns[pending])
        moved: list[int] = []
        stack: list[int] = []
        track: list[int] = []
        for index, *here, start, end in zip(*(column.tolist() for column in columns), strict=True):
            if here != track:
                track, stack = here, []
            while stack and stack[-1] <= start:
                stack.pop()
            if stack and end > stack[-1]:
                moved.append(index)
            else:
                stack.append(end)
        pending = np.array(moved, dtype=np.int64)
        number += 1
    return lane


def _launches(slices: pd.DataFrame) -> pd.DataFrame:
    """Return (source, target) rows for every kernel whose launch is in the capture and began before it."""
    has_id = slices["correlation"] > 0
    calls = slices.index[slices["category"].isin([_RUNTIME, _DRIVER]) & has_id]
    launch_of = slices.loc[calls, "correlation"].drop_duplicates()
    kernels = slices.loc[slices["category"].isin([_KERNEL, _COPY, _FILL]) & has_id, "correlation"]
    pairs = _joined(launch_of, kernels)
    starts = slices["start_ns"].to_numpy()
    return pairs[starts[pairs["source"]] <= starts[pairs["target"]]]


def _gradients(slices: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Return (source, target) rows for every backward op: as torch, the last forward op with its sequence number."""
    functions = {name.removeprefix(_ENGINE) for name in names if name.startswith(_ENGINE)}
    is_function = np.array([name in functions for name in names], dtype=np.bool_)
    is_backward = is_function | np.array([name.startswith(_ENGINE) for name in names], dtype=np.bool_)
    ops = slices.loc[(slices["category"] == _OP) & (slices["sequence"] >= 0), ["name", "sequence"]]
    # What has the number of a backward op from its first slice on is no forward op.
    first = ops.loc[is_backward[ops["name"]], "sequence"].drop_duplicates()
    begun = ops["sequence"].map(dict(zip(first, first.index, strict=True)))
    forward = ops.loc[ops.index < begun, "sequence"]
    return _joined(forward[~forward.duplicated(keep="last")], ops.loc[is_function[ops["name"]], "sequence"])


def _joined(sources: pd.Series[Any], targets: pd.Series[Any]) -> pd.DataFrame:
    import pandas as pd

    found = targets.map(dict(zip(sources, sources.index, strict=True))).dropna()
    return pd.DataFrame({"source": found.to_numpy(np.int64), "target": found.index.to_numpy(np.int64)})


def _flows(slices: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Return both ends of every arrow (id, cat, phase), indexed by the slice that they bind to, in order."""
    import pandas as pd

    pairs = pd.concat([_launches(slices).assign(cat="ac2g"), _gradients(slices, names).assign(cat="fwdbwd")])
    # One id an arrow: a graph launch has as many as kernels, and viewers forget an id at its end.
    pairs["id"] = np.arange(1, len(pairs) + 1)
    ends = [pairs.set_index(column)[["id", "cat"]].assign(phase=phase) for column, phase in _FLOW_ENDS.items()]
    return pd.concat(ends).sort_index(kind="stable")


def _blocks(events: pd.DataFrame, slices: pd.DataFrame) -> Iterator[str]:
    """Yield the slices as JSON behind a comma, each with the arrows that begin or end at it."""
    names, _ = _categories(events["name"])
    quoted = np.array([json.dumps(redact(name)) for name in names], dtype=np.object_)
    places = [_place(events[column], key) for column, key in _PLACES.items() if column in events.columns]
    flows = _flows(slices, names)
    for begin in range(0, len(slices), _BLOCK):
        block = slices.iloc[begin : begin + _BLOCK]
        tracks = [f'"pid":{pid},"tid":{tid}' for pid, tid in zip(block["pid"], block["tid"], strict=True)]
        args = _args(block, "num_bytes" in events.columns)
        for members, codes in places:
            args = args + members[codes[block["row"]]]
        starts = [_us(start) for start in block["start_ns"].tolist()]
        columns = (
            block["category"].tolist(),
            quoted[block["name"]],
            tracks,
            starts,
            block["duration_ns"].tolist(),
            args,
        )
        lines = [
            f'{_HEADS[category]}{name},{track},"ts":{start},"dur":{_us(duration)},"args":{{{arg[1:]}}}}}'
            for category, name, track, start, duration, arg in zip(*columns, strict=True)
        ]
        for row, number, cat, phase in flows.loc[block.index[0] : block.index[-1]].itertuples():
            track, start = tracks[row - begin], starts[row - begin]
            arrow = f'{{"ph":{phase},"cat":"{cat}","name":"{cat}","id":{number},{track},"ts":{start}}}'
            lines[row - begin] += f",\n{arrow}"
        yield ",\n" + ",\n".join(lines)


def _args(block: pd.DataFrame, has_bytes: bool) -> Texts:
    """Return the members of `args` that torch writes, each with a comma before it."""
    category, linked = block["category"], block["linked"]
    is_recorded, is_range = category.isin([_OP, _ANNOTATION]), category == _GPU_ANNOTATION
    is_on_stream = (category >= _KERNEL) & ~is_range
    external = linked.where(~(is_recorded | is_range), block["correlation"])
    texts = _members("External id", external, external > 0)
    texts += _members("Ev Idx", block["row"], is_recorded | (category == _INSTANT))
    texts += _members("Sequence number", block["sequence"], is_recorded & (block["sequence"] >= 0))
    texts += _members("device", block["device"], is_on_stream)
    texts += _members("stream", block["thread"], is_on_stream)
    has_correlation = is_on_stream | category.isin([_RUNTIME, _DRIVER])
    texts += _members("correlation", block["correlation"], has_correlation & (block["correlation"] > 0))
    return texts + _members("Bytes", block["num_bytes"], (category == _INSTANT) & has_bytes)


def _members(key: str, values: pd.Series[Any], is_there: pd.Series[Any]) -> Texts:
    texts = np.full(len(values), "", dtype=np.object_)
    texts[is_there.to_numpy()] = [f',"{key}":{value}' for value in values[is_there].tolist()]
    return texts


def _place(column: pd.Series[Any], key: str) -> tuple[Texts, Int64]:
    categories, codes = _categories(column)
    members = [f',"{key}":{json.dumps(redact(category))}' for category in categories]
    # Code -1, no place, finds the last entry.
    return np.array([*members, ""], dtype=np.object_), codes


def _us(time_ns: int) -> str:
    return f"{time_ns // 1000}.{time_ns % 1000:03d}"
