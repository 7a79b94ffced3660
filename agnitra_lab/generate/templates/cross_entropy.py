"""Cross-entropy of logits [T, V] with class indices [T], each logit read once, whatever its dtype, and nothing kept.

Sums are in fp32, as torch has them after `logits.float()`, but the wide copy is never made. With SPLIT the programs of
a token each take a part of the vocabulary and a second, short kernel joins their sums: for few tokens on a wide device.
Tokens may lie in two levels of strides, so the usual shift `logits[:, :-1]` is read where it lies.

Source: Milakov and Gimelshein, 2018, arXiv 1805.02867; Szegedy et al., arXiv 1512.00567, section 7 (label smoothing).
"""

import math

import torch
import triton
import triton.language as tl
from torch.library import triton_op
from torch.nn import functional

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.generate.points import (
    check_call,
    drawer,
    enumerate_space,
    itemsize,
    launcher,
    next_power_of_two,
    row_rule,
)
from agnitra_lab.generate.templates.online import lane_sum, online_block, online_merge, online_step

PARAMS = ("BLOCK_N", "ROWS_PER_PROGRAM", "SPLIT", "num_warps", "num_stages")
MAX_TILE = 16384
"""Logits that one program holds at once: 16 warps with 32 values a thread, and as many sums."""
REDUCTIONS = ("none", "mean", "sum")


@triton.jit
def _loss(m, s, total, picked, target, num_cols, ignore_index, smoothing, HAS_SMOOTHING: tl.constexpr):
    # In this order, as torch: the maximum and the target's logit are near each other, their difference is exact.
    loss = (m - picked) + tl.log(s)
    if HAS_SMOOTHING:
        smoothing = tl.cast(smoothing, tl.float32)
        loss = loss * (1.0 - smoothing) + (smoothing / num_cols) * (num_cols * (m + tl.log(s)) - total)
    return tl.where(target == ignore_index, 0.0, loss)


