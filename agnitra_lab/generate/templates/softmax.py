"""Softmax and log-softmax over the last dimension, in five forms that follow from the config.

| SPLIT | BLOCK_N | form | passes over memory: reads + writes |
| --- | --- | --- | --- |
| 1 | a row or more | whole rows in registers | 1 + 1 |
| 1 | less | a loop for the sum, a loop to write; the second read hits the L2 while few rows are in flight | 1-2 + 1 |
| S | a row / S or more | S programs a row keep their parts in registers and wait for each other's sums | 1 + 1 |
| S to 64 | less | the same in loops; what a program reads again once it has waited is still in the L2 | 1 + 1 |
| S above | less | a kernel for the sums of the parts, a kernel that writes | 1-2 + 1 |

Sums are in fp32 whatever the dtypes (those over all lanes of fp32 rows in fp64), and the result is rounded once. In the
third form and the fourth a program takes its number from a counter, so all those that it waits for have begun: they
finish as soon as SPLIT programs fit on the device at once, whatever the order in which it starts them.

Source: Milakov and Gimelshein, 2018, arXiv 1805.02867; waiting as in `arrivals.py`.
"""

import math

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.generate.points import (
    as_rows,
    check_call,
    drawer,
    enumerate_space,
    itemsize,
    launcher,
    next_power_of_two,
    row_rule,
)
from agnitra_lab.generate.templates.arrivals import arrive, wait_for, wait_for_all
from agnitra_lab.generate.templates.online import lane_sum, online_block, online_merge, online_step

PARAMS = ("BLOCK_N", "ROWS_PER_PROGRAM", "SPLIT", "num_warps", "num_stages")
MAX_TILE = 32768
"""Elements that one program may hold: 1024 threads with 32 fp32 values each; above it registers spill."""
MAX_WAITING = 64
"""Programs of one row that may wait for each other: no more than any supported device runs at once."""


@triton.jit
def _exp_f32(x):
    # x * log2(e) as a sum of two numbers. tl.exp rounds the product: an error of 3.8 units in the last place (RMS) on
    # normal rows, where torch has 0.6, and fp32 results must not be further from the exact value than torch's.
    x = tl.maximum(x, -200.0, propagate_nan=tl.PropagateNan.ALL)
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.925963033500011e-08, tl.fma(x, 1.4426950408889634, -high))
    power = tl.exp2(high)
    return tl.fma(power, low * 0.6931471805599453, power)


@triton.jit
def _result(x, m, s, IS_LOG: tl.constexpr, IS_FP32: tl.constexpr):
    rounded = s.to(tl.float32)
    if IS_LOG:
        out = x - m - tl.log(rounded)
    else:
        inverse = 1.0 / rounded
        if IS_FP32:
            power = _exp_f32(x - m)
            quotient = power * inverse
            # A step of Newton's makes it as good as a division, by the sum as it was before it was rounded.
            rest = (s - rounded).to(tl.float32)
            left = tl.fma(-quotient, rest, tl.fma(-quotient, rounded, power))
            out = tl.fma(left, inverse, quotient)
        else:
            out = tl.exp(x - m) * inverse
    return out


@triton.jit
def _rows(
    x_ptr,
    out_ptr,
    num_rows,
    num_cols,
    stride_xm,
    IS_LOG: tl.constexpr,
    IS_FP32: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    # 64-bit row offsets: a prefill batch passes 2^31 elements.
    offs_m = tl.program_id(0).to(tl.int64) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)
    mask_m = (offs_m < num_rows)[:, None]
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    out_rows = out_ptr + offs_m[:, None] * num_cols
    if IS_ONE_BLOCK:
        offs_n = tl.arange(0, BLOCK_N)[None, :]
        mask = mask_m & (offs_n < num_cols)
        x = tl.load(x_rows + offs_n, mask=mask, other=-float("inf")).to(tl.float32)
        m, s = online_block(x, IS_FP32)
        tl.store(out_rows + offs_n, _result(x, m, s, IS_LOG, IS_FP32).to(dtype), mask=mask)
    else:
        m = tl.full((ROWS_PER_PROGRAM, 1), -3.4028234663852886e38, tl.float32)
        s = tl.zeros((ROWS_PER_PROGRAM, BLOCK_N), tl.float32)
        for start in tl.range(0, num_cols, BLOCK_N, num_stages=NUM_STAGES):
            offs_n = start + tl.arange(0, BLOCK_N)[None, :]
            mask = mask_m & (offs_n < num_cols)
            x = tl.load(x_rows + offs_n, mask=mask, other=-float("inf"), eviction_policy="evict_last")
            m, s = online_step(x.to(tl.float32), m, s)
        s = lane_sum(s, 1, IS_FP32)
        for start in tl.range(0, num_cols, BLOCK_N, num_stages=NUM_STAGES):
            offs_n = start + tl.arange(0, BLOCK_N)[None, :]
            mask = mask_m & (offs_n < num_cols)
            x = tl.load(x_rows + offs_n, mask=mask, other=-float("inf"), eviction_policy="evict_first")
            out = _result(x.to(tl.float32), m, s, IS_LOG, IS_FP32).to(dtype)
            tl.store(out_rows + offs_n, out, mask=mask, eviction_policy="evict_first")


