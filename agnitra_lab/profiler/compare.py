"""Compare two captures node by node, with a fused set against the nodes that it replaced."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from agnitra_lab.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ("node", "op", "module_path", "owner", "latency_ms", "num_calls")
COMPARE_COLUMNS = (
    "node", "module_path", "op", "baseline_ms", "candidate_ms", "delta_ms", "speedup", "baseline_calls",
    "candidate_calls", "status", "owner",
)  # fmt: skip
Status = Literal["both", "fused", "split", "removed", "added"]

_JOINT = " + "
_TIME_WORDS = {"device_ms": "Device time", "latency_ms": "Self time"}
_STATUS_WORDS = {
    "both": "in both", "fused": "fused", "split": "split", "removed": "only in the baseline",
    "added": "only in the candidate",
}  # fmt: skip
_OWNER_WORDS: dict[str | None, str] = {
    "fx_node": "no single node", "param_grad": "parameter gradients", "optimizer": "the optimiser",
    "outside_graph": "outside the graph",
}  # fmt: skip
_NUM_SHOWN_NAMES = 3


@dataclass
class _Entry:
    """All rows of one capture that stand for the same node, set of nodes, or owner and module."""

    names: tuple[str, ...]
    owner: str | None
    module_path: str | None
    place: tuple[str | None, str | None] | None
    ops: list[str]
    ms: float = 0.0
    num_calls: int = 0


Side = dict[Hashable, _Entry]
Match = tuple[list[_Entry], list[_Entry]]


def compare_nodes(baseline: pd.DataFrame, candidate: pd.DataFrame) -> pd.DataFrame:
    """Compare two captures of the same model by node.

    A set of fused nodes is compared with the sum of its nodes on the other side: sets and nodes that share names, on
    either side, become one row, so no time counts twice and each time column sums to its frame's. Several rows of one
    node, such as those of two phases, are summed. Nodes that share no name are one row when they stand on the same
    line of the same module (columns source and num_nodes, where the frames have them).

    Args:
        baseline: `telemetry.nodes` of the one capture.
        candidate: `telemetry.nodes` of the other.

    Returns:
        One row per node, set of nodes, or owner and module (for time of no node), largest change first, with columns
        `COMPARE_COLUMNS`. Times in ms: device_ms where both captures have it, else latency_ms; `attrs["time"]` says
        which. delta_ms is candidate - baseline, speedup is baseline / candidate. status: both; fused or split, when
        the candidate has larger or smaller sets; removed or added, with null for the side that lacks it.

    Raises:
        UsageError: when a frame lacks a column.
    """
    import pandas as pd

    for side, frame in (("baseline", baseline), ("candidate", candidate)):
        _require(frame, NEEDED, f"The {side}'s node frame", "telemetry.nodes")
    has_device = all(
        "device_ms" in frame.columns and frame["device_ms"].notna().any() for frame in (baseline, candidate)
    )
    time = "device_ms" if has_device else "latency_ms"
    rows = [_row(*match) for match in _matches(_entries(baseline, time), _entries(candidate, time))]
    rows.sort(key=lambda row: -abs(row["delta_ms"]))
    result = pd.DataFrame(rows, columns=list(COMPARE_COLUMNS))
    times = ["baseline_ms", "candidate_ms", "delta_ms", "speedup"]
    result = result.astype(
        dict.fromkeys(times, "float64") | dict.fromkeys(["baseline_calls", "candidate_calls"], "Int64")
    )
    result.attrs["time"] = time
    return result


def comparison_text(frame: pd.DataFrame, limit: int = 10) -> str:
    """Say in a few lines what changed.

    Args:
        frame: what `compare_nodes` returned.
        limit: rows to name; the others are summed in a last line.

    Raises:
        UsageError: when the frame lacks a column.
    """
    _require(frame, COMPARE_COLUMNS, "The comparison", "what compare_nodes returned")
    if frame.empty:
        return "Neither capture has a node."
    before, after = float(frame["baseline_ms"].sum()), float(frame["candidate_ms"].sum())
    word = _TIME_WORDS.get(frame.attrs.get("time", ""), "Time")
    ratio = f", {before / after:.2f}x" if before > 0 and after > 0 else ""
    counts = frame["status"].value_counts()
    parts = [f"{counts[status]} {text}" for status, text in _STATUS_WORDS.items() if status in counts]
    lines = [f"{word} {before:.3f} -> {after:.3f} ms{ratio} ({after - before:+.3f} ms): {', '.join(parts)}."]
    shown = frame.head(max(limit, 0))
    lines += [_line(row) for row in shown.to_dict("records")]
    rest = frame.iloc[len(shown) :]
    if len(rest):
        lines.append(f"{rest['delta_ms'].sum():+10.3f} ms  in {len(rest)} more")
    return "\n".join(lines)


def _require(frame: pd.DataFrame, columns: Sequence[str], what: str, expected: str) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise UsageError(f"{what} lacks {', '.join(missing)}.", hint=f"Give {expected}.")


def _entries(frame: pd.DataFrame, time: str) -> Side:
    """Return the frame's rows by node (in any order of a set's names), or by owner and module where there is none."""
    side: Side = {}
    has_place = "source" in frame.columns and "num_nodes" in frame.columns
    sources = frame["source"].where(frame["num_nodes"] == 1) if has_place else [None] * len(frame)
    # A capture with kernels has no device time where no kernel ran.
    times, calls = frame[time].fillna(0.0), frame["num_calls"].fillna(0)
    for *texts, ms, num_calls in zip(*(frame[name] for name in NEEDED[:4]), sources, times, calls, strict=True):
        node, op, module_path, owner, source = (_text(value) for value in texts)
        names = tuple(node.split(_JOINT)) if node is not None else ()
        key: Hashable = frozenset(names) if names else (owner, module_path)
        place = (module_path, source) if names and source else None
        entry = side.setdefault(key, _Entry(names, owner, module_path, place, []))
        if op is not None and op not in entry.ops:
            entry.ops.append(op)
        entry.ms += float(ms)
        entry.num_calls += int(num_calls)
    return side


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _matches(baseline: Side, candidate: Side) -> list[Match]:
    """Return what is compared with what: every entry of either side exactly once."""
    holders = [_holders(side) for side in (baseline, candidate)]
    # Alike: in both, and none of its nodes runs elsewhere on one side only. Inductor repeats cheap nodes in several
    # kernels, so without this a change in one layer would drag its unchanged neighbours into one row.
    alike = {
        key
        for key, entry in baseline.items()
        if key in candidate and all(holders[0][name] == holders[1][name] for name in entry.names)
    }
    matches: list[Match] = [([baseline[key]], [candidate[key]]) for key in baseline if key in alike]
    rest = [[entry for key, entry in side.items() if key not in alike] for side in (baseline, candidate)]
    matches += [([entry], []) for entry in rest[0] if not entry.names]
    matches += [([], [entry]) for entry in rest[1] if not entry.names]
    return matches + _same_line(_components(*([entry for entry in entries if entry.names] for entries in rest)))


def _holders(side: Side) -> dict[str, set[Hashable]]:
    holders: dict[str, set[Hashable]] = {}
    for key, entry in side.items():
        for name in entry.names:
            holders.setdefault(name, set()).add(key)
    return holders


def _components(baseline: list[_Entry], candidate: list[_Entry]) -> list[Match]:
    """Return the connected components of entries that share names, by union-find."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for entry in chain(baseline, candidate):
        for name in entry.names:
            parent[root(name)] = root(entry.names[0])
    groups: dict[str, Match] = {}
    for number, entries in enumerate((baseline, candidate)):
        for entry in entries:
            groups.setdefault(root(entry.names[0]), ([], []))[number].append(entry)
    return list(groups.values())


