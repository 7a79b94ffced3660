"""Rules of thumb for every kernel template: the configs that were good wherever somebody measured, in order.

A rule sees the shape, the element size and the device, and names targets: what each parameter should be near to. The
targets are snapped to the valid configs of the space that is handed in (`kernel_presets`), so a rule can ask for what
a shape does not allow. Where a target rests on a measurement, it is said there; the others are neighbours of one.
"""

from __future__ import annotations

import math

from agnitra_lab.suggest import product_rules
from agnitra_lab.suggest.device_class import DeviceFacts
from agnitra_lab.suggest.kernel_situation import KernelRule, KernelSituation, Target, next_power_of_two

# Programs of one row that the norms' templates let wait for each other.
_MAX_WAITING = 128
_L2_BYTES = 50 * 1024 * 1024
# How the shape of a depthwise convolution says that each channel is a plane of its own.
_PLANES = 1


def rows_in_one_block(num_rows: int, block: int, device: DeviceFacts) -> list[Target]:
    """Targets of a kernel that holds whole rows: how many rows a program, and how many values a thread.

    Measured on an H200, RMSNorm of bf16: 64, 32 and 16 values a thread lie within 2% of each other for rows of 4096 to
    8192; with 4096 rows of 2048 four rows and 16 warps are 2% faster than one, and one row alone wants every warp that
    4 values a thread leave.
    """
    few = num_rows < 4 * device.num_multiprocessors
    short = max(1, 1024 // block) if num_rows >= 1024 else 1
    if few:
        shapes = [(1, 16), (1, 8), (1, 4), (1, 32), (1, 64)]
    elif device.name == "consumer":
        # Fewer resident threads a multiprocessor: fewer rows at once, more loads each.
        shapes = [(1, 16), (1, 32), (2, 16), (1, 8), (2, 32), (4, 16), (1, 64)]
    else:
        shapes = [(1, 16), (1, 64), (1, 32), (4, 16), (1, 8), (2, 8), (2, 16), (4, 32), (1, 4)]
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


def _moments(num_rows: int, num_cols: int, s: KernelSituation, stages: int, run: int = 0) -> list[Target]:
    """LayerNorm and GroupNorm: a whole row in one block, else loops, else rows split over some 4000 programs.

    Blocks that wait for each other come before them where two rows for each multiprocessor are more than the L2 holds,
    and each of their blocks has one weight or a weight a column.
    """
    if num_cols <= 16384:
        return rows_in_one_block(num_rows, next_power_of_two(num_cols), s.device)
    programs = 32 * s.device.num_multiprocessors
    split = 1 if num_rows >= programs // 2 else next_power_of_two(max(1, programs // num_rows))
    split = min(split, next_power_of_two(num_cols // 16384))
    stages = stages if split == 1 else 3
    base = {"BLOCK_N": 4096, "ROWS_PER_PROGRAM": 1, "SPLIT": split, "num_warps": 8, "num_stages": stages}
    waiting = [
        {**base, "BLOCK_N": block, "SPLIT": -(-num_cols // block), "num_warps": 8, "num_stages": 1}
        for block in (8192, 4096)
        if num_cols <= _MAX_WAITING * block
    ]
    rows_under_way = min(num_rows, 2 * s.device.num_multiprocessors)
    is_much = split > 1 or rows_under_way * num_cols * s.itemsize > _L2_BYTES
    are_first = is_much and bool(waiting) and run % waiting[0]["BLOCK_N"] == 0
    first, others = (waiting, []) if are_first else ([], waiting)
    return [
        *first, base, {**base, "SPLIT": 2 * split}, {**base, "SPLIT": max(1, split // 2)}, {**base, "BLOCK_N": 2048},
        *others, {**base, "BLOCK_N": 8192}, {**base, "num_warps": 4}, {**base, "num_stages": 1},
        {**base, "num_warps": 16},
    ]  # fmt: skip


def _layer_norm(s: KernelSituation) -> list[Target]:
    return _moments(s.num_rows, s.num_cols, s, stages=3)


def _group_norm(s: KernelSituation) -> list[Target]:
    # One stage in a loop over a whole row: the weights of a block are gathered, and a pipeline would copy them value by
    # value. Of split rows 256 x 294912 fp32 took 208 us with three on an H200, and the first pass reads no weights.
    return _moments(s.shape[0], math.prod(s.shape[1:]), s, stages=1, run=math.prod(s.shape[2:]))


def _softmax(s: KernelSituation) -> list[Target]:
    """Rows of 8192 whole, longer ones in a loop over large blocks or whole with every warp.

    Measured on an H200, bf16: 4096 rows of 32,768 in a loop over 8192 with 8 warps 151 us, whole with 32 warps 166 us;
    512 rows of 131,072 in a loop over 32,768 98 us, in 16 joined parts 106 us.
    """
    block = max(16, next_power_of_two(s.num_cols))
    if s.num_cols <= 4096:
        return rows_in_one_block(s.num_rows, block, s.device)
    whole = {"BLOCK_N": block, "ROWS_PER_PROGRAM": 1, "SPLIT": 1, "num_warps": min(32, block // 512), "num_stages": 1}
    loop = {**whole, "BLOCK_N": 8192, "num_warps": 8}
    if s.num_cols <= 8192:
        return [
            whole, {**whole, "num_warps": 4}, {**whole, "num_warps": 8},
            {**whole, "ROWS_PER_PROGRAM": 2, "num_warps": 8}, {**whole, "ROWS_PER_PROGRAM": 2},
            {**whole, "num_warps": 32}, {**loop, "BLOCK_N": 2048, "num_warps": 2},
        ]  # fmt: skip
    if s.num_cols <= 32768:
        return [
            loop, {**whole, "num_warps": 32}, {**loop, "BLOCK_N": 4096}, {**whole, "num_warps": 16},
            {**loop, "BLOCK_N": 4096, "num_warps": 16}, {**whole, "num_warps": 8}, {**loop, "num_warps": 4},
            {**loop, "BLOCK_N": 4096, "num_warps": 4},
        ]  # fmt: skip
    joined = {**loop, "SPLIT": -(-s.num_cols // 8192), "num_warps": 16}
    return [
        joined, {**loop, "BLOCK_N": 32768, "num_warps": 16},
        {**loop, "BLOCK_N": 1024, "SPLIT": 64, "num_warps": 1, "num_stages": 2},
        {**loop, "num_warps": 16, "num_stages": 3}, {**loop, "BLOCK_N": 16384, "num_warps": 16},
        {**joined, "num_warps": 8}, {**loop, "BLOCK_N": 32768, "num_warps": 32},
        {**joined, "BLOCK_N": 16384, "SPLIT": -(-s.num_cols // 16384)},
    ]  # fmt: skip


def _cross_entropy(s: KernelSituation) -> list[Target]:
    """Measured on an H200, bf16, one warp with 1024 values: 2048 x 128256 141 us in 8 parts, 4096 x 50304 116 in 4,
    8192 x 32000 140 in one with two stages; 8 warps with 4096 or 8192 values took 198, 143 and 177."""
    if s.num_cols <= 4096:
        return rows_in_one_block(s.num_rows, max(16, next_power_of_two(s.num_cols)), s.device)
    enough = 124 * s.device.num_multiprocessors
    parts = 1 if 2 * s.num_rows > enough else max(1, enough // s.num_rows)
    split = 1 << max(0, min(parts, s.num_cols // 4096, 32).bit_length() - 1)
    block = 2048 // s.itemsize
    base = {
        "BLOCK_N": block, "ROWS_PER_PROGRAM": 1, "SPLIT": split, "num_warps": 1, "num_stages": 2 if split == 1 else 1,
    }  # fmt: skip
    other = 3 - base["num_stages"]
    return [
        base, {**base, "num_stages": other}, {**base, "SPLIT": max(1, split // 2)}, {**base, "SPLIT": 2 * split},
        {**base, "num_warps": 2}, {**base, "BLOCK_N": block // 2, "num_stages": 3},
        {**base, "BLOCK_N": 2 * block, "num_warps": 2}, {**base, "BLOCK_N": 4 * block, "num_warps": 8, "num_stages": 4},
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


def _depthwise_conv(s: KernelSituation) -> list[Target]:
    """Some 32 outputs a lane: a tile of a plane, or 16 bytes of channels at a few columns. Not measured."""
    channels, columns, is_planes = s.shape[1], s.shape[7], s.shape[14] == _PLANES
    base = {"BLOCK_C": 1, "BLOCK_H": 1, "LANES_C": 1, "num_warps": 4, "num_stages": 1}
    width, height = -(-s.shape[4] // s.shape[10]), -(-s.shape[3] // s.shape[9])
    if is_planes:
        wide = min(8 if columns > 1 else 1, next_power_of_two(width))
        tall = min(4, next_power_of_two(height))
        tiles = [(wide, tall), (max(1, wide // 2), tall), (wide, max(1, tall // 2)), (max(1, wide // 2), 1), (wide, 1)]
        return [{**base, "BLOCK_W": w, "BLOCK_H": h, "num_warps": warps} for w, h in tiles for warps in (4, 2)]
    vector = math.gcd(channels, 16 // s.itemsize)
    reach = next((lanes for lanes in (64, 32, 16) if channels % lanes == 0), 16)
    blocks = [(4, reach), (2, reach), (4, 2 * reach), (1, reach), (8, reach), (4, max(1, reach // 2))]
    return [
        {**base, "BLOCK_W": w, "BLOCK_C": vector, "LANES_C": max(1, lanes // vector), "num_warps": warps}
        for w, lanes in blocks
        for warps in (4, 2)
    ]


RULES: dict[str, KernelRule] = {
    "cached_attention": product_rules.cached_attention,
    "channel_norm": _channel_norm,
    "cross_entropy": _cross_entropy,
    "cumsum": _cumsum,
    "decode_attention": product_rules.decode_attention,
    "depthwise_conv": _depthwise_conv,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "linear_cross_entropy": product_rules.linear_cross_entropy,
    "rms_norm": _rms_norm,
    "skinny_gemm": product_rules.skinny_gemm,
    "softmax": _softmax,
    "split_gemm": product_rules.split_gemm,
    "swiglu": _swiglu,
}
"""One rule a template; a template without one takes `kernel_presets`' general order."""
