"""Rules of thumb for kernels on the tensor cores and for products of few rows: attention, skinny and split GEMMs."""

from __future__ import annotations

from agnitra_lab.suggest.kernel_situation import KernelSituation, Target, next_power_of_two


def decode_attention(s: KernelSituation) -> list[Target]:
    """One wave of programs with long blocks and three stages, else several waves of short blocks.

    Measured on an H200, bf16, 8 heads of 128 with 4 queries each: 8 x 4096 keys 37.8 us with 128 programs and 44 us
    with 256; 1 x 8192 keys 16.5 us with 512 small programs, 16.9 us with 128; 64 x 2048 keys are best left whole.
    """
    batch, num_kv_heads, num_r, num_keys, _ = s.shape
    unit = 1 if s.itemsize == 2 else 2
    wave = max(1, s.device.num_multiprocessors // (batch * num_kv_heads))
    split = min(1 << (wave.bit_length() - 1), 128, max(1, num_keys // 64))
    more = 1 if num_r <= 32 else 2

    def target(block: int, parts: int, warps: int, stages: int) -> Target:
        return {"BLOCK_N": block // unit, "SPLIT": parts, "num_warps": warps * more, "num_stages": stages}

    if batch * num_kv_heads > s.device.num_multiprocessors:
        return [
            target(64, 1, 2, 2), target(64, 1, 4, 2), target(32, 1, 2, 3), target(16, 1, 1, 4), target(128, 1, 4, 3),
            target(64, 2, 4, 2), target(32, 1, 4, 3), target(64, 1, 1, 2),
        ]  # fmt: skip
    return [
        target(128, split, 4, 3), target(16, 4 * split, 1, 3), target(64, 2 * split, 2, 3),
        target(64, 4 * split, 2, 2), target(128, split, 8, 3), target(64, 2 * split, 4, 3),
        target(32, 3 * split, 4, 3), target(64, 4 * split, 4, 2),
    ]  # fmt: skip


def cached_attention(s: KernelSituation) -> list[Target]:
    """Two programs a multiprocessor, each of at least 64 keys, with 8 warps; then as the split attention it contains.

    Measured on an H200 in the chain of a 1.1B decoder's token, bf16, 4 heads of 64 with 8 queries each, 1 x 1024 keys:
    16 parts in blocks of 64 keys 0.732 ms with 8 warps, 0.748 with 4; 32 parts in blocks of 32 0.736 with 4; 8 parts in
    blocks of 128 0.762 with 8; 8 parts in blocks of 64 0.780 with 8, 0.793 with 4.
    """
    batch, num_kv_heads, _, num_keys, _ = s.shape
    block = 64 if s.itemsize == 2 else 32
    wanted = max(1, 2 * s.device.num_multiprocessors // (batch * num_kv_heads))
    split = min(1 << (wanted.bit_length() - 1), 128, max(1, num_keys // block))
    first = {"BLOCK_N": block, "SPLIT": split, "num_warps": 8, "num_stages": 2}
    second = {"BLOCK_N": block // 2, "SPLIT": 2 * split, "num_warps": 4, "num_stages": 2}
    return [{**target, "PDL": 2} for target in (first, second, {**first, "num_warps": 4}, *decode_attention(s)[:5])]


def skinny_gemm(s: KernelSituation) -> list[Target]:
    """Measured on an H200 with dependent launches, 2048 and 5632 columns of bf16: 8 warps along K, two rows of W a
    program, four where that still gives every multiprocessor several programs."""
    num_rows, num_weight_rows, num_cols = s.shape
    if num_rows <= 4:
        warps = max(1, min(8, next_power_of_two(num_cols * s.itemsize // 512)))
        block_n = 4 if num_weight_rows <= 4096 and num_cols * s.itemsize <= 4096 else 2
        shapes = [(block_n, warps), (6 - block_n, warps), (block_n, warps // 2), (1, warps), (8, warps),
                  (2, 2 * warps), (4, warps // 2), (1, warps // 2)]  # fmt: skip
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
    return _skinny_product(s, num_weight_rows)


def _skinny_product(s: KernelSituation, num_weight_rows: int) -> list[Target]:
    """Few programs want six stages in flight, many want to share a multiprocessor.

    Measured on an H200, 16 rows of bf16: 4096 x 4096 13.3 us in blocks of 32 x 256 with six stages, 15.1 us with four;
    28,672 x 4096 59.4 us in blocks of 32 x 128 with three.
    """
    itemsize = s.itemsize

    def target(block_n: int, block_k: int, split: int, warps: int, stages: int, pdl: int = 2) -> Target:
        return {
            "BLOCK_N": block_n, "BLOCK_K": 2 * block_k // itemsize, "SPLIT": split, "PDL": pdl, "num_warps": warps,
            "num_stages": stages,
        }  # fmt: skip

    if num_weight_rows >= 64 * s.device.num_multiprocessors:
        return [
            target(32, 128, 1, 2, 3), target(32, 128, 1, 1, 3, pdl=1), target(128, 128, 1, 4, 3),
            target(64, 64, 1, 4, 3), target(64, 128, 1, 4, 2, pdl=1), target(32, 256, 1, 1, 2, pdl=1),
            target(64, 128, 1, 4, 6), target(64, 256, 1, 4, 4),
        ]  # fmt: skip
    return [
        target(32, 256, 1, 4, 6), target(32, 256, 1, 4, 6, pdl=1), target(32, 256, 1, 2, 6), target(64, 128, 2, 4, 6),
        target(64, 256, 1, 4, 4, pdl=1), target(16, 256, 1, 2, 6), target(32, 512, 1, 4, 4, pdl=1),
        target(64, 64, 4, 4, 6),
    ]  # fmt: skip


def split_gemm(s: KernelSituation) -> list[Target]:
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


def linear_cross_entropy(s: KernelSituation) -> list[Target]:
    """Two programs a multiprocessor, so that one multiplies while the other reduces; then wide tiles: not measured.

    ptxas for sm_90: 128 x 128 takes 128 registers with 8 warps, 128 x 256 takes 182, both without spills.
    """
    num_tokens, _, _ = s.shape
    block_m = min(128, max(16, next_power_of_two(num_tokens)))
    split = next_power_of_two(max(1, 4 * s.device.num_multiprocessors // -(-num_tokens // block_m)))
    warps, stages = (8, 3) if block_m == 128 else (4, 4)
    base = {"BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_K": 64, "SPLIT": split, "FLATTEN": 1, "num_warps": warps,
            "num_stages": stages}  # fmt: skip
    wide = {**base, "BLOCK_N": 256, "num_warps": 8, "num_stages": 3}
    return [
        base, wide, {**wide, "FLATTEN": 2}, {**base, "num_warps": 4}, {**wide, "SPLIT": max(1, split // 2)},
        {**base, "BLOCK_M": 64, "BLOCK_N": 256, "num_warps": 4}, {**base, "FLATTEN": 2}, {**base, "SPLIT": 2 * split},
    ]  # fmt: skip
