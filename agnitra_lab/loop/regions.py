"""Where the time went before and after: the profiles of the original and of what was installed, region by region."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from agnitra_lab.contracts.device import DeviceInfo, DevicePeaks
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.contracts.report import Region
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.loop.undisturbed import as_it_was
from agnitra_lab.profiler import capture
from agnitra_lab.profiler.telemetry import Telemetry

if TYPE_CHECKING:
    import pandas as pd

MAX_REGIONS = 24
# A module that stands in a list has its number for a name; a model of 22 layers has one region for each of their parts.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_ROOT = "the root module"
_OTHER = "other places"
_NUM_CALLS = 3


def explain(
    workload: Workload, before: Telemetry, model: Callable[..., Any], descriptors: Sequence[PatchDescriptor], *,
    peaks: DevicePeaks | None, device: DeviceInfo, folder: Path,
) -> tuple[Region, ...]:  # fmt: skip
    """Profile what was installed and hold it against the first profile, region by region.

    Args:
        workload: whose inputs it is called on.
        before: profile of the original.
        model: what was installed.
        descriptors: what was changed where.
        peaks: measured ceilings.
        device: where it runs.
        folder: where the second profile goes.

    Raises:
        Exception: whatever the model or a profiler raises.
    """

    def call() -> Any:
        with torch.no_grad():
            return model(*workload.args, **workload.kwargs)

    with as_it_was(workload) as restore:
        after = capture.profile(
            call, name=workload.name, repeat=_NUM_CALLS, num_warmup=1, should_time=False, device_info=device,
            reference=before, restore=restore,
        )  # fmt: skip
    after.save(folder)
    return regions(workload, before, after, descriptors, peaks)


def regions(
    workload: Workload,
    before: Telemetry,
    after: Telemetry,
    descriptors: Sequence[PatchDescriptor],
    peaks: DevicePeaks | None,
) -> tuple[Region, ...]:
    """Sum a comparison of two profiles by place, equal places of numbered layers as one.

    Where a kernel of the candidate spans modules, those are one region: the baseline's time of all of them stands
    beside it. The times of all regions add up to the two profiles'.

    Args:
        workload: its model's weights, and so the least time in which a region can read them.
        before: profile of the original.
        after: profile of the drop-in, on the same inputs.
        descriptors: what was changed where.
        peaks: measured ceilings, None where none were measured.

    Returns:
        The regions, the longest before first; what lies beyond the first two dozen is one last row.
    """
    frame = before.compare(after)
    flops, modules = _facts_of_nodes(before.nodes)
    sums: dict[str, _Sum] = {}
    for row in frame.to_dict("records"):
        entry = sums.setdefault(_place(row["module_path"], row["owner"]), _Sum())
        entry.baseline_ms += _number(row["baseline_ms"])
        entry.candidate_ms += _number(row["candidate_ms"])
        for name in str(row["node"] or "").split(" + "):
            entry.flops += flops.get(name, 0.0)
            entry.modules.update(modules.get(name, ()))
    ranked = sorted(sums.items(), key=lambda pair: -max(pair[1].baseline_ms, pair[1].candidate_ms))
    shown, rest = ranked[:MAX_REGIONS], ranked[MAX_REGIONS:]
    if rest:
        other = _Sum()
        for _, entry in rest:
            other.add(entry)
        shown = [*shown, (_OTHER, other)]
    changes = _changes_by_place(descriptors)
    return tuple(
        Region(
            place=place,
            baseline_ms=entry.baseline_ms,
            candidate_ms=entry.candidate_ms,
            limit_ms=_limit_ms(workload, entry, peaks),
            changes=_changes_in(place, changes),
        )
        for place, entry in shown
    )


class _Sum:
    """Times and FLOPs of one place, and the modules whose ops they are."""

    def __init__(self) -> None:
        self.baseline_ms = self.candidate_ms = self.flops = 0.0
        self.modules: set[str] = set()

    def add(self, other: _Sum) -> None:
        self.baseline_ms += other.baseline_ms
        self.candidate_ms += other.candidate_ms
        self.flops += other.flops
        self.modules |= other.modules


def _place(module_path: object, owner: object) -> str:
    if isinstance(module_path, str) and module_path:
        return _NUMBER.sub("*", module_path)
    return _ROOT if owner == "fx_node" else str(owner).replace("_", " ") if isinstance(owner, str) else "residual"


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and value == value else 0.0


def _facts_of_nodes(nodes: pd.DataFrame) -> tuple[dict[str, float], dict[str, set[str]]]:
    """Return FLOPs and module paths by node name."""
    flops: dict[str, float] = {}
    modules: dict[str, set[str]] = {}
    for node, done, path in zip(nodes["node"], nodes["flops"], nodes["module_path"], strict=True):
        if isinstance(node, str):
            flops[node] = flops.get(node, 0.0) + _number(done)
            modules.setdefault(node, set()).update([path] if isinstance(path, str) else [])
    return flops, modules


def _changes_by_place(descriptors: Sequence[PatchDescriptor]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for change in descriptors:
        if change.kind != "options":
            found.setdefault(_NUMBER.sub("*", change.module_path), []).append(change.action)
    return found


def _changes_in(place: str, changes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the actions at the place, above it or below it: a change is filed where its first op stood."""
    inside = [
        action
        for where, actions in changes.items()
        if where == place or where.startswith(f"{place}.") or (where and place.startswith(f"{where}."))
        for action in actions
    ]
    return tuple(dict.fromkeys(inside))


def _limit_ms(workload: Workload, work: _Sum, peaks: DevicePeaks | None) -> float | None:
    """Return the least time that the device allows: FLOPs at its matrix peak, or one read of the weights there."""
    if peaks is None:
        return None
    bandwidth, rate = peaks.copy_bandwidth_gb_per_s, peaks.gemm_tflop_per_s
    weights_ms = _weight_bytes(workload, work.modules) / (bandwidth * 1e6) if bandwidth else 0.0
    return max(weights_ms, work.flops / (rate * 1e9) if rate else 0.0) or None


def _weight_bytes(workload: Workload, paths: Collection[str]) -> int:
    """Return the bytes of the modules' own parameters that a call reads whole."""
    if not isinstance(workload.model, nn.Module):
        return 0
    return sum(
        parameter.numel() * parameter.element_size()
        for name, module in workload.model.named_modules()
        if name in paths and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for parameter in module.parameters(recurse=False)
    )