def _same_line(matches: list[Match]) -> list[Match]:
    """Join nodes that only one side has when the other has different ones for the same line in the same module.

    torch.export names a node after its op and Dynamo after the variable it is assigned to: an eager model's
    scaled_dot_product_attention is the compiled model's y.
    """
    lines: dict[Hashable, Match] = {}
    for number, (baseline, candidate) in enumerate(matches):
        places = {entry.place for entry in (*baseline, *candidate)}
        is_lone = len(places) == 1 and None not in places and not (baseline and candidate)
        line = lines.setdefault(places.pop() if is_lone else number, ([], []))
        line[0].extend(baseline)
        line[1].extend(candidate)
    joined: list[Match] = []
    for baseline, candidate in lines.values():
        if baseline and candidate:
            joined.append((baseline, candidate))
        else:
            joined += [*(([entry], []) for entry in baseline), *(([], [entry]) for entry in candidate)]
    return joined


def _row(baseline: list[_Entry], candidate: list[_Entry]) -> dict[str, Any]:
    entries = [*baseline, *candidate]
    before, after = (sum(entry.ms for entry in side) if side else None for side in (baseline, candidate))
    owners = {entry.owner for entry in entries}
    return {
        "node": _JOINT.join(dict.fromkeys(chain.from_iterable(entry.names for entry in entries))) or None,
        "module_path": _shared_path(entry.module_path for entry in entries),
        "op": _JOINT.join(dict.fromkeys(chain.from_iterable(entry.ops for entry in entries))) or None,
        "baseline_ms": before,
        "candidate_ms": after,
        "delta_ms": (after or 0.0) - (before or 0.0),
        "speedup": before / after if before is not None and after else None,
        "baseline_calls": sum(entry.num_calls for entry in baseline) if baseline else None,
        "candidate_calls": sum(entry.num_calls for entry in candidate) if candidate else None,
        "status": _status(baseline, candidate),
        "owner": owners.pop() if len(owners) == 1 else None,
    }


