"""The rows of the profile card's panels, as they are written: the same in HTML and in text."""

from __future__ import annotations

from dataclasses import dataclass

from agnitra_lab.contracts.device import DevicePeaks
from agnitra_lab.contracts.telemetry import NodeEvent, OpEvent, TelemetryRecord, Timeline
from agnitra_lab.notebook.cards import Column, Table
from agnitra_lab.notebook.profile_icicle import Icicle
from agnitra_lab.notebook.profile_names import NO_OWNER, method_name, node_name, place_of, short_source
from agnitra_lab.notebook.profile_pictures import mean
from agnitra_lab.notebook.profile_roofline import Roofline, bound_of, number_text, rate_text
from agnitra_lab.report import numbers, palette

OWNERS = "Who spends the self time"
ICICLE = "Where the self time goes"
ROOFLINE = "Roofline"
TIMELINE = "Over the capture"
_MAX_TOP, _MAX_ICICLE, _MAX_ROOFLINE, _MAX_MEMORY = 8, 8, 6, 5

_ICICLE_COLUMNS = (
    Column("Module", 30),
    Column("Op", 22),
    Column("Largest kernel", 22),
    Column("Self time", 14, is_number=True),
    Column("Share", 12, is_number=True),
)
_ROOFLINE_COLUMNS = (
    Column("Node", 36),
    Column("FLOP per byte", 16, is_number=True),
    Column("Rate", 18, is_number=True),
    Column("Bandwidth", 16, is_number=True),
    Column("Of roofline", 14, is_number=True),
)
_PHASE_COLUMNS = (
    Column("Phase", 16),
    Column("Calls", 12, is_number=True),
    Column("Wall time", 18, is_number=True),
    Column("Self time", 18, is_number=True),
    Column("Tokens", 16, is_number=True),
    Column("Tokens/s", 20, is_number=True),
)
_MEMORY_COLUMNS = (Column("Held by", 60), Column("Size", 22, is_number=True), Column("Of the peak", 18, is_number=True))


@dataclass(frozen=True)
class Row:
    """One line of the top table.

    Attributes:
        name: of the node, or of the op where no node is known.
        place: module and source line.
        latency: self time.
        share: of the self time, 0 to 1.
        calls: how often it ran.
        limit: share of the roofline, None where it is not known.
        bound: what sets it, "bytes" or "FLOPs", None where that is not known.
        method: how the place is known, None where nothing is.
    """

    name: str
    place: str
    latency: str
    share: float
    calls: int
    limit: str | None = None
    bound: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class OwnerRow:
    """One part of the program, its share of the self time, and the colour of both."""

    label: str
    share: float
    colour: str
    note: str = ""

    @property
    def text(self) -> str:
        """The share as written."""
        return share_text(self.share)


def top_rows(record: TelemetryRecord, peaks: DevicePeaks | None = None) -> tuple[str, list[Row]]:
    """The largest rows and what they are: nodes where they are known, else ops."""
    if record.nodes:
        has_phases = len({node.phase for node in record.nodes} - {None}) > 1
        shown = [_node_row(node, peaks, has_phases=has_phases) for node in record.nodes[:_MAX_TOP]]
        return "Top nodes by self time", shown
    return "Top ops by self time", [_op_row(event) for event in record.events[:_MAX_TOP]]


def owner_rows(record: TelemetryRecord) -> list[OwnerRow]:
    """The five parts that the self time divides into; the residual is always one of them, and the last."""
    owners = record.owners
    if owners is None:
        return []
    exact = f"({share_text(owners.exact_node)} exact)" if owners.fx_node else ""
    return [
        OwnerRow("Graph nodes", owners.fx_node, palette.ACCENT, exact),
        OwnerRow("Parameter gradients", owners.param_grad, palette.SECONDARY),
        OwnerRow("Optimiser", owners.optimizer, palette.BASELINE),
        OwnerRow("Outside the graph", owners.outside_graph, palette.WARNING),
        OwnerRow("Residual", owners.residual, palette.MUTED),
    ]


def icicle_table(icicle: Icicle) -> Table:
    """The largest blocks of the icicle; what is left comes last."""
    has_kernels = icicle.num_levels > 2
    blocks = [
        ((module.label, op.label, op.children[0].label if op.children else ""), op.time_ms)
        for module in icicle.modules
        for op in module.children
    ]
    shown = sorted(blocks, key=lambda block: -block[1])[:_MAX_ICICLE]
    rest_ms = icicle.total_ms - sum(ms for _, ms in shown)
    if rest_ms > 1e-6 * icicle.total_ms:
        shown.append((("all other rows", "", ""), rest_ms))
    rows = [
        (*(names if has_kernels else names[:2]), numbers.milliseconds(ms), share_text(ms / icicle.total_ms))
        for names, ms in shown
    ]
    columns = _ICICLE_COLUMNS if has_kernels else (*_ICICLE_COLUMNS[:2], *_ICICLE_COLUMNS[3:])
    return Table(ICICLE, columns, rows)


