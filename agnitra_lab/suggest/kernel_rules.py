"""Rules of thumb for every kernel template: the configs that were good wherever somebody measured, in order.

A rule sees the shape, the element size and the device, and names targets: what each parameter should be near to. The
targets are snapped to the valid configs of the space that is handed in (`kernel_presets`), so a rule can ask for what
a shape does not allow. Where a target rests on a measurement, it is said there; the others are neighbours of one.
"""

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


def rows_in_one_block(num_rows: int, block: int, device: DeviceFacts) -> list[Target]:
    """Targets of a kernel that holds whole rows: how many rows a program, and how many values a thread.

    Measured on an H200, RMSNorm of bf16: 16 or 8 values a thread for one row a program; with 4096 rows of 2048 four
    rows and 16 warps are 2% faster, and one row alone wants every warp that 4 values a thread leave.
    """
    few = num_rows < 4 * device.num_multiprocessors
    short = max(1, 1024 // block) if num_rows >= 1024 else 1
    if few:
        shapes = [(1, 16), (1, 8), (1, 4), (1, 32), (1, 64)]
    elif device.name == "consumer":
        # Fewer resident threads a multiprocessor: fewer rows at once, more loads each.
        shapes = [(1, 16), (1, 32), (2, 16), (1, 8), (2, 32), (4, 16), (1, 64)]
    else:
        shapes = [(1, 16), (4, 16), (1, 8), (2, 8), (1, 32), (2, 16), (1, 64), (4, 32), (1, 4)]
    return [
        {
            "BLOCK_N": block,
            "ROWS_PER_PROGRAM": rows * short,
            "SPLIT": 1,
            "num_warps": _warps(block * rows * short, values),
            "num_stages": 1,
        }
        for rows, values in shapes
    ]


def _warps(tile: int, values_per_thread: int, most: int = 32) -> int:
    return max(1, min(most, tile // (32 * values_per_thread)))


def _rms_norm(s: KernelSituation) -> list[Target]:
    whole = rows_in_one_block(s.num_rows, next_power_of_two(s.num_cols), s.device)
    loop = {"BLOCK_N": 2048, "ROWS_PER_PROGRAM": 1, "num_warps": 8, "num_stages": 2}
    return [*whole, loop, {**loop, "BLOCK_N": 4096, "num_stages": 3}]


def _swiglu(s: KernelSituation) -> list[Target]:
    """Measured on an H200: 1024 columns and 8 values a thread for one row; 4096 rows of 5632 like narrow tiles of many
    rows, 16384 rows of 14336 like 16 warps."""
    wide = next_power_of_two(s.num_cols)
    if s.num_rows < 4 * s.device.num_multiprocessors:
        tiles = [(1024, 1, 4), (512, 1, 8), (1024, 1, 8), (2048, 1, 8), (256, 1, 2), (128, 1, 1), (512, 1, 2)]
    else:
        tiles = [
            (1024, 4, 16),
            (256, 2, 2),
            (128, 8, 4),
            (4096, 1, 16),
            (1024, 2, 8),
            (2048, 1, 8),
            (1024, 1, 4),
            (256, 8, 8),
        ]
    return [
        {"BLOCK_N": min(block, wide), "ROWS_PER_PROGRAM": rows, "num_warps": warps, "num_stages": 1}
        for block, rows, warps in tiles
    ]


def _moments(num_rows: int, num_cols: int, device: DeviceFacts, stages: int) -> list[Target]:
    """LayerNorm and GroupNorm: a whole row in one block, else loops, else rows split over some 4000 programs."""
    if num_cols <= 16384:
        return rows_in_one_block(num_rows, next_power_of_two(num_cols), device)
    programs = 32 * device.num_multiprocessors
    split = 1 if num_rows >= programs // 2 else next_power_of_two(max(1, programs // num_rows))
    split = min(split, next_power_of_two(num_cols // 16384))
    base = {"BLOCK_N": 4096, "ROWS_PER_PROGRAM": 1, "SPLIT": split, "num_warps": 8, "num_stages": stages}
    return [
        base, {**base, "SPLIT": 2 * split}, {**base, "SPLIT": max(1, split // 2)}, {**base, "BLOCK_N": 2048},
        {**base, "BLOCK_N": 8192}, {**base, "num_warps": 4}, {**base, "num_stages": 1}, {**base, "num_warps": 16},
    ]  # fmt: skip


def _layer_norm(s: KernelSituation) -> list[Target]:
    return _moments(s.num_rows, s.num_cols, s.device, stages=3)


def _group_norm(s: KernelSituation) -> list[Target]:
    # One stage: the weights of a block are gathered, and a pipeline would copy them value by value.
    return _moments(s.shape[0], math.prod(s.shape[1:]), s.device, stages=1)


def _softmax(s: KernelSituation) -> list[Target]:
    """Measured on an H100: 512 rows of 131,072 in bf16 take 122 us in blocks of 8192, 125 us in blocks of 16384."""
    block = max(16, next_power_of_two(s.num_cols))
    if s.num_cols <= 4096:
        return rows_in_one_block(s.num_rows, block, s.device)
    if s.num_cols <= 32768:
        whole = {
            "BLOCK_N": block,
            "ROWS_PER_PROGRAM": 1,
            "SPLIT": 1,
            "num_warps": min(32, block // 512),
            "num_stages": 1,
        }
        halves = {**whole, "BLOCK_N": block // 2, "SPLIT": -(-2 * s.num_cols // block)}
        loop = {**whole, "BLOCK_N": 4096, "num_warps": 8, "num_stages": 3}
        return [
            whole, {**whole, "num_warps": min(32, block // 1024)}, {**whole, "num_warps": 32},
            {**halves, "num_warps": min(32, block // 1024)}, {**whole, "num_warps": block // 2048},
            {**whole, "ROWS_PER_PROGRAM": 2}, loop, {**loop, "BLOCK_N": 8192, "num_stages": 2},
        ]  # fmt: skip
    joined = [
        {"BLOCK_N": block, "ROWS_PER_PROGRAM": 1, "SPLIT": -(-s.num_cols // block), "num_warps": warps, "num_stages": 1}
        for block, warps in ((8192, 16), (8192, 8), (16384, 16), (4096, 8), (16384, 32), (32768, 32))
    ]
    loop = {"BLOCK_N": 4096, "ROWS_PER_PROGRAM": 1, "SPLIT": 128, "num_warps": 8, "num_stages": 2}
    return [*joined, loop, {**loop, "SPLIT": 32}]


def _cross_entropy(s: KernelSituation) -> list[Target]:
    """Measured on an H100, bf16: 32,000 classes 188 us in blocks of 4096 and 4 stages, 128,256 classes 113 us in
    blocks of 8192 and 3 stages."""
    if s.num_cols <= 4096:
        return rows_in_one_block(s.num_rows, max(16, next_power_of_two(s.num_cols)), s.device)
    wanted = max(1, 4 * s.device.num_multiprocessors // s.num_rows)
    split = min(next_power_of_two(wanted), max(1, s.num_cols // 8192))
    block, stages = (4096, 4) if s.num_cols <= 65536 else (8192, 3)
    base = {"BLOCK_N": block, "ROWS_PER_PROGRAM": 1, "SPLIT": split, "num_warps": 8, "num_stages": stages}
    first = [base, {**base, "BLOCK_N": 12288 - block, "num_stages": 7 - stages}, {**base, "num_warps": 16}]
    if split > 1:
        first += [{**base, "SPLIT": 2 * split}, {**base, "SPLIT": max(1, split // 2)}]
    return [
        *first, {**base, "BLOCK_N": 8192, "num_warps": 16, "num_stages": 3}, {**base, "num_warps": 4},
        {**base, "BLOCK_N": 32768, "num_warps": 32, "num_stages": 1}, {**base, "BLOCK_N": 2048, "num_warps": 4},
        {**base, "BLOCK_N": 16384, "num_warps": 16, "num_stages": 2},
    ]  # fmt: skip


def _cumsum(s: KernelSituation) -> list[Target]:
    """Measured on an H100: 2048 rows of 32,768 in fp32 take 191 us in blocks of 8192, 194 us in blocks of 4096."""
    if s.num_cols <= 8192:
        return rows_in_one_block(s.num_rows, max(16, next_power_of_two(s.num_cols)), s.device)
    split = next_power_of_two(max(1, min(2 * s.device.num_multiprocessors // s.num_rows, s.num_cols // 4096)))
    block, stages = (8192, 3) if split == 1 else (4096, 2)
    base = {"BLOCK_N": block, "ROWS_PER_PROGRAM": 1, "SPLIT": split, "num_warps": 8, "num_stages": stages}
    return [
        base, {**base, "num_warps": 16}, {**base, "BLOCK_N": block // 2}, {**base, "SPLIT": 2 * split},
        {**base, "SPLIT": max(1, split // 2)}, {**base, "num_stages": 1}, {**base, "num_warps": 4},
        {**base, "BLOCK_N": 16384, "num_warps": 16},
    ]  # fmt: skip


def _channel_norm(s: KernelSituation) -> list[Target]:
    outer, channels, inner = s.shape
    whole = max(16, next_power_of_two(channels))
    if inner == 1:
        return [
            {**target, "BLOCK_C": target["BLOCK_N"], "BLOCK_S": target["ROWS_PER_PROGRAM"]}
            for target in rows_in_one_block(outer, whole, s.device)
        ]
    block_c = whole if whole <= 512 else 128
    block_s = max(32, min(8192 // block_c, next_power_of_two(inner)))
    tiles = [(1, 32), (2, 32), (1, 16), (0.5, 16), (2, 16), (1, 64), (0.5, 32), (4, 32)]
    return [
        {
            "BLOCK_C": block_c,
            "BLOCK_S": max(16, int(block_s * factor)),
            "num_warps": _warps(int(block_c * block_s * factor), values),
            "num_stages": 2 if factor == 1 else 1,
        }
        for factor, values in tiles
    ]


def _decode_attention(s: KernelSituation) -> list[Target]:
    """Parts for two programs on each multiprocessor, of at least 64 keys."""
    batch, num_kv_heads, num_r, num_keys, _ = s.shape
    block = 64 if s.itemsize == 2 else 32
    wanted = max(1, 2 * s.device.num_multiprocessors // (batch * num_kv_heads))
    split = min(1 << (wanted.bit_length() - 1), 128, max(1, num_keys // block))
    warps = 4 if num_r <= 32 else 8
    base = {"BLOCK_N": block, "SPLIT": split, "num_warps": warps, "num_stages": 2}
    return [
        base, {**base, "SPLIT": 2 * split}, {**base, "BLOCK_N": 2 * block}, {**base, "num_stages": 3},
        {**base, "BLOCK_N": block // 2, "num_warps": warps // 2}, {**base, "SPLIT": 3 * split // 2},
        {**base, "BLOCK_N": 2 * block, "SPLIT": 2 * split, "num_warps": 2 * warps},
        {**base, "SPLIT": max(1, split // 2), "num_stages": 3},
    ]  # fmt: skip


def _skinny_gemm(s: KernelSituation) -> list[Target]:
    """Measured on an H200 with dependent launches, 2048 and 5632 columns of bf16: 8 warps along K, two rows of W a
    program, four where that still gives every multiprocessor several programs."""
    num_rows, num_weight_rows, num_cols = s.shape
    if num_rows <= 4:
        warps = max(1, min(8, next_power_of_two(num_cols * s.itemsize // 512)))
        block_n = 4 if num_weight_rows <= 4096 and num_cols * s.itemsize <= 4096 else 2
        shapes = [(block_n, warps), (6 - block_n, warps), (block_n, warps // 2), (1, warps), (8, warps),
                  (2, warps // 4), (4, warps // 2), (1, warps // 2)]  # fmt: skip
        return [
            {
                "BLOCK_N": rows,
                "BLOCK_K": 512 * max(1, w) // s.itemsize,
                "SPLIT": 1,
                "PDL": 2,
                "num_warps": max(1, w),
                "num_stages": 1,
            }
            for rows, w in shapes
        ]
    programs = 2 * s.device.num_multiprocessors
    block_n = 64 if num_weight_rows >= 64 * programs else 32 if num_weight_rows >= 4096 else 16
    stages = 3 if s.device.name == "consumer" else 4
    base = {
        "BLOCK_N": block_n,
        "BLOCK_K": 512 // s.itemsize,
        "SPLIT": 1,
        "PDL": 2,
        "num_warps": 4,
        "num_stages": stages,
    }
    return [
        base, {**base, "BLOCK_N": 2 * block_n}, {**base, "SPLIT": 2}, {**base, "BLOCK_N": max(16, block_n // 2)},
        {**base, "BLOCK_K": base["BLOCK_K"] // 2, "num_stages": 6}, {**base, "num_stages": 3},
        {**base, "num_warps": 2}, {**base, "SPLIT": 4},
    ]  # fmt: skip


def _split_gemm(s: KernelSituation) -> list[Target]:
    """Blocks of 128 x 128 where there are enough of them for the device; less shared memory takes fewer stages."""
    num_batches, num_m, num_n, _ = s.shape
    num_blocks = num_batches * -(-num_m // 128) * -(-num_n // 128)
    is_large = 4 * num_blocks >= 3 * s.device.num_multiprocessors
    base = {"BLOCK_M": 128 if is_large else 64, "BLOCK_N": 128, "BLOCK_K": 64, "K_CHUNK": 64, "GROUP_M": 8,
            "num_warps": 8 if is_large else 4, "num_stages": 3 if is_large else 4}  # fmt: skip
    deep = {**base, "BLOCK_K": 32, "num_stages": 2 * base["num_stages"]}
    other = {
        **base,
        "BLOCK_M": 192 - base["BLOCK_M"],
        "num_warps": 12 - base["num_warps"],
        "num_stages": 7 - base["num_stages"],
    }
    return [
        base, {**base, "K_CHUNK": 128}, {**base, "GROUP_M": 4}, deep, {**base, "num_stages": 2}, other,
        {**base, "BLOCK_M": 64, "BLOCK_N": 256, "num_warps": 8, "num_stages": 2}, {**deep, "num_stages": 4},
    ]  # fmt: skip


RULES: dict[str, KernelRule] = {
    "channel_norm": _channel_norm,
    "cross_entropy": _cross_entropy,
    "cumsum": _cumsum,
    "decode_attention": _decode_attention,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "skinny_gemm": _skinny_gemm,
    "softmax": _softmax,
    "split_gemm": _split_gemm,
    "swiglu": _swiglu,
}
"""One rule a template; a template without one takes `kernel_presets`' general order."""


def shared_memory_bytes(template: str, params: Target, situation: KernelSituation) -> int:
    """Estimate the shared memory that a config's pipeline takes: what smaller devices than a Hopper do not have.

    Templates enumerate what fits 227 KiB. Unknown templates count as 0.
    """
    stages = params.get("num_stages", 1)
    size = situation.itemsize
    if template == "split_gemm":
        return 4 * (params["BLOCK_M"] + params["BLOCK_N"]) * params["BLOCK_K"] * stages
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
