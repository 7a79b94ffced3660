"""The wide grids of complete landscapes: more values than a template's everyday space, and looser rules.

A search of a few minutes wants the small space that a template lists; a recording of everything wants the bad
configs as well, because a sampler is judged by how it keeps away from them. What cannot be compiled to something
else, or is a copy of another config, stays out here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate.points import enumerate_space, itemsize, next_power_of_two

_SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on Hopper (compute capability 9.0)."""
_MOST_TILE = 32768
_WARPS = (1, 2, 4, 8, 16, 32)
_MOST_SPLIT_PROGRAMS = 16384

Point = dict[str, int]
Grid = tuple[dict[str, tuple[int, ...]], Callable[[Point], bool]]

PLAN: dict[str, tuple[Site, ...]] = {
    "decode_attention": (
        Site("decode_attention", (8, 8, 4, 4096, 128), "bfloat16"),
        Site("decode_attention", (1, 8, 4, 8192, 128), "bfloat16"),
        Site("decode_attention", (64, 8, 4, 2048, 128), "bfloat16"),
    ),
    "rms_norm": (
        Site("rms_norm", (16384, 4096), "bfloat16"),
        Site("rms_norm", (4096, 8192), "bfloat16"),
        Site("rms_norm", (8192, 5120), "bfloat16"),
    ),
    "skinny_gemm": (
        Site("skinny_gemm", (16, 4096, 4096), "bfloat16"),
        Site("skinny_gemm", (16, 28672, 4096), "bfloat16"),
        Site("skinny_gemm", (16, 4096, 14336), "bfloat16"),
    ),
    "softmax": (
        Site("softmax", (4096, 32768), "bfloat16"),
        Site("softmax", (16384, 8192), "bfloat16"),
        Site("softmax", (512, 131072), "bfloat16"),
    ),
    "layer_norm": (
        Site("layer_norm", (8192, 4096), "bfloat16"),
        Site("layer_norm", (32768, 2048), "bfloat16"),
        Site("layer_norm", (1024, 16384), "bfloat16"),
    ),
    "gemv": (
        Site("skinny_gemm", (1, 6144, 4096), "bfloat16"),
        Site("skinny_gemm", (1, 28672, 4096), "bfloat16"),
        Site("skinny_gemm", (1, 4096, 14336), "bfloat16"),
    ),
    "cross_entropy": (
        Site("cross_entropy", (8192, 32000), "bfloat16"),
        Site("cross_entropy", (4096, 50304), "bfloat16"),
        Site("cross_entropy", (2048, 128256), "bfloat16"),
    ),
}
"""What is recorded by default: name of a family -> its sites, whose kernels share much of their compilation."""


def wide_space(site: Site) -> SearchSpace:
    """Enumerate the wide grid of a template at a site.

    Raises:
        TemplateError: for a template without a wide grid, with those that have one, or a shape it does not take.
    """
    if site.template not in _GRIDS:
        raise TemplateError(f"{site.template} has no wide grid.", hint=f"These have: {', '.join(sorted(_GRIDS))}.")
    if not site.shape or min(site.shape) < 1:
        raise TemplateError(f"{site.template} needs a shape of numbers of at least 1, not {site.shape}.")
    params, is_valid = _GRIDS[site.template](site.shape, site.dtype)
    return enumerate_space(site.template, site.shape, site.dtype, params, is_valid)


def _powers(low: int, high: int) -> tuple[int, ...]:
    return tuple(1 << power for power in range(low.bit_length() - 1, high.bit_length()))


def _is_row_tile(point: Point, most_rows: int, per_thread: tuple[float, float]) -> bool:
    tile = point["BLOCK_N"] * point["ROWS_PER_PROGRAM"]
    values_per_thread = tile / (32 * point["num_warps"])
    return (
        point["ROWS_PER_PROGRAM"] <= most_rows
        and tile <= _MOST_TILE
        and per_thread[0] <= values_per_thread <= per_thread[1]
    )


def _rms_norm(shape: tuple[int, ...], dtype: str) -> Grid:
    num_rows, num_cols = math.prod(shape[:-1]), shape[-1]
    whole_row = max(16, next_power_of_two(num_cols))

    def is_valid(point: Point) -> bool:
        is_one_block = num_cols <= point["BLOCK_N"]
        values = 2 * point["BLOCK_N"] * point["ROWS_PER_PROGRAM"] + point["BLOCK_N"]
        return (
            _is_row_tile(point, next_power_of_two(num_rows), (1, 128))
            # Stages are of the loop over blocks: without the loop they would be copies of one config.
            and (not is_one_block or point["num_stages"] == 1)
            and (point["num_stages"] - 1) * values * itemsize(dtype) <= _SHARED_MEMORY_BYTES
        )

    blocks = _powers(min(128, whole_row), min(2 * whole_row, _MOST_TILE))
    return {
        "BLOCK_N": blocks, "ROWS_PER_PROGRAM": (1, 2, 4, 8, 16, 32), "num_warps": _WARPS, "num_stages": (1, 2, 3, 4, 5),
    }, is_valid  # fmt: skip


