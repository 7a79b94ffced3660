"""The icicle of the profile card: module, op and kernel, each as wide as its self time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from agnitra_lab.contracts.telemetry import KernelEvent, OpEvent, TelemetryRecord
from agnitra_lab.notebook import profile_pictures as draw
from agnitra_lab.notebook.profile_names import place_of, short_op
from agnitra_lab.report import numbers, palette

REST = "rest"
LEVELS = ("module", "op", "kernel")
_ROW_HEIGHT, _ROW_STEP = 40, 42
_MIN_SHARE = 0.006
"""Narrower blocks stand together in one: at 800 pixels they would be 5 wide."""
_MAX_MODULES = 10
"""With more than these, equal modules of numbered layers stand together."""
# Labels are cut for three widths of the picture: class, narrowest picture it is for, width without the gutter.
_TIERS = (("w", 860, 790.0), ("v", 700, 640.0), ("n", 0, 500.0))
_CHARACTER_PX, _PADDING_PX = 6.2, 8
_MIN_CHARACTERS = 4


@dataclass(frozen=True)
class Block:
    """One block of the icicle.

    Attributes:
        label: whole name.
        time_ms: its width; at least the sum of its children's.
        children: blocks of the level below, largest first.
        is_rest: whether it stands for rows that are not in the record.
    """

    label: str
    time_ms: float
    children: tuple[Block, ...] = ()
    is_rest: bool = False


@dataclass(frozen=True)
class Icicle:
    """All blocks of a profile.

    Attributes:
        modules: blocks of the first level, which sum to the total.
        total_ms: self time of the profile.
        num_levels: 2 without kernels, else 3.
    """

    modules: tuple[Block, ...]
    total_ms: float
    num_levels: int

    @property
    def height(self) -> int:
        """Height of the picture in pixels."""
        return _ROW_STEP * self.num_levels


def build_icicle(record: TelemetryRecord) -> Icicle | None:
    """Group the record's rows by module, op and kernel; None when nothing ran.

    The record holds the largest rows alone: a block named "rest" has the time of the others, so that widths are true.
    """
    op_ms, kernel_ms = _from_hotspots(record) if record.hotspots else _from_rows(record)
    total_ms = max(record.total_self_ms or 0.0, sum(op_ms.values()))
    if not total_ms:
        return None
    modules = list(_modules(op_ms, kernel_ms, total_ms))
    rest_ms = total_ms - sum(block.time_ms for block in modules)
    if rest_ms > 1e-6 * total_ms:
        modules.append(Block(REST, rest_ms, is_rest=True))
    return Icicle(tuple(modules), total_ms, 3 if kernel_ms else 2)


_OpTimes = dict[tuple[str, str], float]
_KernelTimes = dict[tuple[str, str], dict[str, float]]


def _from_hotspots(record: TelemetryRecord) -> tuple[_OpTimes, _KernelTimes]:
    op_ms: _OpTimes = defaultdict(float)
    kernel_ms: _KernelTimes = defaultdict(lambda: defaultdict(float))
    for spot in record.hotspots:
        place = f"{spot.place} ×{spot.num_places}" if spot.num_places > 1 and "*" in spot.place else spot.place
        key = place, short_op(spot.op)
        op_ms[key] += spot.latency_ms
        if spot.kernel is not None:
            kernel_ms[key][short_op(spot.kernel)] += spot.latency_ms
    return op_ms, kernel_ms


def _from_rows(record: TelemetryRecord) -> tuple[_OpTimes, _KernelTimes]:
    """Read what schema v1 has: the op rows and the kernel rows, each cut at a number of rows."""
    paths = [event.module_path for event in record.events] + [kernel.module_path for kernel in record.kernels]
    name_of = _ModuleNames({path for path in paths if path})
    event_of_node = {event.node: event for event in record.events if event.node}
    op_ms: _OpTimes = defaultdict(float)
    kernel_ms: _KernelTimes = defaultdict(lambda: defaultdict(float))
    for event in record.events:
        op_ms[name_of(place_of(event)), short_op(event.op)] += event.latency_ms
    for kernel in record.kernels:
        place = _place_of_kernel(kernel, event_of_node)
        if place is not None:
            kernel_ms[name_of(place), short_op(kernel.op or kernel.kernel)][short_op(kernel.kernel)] += kernel.device_ms
    # Either may know more of an op than the other.
    for key, kernels in kernel_ms.items():
        op_ms[key] = max(op_ms[key], sum(kernels.values()))
    return op_ms, kernel_ms


def icicle_picture(icicle: Icicle) -> str:
    """Draw the blocks, modules on top; names that do not fit are cut or left out."""
    level_colours = (palette.SECONDARY, palette.ACCENT, palette.BASELINE)
    tints = "".join(f".l{level}{{fill:{tint(colour)};stroke:{colour}}}" for level, colour in enumerate(level_colours))
    rest = f".r{{fill:{palette.PANEL};stroke:{palette.EDGE};stroke-dasharray:4 3}}"
    style = f"{tints}rect{{stroke-opacity:.75}}svg text{{font-size:11px}}{rest}{_media_rules()}"
    gutter = "".join(
        draw.text("0", _ROW_STEP * level + 24, name, "m") for level, name in enumerate(LEVELS[: icicle.num_levels])
    )
    return draw.canvas(icicle.height, gutter + "".join(_shapes(icicle.modules, 0.0, 0, icicle.total_ms)), style=style)


def tint(colour: str, strength: float = 0.25) -> str:
    """A colour laid thinly over the panel, for blocks that carry light text."""
    pairs = ((int(colour[at : at + 2], 16), int(palette.PANEL[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(strength * over + (1 - strength) * under):02X}" for over, under in pairs)


class _ModuleNames:
    """Names of modules in the picture: where there are many, equal ones of numbered layers share a name with a star."""

    def __init__(self, paths: set[str]) -> None:
        self._starred: dict[str, str] = {}
        if len(paths) <= _MAX_MODULES:
            return
        members = defaultdict(list)
        for path in paths:
            members[re.sub(r"(?<![^.])\d+(?![^.])", "*", path)].append(path)
        for starred, equal in members.items():
            self._starred |= {path: f"{starred} ×{len(equal)}" if len(equal) > 1 else path for path in equal}

    def __call__(self, place: str) -> str:
        return self._starred.get(place, place)


def _place_of_kernel(kernel: KernelEvent, event_of_node: dict[str, OpEvent]) -> str | None:
    """The kernel's module; schema v1 has it by the node alone, and not at all where no node is known."""
    if kernel.module_path is None and kernel.owner is None and kernel.method is None:
        found = event_of_node.get(kernel.node or "")
        return place_of(found) if found is not None else None
    return place_of(kernel)