def roofline_table(roofline: Roofline) -> Table:
    """The nodes of the roofline that take the most time."""
    rows = [
        (
            node_name(node.node, node.op),
            number_text(node.intensity_flop_per_byte or 0.0),
            rate_text(node.tflop_per_s or 0.0),
            f"{number_text(node.gb_per_s)} GB/s" if node.gb_per_s is not None else numbers.ABSENT,
            f"{100 * node.roofline_share:.0f}%" if node.roofline_share is not None else numbers.ABSENT,
        )
        for node in roofline.nodes[:_MAX_ROOFLINE]
    ]
    return Table(ROOFLINE, _ROOFLINE_COLUMNS, rows)


def phase_table(record: TelemetryRecord) -> Table | None:
    """The phases of a language model's calls; None for a model that has none."""
    rows = [
        (
            phase.phase,
            f"{phase.num_calls:,}",
            numbers.milliseconds(phase.wall_ms),
            numbers.milliseconds(phase.latency_ms),
            f"{phase.num_tokens:,}" if phase.num_tokens is not None else numbers.ABSENT,
            numbers.rate(phase.tokens_per_second) if phase.tokens_per_second is not None else numbers.ABSENT,
        )
        for phase in record.phases
    ]
    return Table("Prefill and decode", _PHASE_COLUMNS, rows) if rows else None


def memory_table(record: TelemetryRecord) -> Table | None:
    """What was alive at the peak, largest first; None where no memory pass ran."""
    memory = record.memory
    if memory is None or not memory.peak_nodes:
        return None
    peak = memory.peak_memory_bytes
    rows = [
        (
            " · ".join(filter(None, (node_name(held.node) if held.node else None, held.module_path))) or NO_OWNER,
            mebibytes(held.num_bytes),
            share_text(min(1.0, held.num_bytes / peak)) if peak else numbers.ABSENT,
        )
        for held in memory.peak_nodes[:_MAX_MEMORY]
    ]
    before = (peak or 0) - sum(held.num_bytes for held in memory.peak_nodes)
    if peak and before > 0:
        rows.insert(0, ("weights and all else from before the call", mebibytes(before), share_text(before / peak)))
    return Table("Alive at the memory peak", _MEMORY_COLUMNS, rows)


def timeline_sentence(timeline: Timeline) -> str | None:
    """How busy host and device were, in one sentence; None for a capture without bins."""
    num_bins = max(len(timeline.host_busy), len(timeline.device_busy))
    if not num_bins:
        return None
    lanes = (("Host", timeline.host_busy), ("device", timeline.device_busy))
    parts = [f"{name} busy {numbers.share(mean(values))}" for name, values in lanes if values]
    total = numbers.milliseconds(num_bins * timeline.bin_ms)
    return f"{' and '.join(parts)} of {total}, in {num_bins:,} bins of {numbers.milliseconds(timeline.bin_ms)}."


def share_text(value: float) -> str:
    """A share with one decimal; what is not quite all is not written as all, nor what is not quite none as none."""
    if 0 < value < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= value < 1 else numbers.share(value)


def calls_text(count: int) -> str:
    """A count of calls in words."""
    return f"{count:,} call{'' if count == 1 else 's'}"


def mebibytes(num_bytes: int) -> str:
    """A size with its unit."""
    size = num_bytes / 2**20
    if 0 < size < 0.1:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{size:,.0f} MiB" if size >= 100 else f"{size:.2f} MiB"


def _node_row(node: NodeEvent, peaks: DevicePeaks | None, *, has_phases: bool) -> Row:
    name, place = node_name(node.node, node.op), place_of(node)
    source = short_source(node.source) if node.source else None
    # An optimiser's name and a gradient's hold their place already.
    is_named_so = node.owner in ("param_grad", "optimizer")
    parts = (None if is_named_so and place in name else place, source, node.phase if has_phases else None)
    limit = f"{100 * node.roofline_share:.0f}%" if node.roofline_share is not None else None
    return Row(
        name,
        " · ".join(filter(None, parts)),
        numbers.milliseconds(node.latency_ms),
        node.share,
        node.num_calls,
        limit,
        bound_of(node, peaks) if limit else None,
        method_name(node),
    )


def _op_row(event: OpEvent) -> Row:
    # Schema v1 tied a row to its node without a module.
    place = event.module_path or event.node or place_of(event)
    latency = numbers.milliseconds(event.latency_ms)
    return Row(event.op, place, latency, event.share, event.num_calls, method=method_name(event))