def _layer_norm(shape: tuple[int, ...], dtype: str) -> Grid:
    num_rows, num_cols = math.prod(shape[:-1]), shape[-1]
    whole_row = max(16, next_power_of_two(num_cols))

    def is_valid(point: Point) -> bool:
        tile = point["BLOCK_N"] * point["ROWS_PER_PROGRAM"]
        is_one_block, split = num_cols <= point["BLOCK_N"], point["SPLIT"]
        loaded_bytes = (2 * tile + 2 * point["BLOCK_N"]) * itemsize(dtype)
        return (
            # Two moments a lane live through the loop; they take the registers of the one block's row.
            _is_row_tile(point, next_power_of_two(num_rows), (1, 128 if is_one_block else 64))
            and (not is_one_block or point["num_stages"] == 1)
            and (point["num_stages"] - 1) * loaded_bytes <= _SHARED_MEMORY_BYTES
            and (split == 1 or (point["ROWS_PER_PROGRAM"] == 1 and point["BLOCK_N"] * split <= num_cols))
            and (split == 1 or split * num_rows <= _MOST_SPLIT_PROGRAMS)
        )

    blocks = _powers(min(128, whole_row), min(2 * whole_row, _MOST_TILE))
    return {
        "BLOCK_N": blocks, "ROWS_PER_PROGRAM": (1, 2, 4, 8, 16), "SPLIT": (1, 2, 4, 8, 16),
        "num_warps": _WARPS, "num_stages": (1, 2, 3, 4, 5),
    }, is_valid  # fmt: skip


def _is_part_of_row(point: Point, num_cols: int, most_waiting: int) -> bool:
    """The third form of softmax: the fewest programs that hold the row, no more than may wait for each other."""
    block, split = point["BLOCK_N"], point["SPLIT"]
    return (split - 1) * block < num_cols and split <= most_waiting and point["num_stages"] == 1