def _modules(
    op_ms: dict[tuple[str, str], float], kernel_ms: dict[tuple[str, str], dict[str, float]], total_ms: float
) -> Iterator[Block]:
    ops: dict[str, list[Block]] = defaultdict(list)
    for (module, op), time_ms in op_ms.items():
        kernels = (Block(name, spent_ms) for name, spent_ms in kernel_ms.get((module, op), {}).items())
        ops[module].append(Block(op, time_ms, _gathered(kernels, total_ms)))
    modules = (Block(module, sum(op.time_ms for op in made), _gathered(made, total_ms)) for module, made in ops.items())
    yield from _gathered(modules, total_ms)


def _gathered(blocks: Iterable[Block], total_ms: float) -> tuple[Block, ...]:
    """Blocks by time, with those that are too narrow to see in one at the end."""
    ranked = sorted((block for block in blocks if block.time_ms > 0), key=lambda block: -block.time_ms)
    narrow = [block for block in ranked if block.time_ms < _MIN_SHARE * total_ms]
    if len(narrow) < 2:
        return tuple(ranked)
    together = Block(f"{len(narrow)} more", sum(block.time_ms for block in narrow))
    return (*ranked[: len(ranked) - len(narrow)], together)


def _shapes(blocks: Iterable[Block], left_ms: float, level: int, total_ms: float) -> Iterator[str]:
    scale = (100 - draw.GUTTER) / total_ms
    for block in blocks:
        place = (
            f'x="{draw.percent(draw.GUTTER + scale * left_ms)}" y="{_ROW_STEP * level}" '
            f'width="{draw.percent(scale * block.time_ms)}" height="{_ROW_HEIGHT}"'
        )
        colour = "r" if block.is_rest else f"l{level}"
        labels = _labels(block, block.time_ms / total_ms)
        # An inner picture clips its label, where the letters are wider than they were taken for.
        whole = f'<svg {place}><rect width="100%" height="100%" class="{colour}"/>{labels}</svg>'
        yield whole if labels else f'<rect {place} class="{colour}"/>'
        yield from _shapes(block.children, left_ms, level + 1, total_ms)
        left_ms += block.time_ms


def _labels(block: Block, share: float) -> str:
    """A block's name as cut for each width, and its share."""
    variants: dict[tuple[int, str], list[str]] = defaultdict(list)
    for tier, _, width_px in _TIERS:
        for line, content in enumerate(_label(block, share, width_px)):
            variants[line, content].append(tier)
    return "".join(
        draw.text("5", 17 + 15 * line, content, "" if len(tiers) == len(_TIERS) else " ".join(tiers))
        for (line, content), tiers in variants.items()
    )


def _label(block: Block, share: float, width_px: float) -> tuple[str, ...]:
    """Name and share as far as they fit: a module loses its first parts, then its count, before its name is cut."""
    fits = int((share * width_px - _PADDING_PX) / _CHARACTER_PX)
    if fits < _MIN_CHARACTERS:
        return ()
    number = numbers.share(share)
    name = next((name for name in _shorter(block.label) if len(name) <= fits), None)
    if name is None:
        name = numbers.shortened(_shorter(block.label)[-1], fits)
    return (name, number) if len(number) <= fits else (name,)


def _shorter(label: str) -> list[str]:
    path, _, count = label.partition(" ×")
    parts = path.split(".")
    # A name that starts with the star of a layer's number tells nothing.
    tails = [".".join(parts[start:]) for start in range(len(parts)) if parts[start] != "*" or len(parts) == 1]
    return [f"{tail} ×{count}" for tail in tails] + tails[-1:] if count else tails


def _media_rules() -> str:
    rules, above = [f"{','.join(f'.{tier}' for tier, _, _ in _TIERS)}{{display:none}}"], None
    for tier, lowest, _ in _TIERS:
        below = f" and (max-width:{above - 0.01}px)" if above else ""
        rules.append(f"@media(min-width:{lowest}px){below}{{.{tier}{{display:inline}}}}")
        above = lowest
    return "".join(rules)