def _shared_path(paths: Iterable[str | None]) -> str | None:
    """Return the innermost module that holds all of them."""
    known = [path.split(".") if path else [] for path in paths if path is not None]
    if not known:
        return None
    shared = known[0]
    for parts in known[1:]:
        length = next((at for at, pair in enumerate(zip(shared, parts, strict=False)) if pair[0] != pair[1]), None)
        shared = shared[: min(len(shared), len(parts)) if length is None else length]
    return ".".join(shared)


def _status(baseline: list[_Entry], candidate: list[_Entry]) -> Status:
    if not baseline or not candidate:
        return "removed" if baseline else "added"
    # Larger sets are a fusion; with sets of one size it is the number of kernels' rows that tells.
    growth = max(len(entry.names) for entry in candidate) - max(len(entry.names) for entry in baseline)
    growth = growth or len(baseline) - len(candidate)
    return "fused" if growth > 0 else "split" if growth < 0 else "both"


def _line(row: dict[Hashable, Any]) -> str:
    before, after = row["baseline_ms"], row["candidate_ms"]
    if row["status"] in ("both", "fused", "split"):
        times = f"{before:.3f} -> {after:.3f} ms" + (f" {row['speedup']:.2f}x" if row["speedup"] > 0 else "")
    else:
        times = f"{before if row['status'] == 'removed' else after:.3f} ms"
    note = "" if row["status"] == "both" else f", {_STATUS_WORDS[row['status']]}"
    return f"{row['delta_ms']:+10.3f} ms  {_label(row)}: {times}{note}"


def _label(row: dict[Hashable, Any]) -> str:
    node, path = _text(row["node"]), _text(row["module_path"])
    place = f" in {path}" if path else ""
    if node is None:
        return f"{_OWNER_WORDS.get(_text(row['owner']), 'no known owner')}{place}"
    names = node.split(_JOINT)
    more = len(names) - _NUM_SHOWN_NAMES
    return _JOINT.join(names[:_NUM_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "") + place
