"""What a prompt says about a place for a kernel: its space, its roofline, and what was measured of it so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.device import DeviceInfo, DevicePeaks
from agnitra_lab.contracts.search import KernelConfig, SearchSpace, Trial
from agnitra_lab.suggest import landscapes
from agnitra_lab.suggest.device_class import facts_of
from agnitra_lab.suggest.kernel_presets import ranked
from agnitra_lab.suggest.sites import KernelSite

NUM_LISTED = 24
"""A space of at most as many configs is listed; of a larger one the bounds are said."""
NUM_SIBLINGS = 2
NUM_PRESETS_SHOWN = 4

PARAM_MEANINGS: dict[str, str] = {
    "BLOCK_M": "rows of the result that one program computes",
    "BLOCK_N": "columns (of a row, or of the result; keys of attention) that one program holds at a time",
    "BLOCK_K": "columns of the summed dimension that one step loads",
    "BLOCK_C": "channels that one program holds at a time",
    "BLOCK_S": "positions beside each other that one program holds",
    "ROWS_PER_PROGRAM": "rows that one program holds at once",
    "SPLIT": "programs that share one row, sum or set of keys; their parts are joined after",
    "K_CHUNK": "columns added up before they join the fp32 sum: longer is faster and less exact",
    "GROUP_M": "row blocks that run near each other in time, for the L2",
    "PDL": "dependent launch; leave it as listed",
    "num_warps": "warps of one program",
    "num_stages": "loads in flight of the loop, in shared memory; 1 has no pipeline",
}


def site_facts(
    site: KernelSite, device: DeviceInfo, peaks: DevicePeaks | None, trials: Sequence[Trial] = ()
) -> dict[str, Any]:
    """Describe one site.

    Args:
        site: the space and what is known of it.
        device: where it will run.
        peaks: the device's measured ceilings.
        trials: what was measured of it in earlier rounds.
    """
    space = site.space
    facts: dict[str, Any] = {
        "site": site.key,
        "action": space.template,
        "kernel": ACTIONS[space.template].summary if space.template in ACTIONS else space.template,
        "shape": list(space.shape),
        "dtype": space.dtype,
        "num_nodes": site.num_nodes,
        **_roofline(site, peaks),
        **_space_facts(space),
        "rules_of_thumb": [config.params for config in ranked(space, device, limit=NUM_PRESETS_SHOWN)],
    }
    if site.siblings:
        facts["measured_elsewhere"] = [
            {"where": sibling.label, **landscapes.summarise(sibling.trials)} for sibling in site.siblings[:NUM_SIBLINGS]
        ]
    if trials:
        facts["measured_here"] = landscapes.summarise(trials)
    return facts


def meanings(sites: Sequence[KernelSite]) -> dict[str, str]:
    """Explain the parameters that the sites have."""
    names = {name for site in sites for name in site.space.params}
    return {name: text for name, text in PARAM_MEANINGS.items() if name in names}


def multiprocessor_facts(device: DeviceInfo) -> dict[str, Any]:
    """Return what a config must live within; empty for a CPU."""
    facts = facts_of(device)
    if facts.name == "none":
        return {}
    return {
        "class": facts.name,
        "num_multiprocessors": facts.num_multiprocessors,
        "shared_memory_bytes_per_program": facts.shared_memory_bytes,
        "threads_per_multiprocessor": facts.threads_per_multiprocessor,
        "registers_per_multiprocessor": 65_536,
    }


def _roofline(site: KernelSite, peaks: DevicePeaks | None) -> dict[str, Any]:
    """Return the least time that bytes and FLOPs allow, and which of the two sets it."""
    facts: dict[str, Any] = {}
    if site.bytes_moved:
        facts["bytes_moved"] = site.bytes_moved
    if site.flops:
        facts["flops"] = site.flops
    if peaks is None:
        return facts
    floors = {
        "memory": (site.bytes_moved or 0) / (peaks.copy_bandwidth_gb_per_s or math.inf) / 1e3,
        "compute": (site.flops or 0) / (peaks.gemm_tflop_per_s or math.inf) / 1e6,
    }
    bound = max(floors, key=lambda name: floors[name])
    if floors[bound] > 0:
        facts |= {"floor_us": float(f"{floors[bound]:.4g}"), "bound": bound}
    return facts


def _space_facts(space: SearchSpace) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "params": {name: list(values) for name, values in space.params.items()},
        "num_valid": len(space.configs),
    }
    if 0 < len(space.configs) <= NUM_LISTED:
        names = list(space.params)
        facts["valid"] = {"order": names, "configs": [[c.params[name] for name in names] for c in space.configs]}
    elif space.configs:
        facts["valid_only_if"] = _bounds(space.configs)
    return facts


def _bounds(configs: Sequence[KernelConfig]) -> dict[str, list[float]]:
    """Return what all valid configs have in common: how large a tile is, and how many values a thread holds."""
    tiles = [(float(_tile(config.params)), config.params.get("num_warps", 1)) for config in configs]
    elements = [tile for tile, _ in tiles]
    per_thread = [tile / (32 * warps) for tile, warps in tiles]
    return {
        "tile_elements": [min(elements), max(elements)],
        "values_per_thread": [min(per_thread), max(per_thread)],
    }


def _tile(params: Mapping[str, int]) -> int:
    """Elements of one program's tile: the two sides that are not summed over."""
    sides = [
        v for name, v in params.items() if name in ("BLOCK_M", "BLOCK_N", "BLOCK_C", "BLOCK_S", "ROWS_PER_PROGRAM")
    ]
    return math.prod(sides)
