"""The memory pass: what one call allocates and frees, and what is alive at the peak, by the op that made it."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from agnitra_lab.contracts import MemoryShare

if TYPE_CHECKING:
    import pandas as pd

Int64 = NDArray[np.int64]
PlaceOf = Callable[[int], tuple[str | None, str | None]]

MEMORY_COLUMNS = ("time_ms", "device", "num_bytes", "allocated_bytes", "node", "module_path", "is_alive_at_peak")
SCOPE_NAME = "agnitra memory pass"
_MEMORY = "[memory]"
_NO_ADDRESS = "this torch does not say which address was freed, so it is not known what was alive"
_OUTSIDE = (
    "{num} of {total} allocations and frees happened outside of any op or range, where torch does not say the address, "
    "so it is not known what was alive; memory_scope() around the code avoids this"
)


class _Record(NamedTuple):
    """One allocation (positive) or free (negative), as the profiler recorded it."""

    time_ns: int
    num_bytes: int
    device: str
    pointer: int
    op_correlation: int
    reported_bytes: int
    """Allocated on the device after it, by the allocator's own count."""


@dataclass
class Allocations:
    """Every allocation and free of one pass, as columns of equal length in time order.

    A GPU's sizes are those of the allocator's blocks (multiples of 512 bytes), a CPU's those that were asked for.

    Attributes:
        time_ns: on the profiler's clock.
        num_bytes: positive for an allocation, negative for a free.
        device: index into `device_names`.
        op_correlation: correlation id of the innermost op, marker or range in which the memory was allocated; a free
            has that of what it frees. 0 outside of any, and for memory from before the pass.
        total_bytes: allocated on that device after the event; on a CPU, of what the pass itself allocated.
        alive_at_peak: allocations whose memory was alive at the peak of their device; None when unknown.
        device_names: "cpu", "cuda:0" and so on.
        base_bytes: allocated on each device before the pass; None where no allocator says so, as on a CPU.
        start_ns: when the pass began.
        reason: why `alive_at_peak` is None.
        notes: what the profiler could not see, in plain words.
    """

    time_ns: Int64
    num_bytes: Int64
    device: NDArray[np.int8]
    op_correlation: Int64
    total_bytes: Int64
    alive_at_peak: NDArray[np.bool_] | None
    device_names: tuple[str, ...] = ()
    base_bytes: tuple[int | None, ...] = ()
    start_ns: int = 0
    reason: str | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.time_ns)


@contextlib.contextmanager
def memory_scope() -> Iterator[None]:
    """Make every GPU allocation and free of the block readable; enter it right after the profiler.

    Torch leaves GPU memory events out of its event tree where no op is running, and only the tree has addresses. So
    one range is held open, and backward runs in the caller's thread and with that inside of the range. Seen on an
    H200: 4 of the 41 memory events of a training step are lost without it.
    """
    with torch.autograd.set_multithreading_enabled(False), torch.profiler.record_function(SCOPE_NAME):
        yield


def read_allocations(profiler_result: Any) -> Allocations:
    """Read the memory events of a profile that was taken with `profile_memory=True`.

    Allocations are paired with frees by address, which only the profiler's event tree carries. The tree also says
    which op was running. 10,000 allocations among 61,000 events take 0.2 s to read (one core).

    Args:
        profiler_result: `prof.profiler.kineto_results` of a profile whose body ran in `memory_scope`.

    Returns:
        The allocations. The profiler sees the profiled thread and what torch runs for it (autograd, data parallel
        loops), never another Python thread. On a CPU it does not see frees of memory from before the pass.
    """
    tree = getattr(profiler_result, "experimental_event_tree", None)
    records = sorted(_tree_records(tree()), key=lambda record: record.time_ns) if tree is not None else []
    events = profiler_result.events()
    num_outside = sum(event.name() == _MEMORY for event in events) - len(records)
    if num_outside <= 0:
        allocations = _pair(records)
    else:
        allocations = _unpaired(_event_records(events), records)
        total = num_outside + len(records)
        allocations.reason = _OUTSIDE.format(num=num_outside, total=total) if tree is not None else _NO_ADDRESS
    start = getattr(profiler_result, "trace_start_ns", None)
    first_ns = int(allocations.time_ns[0]) if len(allocations) else 0
    allocations.start_ns = min(first_ns, int(start())) if start is not None else first_ns
    return allocations


def peak_bytes(allocations: Allocations, device: str | None = None) -> int | None:
    """Return the most that was allocated at one moment of the pass.

    Args:
        allocations: from `read_allocations`.
        device: one of `device_names`; by default the accelerator with the highest peak, else the CPU.

    Returns:
        Bytes, with what was there before the pass where the allocator says so (a GPU), else what the pass itself
        had allocated and not freed (a CPU). None when no allocation was recorded on the device.
    """
    code = _device_code(allocations, device)
    return None if code is None else _peak_of(allocations, code)[0]