@triton.jit
def _merged(part_ptr, row, num_rows, IS_FP32: tl.constexpr, SPLIT: tl.constexpr, BLOCK_SPLIT: tl.constexpr):
    offs_s = tl.arange(0, BLOCK_SPLIT)
    m_ptr = part_ptr + row * SPLIT + offs_s
    # Past the L1: other multiprocessors wrote these.
    m = tl.load(m_ptr, mask=offs_s < SPLIT, other=-3.4028234663852886e38, cache_modifier=".cg")
    s = tl.load(m_ptr + num_rows * SPLIT, mask=offs_s < SPLIT, other=0.0, cache_modifier=".cg")
    return online_merge(m, s, IS_FP32)


@triton.jit
def _keep(part_ptr, row, place, m, s, num_rows, SPLIT: tl.constexpr):
    m_ptr = part_ptr + row * SPLIT + place + tl.zeros((1, 1), tl.int32)
    tl.store(m_ptr, m)
    tl.store(m_ptr + num_rows * SPLIT, s)


@triton.jit
def _sums(x_row, first, last, IS_FP32: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr):
    m = tl.full((1, 1), -3.4028234663852886e38, tl.float32)
    s = tl.zeros((1, BLOCK_N), tl.float32)
    for start in tl.range(first, last, BLOCK_N, num_stages=NUM_STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        x = tl.load(x_row + offs_n, mask=offs_n < last, other=-float("inf"), eviction_policy="evict_last")
        m, s = online_step(x.to(tl.float32), m, s)
    return m, lane_sum(s, 1, IS_FP32)


@triton.jit
def _write(x_row, out_row, first, last, m, s, IS_LOG: tl.constexpr, IS_FP32: tl.constexpr, BLOCK_N: tl.constexpr,
           NUM_STAGES: tl.constexpr):  # fmt: skip
    for start in tl.range(first, last, BLOCK_N, num_stages=NUM_STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        mask = offs_n < last
        x = tl.load(x_row + offs_n, mask=mask, other=-float("inf"), eviction_policy="evict_first")
        out = _result(x.to(tl.float32), m, s, IS_LOG, IS_FP32).to(out_row.dtype.element_ty)
        tl.store(out_row + offs_n, out, mask=mask, eviction_policy="evict_first")


@triton.jit
def _joined(
    x_ptr,
    out_ptr,
    part_ptr,
    count_ptr,
    num_rows,
    num_cols,
    chunk,
    stride_xm,
    IS_LOG: tl.constexpr,
    IS_FP32: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    ticket = tl.atomic_add(count_ptr, 1, sem="relaxed")
    row = (ticket // SPLIT).to(tl.int64)
    place = ticket % SPLIT
    x_row = x_ptr + row * stride_xm
    out_row = out_ptr + row * num_cols
    if IS_ONE_BLOCK:
        offs_n = place * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        mask = offs_n < num_cols
        x = tl.load(x_row + offs_n, mask=mask, other=-float("inf")).to(tl.float32)
        m, s = online_block(x, IS_FP32)
        _keep(part_ptr, row, place, m, s, num_rows, SPLIT)
        wait_for_all(count_ptr + 1 + row, SPLIT)
        m, s = _merged(part_ptr, row, num_rows, IS_FP32, SPLIT, BLOCK_SPLIT)
        tl.store(out_row + offs_n, _result(x, m, s, IS_LOG, IS_FP32).to(dtype), mask=mask)
    else:
        first = place * chunk
        last = tl.minimum(first + chunk, num_cols)
        m, s = _sums(x_row, first, last, IS_FP32, BLOCK_N, NUM_STAGES)
        _keep(part_ptr, row, place, m, s, num_rows, SPLIT)
        wait_for_all(count_ptr + 1 + row, SPLIT)
        m_all, s_all = _merged(part_ptr, row, num_rows, IS_FP32, SPLIT, BLOCK_SPLIT)
        _write(x_row, out_row, first, last, m_all, s_all, IS_LOG, IS_FP32, BLOCK_N, NUM_STAGES)


@triton.jit
def _parts(
    x_ptr,
    out_ptr,
    part_ptr,
    num_rows,
    num_cols,
    chunk,
    stride_xm,
    IS_SECOND: tl.constexpr,
    IS_LOG: tl.constexpr,
    IS_FP32: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    if IS_SECOND:
        # From the end, which the L2 still holds.
        pid = tl.num_programs(0) - 1 - pid
    row = (pid // SPLIT).to(tl.int64)
    first = (pid % SPLIT) * chunk
    last = tl.minimum(first + chunk, num_cols)
    x_row = x_ptr + row * stride_xm
    if IS_SECOND:
        m, s = _merged(part_ptr, row, num_rows, IS_FP32, SPLIT, BLOCK_SPLIT)
        _write(x_row, out_ptr + row * num_cols, first, last, m, s, IS_LOG, IS_FP32, BLOCK_N, NUM_STAGES)
    else:
        m, s = _sums(x_row, first, last, IS_FP32, BLOCK_N, NUM_STAGES)
        _keep(part_ptr, row, pid % SPLIT, m, s, num_rows, SPLIT)


kernel = (
    lane_sum, online_block, online_step, online_merge, arrive, wait_for, wait_for_all, _exp_f32, _result, _rows,
    _merged, _keep, _sums, _write, _joined, _parts,
)  # fmt: skip
_IS_COMPILED = isinstance(_rows, triton.JITFunction)
_SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on Hopper (compute capability 9.0)."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton_op("agnitra::softmax", mutates_args=())
def _softmax(
    x: torch.Tensor,
    is_log: bool,
    out_dtype: torch.dtype,
    block_n: int,
    rows_per_program: int,
    split: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    x_MN = as_rows(x)
    num_rows, num_cols = x_MN.shape
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    flags = {"IS_LOG": is_log, "IS_FP32": out_dtype == torch.float32, "BLOCK_N": block_n, "num_warps": num_warps}
    stages = {"NUM_STAGES": num_stages, "num_stages": num_stages}
    if split == 1:
        grid = ((num_rows + rows_per_program - 1) // rows_per_program,)
        shape = {"IS_ONE_BLOCK": bool(num_cols <= block_n), "ROWS_PER_PROGRAM": rows_per_program}
        launcher(_rows)[grid](x_MN, out, num_rows, num_cols, x_MN.stride(0), **shape, **flags, **stages)
        return out
    part = torch.empty((2, num_rows, split), dtype=torch.float32, device=x.device)
    flags |= {"SPLIT": split, "BLOCK_SPLIT": next_power_of_two(split)}
    grid = (num_rows * split,)
    chunk = (num_cols + split * block_n - 1) // (split * block_n) * block_n
    numbers = (num_rows, num_cols, chunk, x_MN.stride(0))
    # The interpreter runs one program after the other, and would wait for ever.
    if split <= MAX_WAITING and _IS_COMPILED:
        count = torch.zeros(num_rows + 1, dtype=torch.int32, device=x.device)
        is_one = bool(chunk <= block_n)
        launcher(_joined)[grid](x_MN, out, part, count, *numbers, IS_ONE_BLOCK=is_one, **flags, **stages)
        return out
    for is_second in (False, True):
        launcher(_parts)[grid](x_MN, out, part, *numbers, IS_SECOND=is_second, **flags, **stages)
    return out


def launch(
    params: dict[str, int], x: torch.Tensor, *, is_log: bool = False, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Run the kernel, or the two kernels, with one config.

    Args:
        params: BLOCK_N, ROWS_PER_PROGRAM, SPLIT, num_warps, num_stages.
        x: [..., N] floating tensor on a CUDA device (any device in the interpreter); any row stride.
        is_log: give the logarithm.
        out_dtype: float32, bfloat16 or float16; the dtype of x when None.

    Returns:
        The softmax over the last dimension, of x's shape and contiguous.

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    refusal = supports(x)
    if refusal is None and out_dtype not in (None, *_DTYPES):
        refusal = f"softmax gives float32, bfloat16 or float16, not {out_dtype}"
    check_call("softmax", (x,), refusal, _IS_COMPILED)
    return torch.ops.agnitra.softmax(x, is_log, out_dtype or x.dtype, *(params[name] for name in PARAMS))


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one tensor.

    Args:
        shape: shape of x; the last number is the row's length.
        dtype: "float32", "bfloat16" or "float16", of x.

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    num_rows, num_cols = math.prod(shape[:-1]), shape[-1] if shape else 0
    whole_row = max(16, next_power_of_two(num_cols))
    blocks = {min(whole_row, MAX_TILE)} | {block for block in (2048, 4096, 8192, 16384, 32768) if block < whole_row}
    joined = {-(-num_cols // block) for block in (4096, 8192, 16384, 32768)}
    splits = {1} | {split for split in {4, 8, 16, 32, 64, 128} | joined if 2048 * split <= num_cols and split <= 1024}

    def is_valid(point: dict[str, int]) -> bool:
        """Leave out what cannot run, what spills, and what only repeats another config."""
        block, rows, split, stages = (point[name] for name in ("BLOCK_N", "ROWS_PER_PROGRAM", "SPLIT", "num_stages"))
        values_per_thread = block * rows / (32 * point["num_warps"])
        if rows > next_power_of_two(num_rows) or block * rows > MAX_TILE or values_per_thread > 64:
            return False
        if values_per_thread < 4 and point["num_warps"] > 1:
            return False
        if block >= num_cols:
            return split == 1 and stages == 1
        if rows > 1:
            return False
        if split > 1 and split * block >= num_cols:
            # The fewest programs that hold the row: with one less, they would not.
            is_fewest = (split - 1) * block < num_cols
            return is_fewest and split <= MAX_WAITING and stages == 1 and 8 <= values_per_thread <= 32
        is_loop = block <= 8192 and 8 <= values_per_thread <= 32
        return is_loop and (stages - 1) * block * itemsize(dtype) <= _SHARED_MEMORY_BYTES

    values = {
        "BLOCK_N": tuple(sorted(blocks)),
        "ROWS_PER_PROGRAM": (1, 2, 4, 8, 16, 32, 64),
        "SPLIT": tuple(sorted(splits)),
        "num_warps": (1, 2, 4, 8, 16, 32),
        "num_stages": (1, 2, 3),
    }
    return enumerate_space("softmax", shape, dtype, values, is_valid)


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """A row in one program's registers where it fits; else several programs that wait for each other.

    Measured on one H200 beside a copy of the same bytes (torch 2.11): 512 rows of 131,072 in bf16 take 99.5 us in loops
    and 111 in registers (copy 67), 4096 of 32,768 take 176 and 191 (131); 256 of 131,072 in fp32 93 and 89 (69), 4 of
    1,000,000 17.7 and 19.8 (16.4).
    """
    num_cols = shape[-1]
    if num_cols <= MAX_TILE:
        rule = row_rule(shape, block_n=max(16, next_power_of_two(num_cols)), values_per_thread=16)
        warps = max(rule["num_warps"], rule["BLOCK_N"] // 1024)
        return rule | {"SPLIT": 1, "num_warps": warps, "num_stages": 1}
    if itemsize(dtype) == 4 and num_cols <= 4096 * MAX_WAITING:
        return {"BLOCK_N": 4096, "ROWS_PER_PROGRAM": 1, "SPLIT": -(-num_cols // 4096), "num_warps": 4, "num_stages": 1}
    block = 2048 if num_cols <= 65536 else 4096
    split = min(next_power_of_two(-(-num_cols // (4 * block))), MAX_WAITING)
    if split == MAX_WAITING:
        block = 8192
    return {"BLOCK_N": block, "ROWS_PER_PROGRAM": 1, "SPLIT": split, "num_warps": block // 512, "num_stages": 1}


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw x, from a fixed seed."""
    return (drawer(dtype, device)(*shape),), {}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """One stream in and one out; five operations an element."""
    num_elements = math.prod(shape)
    return 2 * num_elements * itemsize(dtype), 5 * num_elements


def reference(x: torch.Tensor, *, is_log: bool = False, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Compute the same in plain torch, with sums in fp32; fp64 stays fp64."""
    wide = x if x.dtype == torch.float64 else x.float()
    out = torch.log_softmax(wide, -1) if is_log else torch.softmax(wide, -1)
    return out.to(out_dtype or x.dtype)


def supports(x: torch.Tensor) -> str | None:
    """Say why this tensor (real, fake or meta) must keep its own ops, or None when the template takes it."""
    if x.dtype not in _DTYPES:
        return f"softmax takes float32, bfloat16 or float16, not {x.dtype}"
    if x.dim() < 1 or x.numel() < 1:
        return f"softmax needs at least one value, not shape {tuple(x.shape)}"
    return None
