"""Presets: the configs of a search space to measure first, ranked by rule, for when no language model is asked.

A preset is a rank among the valid configs of the space that is handed in. Rules name targets (`kernel_rules`); each is
snapped to the nearest valid config that fits the device, and what is left of the limit is filled with the first
preset's neighbours, so that even an unknown template has presets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.suggest.device_class import DeviceFacts, facts_of
from agnitra_lab.suggest.kernel_rules import RULES
from agnitra_lab.suggest.kernel_situation import KernelSituation, Target, shared_memory_bytes

NUM_PRESETS = 8
ENUMERATED_BYTES = 227 * 1024
"""The shared memory that templates enumerate their spaces for: a device with as much needs no second look."""


def ranked(space: SearchSpace, device: DeviceInfo | None, *, limit: int = NUM_PRESETS) -> tuple[KernelConfig, ...]:
    """Rank the configs to measure first.

    Args:
        space: the valid configs of one template at one shape.
        device: where the kernel will run; None and a CPU stand for the interpreter.
        limit: how many presets to give at most.

    Returns:
        Valid configs, each once, best guess first; empty only for an empty space.
    """
    facts = facts_of(device)
    situation = KernelSituation(space.shape, 4 if space.dtype == "float32" else 2, facts)
    fitting = [config for config in space.configs if _fits(config, situation)] or list(space.configs)
    if not fitting:
        return ()
    chosen: dict[str, KernelConfig] = {}
    for config in _in_order(space, situation, fitting):
        chosen.setdefault(config.key(), config)
        if len(chosen) >= limit:
            break
    return tuple(chosen.values())


def _in_order(space: SearchSpace, situation: KernelSituation, fitting: list[KernelConfig]) -> Iterator[KernelConfig]:
    rule = RULES.get(space.template)
    if situation.device.name == "none":
        yield from sorted(fitting, key=lambda config: _num_programs_rank(config.params))
        return
    targets = rule(situation) if rule is not None else [_middle(space)]
    snapped = [_nearest(fitting, target, space) for target in targets]
    yield from snapped
    yield from _neighbours(fitting, snapped[0])


def _nearest(configs: Sequence[KernelConfig], target: Target, space: SearchSpace) -> KernelConfig:
    """Return the config nearest to a target, in steps of powers of two; the space's first parameters count first."""
    nearest = configs
    for name in space.params:
        if name in target:
            steps = {value: _steps(value, target[name]) for value in {config.params[name] for config in nearest}}
            least = min(steps.values())
            nearest = [config for config in nearest if steps[config.params[name]] == least]
    return nearest[0]


def _neighbours(configs: Sequence[KernelConfig], centre: KernelConfig) -> list[KernelConfig]:
    """Return all configs, the nearest to the first preset first; ties in the space's order."""
    steps = {
        name: {value: _steps(value, wanted) for value in {config.params[name] for config in configs}}
        for name, wanted in centre.params.items()
    }
    return sorted(configs, key=lambda config: sum(steps[name][value] for name, value in config.params.items()))


def _steps(value: int, wanted: int) -> float:
    return abs(math.log2(max(value, 1)) - math.log2(max(wanted, 1)))


def _middle(space: SearchSpace) -> Target:
    return {name: values[len(values) // 2] for name, values in space.params.items()}


def _fits(config: KernelConfig, situation: KernelSituation) -> bool:
    device: DeviceFacts = situation.device
    if device.shared_memory_bytes >= ENUMERATED_BYTES:
        return True
    needed = shared_memory_bytes(config.template, config.params, situation)
    return needed <= device.shared_memory_bytes


def _num_programs_rank(params: Target) -> float:
    """Fewest programs first: the interpreter's time goes by their number."""
    tile = math.prod(value for name, value in params.items() if name.startswith(("BLOCK", "ROWS")))
    return params.get("SPLIT", 1) / tile
