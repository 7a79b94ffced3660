"""The config to start from, by rule: a good kernel before anything was measured, and the first seed of a search."""

from __future__ import annotations

import math

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry
from agnitra_lab.generate.points import next_power_of_two

_VALUES_PER_THREAD = {"rms_norm": 16, "swiglu": 8}
"""Two 16-byte loads of bf16 in flight a thread for a row that is reduced, one for each stream of a pointwise op."""
_SMALLEST_TILE = 1024


def default_config(template: str, shape: tuple[int, ...], dtype: str) -> KernelConfig:
    """Choose the valid config that is nearest to the rule of thumb for this shape.

    The rule: a whole row in one block where it fits (blocks of 1024 for swiglu), several short rows in a program so
    that it has enough to load, and as many warps as give each thread one or two 16-byte loads in each stream.

    Args:
        template: name of a template.
        shape: the tensor's shape; the last number is the row's length.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        TemplateError: for an unknown template, or a shape or dtype without a valid config.
    """
    space = registry.load(template).space(shape, dtype)
    if not space.configs:
        raise TemplateError(f"{template} has no valid config for the shape {tuple(shape)} and {dtype}.")
    num_rows, num_cols = math.prod(shape[:-1]), shape[-1]
    block_n = next_power_of_two(num_cols) if template == "rms_norm" else min(1024, next_power_of_two(num_cols))
    # Few rows stay in programs of their own: the machine has more multiprocessors than rows.
    rows = max(1, _SMALLEST_TILE // block_n) if num_rows >= 1024 else 1
    warps = max(1, block_n * rows // (32 * _VALUES_PER_THREAD[template]))
    target = {"BLOCK_N": block_n, "ROWS_PER_PROGRAM": rows, "num_warps": min(16, warps), "num_stages": 2}

    def distance(config: KernelConfig) -> tuple[float, ...]:
        steps = {name: abs(math.log2(value / target[name])) for name, value in config.params.items()}
        return steps["BLOCK_N"], steps["ROWS_PER_PROGRAM"], steps["num_warps"], steps["num_stages"]

    return min(space.configs, key=distance)