def _softmax(shape: tuple[int, ...], dtype: str) -> Grid:
    num_rows, num_cols = math.prod(shape[:-1]), shape[-1]
    whole_row = max(16, next_power_of_two(num_cols))
    blocks = _powers(min(256, whole_row), min(whole_row, _MOST_TILE))
    joined = {-(-num_cols // block) for block in blocks}
    splits = {1} | {split for split in {2, 4, 8, 16, 32, 64} | joined if 512 * split <= num_cols and split <= 128}

    def is_valid(point: Point) -> bool:
        block, split = point["BLOCK_N"], point["SPLIT"]
        if not _is_row_tile(point, next_power_of_two(num_rows), (2, 128)):
            return False
        if block >= num_cols:
            return split == 1 and point["num_stages"] == 1
        if split > 1 and point["ROWS_PER_PROGRAM"] > 1:
            return False
        if split > 1 and split * block >= num_cols:
            return _is_part_of_row(point, num_cols, 64)
        loaded_bytes = block * point["ROWS_PER_PROGRAM"] * itemsize(dtype)
        return split * num_rows <= 65536 and (point["num_stages"] - 1) * loaded_bytes <= _SHARED_MEMORY_BYTES

    return {
        "BLOCK_N": blocks, "ROWS_PER_PROGRAM": (1, 2, 4, 8), "SPLIT": tuple(sorted(splits)),
        "num_warps": _WARPS, "num_stages": (1, 2, 3, 4),
    }, is_valid  # fmt: skip


def _cross_entropy(shape: tuple[int, ...], dtype: str) -> Grid:
    num_tokens, num_cols = math.prod(shape[:-1]), shape[-1]
    whole_row = max(16, next_power_of_two(num_cols))
    blocks = _powers(min(256, whole_row), min(whole_row, _MOST_TILE))

    def is_valid(point: Point) -> bool:
        block, split, stages = point["BLOCK_N"], point["SPLIT"], point["num_stages"]
        if not _is_row_tile(point, next_power_of_two(num_tokens), (2, 128)):
            return False
        if split > 1 and (split * num_tokens > 65536 or block * (split - 1) >= num_cols):
            return False
        if block * split >= num_cols:
            return stages == 1
        if stages > 1 and point["ROWS_PER_PROGRAM"] > 2:
            return False
        return stages * block * point["ROWS_PER_PROGRAM"] * itemsize(dtype) <= _SHARED_MEMORY_BYTES

    return {
        "BLOCK_N": blocks, "ROWS_PER_PROGRAM": (1, 2, 4, 8), "SPLIT": (1, 2, 4, 8),
        "num_warps": _WARPS, "num_stages": (1, 2, 3, 4),
    }, is_valid  # fmt: skip


def _decode_attention(shape: tuple[int, ...], dtype: str) -> Grid:
    if len(shape) != 5:
        raise TemplateError(f"decode_attention needs a shape (B, G, R, S, D), not {shape}.")
    batch, num_kv_heads, num_r, num_keys, head_size = shape
    block_d, block_r = max(16, next_power_of_two(head_size)), max(16, next_power_of_two(num_r))

    def is_valid(point: Point) -> bool:
        stage_bytes = 2 * point["BLOCK_N"] * block_d * itemsize(dtype)
        num_blocks = -(-num_keys // point["BLOCK_N"])
        values_per_thread = block_r * max(point["BLOCK_N"], block_d) / (32 * point["num_warps"])
        return (
            point["SPLIT"] <= num_blocks
            and batch * num_kv_heads * point["SPLIT"] <= _MOST_SPLIT_PROGRAMS
            and point["num_stages"] * stage_bytes + block_r * block_d * itemsize(dtype) <= _SHARED_MEMORY_BYTES
            and 1 <= values_per_thread <= 128
            # Stages past the part's own blocks would be copies of one config.
            and (point["num_stages"] <= 2 or point["num_stages"] <= -(-num_blocks // point["SPLIT"]))
        )

    return {
        "BLOCK_N": (16, 32, 64, 128, 256), "SPLIT": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128),
        "num_warps": (1, 2, 4, 8, 16), "num_stages": (1, 2, 3, 4, 5),
    }, is_valid  # fmt: skip


def _skinny_gemm(shape: tuple[int, ...], dtype: str) -> Grid:
    from agnitra_lab.generate.templates.skinny_gemm import MAX_ROWS, MOST_REDUCED_ROWS

    if len(shape) != 3 or shape[0] > MAX_ROWS:
        raise TemplateError(f"skinny_gemm needs a shape (M, N, K) with M at most {MAX_ROWS}, not {shape}.")
    return _reduction(shape, dtype) if shape[0] <= MOST_REDUCED_ROWS else _product(shape, dtype)


def _reduction(shape: tuple[int, ...], dtype: str) -> Grid:
    from agnitra_lab.generate.templates.skinny_gemm import MOST_TILES

    num_cols = shape[2]

    def is_valid(point: Point) -> bool:
        num_tiles = -(-num_cols // (point["BLOCK_K"] * point["SPLIT"]))
        per_thread = num_tiles * point["BLOCK_K"] * point["BLOCK_N"] * itemsize(dtype) / (32 * point["num_warps"])
        return (
            num_tiles <= MOST_TILES
            and 16 <= per_thread <= 512
            and num_tiles * point["BLOCK_K"] * point["SPLIT"] <= 1.5 * num_cols
        )

    return {
        "BLOCK_N": (1, 2, 4, 8, 16, 32), "BLOCK_K": (128, 256, 512, 1024, 2048, 4096, 8192), "SPLIT": (1, 2, 3, 4, 8),
        "PDL": (1, 2), "num_warps": _WARPS, "num_stages": (1,),
    }, is_valid  # fmt: skip


def _product(shape: tuple[int, ...], dtype: str) -> Grid:
    num_cols = shape[2]

    def is_valid(point: Point) -> bool:
        stage_bytes = (point["BLOCK_N"] + 16) * point["BLOCK_K"] * itemsize(dtype)
        num_tiles = -(-num_cols // (point["BLOCK_K"] * point["SPLIT"]))
        return (
            point["num_stages"] * stage_bytes <= _SHARED_MEMORY_BYTES
            and point["BLOCK_N"] * 16 >= 32 * point["num_warps"]
            # Stages past the part's own tiles would be copies of one config.
            and (point["num_stages"] <= 2 or point["num_stages"] <= num_tiles)
        )

    return {
        "BLOCK_N": (16, 32, 64, 128), "BLOCK_K": (64, 128, 256, 512), "SPLIT": (1, 2, 4, 8),
        "PDL": (1, 2), "num_warps": (1, 2, 4, 8), "num_stages": (2, 3, 4, 6),
    }, is_valid  # fmt: skip


_GRIDS: Mapping[str, Callable[[tuple[int, ...], str], Grid]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "cross_entropy": _cross_entropy,
    "decode_attention": _decode_attention,
    "skinny_gemm": _skinny_gemm,
}
