"""What a rule of thumb for a kernel looks at, and what of the shared memory a config would take there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from agnitra_lab.suggest.device_class import DeviceFacts

Target = dict[str, int]


@dataclass(frozen=True)
class KernelSituation:
    """What a rule looks at.

    Attributes:
        shape: as the template counts it.
        itemsize: bytes of one element.
        device: class, multiprocessors and shared memory.
    """

    shape: tuple[int, ...]
    itemsize: int
    device: DeviceFacts

    @property
    def num_rows(self) -> int:
        """Rows of a kernel over the last dimension."""
        return math.prod(self.shape[:-1])

    @property
    def num_cols(self) -> int:
        """Their length."""
        return self.shape[-1]


KernelRule = Callable[[KernelSituation], list[Target]]


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number` (1 for 0)."""
    return 1 << max(0, number - 1).bit_length()


def shared_memory_bytes(template: str, params: Target, situation: KernelSituation) -> int:
    """Estimate the shared memory that a config's pipeline takes: what smaller devices than a Hopper do not have.

    Templates enumerate what fits 227 KiB. Unknown templates count as 0.
    """
    stages = params.get("num_stages", 1)
    size = situation.itemsize
    if template == "split_gemm":
        return 4 * (params["BLOCK_M"] + params["BLOCK_N"]) * params["BLOCK_K"] * stages
    if template == "linear_cross_entropy":
        return (params["BLOCK_M"] + params["BLOCK_N"]) * params["BLOCK_K"] * size * stages
    if template == "decode_attention":
        return 2 * params["BLOCK_N"] * max(16, next_power_of_two(situation.shape[-1])) * size * stages
    if template == "skinny_gemm":
        # Few rows are summed in registers; the tensor-core product pads them to 16.
        return 0 if situation.shape[0] <= 4 else (params["BLOCK_N"] + 16) * params["BLOCK_K"] * size * stages
    tile = params.get("BLOCK_N", 0) * params.get("ROWS_PER_PROGRAM", 1) or (
        params.get("BLOCK_C", 0) * params.get("BLOCK_S", 1)
    )
    streams = {"rms_norm": 2, "layer_norm": 2, "group_norm": 2}.get(template, 1)
    return (stages - 1) * streams * tile * size