def peak_shares(
    allocations: Allocations, place_of: PlaceOf, limit: int = 20, device: str | None = None
) -> tuple[MemoryShare, ...]:
    """Sum what was alive at the peak by the place that had allocated it.

    Args:
        allocations: from `read_allocations`.
        place_of: op correlation id -> (node, module path).
        limit: most places to name.
        device: as for `peak_bytes`.

    Returns:
        The places, largest first, then one row without node and module for all else, if there is any. They sum to
        the peak less what was there from before the pass. Empty when it is not known what was alive.
    """
    code = _device_code(allocations, device)
    if code is None or allocations.alive_at_peak is None:
        return ()
    alive = allocations.alive_at_peak & (allocations.device == code)
    sums: dict[tuple[str | None, str | None], int] = defaultdict(int)
    for place, size in zip(
        _places(allocations.op_correlation[alive], place_of), allocations.num_bytes[alive].tolist(), strict=True
    ):
        sums[place] += size
    rest = sums.pop((None, None), 0)
    ranked = sorted(sums.items(), key=lambda entry: (-entry[1], str(entry[0])))
    rest += sum(size for _, size in ranked[limit:])
    shares = [MemoryShare(node=node, module_path=path, num_bytes=size) for (node, path), size in ranked[:limit]]
    return (*shares, MemoryShare(node=None, module_path=None, num_bytes=rest)) if rest else tuple(shares)


def memory_frame(allocations: Allocations, place_of: PlaceOf) -> pd.DataFrame:
    """Return one row per allocation and free in time order. Columns: `MEMORY_COLUMNS`.

    Args:
        allocations: from `read_allocations`.
        place_of: op correlation id -> (node, module path); a free has the place of what it frees, so that the sum
            over a place is what it still holds at the end.

    Returns:
        The frame: `time_ms` since the pass began, `allocated_bytes` on the device after the event,
        `is_alive_at_peak` missing where it is not known.
    """
    import pandas as pd

    places = _places(allocations.op_correlation, place_of)
    alive = allocations.alive_at_peak
    columns: dict[str, Any] = {
        "time_ms": (allocations.time_ns - allocations.start_ns) / 1e6,
        "device": pd.Categorical([allocations.device_names[code] for code in allocations.device.tolist()]),
        "num_bytes": allocations.num_bytes,
        "allocated_bytes": allocations.total_bytes,
        "node": pd.Categorical([node for node, _ in places]),
        "module_path": pd.Categorical([path for _, path in places]),
        "is_alive_at_peak": pd.array([None] * len(places) if alive is None else alive.tolist(), dtype="boolean"),
    }
    return pd.DataFrame(columns, columns=list(MEMORY_COLUMNS))


def _places(correlations: Int64, place_of: PlaceOf) -> list[tuple[str | None, str | None]]:
    known = {op: place_of(op) if op > 0 else (None, None) for op in np.unique(correlations).tolist()}
    return [known[op] for op in correlations.tolist()]


def _device_code(allocations: Allocations, device: str | None) -> int | None:
    names = allocations.device_names
    if device is not None:
        return names.index(device) if device in names else None
    candidates = [code for code, name in enumerate(names) if name != "cpu"] or list(range(len(names)))
    return max(candidates, key=lambda code: _peak_of(allocations, code)[0], default=None)


def _peak_of(allocations: Allocations, code: int) -> tuple[int, int]:
    """Return the peak of a device and the row at which it is reached, -1 when the pass never exceeds its start."""
    rows = np.flatnonzero(allocations.device == code)
    highest = int(rows[np.argmax(allocations.total_bytes[rows])])
    peak, start = int(allocations.total_bytes[highest]), allocations.base_bytes[code] or 0
    return (peak, highest) if peak > start else (start, -1)


def _tree_records(roots: Iterable[Any]) -> list[_Record]:
    records: list[_Record] = []
    device_names: dict[Any, str] = {}
    # A binding's enum takes a microsecond for its name, and a tenth of that for its hash.
    is_op: dict[Any, bool] = {}
    stack = [(event, 0) for event in reversed(list(roots))]
    while stack:
        event, inside = stack.pop()
        name, children = event.name, event.children
        if not children and name != _MEMORY:
            continue
        tag = event.tag
        if tag not in is_op:
            is_op[tag] = tag.name == "TorchOp"
        if name == _MEMORY and not is_op[tag]:
            fields = event.extra_fields
            device = device_names.get(fields.device) or device_names.setdefault(fields.device, str(fields.device))
            size, total = fields.alloc_size, fields.total_allocated
            records.append(_Record(event.start_time_ns, size, device, fields.ptr, inside, total))
        # Only ops, markers and ranges have ids of that kind: those of CUDA's calls and Python frames are others.
        own = event.correlation_id if is_op[tag] else inside
        own = own if name != SCOPE_NAME else 0
        stack += [(child, own) for child in reversed(children)]
    return records


