"""Synthetic landscapes by mechanism, for the robustness of searches: no device has these times, no headline too.

Three kernel families (a tiled matrix product, an image convolution, a reduction over channels) on made-up devices:
occupancy by registers and shared memory, waves and tails, vector widths, spills, bank conflicts, cliffs, a fixed
pseudo-random factor a config (as alignment and scheduling add), and failures where a resource runs out. Devices of one
family differ in their constants, so that some are good siblings of each other and some are not.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.contracts.search import KernelConfig, SearchSpace

Columns = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Device:
    """Constants of a made-up device."""

    name: str
    num_cores: int
    registers: int
    shared_kb: float
    warp: int
    gflops: float
    gb_per_s: float
    best_vector: int
    spill_cost: float
    ruggedness: float
    likes_shared: float
    seed: int


DEVICES = (
    Device("green-a", 108, 65536, 164, 32, 19e3, 1550, 4, 0.05, 0.04, 1.0, 1),
    Device("green-b", 48, 65536, 100, 32, 19e3, 448, 4, 0.05, 0.04, 1.0, 2),
    Device("green-c", 80, 65536, 96, 32, 14e3, 900, 2, 0.08, 0.06, 0.7, 3),
    Device("red-a", 110, 131072, 64, 64, 23e3, 1600, 4, 0.2, 0.06, 0.2, 4),
    Device("red-b", 28, 131072, 64, 32, 8.9e3, 224, 1, 0.15, 0.10, -0.4, 5),
)


@dataclass(frozen=True)
class Synthetic:
    """One landscape: NaN where the config fails."""

    family: str
    device: str
    space: SearchSpace
    latency_ms: NDArray[np.float64]

    @property
    def optimum_ms(self) -> float:
        return float(np.nanmin(self.latency_ms))


def enumerated(params: dict[str, tuple[int, ...]]) -> Columns:
    grid = np.meshgrid(*[np.array(values, dtype=np.float64) for values in params.values()], indexing="ij")
    return {name: axis.ravel() for name, axis in zip(params, grid, strict=True)}


def _rugged(columns: Columns, device: Device, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
    """A factor a config: part of it shared by all devices, because the compiler is the same."""
    num = len(next(iter(columns.values())))
    shared = np.random.default_rng(99).standard_normal(num)
    own = np.random.default_rng(device.seed).standard_normal(num)
    return np.exp(device.ruggedness * np.abs(0.6 * shared + 0.8 * own))[keep]


def _occupancy(
    threads: NDArray[np.float64], regs: NDArray[np.float64], shared_kb: NDArray[np.float64], device: Device
) -> NDArray[np.float64]:
    by_regs = np.floor(device.registers / (regs * threads))
    by_shared = np.floor(device.shared_kb / np.maximum(shared_kb, 0.1))
    blocks = np.minimum(np.minimum(by_regs, by_shared), np.minimum(32, np.floor(2048 / threads)))
    return blocks * threads / 2048


def _matmul(device: Device) -> tuple[dict[str, tuple[int, ...]], Columns, NDArray[np.bool_], NDArray[np.float64]]:
    params = {
        "MWG": (16, 32, 64, 128), "NWG": (16, 32, 64, 128), "KWG": (16, 32), "MDIMC": (8, 16, 32),
        "NDIMC": (8, 16, 32), "KWI": (2, 8), "VWM": (1, 2, 4, 8), "VWN": (1, 2, 4, 8), "SA": (0, 1), "SB": (0, 1),
        "STRM": (0,),
    }  # fmt: skip
    c = enumerated(params)
    keep = (c["MWG"] % (c["MDIMC"] * c["VWM"]) == 0) & (c["NWG"] % (c["NDIMC"] * c["VWN"]) == 0)
    c_kept = {name: column[keep] for name, column in c.items()}
    m, n, k = c_kept["MWG"], c_kept["NWG"], c_kept["KWG"]
    threads = c_kept["MDIMC"] * c_kept["NDIMC"]
    work = m * n / threads
    regs = 24 + 1.15 * work + 2 * c_kept["KWI"] + 1.5 * (c_kept["VWM"] + c_kept["VWN"])
    shared_kb = 4 * k * (m * c_kept["SA"] + n * c_kept["SB"]) / 1024
    spill = 1 + device.spill_cost * np.maximum(0, regs - 128) ** 0.8 / 4
    regs = np.minimum(regs, 255)
    occupancy = _occupancy(threads, regs, shared_kb, device)
    size = 2048.0
    blocks = size * size / (m * n)
    per_core = np.maximum(1, np.floor(occupancy * 2048 / threads))
    waves = np.ceil(blocks / (device.num_cores * per_core)) / (blocks / (device.num_cores * per_core))
    ilp = 1 - np.exp(-(occupancy * 2048 / 256 * np.sqrt(work)) / 10)
    intensity = 2 / (1 / m + 1 / n) / 4
    cache = np.where(c_kept["SA"] + c_kept["SB"] == 2, 1.0, np.where(c_kept["SA"] + c_kept["SB"] == 1, 0.7, 0.45))
    cache = 1 + device.likes_shared * (cache - 1)
    vector = (
        1
        - 0.09 * np.abs(np.log2(c_kept["VWM"] / device.best_vector))
        - 0.06 * np.abs(np.log2(c_kept["VWN"] / device.best_vector))
    )
    conflict = np.where((c_kept["SA"] == 1) & (c_kept["MDIMC"] * c_kept["VWM"] % 64 == 0), 1.12, 1.0)
    compute = 2 * size**3 / (device.gflops * 1e6) / np.maximum(ilp * vector, 0.05) * spill * waves * conflict
    memory = 2 * size**3 / intensity / (device.gb_per_s * 1e6 * 2.5) / np.maximum(cache, 0.1)
    unroll = np.where((c_kept["KWI"] == 8) & (work > 32), 1.08, 1.0) * np.where(c_kept["KWI"] == 2, 1.04, 1.0)
    times = (compute**3 + memory**3) ** (1 / 3) * unroll
    failed = (occupancy <= 0) | (threads > 1024)
    return params, c, keep, np.where(failed, np.nan, times * _rugged(c, device, keep))


def _convolution(device: Device) -> tuple[dict[str, tuple[int, ...]], Columns, NDArray[np.bool_], NDArray[np.float64]]:
    params = {
        "block_size_x": (16, 32, 48, 64, 80, 96, 112, 128, 256), "block_size_y": (1, 2, 4, 8, 16),
        "tile_size_x": (1, 2, 3, 4, 5, 6, 7, 8), "tile_size_y": (1, 2, 3, 4, 5, 6, 7, 8),
        "use_padding": (0, 1), "read_only": (0, 1),
    }  # fmt: skip
    c = enumerated(params)
    threads = c["block_size_x"] * c["block_size_y"]
    shared_kb = 4 * (c["block_size_x"] * c["tile_size_x"] + 16) * (c["block_size_y"] * c["tile_size_y"] + 16) / 1024
    keep = (
        (threads >= 32)
        & (threads <= 1024)
        & (shared_kb <= 64)
        & ((c["use_padding"] == 0) | (c["block_size_x"] % 32 != 0))
    )
    c_kept = {name: column[keep] for name, column in c.items()}
    threads, shared_kb = threads[keep], shared_kb[keep]
    work = c_kept["tile_size_x"] * c_kept["tile_size_y"]
    regs = 20 + 1.6 * work
    spill = 1 + device.spill_cost * np.maximum(0, regs - 96) / 10
    occupancy = _occupancy(threads, np.minimum(regs, 255), shared_kb, device)
    halo = (1 + 16 / (c_kept["block_size_x"] * c_kept["tile_size_x"])) * (
        1 + 16 / (c_kept["block_size_y"] * c_kept["tile_size_y"])
    )
    reuse = 17 / (17 + c_kept["tile_size_x"] - 1) + 0.15
    warp_loss = 1 + 0.5 * ((-c_kept["block_size_x"]) % device.warp) / device.warp
    conflict = np.where((c_kept["use_padding"] == 0) & (c_kept["block_size_x"] % 32 != 0), 1.25, 1.0)
    ilp = 1 - np.exp(-occupancy * (1 + work) / 2.2)
    read = np.where(c_kept["read_only"] == 1, 1 - 0.06 * device.likes_shared, 1.0)
    compute = 4.2 * reuse / np.maximum(ilp, 0.03) * spill * warp_loss * conflict * read * 19e3 / device.gflops
    memory = 1.3 * halo * 1550 / device.gb_per_s
    odd = 1 + 0.08 * (c_kept["tile_size_x"] % 2) * (c_kept["tile_size_y"] % 2) * (work > 1)
    times = (compute**4 + memory**4) ** 0.25 * odd
    return params, c, keep, np.where(occupancy <= 0, np.nan, times * _rugged(c, device, keep))


def _channels(device: Device) -> tuple[dict[str, tuple[int, ...]], Columns, NDArray[np.bool_], NDArray[np.float64]]:
    params = {
        "block_size_x": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), "block_size_y": (4, 8, 16, 32, 64, 128),
        "tile_size_x": (1, 2, 3, 4, 5, 6, 7, 8), "tile_size_y": (1, 2, 3, 4, 5, 6, 7, 8),
        "stride_x": (0, 1), "stride_y": (0, 1), "unroll": (0, 2),
    }  # fmt: skip
    c = enumerated(params)
    threads = c["block_size_x"] * c["block_size_y"]
    keep = (threads >= 32) & (threads <= 1024)
    keep &= ((c["tile_size_x"] > 1) | (c["stride_x"] == 0)) & ((c["tile_size_y"] > 1) | (c["stride_y"] == 0))
    c_kept = {name: column[keep] for name, column in c.items()}
    threads = threads[keep]
    work = c_kept["tile_size_x"] * c_kept["tile_size_y"]
    regs = 18 + 1.4 * work + 2 * c_kept["unroll"]
    spill = 1 + device.spill_cost * np.maximum(0, regs - 80) / 8
    occupancy = _occupancy(threads, np.minimum(regs, 255), np.full_like(threads, 0.1), device)
    coalesced = np.minimum(1, c_kept["block_size_x"] / device.warp) ** 0.7
    coalesced *= np.where(
        (c_kept["stride_x"] == 0) & (c_kept["tile_size_x"] > 1), 0.6 + 0.3 / c_kept["tile_size_x"], 1.0
    )
    reuse = 1 / (1 + 0.35 * np.log2(c_kept["tile_size_y"] * c_kept["block_size_y"]))
    hide = 1 - np.exp(-occupancy * (2 + work * (1 + 0.2 * c_kept["unroll"])) / 3)
    loop = np.where(c_kept["unroll"] == 0, 1.05, 1.0)
    memory = 30 * reuse / np.maximum(coalesced, 0.02) / np.maximum(hide, 0.02) * 1550 / device.gb_per_s
    compute = 3.0 * 19e3 / device.gflops * (1 + 0.3 / work)
    times = (memory + compute) * spill * loop
    return params, c, keep, times * _rugged(c, device, keep)


FAMILIES = {"matmul": _matmul, "convolution": _convolution, "channels": _channels}


def landscape(family: str, device: Device) -> Synthetic:
    """Build one landscape."""
    params, columns, keep, times = FAMILIES[family](device)
    picked = np.flatnonzero(keep)
    configs = tuple(
        KernelConfig(template=f"synthetic_{family}", params={name: int(columns[name][index]) for name in params})
        for index in picked
    )
    space = SearchSpace(template=f"synthetic_{family}", shape=(1,), dtype="float32", params=params, configs=configs)
    return Synthetic(family, device.name, space, times)


def all_landscapes() -> list[Synthetic]:
    """Every family on every device."""
    return [landscape(family, device) for family, device in itertools.product(FAMILIES, DEVICES)]
