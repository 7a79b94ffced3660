"""Running sum over the last dimension, forwards or backwards, of a tensor or of its product with a mask.

A program goes along its rows block by block and carries the sum: one read and one write. With SPLIT a first kernel sums
parts of the rows and a second one starts each part from the sum of those before it: two reads and one write, for few
long rows, where one program a row would leave the device empty. Nothing waits and nothing is added in changing order.

Sums are in fp32 whatever the dtype, so they are nearer to the exact ones than torch's in 16 bits.

Source: Blelloch, "Prefix Sums and Their Applications", CMU-CS-90-190, 1990, section 1.2.
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

PARAMS = ("BLOCK_N", "ROWS_PER_PROGRAM", "SPLIT", "num_warps", "num_stages")
MAX_TILE = 16384
"""Elements that one program holds at once: 16 warps with 32 fp32 values a thread and their sums."""


@triton.jit
def _load(x_rows, mask_rows, offs_n, mask, HAS_MASK: tl.constexpr):
    x = tl.load(x_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
    if HAS_MASK:
        # A product, as it is written: what is masked out may be infinite.
        x *= tl.load(mask_rows + offs_n, mask=mask, other=0).to(tl.float32)
    return x


@triton.jit
def _sums(
    x_ptr,
    mask_ptr,
    part_ptr,
    num_cols,
    chunk,
    stride_xm,
    stride_mm,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // SPLIT).to(tl.int64)
    first = (pid % SPLIT) * chunk
    last = tl.minimum(first + chunk, num_cols)
    acc = tl.zeros((1, BLOCK_N), tl.float32)
    for start in tl.range(first, last, BLOCK_N, num_stages=NUM_STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        acc += _load(x_ptr + row * stride_xm, mask_ptr + row * stride_mm, offs_n, offs_n < last, HAS_MASK)
    tl.store(part_ptr + pid + tl.zeros((1, 1), tl.int32), tl.sum(acc, axis=1, keep_dims=True))


@triton.jit
def _scan(
    x_ptr,
    mask_ptr,
    part_ptr,
    out_ptr,
    num_rows,
    num_cols,
    chunk,
    stride_xm,
    stride_mm,
    HAS_MASK: tl.constexpr,
    IS_REVERSE: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_SPLIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    if SPLIT > 1:
        # From the end, which the L2 still holds.
        pid = tl.num_programs(0) - 1 - pid
    # 64-bit row offsets: a batch of long rows passes 2^31 elements.
    offs_m = (pid // SPLIT).to(tl.int64) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)[:, None]
    mask_m = offs_m < num_rows
    first = (pid % SPLIT) * chunk
    last = tl.minimum(first + chunk, num_cols)
    carry = tl.zeros((ROWS_PER_PROGRAM, 1), tl.float32)
    if SPLIT > 1:
        offs_s = tl.arange(0, BLOCK_SPLIT)[None, :]
        is_before = (offs_s > pid % SPLIT) & (offs_s < SPLIT) if IS_REVERSE else offs_s < pid % SPLIT
        carry += tl.sum(tl.load(part_ptr + offs_m * SPLIT + offs_s, mask=is_before, other=0.0), axis=1, keep_dims=True)
    num_blocks = tl.cdiv(last - first, BLOCK_N)
    for index in tl.range(0, num_blocks, num_stages=NUM_STAGES):
        start = first + (num_blocks - 1 - index if IS_REVERSE else index) * BLOCK_N
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        mask = mask_m & (offs_n < last)
        x = _load(x_ptr + offs_m * stride_xm, mask_ptr + offs_m * stride_mm, offs_n, mask, HAS_MASK)
        out = tl.cumsum(x, axis=1, reverse=IS_REVERSE) + carry
        tl.store(out_ptr + offs_m * num_cols + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask)
        if not IS_ONE_BLOCK:
            carry += tl.sum(x, axis=1, keep_dims=True)


kernel = (_load, _sums, _scan)
_IS_COMPILED = isinstance(_scan, triton.JITFunction)
_SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on Hopper (compute capability 9.0)."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton_op("agnitra::cumsum", mutates_args=())
def _cumsum(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    reverse: bool,
    out_dtype: torch.dtype,
    block_n: int,
    rows_per_program: int,
    split: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    x_MN = as_rows(x)
    mask_MN = x_MN if mask is None else as_rows(mask.view(torch.uint8))
    num_rows, num_cols = x_MN.shape
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    chunk = (num_cols + split * block_n - 1) // (split * block_n) * block_n
    numbers = (num_cols, chunk, x_MN.stride(0), mask_MN.stride(0))
    flags = {
        "HAS_MASK": mask is not None,
        "SPLIT": split,
        "BLOCK_N": block_n,
        "NUM_STAGES": num_stages,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    part = x_MN
    if split > 1:
        part = torch.empty((num_rows, split), dtype=torch.float32, device=x.device)
        launcher(_sums)[(num_rows * split,)](x_MN, mask_MN, part, *numbers, **flags)
    launcher(_scan)[((num_rows + rows_per_program - 1) // rows_per_program * split,)](
        x_MN,
        mask_MN,
        part,
        out,
        num_rows,
        *numbers,
        IS_REVERSE=reverse,
        IS_ONE_BLOCK=bool(chunk <= block_n),
        ROWS_PER_PROGRAM=rows_per_program,
        BLOCK_SPLIT=next_power_of_two(split),
        **flags,
    )
    return out


def launch(
    params: dict[str, int],
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Run the kernel, or the two kernels, with one config.

    Args:
        params: BLOCK_N, ROWS_PER_PROGRAM, SPLIT, num_warps, num_stages.
        x: [..., N] floating tensor on a CUDA device (any device in the interpreter); any row stride.
        mask: None, or a bool tensor of x's shape: the sum is that of x * mask.
        reverse: sum from the end.
        out_dtype: float32, bfloat16 or float16; the dtype of x when None.

    Returns:
        The sums over the last dimension up to and with each element, of x's shape and contiguous.

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    refusal = supports(x, mask)
    if refusal is None and out_dtype not in (None, *_DTYPES):
        refusal = f"cumsum gives float32, bfloat16 or float16, not {out_dtype}"
    check_call("cumsum", (x,) if mask is None else (x, mask), refusal, _IS_COMPILED)
    return torch.ops.agnitra.cumsum(x, mask, reverse, out_dtype or x.dtype, *(params[name] for name in PARAMS))


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
    blocks = {min(whole_row, MAX_TILE)} | {block for block in (1024, 2048, 4096, 8192) if block < whole_row}
    # Where there are more rows than programs that the device holds, parts would only be read once more.
    splits = [split for split in (4, 8, 16, 32, 64, 128, 256) if num_rows <= 264 and 2048 * split <= num_cols][-4:]

    def is_valid(point: dict[str, int]) -> bool:
        """Leave out what cannot run, what spills, and what only repeats another config."""
        block, rows, split, stages = (point[name] for name in ("BLOCK_N", "ROWS_PER_PROGRAM", "SPLIT", "num_stages"))
        values_per_thread = block * rows / (32 * point["num_warps"])
        if rows > next_power_of_two(num_rows) or block * rows > MAX_TILE or not values_per_thread <= 32:
            return False
        if values_per_thread < 4 and point["num_warps"] > 1:
            return False
        if split > 1:
            return rows == 1 and stages <= 2 and block <= 4096 and split * block < 2 * num_cols
        if block >= num_cols:
            return stages == 1
        return rows <= 2 and values_per_thread >= 8 and stages * block * rows * itemsize(dtype) <= _SHARED_MEMORY_BYTES

    values = {
        "BLOCK_N": tuple(sorted(blocks)),
        "ROWS_PER_PROGRAM": (1, 2, 4, 8, 16, 32, 64),
        "SPLIT": (1, *splits),
        "num_warps": (1, 2, 4, 8, 16),
        "num_stages": (1, 2, 3, 4),
    }
    return enumerate_space("cumsum", shape, dtype, values, is_valid)


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """Short rows whole, long ones in a loop that loads ahead, in parts where there are fewer than multiprocessors."""
    num_rows, num_cols = math.prod(shape[:-1]), shape[-1]
    if num_cols <= 8192:
        rule = row_rule(shape, block_n=max(16, next_power_of_two(num_cols)), values_per_thread=16)
        return rule | {"SPLIT": 1, "num_stages": 1}
    split = next_power_of_two(max(1, min(264 // num_rows, num_cols // 4096)))
    # Measured on an H100: 2048 rows of 32,768 in fp32 take 191 us in blocks of 8192, 194 us in blocks of 4096.
    block, stages = (8192, 3) if split == 1 else (4096, 2)
    return {"BLOCK_N": block, "ROWS_PER_PROGRAM": 1, "SPLIT": split, "num_warps": 8, "num_stages": stages}


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw x, from a fixed seed."""
    return (drawer(dtype, device)(*shape),), {}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """One stream in and one out; one operation an element."""
    num_elements = math.prod(shape)
    return 2 * num_elements * itemsize(dtype), num_elements


def reference(
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute the same in plain torch, in fp32; fp64 stays fp64."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide if mask is None else wide * mask
    sums = wide.flip(-1).cumsum(-1).flip(-1) if reverse else wide.cumsum(-1)
    return sums.to(out_dtype or x.dtype)


def supports(x: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if x.dtype not in _DTYPES:
        return f"cumsum takes float32, bfloat16 or float16, not {x.dtype}"
    if x.dim() < 1 or x.numel() < 1:
        return f"cumsum needs at least one value, not shape {tuple(x.shape)}"
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != tuple(x.shape)):
        return f"cumsum needs a bool mask of shape {tuple(x.shape)}, not {tuple(mask.shape)} {mask.dtype}"
    return None