def _event_records(events: Iterable[Any]) -> list[_Record]:
    """Read allocations without addresses, from events in order of their start; the op is the innermost by time."""
    records: list[_Record] = []
    open_ops: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        start_ns, is_host = event.start_ns(), event.device_type().name == "CPU"
        stack = open_ops[event.start_thread_id()]
        while stack and stack[-1][0] < start_ns:
            stack.pop()
        if event.name() == _MEMORY:
            device = "cpu" if is_host else f"{event.device_type().name.lower()}:{event.device_index()}"
            records.append(_Record(start_ns, event.nbytes(), device, 0, stack[-1][1] if stack else 0, 0))
        elif is_host:
            own = event.correlation_id() if event.name() != SCOPE_NAME else 0
            stack.append((start_ns + event.duration_ns(), own))
    return records


class _Ledger:
    """Pairs frees with allocations and keeps the running total of each device, one row per event."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, str, int, int]] = []
        """Time, signed bytes, device, op correlation, total after it."""
        self.freed_at: dict[int, int] = {}
        """Row of an allocation -> row of its free."""
        self.base: dict[str, int | None] = {}
        self._total: dict[str, int] = {}
        self._held: dict[tuple[str, int], int] = {}
        self._unseen: dict[str, int] = defaultdict(int)
        self._num_lost = 0

    def start(self, device: str, base: int | None) -> None:
        """Open a device, unless it is open, with what was allocated on it before."""
        if device not in self.base:
            self.base[device], self._total[device] = base, base or 0

    def take(self, record: _Record) -> None:
        """Enter one record."""
        # A CPU's count is of what memory passes have seen: what was freed between two of them stays in it for good.
        self.start(record.device, record.reported_bytes - record.num_bytes if record.device != "cpu" else None)
        row = self._held.pop((record.device, record.pointer), None)
        is_own_free = row is not None and self.rows[row][1] == -record.num_bytes
        if row is not None:
            self.freed_at[row] = self.add(record, -self.rows[row][1], self.rows[row][3])
            # Another use of the address: a thread that the profiler does not see had freed it, at the latest now.
            self._num_lost += not is_own_free
        if record.num_bytes > 0:
            self._held[record.device, record.pointer] = self.add(record, record.num_bytes, record.op_correlation)
        elif not is_own_free and record.device != "cpu":
            # On a CPU this is reported only if an earlier memory pass saw the address, with the size that it had then.
            self.add(record, record.num_bytes, 0)
        if record.device != "cpu":
            gap = abs(record.reported_bytes - self._total[record.device])
            self._unseen[record.device] = max(gap, self._unseen[record.device])

    def add(self, record: _Record, num_bytes: int, op_correlation: int) -> int:
        """Append a row and return its number."""
        self._total[record.device] = total = self._total[record.device] + num_bytes
        self.rows.append((record.time_ns, num_bytes, record.device, op_correlation, total))
        return len(self.rows) - 1

    def notes(self) -> tuple[str, ...]:
        """Say what the profiler did not see."""
        notes = [
            f"up to {size} bytes on {device} were moved by threads that the profiler does not see"
            for device, size in self._unseen.items()
            if size
        ]
        if self._num_lost:
            notes.append(
                f"allocations that were freed by threads that the profiler does not see: {self._num_lost}; "
                "each counts until its address is used again"
            )
        return tuple(notes)


def _pair(records: Iterable[_Record]) -> Allocations:
    ledger = _Ledger()
    for record in records:
        ledger.take(record)
    allocations = _columns(ledger, ledger.notes())
    size = len(allocations)
    freed_row = np.full(size, size)
    freed_row[list(ledger.freed_at)] = list(ledger.freed_at.values())
    alive = np.zeros(size, dtype=np.bool_)
    for code in range(len(allocations.device_names)):
        peak = _peak_of(allocations, code)[1]
        alive |= (allocations.device == code) & (np.arange(size) <= peak) & (freed_row > peak)
    allocations.alive_at_peak = alive & (allocations.num_bytes > 0)
    return allocations


def _unpaired(records: list[_Record], known: list[_Record]) -> Allocations:
    ledger = _Ledger()
    for record in known:
        if record.device != "cpu" and record.device not in ledger.base:
            before = sum(
                one.num_bytes for one in records if one.device == record.device and one.time_ns <= record.time_ns
            )
            ledger.start(record.device, record.reported_bytes - before)
    for record in records:
        ledger.start(record.device, None)
        ledger.add(record, record.num_bytes, record.op_correlation if record.num_bytes > 0 else 0)
    return _columns(ledger, ())


def _columns(ledger: _Ledger, notes: tuple[str, ...]) -> Allocations:
    times, sizes, devices, correlations, totals = zip(*ledger.rows, strict=True) if ledger.rows else ((),) * 5
    names = tuple(dict.fromkeys(devices))
    codes = {name: code for code, name in enumerate(names)}
    return Allocations(
        time_ns=np.array(times, dtype=np.int64),
        num_bytes=np.array(sizes, dtype=np.int64),
        device=np.array([codes[name] for name in devices], dtype=np.int8),
        op_correlation=np.array(correlations, dtype=np.int64),
        total_bytes=np.array(totals, dtype=np.int64),
        alive_at_peak=None,
        device_names=names,
        base_bytes=tuple(ledger.base[name] for name in names),
        notes=notes,
    )