@triton.jit
def _row_sums(
    x_rows,
    mask_m,
    first,
    last,
    HAS_SMOOTHING: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    total = tl.zeros((ROWS_PER_PROGRAM, 1), tl.float32)
    if IS_ONE_BLOCK:
        offs_n = first + tl.arange(0, BLOCK_N)[None, :]
        mask = mask_m & (offs_n < last)
        x = tl.load(x_rows + offs_n, mask=mask, other=-float("inf")).to(tl.float32)
        m, s = online_block(x)
        if HAS_SMOOTHING:
            total = tl.sum(tl.where(mask, x, 0.0), axis=1, keep_dims=True)
    else:
        m = tl.full((ROWS_PER_PROGRAM, 1), -3.4028234663852886e38, tl.float32)
        sums = tl.zeros((ROWS_PER_PROGRAM, BLOCK_N), tl.float32)
        totals = tl.zeros((ROWS_PER_PROGRAM, BLOCK_N), tl.float32)
        for start in tl.range(first, last, BLOCK_N, num_stages=NUM_STAGES):
            offs_n = start + tl.arange(0, BLOCK_N)[None, :]
            mask = mask_m & (offs_n < last)
            x = tl.load(x_rows + offs_n, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
            m, sums = online_step(x, m, sums)
            if HAS_SMOOTHING:
                totals += tl.where(mask, x, 0.0)
        s = tl.sum(sums, axis=1, keep_dims=True)
        if HAS_SMOOTHING:
            total = tl.sum(totals, axis=1, keep_dims=True)
    return m, s, total


@triton.jit
def _tokens(
    x_ptr,
    target_ptr,
    loss_ptr,
    part_ptr,
    num_tokens,
    num_cols,
    num_inner,
    chunk,
    stride_outer,
    stride_inner,
    ignore_index,
    smoothing,
    HAS_SMOOTHING: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    # 64-bit offsets: logits pass 2^31 elements.
    offs_m = (pid // SPLIT).to(tl.int64) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)[:, None]
    mask_m = offs_m < num_tokens
    x_rows = x_ptr + (offs_m // num_inner) * stride_outer + (offs_m % num_inner) * stride_inner
    first = (pid % SPLIT) * chunk
    last = tl.minimum(first + chunk, num_cols)
    if SPLIT == 1:
        # Before the row, so that these two loads in a chain wait along with the row's own.
        target = tl.load(target_ptr + offs_m, mask=mask_m, other=0)
        # A class that does not exist ends eager with an error on the device; here its loss is NaN.
        is_class = mask_m & (target >= 0) & (target < num_cols)
        picked = tl.load(x_rows + target, mask=is_class, other=float("nan")).to(tl.float32)
        m, s, total = _row_sums(
            x_rows, mask_m, first, last, HAS_SMOOTHING, IS_ONE_BLOCK, BLOCK_N, ROWS_PER_PROGRAM, NUM_STAGES
        )
        loss = _loss(m, s, total, picked, target, num_cols, ignore_index, smoothing, HAS_SMOOTHING)
        tl.store(loss_ptr + offs_m, loss.to(loss_ptr.dtype.element_ty), mask=mask_m)
    else:
        m, s, total = _row_sums(
            x_rows, mask_m, first, last, HAS_SMOOTHING, IS_ONE_BLOCK, BLOCK_N, ROWS_PER_PROGRAM, NUM_STAGES
        )
        m_ptr = part_ptr + offs_m * SPLIT + pid % SPLIT
        tl.store(m_ptr, m)
        tl.store(m_ptr + num_tokens * SPLIT, s)
        if HAS_SMOOTHING:
            tl.store(m_ptr + 2 * num_tokens * SPLIT, total)


@triton.jit
def _join(
    x_ptr,
    target_ptr,
    loss_ptr,
    part_ptr,
    num_tokens,
    num_cols,
    num_inner,
    stride_outer,
    stride_inner,
    ignore_index,
    smoothing,
    HAS_SMOOTHING: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_SPLIT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + (token // num_inner) * stride_outer + (token % num_inner) * stride_inner
    offs_s = tl.arange(0, BLOCK_SPLIT)
    mask = offs_s < SPLIT
    m_ptr = part_ptr + token * SPLIT + offs_s
    m = tl.load(m_ptr, mask=mask, other=-3.4028234663852886e38)
    s = tl.load(m_ptr + num_tokens * SPLIT, mask=mask, other=0.0)
    m, s = online_merge(m, s)
    total = 0.0
    if HAS_SMOOTHING:
        total = tl.sum(tl.load(m_ptr + 2 * num_tokens * SPLIT, mask=mask, other=0.0), axis=0)
    target = tl.load(target_ptr + token)
    picked = tl.load(x_row + target, mask=(target >= 0) & (target < num_cols), other=float("nan")).to(tl.float32)
    loss = _loss(m, s, total, picked, target, num_cols, ignore_index, smoothing, HAS_SMOOTHING)
    tl.store(loss_ptr + token, loss.to(loss_ptr.dtype.element_ty))


kernel = (lane_sum, online_block, online_step, online_merge, _loss, _row_sums, _tokens, _join)
_IS_COMPILED = isinstance(_tokens, triton.JITFunction)
_SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on Hopper (compute capability 9.0)."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton_op("agnitra::cross_entropy", mutates_args=())
def _cross_entropy(
    x: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    out_dtype: torch.dtype,
    block_n: int,
    rows_per_program: int,
    split: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    x_OIN = _in_two_levels(x)
    num_outer, num_inner, num_cols = x_OIN.shape
    num_tokens = num_outer * num_inner
    loss = torch.empty(x.shape[:-1], dtype=out_dtype, device=x.device)
    target_T = target.reshape(-1).contiguous()
    chunk = (num_cols + split * block_n - 1) // (split * block_n) * block_n
    strides = (x_OIN.stride(0), x_OIN.stride(1))
    flags = {"HAS_SMOOTHING": label_smoothing != 0.0, "SPLIT": split}
    rule = (ignore_index, label_smoothing)
    part = torch.empty((3, num_tokens, split), dtype=torch.float32, device=x.device) if split > 1 else x_OIN
    launcher(_tokens)[((num_tokens + rows_per_program - 1) // rows_per_program * split,)](
        x_OIN,
        target_T,
        loss,
        part,
        num_tokens,
        num_cols,
        num_inner,
        chunk,
        *strides,
        *rule,
        IS_ONE_BLOCK=bool(chunk <= block_n),
        BLOCK_N=block_n,
        ROWS_PER_PROGRAM=rows_per_program,
        NUM_STAGES=num_stages,
        num_warps=num_warps,
        num_stages=num_stages,
        **flags,
    )
    if split > 1:
        numbers = (num_tokens, num_cols, num_inner, *strides, *rule)
        parts = {"BLOCK_SPLIT": next_power_of_two(split), "num_warps": 1}
        launcher(_join)[(num_tokens,)](x_OIN, target_T, loss, part, *numbers, **flags, **parts)
    return loss


def _in_two_levels(x: torch.Tensor) -> torch.Tensor:
    """View x as [outer, inner, classes] with contiguous classes; copies only where no such view exists."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.dim() == 3:
        return x
    return x.reshape(1, -1, x.shape[-1]) if x.dim() < 3 else x.reshape(x.shape[0], -1, x.shape[-1])


def launch(
    params: dict[str, int],
    x: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Run the kernel, or the two kernels, with one config; means and sums are torch's.

    Args:
        params: BLOCK_N, ROWS_PER_PROGRAM, SPLIT, num_warps, num_stages.
        x: [..., V] floating logits on a CUDA device (any device in the interpreter).
        target: [...] int64 classes.
        ignore_index: the class whose tokens count nothing.
        label_smoothing: from 0 to 1.
        reduction: "none", "mean" (over the tokens that count; NaN when there is none) or "sum".
        out_dtype: of the result; the dtype of x when None. Means and sums are taken in fp32 and rounded once.

    Returns:
        The losses [...], or a number.

    Raises:
        TemplateError: under grad, on a CPU, or for arguments that `supports` refuses.
    """
    refusal = supports(x, target)
    if refusal is None and (reduction not in REDUCTIONS or out_dtype not in (None, *_DTYPES)):
        refusal = f"cross_entropy takes the reductions {', '.join(REDUCTIONS)} and a floating dtype, not {reduction!r}"
    check_call("cross_entropy", (x, target), refusal, _IS_COMPILED)
    dtype = out_dtype or x.dtype
    config = tuple(params[name] for name in PARAMS)
    loss_dtype = dtype if reduction == "none" else torch.float32
    loss = torch.ops.agnitra.cross_entropy(x, target, ignore_index, label_smoothing, loss_dtype, *config)
    return _reduced(loss, target, ignore_index, reduction, dtype)


def _reduced(
    loss: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str, dtype: torch.dtype
) -> torch.Tensor:
    """Reduce losses [...] as torch does, a mean over the tokens that count; only a reduced one is given the dtype."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return (total if reduction == "sum" else total / (target != ignore_index).sum()).to(dtype)


_ENOUGH_PROGRAMS = 16384
"""Programs of one warp that keep an H200 busy to the end."""
_MOST_PARTS = 32


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one tensor of logits.

    Args:
        shape: shape of the logits; the last number is the vocabulary's.
        dtype: "float32", "bfloat16" or "float16", of the logits.

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    num_tokens, num_cols = math.prod(shape[:-1]), shape[-1] if shape else 0
    whole_row = max(16, next_power_of_two(num_cols))
    smaller = (512, 1024, 2048, 4096, 8192, 16384)
    blocks = {min(whole_row, MAX_TILE)} | {block for block in smaller if block < whole_row}
    # Parts fill the device where there are few tokens, and even out its last round where there are some more.
    wanted = _ENOUGH_PROGRAMS // max(1, num_tokens)
    splits = [split for split in (2, 4, 8, 16, 32, 64, 128) if split <= wanted and 4096 * split <= num_cols][-3:]

    def is_valid(point: dict[str, int]) -> bool:
        """Leave out what cannot run, what spills, and what only repeats another config."""
        block, rows, split, stages = (point[name] for name in ("BLOCK_N", "ROWS_PER_PROGRAM", "SPLIT", "num_stages"))
        values_per_thread = block * rows / (32 * point["num_warps"])
        if rows > next_power_of_two(num_tokens) or block * rows > MAX_TILE or not values_per_thread <= 32:
            return False
        if values_per_thread < 4 and point["num_warps"] > 1:
            return False
        if block * split >= num_cols and split > 1:
            return rows == 1 and stages == 1 and block * (split - 1) < num_cols
        if block >= num_cols:
            return stages == 1
        return rows == 1 and values_per_thread >= 8 and stages * block * itemsize(dtype) <= _SHARED_MEMORY_BYTES

    values = {
        "BLOCK_N": tuple(sorted(blocks)),
        "ROWS_PER_PROGRAM": (1, 2, 4, 8, 16, 32, 64),
        "SPLIT": (1, *splits),
        "num_warps": (1, 2, 4, 8, 16),
        "num_stages": (1, 2, 3, 4),
    }
    return enumerate_space("cross_entropy", shape, dtype, values, is_valid)


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """Short rows several to a program; long ones in a loop that loads ahead, in parts where tokens are few."""
    num_tokens, num_cols = math.prod(shape[:-1]), shape[-1]
    if num_cols <= 4096:
        rule = row_rule(shape, block_n=max(16, next_power_of_two(num_cols)), values_per_thread=16)
        return rule | {"SPLIT": 1, "num_stages": 1}
    # One warp of 64 bytes a thread, and very many of them. Measured on an H200 (bf16), beside 8 warps of 4096 or 8192
    # values: 2048 x 128256 141 us, not 198, 4096 x 50304 116, not 143; 8192 x 32000 140, not 177.
    parts = 1 if num_tokens >= _ENOUGH_PROGRAMS // 2 else _ENOUGH_PROGRAMS // num_tokens
    split = 1 << max(0, min(parts, num_cols // 4096, _MOST_PARTS).bit_length() - 1)
    return {
        "BLOCK_N": 2048 // itemsize(dtype), "ROWS_PER_PROGRAM": 1, "SPLIT": split, "num_warps": 1,
        "num_stages": 2 if split == 1 else 1,
    }  # fmt: skip


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw logits and classes, from fixed seeds; the loss of each token."""
    generator = torch.Generator(device).manual_seed(1)
    target = torch.randint(0, shape[-1], shape[:-1], generator=generator, device=device)
    return (drawer(dtype, device)(*shape), target), {"reduction": "none", "out_dtype": torch.float32}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """One stream in, and a class and a loss for each token; four operations a logit."""
    num_elements, num_tokens = math.prod(shape), math.prod(shape[:-1])
    return num_elements * itemsize(dtype) + 12 * num_tokens, 4 * num_elements


def reference(
    x: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute the same in plain torch, in fp32; fp64 stays fp64."""
    wide = x if x.dtype == torch.float64 else x.float()
    loss = functional.cross_entropy(
        wide.reshape(-1, x.shape[-1]),
        target.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return (loss.reshape(target.shape) if reduction == "none" else loss).to(out_dtype or x.dtype)


def supports(x: torch.Tensor, target: torch.Tensor) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if x.dtype not in _DTYPES:
        return f"cross_entropy takes float32, bfloat16 or float16, not {x.dtype}"
    if x.dim() < 1 or x.numel() < 1:
        return f"cross_entropy needs at least one value, not shape {tuple(x.shape)}"
    if target.dtype != torch.int64 or tuple(target.shape) != tuple(x.shape[:-1]):
        expected, given = tuple(x.shape[:-1]), f"{tuple(target.shape)} {target.dtype}"
        return f"cross_entropy needs int64 classes of shape {expected}, not {given}"
    return None
