"""Place the kernels of CUDA-graph replays: all of one launch share its id, so their order says what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

import numpy as np

from agnitra_lab.profiler.event_table import EventTable, Int64, Kind
from agnitra_lab.profiler.inductor import Program, best_program, match_kernels
from agnitra_lab.profiler.places import Attribution, Label, Places, RootGraph
from agnitra_lab.profiler.regions import NodeSets
from agnitra_lab.profiler.sweep import Nesting, replayed

_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemsetAsync", "cudaMemcpyAsync", "cudaLaunchCooperativeKernel")
_BEGIN, _END = "cudaStreamBeginCapture", "cudaStreamEndCapture"
_MIN_AGREEMENT = 0.8


def place_replays(
    attribution: Attribution,
    graphs: Mapping[int, RootGraph],
    programs: Sequence[Program],
    reference: Attribution | None = None,
) -> None:
    """Place the kernels of every replay, by the first of these that knows them.

    1. The graph was captured inside the profile: its launches were seen then, op by op, in the same order.
    2. Inductor compiled what was captured: the order of the launches in its source, with Triton's names as anchors.
    3. A reference: another attribution of the same kernels, such as the eager model's.

    Args:
        attribution: is changed in place; kernels that nothing explains have the module that launched the graph or,
            outside of modules, no owner.
        graphs: marker index of a root call -> its graph.
        programs: of Inductor, in this process.
        reference: see above.
    """
    table, nesting, places = attribution.table, attribution.nesting, attribution.places
    groups = _groups(table, nesting)
    if not groups:
        return
    captures = _captures(attribution)
    sets = NodeSets(places, graphs)
    known: dict[bytes, tuple[Program, list[tuple[int, ...]]] | None] = {}
    for rows in groups:
        if _place_captured(rows, captures, table, places):
            continue
        key = table.name[rows].tobytes()
        if key not in known:
            known[key] = _match([table.name_of(row) for row in rows.tolist()], programs)
        match = known[key]
        if match is not None:
            _place_program(rows, match, attribution, sets)
        elif reference is None or not _place_reference(rows, attribution, reference):
            # Inside a module the launch at least says which; a graph that the user replays by hand could be anything.
            unknown = rows[places.path[rows] < 0]
            places.put(unknown, None, None, confidence=0.0)


def _groups(table: EventTable, nesting: Nesting) -> list[Int64]:
    launch = nesting.launch
    kernels = np.flatnonzero((table.kind == Kind.KERNEL) & replayed(table, nesting))
    kernels = kernels[np.lexsort((table.start_ns[kernels], launch[kernels]))]
    return [rows for rows in np.split(kernels, np.flatnonzero(np.diff(launch[kernels])) + 1) if len(rows)]


def _captures(attribution: Attribution) -> list[Int64]:
    """Return, for each stream capture inside the profile, the rows of the ops that launched, in order."""
    table = attribution.table
    is_call = table.kind == Kind.RUNTIME
    begins = np.sort(table.start_ns[is_call & table.named(_BEGIN)])
    ends = np.sort(table.start_ns[is_call & table.named(_END)])
    if not len(begins) or not len(ends):
        return []
    calls = np.flatnonzero(is_call & table.named(*_LAUNCHES))
    calls = calls[np.argsort(table.start_ns[calls], kind="stable")]
    ops = np.flatnonzero(table.kind <= Kind.MARKER)
    row_of = dict(zip(table.correlation[ops].tolist(), ops.tolist(), strict=True))
    captures = []
    for begin in begins.tolist():
        end = ends[np.searchsorted(ends, begin)] if ends[-1] >= begin else begin
        inside = calls[(table.start_ns[calls] > begin) & (table.start_ns[calls] < end)]
        captures.append(np.array([row_of.get(link, -1) for link in table.linked[inside].tolist()], np.int64))
    return captures


def _place_captured(rows: Int64, captures: list[Int64], table: EventTable, places: Places) -> bool:
    for sources in reversed(captures):
        if len(sources) == len(rows) and (sources >= 0).all():
            places.copy(rows, sources)
            places.method[rows[places.label[rows] >= 0]] = _REPLAY
            return True
    return False


def _match(names: list[str], programs: Sequence[Program]) -> tuple[Program, list[tuple[int, ...]]] | None:
    found = best_program(names, programs, is_replay=True)
    return (found[0], match_kernels(names, found[0])) if found is not None else None


def _place_program(
    rows: Int64, match: tuple[Program, list[tuple[int, ...]]], attribution: Attribution, sets: NodeSets
) -> None:
    nesting, places = attribution.nesting, attribution.places
    program, found = match
    event = int(nesting.root_event[rows[0]])
    root = sets.root_of(program, int(nesting.module[event]) if event >= 0 else -1)
    for row, indices in zip(rows.tolist(), found, strict=True):
        if not indices:
            continue
        label, path, confidence = sets.label(
            [program.launches[index] for index in indices], root, is_backward=program.is_backward
        )
        # A kernel between two anchors that several launches share is one of theirs: it is not known which.
        confidence /= len(indices)
        places.put(row, "fx_node", "replay", confidence=confidence, label=label, path=path)


def _place_reference(rows: Int64, attribution: Attribution, reference: Attribution) -> bool:
    table, places = attribution.table, attribution.places
    known = np.flatnonzero(reference.table.kind == Kind.KERNEL)
    known = known[np.argsort(reference.table.start_ns[known], kind="stable")]
    theirs = [reference.table.name_of(row) for row in known.tolist()]
    mine = [table.name_of(row) for row in rows.tolist()]
    matcher = SequenceMatcher(None, mine, theirs, autojunk=False)
    if sum(block.size for block in matcher.get_matching_blocks()) < _MIN_AGREEMENT * len(mine):
        return False
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            _copy_place(int(rows[block.a + offset]), places, int(known[block.b + offset]), reference.places)
    return True


def _copy_place(row: int, places: Places, source: int, reference: Places) -> None:
    label = reference.labels[reference.label[source]] if reference.label[source] >= 0 else None
    ours = places.label_id(("reference", label.text), Label(label.text, label.nodes)) if label is not None else -1
    places.owner[row] = reference.owner[source]
    places.method[row], places.confidence[row] = _REFERENCE, reference.confidence[source]
    places.path[row], places.label[row] = places.path_id(reference.module_path(source)), ours


_REPLAY, _REFERENCE = (Places.method_id(name) for name in ("replay", "reference"))
