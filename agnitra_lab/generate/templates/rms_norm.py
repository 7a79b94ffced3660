"""RMSNorm in one pass over memory, alone or with the residual addition before it.

The place where values are rounded to the input dtype is part of the contract, because models disagree about it:
`cast_before_weight=True` is the order of the Llama family (normalise in fp32, round, multiply by the weight), False the
order of `torch.nn.RMSNorm` (normalise and multiply in fp32, round once). The residual sum is rounded to the input dtype
before it is normalised, as two separate ops would.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv 1910.07467, section 4.
"""

import math

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.generate.points import check_call, drawer, enumerate_space, itemsize, next_power_of_two, row_rule

PARAMS = ("BLOCK_N", "ROWS_PER_PROGRAM", "num_warps", "num_stages")
MAX_BLOCK_N = 16384
MAX_TILE = 16384
"""Elements that one program may hold: 512 threads with 32 fp32 values each; above it registers spill."""


@triton.jit
def kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    summed_ptr,
    num_rows,
    num_cols,
    stride_xm,
    stride_rm,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    # 64-bit row offsets: a prefill batch passes 2^31 elements.
    offs_m = tl.program_id(0).to(tl.int64) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)
    mask_m = offs_m < num_rows
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    residual_rows = residual_ptr + offs_m[:, None] * stride_rm
    out_rows = out_ptr + offs_m[:, None] * num_cols
    summed_rows = summed_ptr + offs_m[:, None] * num_cols

    if IS_ONE_BLOCK:
        offs_n = tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_cols
        mask = mask_m[:, None] & mask_n[None, :]
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        h = tl.load(x_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            h += tl.load(residual_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            rounded = h.to(dtype)
            tl.store(summed_rows + offs_n[None, :], rounded, mask=mask)
            h = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(h * h, axis=1) / num_cols + tl.cast(eps, tl.float32))
        normed = h * scale[:, None]
        if CAST_BEFORE_WEIGHT:
            normed = normed.to(dtype).to(tl.float32)
        tl.store(out_rows + offs_n[None, :], (normed * weight[None, :]).to(dtype), mask=mask)
    else:
        acc = tl.zeros((ROWS_PER_PROGRAM, BLOCK_N), dtype=tl.float32)
        for start in tl.range(0, num_cols, BLOCK_N, num_stages=NUM_STAGES):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask = mask_m[:, None] & (offs_n < num_cols)[None, :]
            h = tl.load(x_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                h += tl.load(residual_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
                h = h.to(dtype).to(tl.float32)
            acc += h * h
        scale = tl.rsqrt(tl.sum(acc, axis=1) / num_cols + tl.cast(eps, tl.float32))
        # The second pass adds again instead of reading back `summed`: a store and a load of one address in one kernel
        # would need a barrier, and the inputs are still in the L2.
        for start in tl.range(0, num_cols, BLOCK_N, num_stages=NUM_STAGES):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < num_cols
            mask = mask_m[:, None] & mask_n[None, :]
            weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            h = tl.load(x_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                h += tl.load(residual_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
                rounded = h.to(dtype)
                tl.store(summed_rows + offs_n[None, :], rounded, mask=mask)
                h = rounded.to(tl.float32)
            normed = h * scale[:, None]
            if CAST_BEFORE_WEIGHT:
                normed = normed.to(dtype).to(tl.float32)
            tl.store(out_rows + offs_n[None, :], (normed * weight[None, :]).to(dtype), mask=mask)


_IS_COMPILED = isinstance(kernel, triton.JITFunction)
_SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on Hopper (compute capability 9.0)."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton_op("agnitra::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cast_before_weight: bool,
    block_n: int,
    rows_per_program: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    x_MN = _as_rows(x)
    num_rows, num_cols = x_MN.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # The interpreter's kernel is no JITFunction, and wrap_triton takes nothing else.
    launcher = wrap_triton(kernel) if _IS_COMPILED else kernel
    launcher[((num_rows + rows_per_program - 1) // rows_per_program,)](
        x_MN,
        x_MN,
        weight,
        out,
        x_MN,
        num_rows,
        num_cols,
        x_MN.stride(0),
        0,
        eps,
        HAS_RESIDUAL=False,
        CAST_BEFORE_WEIGHT=cast_before_weight,
        IS_ONE_BLOCK=bool(num_cols <= block_n),
        BLOCK_N=block_n,
        ROWS_PER_PROGRAM=rows_per_program,
        NUM_STAGES=num_stages,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


@triton_op("agnitra::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cast_before_weight: bool,
    block_n: int,
    rows_per_program: int,
    num_warps: int,
    num_stages: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    x_MN = _as_rows(x)
    residual_MN = _as_rows(residual)
    num_rows, num_cols = x_MN.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launcher = wrap_triton(kernel) if _IS_COMPILED else kernel
    launcher[((num_rows + rows_per_program - 1) // rows_per_program,)](
        x_MN,
        residual_MN,
        weight,
        out,
        summed,
        num_rows,
        num_cols,
        x_MN.stride(0),
        residual_MN.stride(0),
        eps,
        HAS_RESIDUAL=True,
        CAST_BEFORE_WEIGHT=cast_before_weight,
        IS_ONE_BLOCK=bool(num_cols <= block_n),
        BLOCK_N=block_n,
        ROWS_PER_PROGRAM=rows_per_program,
        NUM_STAGES=num_stages,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out, summed


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """View x as [rows, columns] with contiguous columns; copies only where no such view exists."""
    x_MN = x.reshape(-1, x.shape[-1])
    return x_MN if x_MN.stride(1) == 1 else x_MN.contiguous()


def launch(
    params: dict[str, int],
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    cast_before_weight: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel with one config.

    Args:
        params: BLOCK_N, ROWS_PER_PROGRAM, num_warps, num_stages.
        x: [..., N] floating tensor on a CUDA device (any device in the interpreter).
        weight: [N], the dtype of x or float32.
        eps: added to the mean of squares.
        residual: None, or a tensor of x's shape and dtype that is added to x first.
        cast_before_weight: where values are rounded; see the module.

    Returns:
        The normed tensor, of x's shape and contiguous; with a residual (normed, x + residual).

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    tensors = (x, weight) if residual is None else (x, weight, residual)
    check_call("rms_norm", tensors, supports(x, weight, residual), _IS_COMPILED)
    config = (params["BLOCK_N"], params["ROWS_PER_PROGRAM"], params["num_warps"], params["num_stages"])
    if residual is None:
        return torch.ops.agnitra.rms_norm(x, weight, eps, cast_before_weight, *config)
    return torch.ops.agnitra.add_rms_norm(x, residual, weight, eps, cast_before_weight, *config)


def _pipeline_bytes(point: dict[str, int], dtype: str) -> int:
    """Shared memory of the loop over blocks: x, residual and weight of each block that is loaded ahead."""
    values = 2 * point["BLOCK_N"] * point["ROWS_PER_PROGRAM"] + point["BLOCK_N"]
    return (point["num_stages"] - 1) * values * (4 if dtype.endswith("float32") else 2)


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one tensor.

    Args:
        shape: shape of x; the last number is the row's length.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    num_rows, num_cols = math.prod(shape[:-1]), shape[-1] if shape else 0
    whole_row = max(16, next_power_of_two(num_cols))
    blocks = sorted({block for block in (1024, 2048, 4096) if block < whole_row} | {min(whole_row, MAX_BLOCK_N)})
    most_rows = next_power_of_two(num_rows)

    def is_valid(point: dict[str, int]) -> bool:
        """Leave out what cannot run or only repeats another config."""
        tile = point["BLOCK_N"] * point["ROWS_PER_PROGRAM"]
        values_per_thread = tile / (32 * point["num_warps"])
        is_one_block = num_cols <= point["BLOCK_N"]
        return (
            point["ROWS_PER_PROGRAM"] <= most_rows
            and tile <= MAX_TILE
            and (values_per_thread <= 64)
            and (values_per_thread >= 4 or point["num_warps"] == 1)
            and _pipeline_bytes(point, dtype) <= _SHARED_MEMORY_BYTES
            # Stages are of the loop over blocks: without the loop they would be copies of one config.
            and (not is_one_block or point["num_stages"] == 1)
        )

    return enumerate_space(
        "rms_norm",
        shape,
        dtype,
        {
            "BLOCK_N": tuple(blocks),
            "ROWS_PER_PROGRAM": (1, 2, 4, 8, 16),
            "num_warps": (1, 2, 4, 8, 16),
            "num_stages": (1, 2, 3),
        },
        is_valid,
    )


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """A whole row in one block where it fits, two 16-byte loads of bf16 a thread, short rows several to a program."""
    return row_rule(shape, block_n=next_power_of_two(shape[-1]), values_per_thread=16)


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw x [rows, N], weight [N] and a residual like x, from a fixed seed."""
    draw = drawer(dtype, device)
    return (draw(*shape), draw(shape[-1]), 1e-5), {"residual": draw(*shape)}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Two streams in and two out, as with a residual; five operations an element."""
    num_elements = math.prod(shape)
    return 4 * num_elements * itemsize(dtype), 5 * num_elements


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    cast_before_weight: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute the same in plain torch, op by op, rounding where a model's own code rounds; fp64 stays fp64."""
    summed = x if residual is None else x + residual
    wide = summed if summed.dtype == torch.float64 else summed.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out = normed.to(x.dtype) * weight if cast_before_weight else normed * weight.to(normed.dtype)
    return out.to(x.dtype) if residual is None else (out.to(x.dtype), summed)


def supports(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if x.dtype not in _DTYPES:
        return f"rms_norm takes float32, bfloat16 or float16, not {x.dtype}"
    if x.dim() < 1 or x.numel() < 1:
        return f"rms_norm needs at least one value, not shape {tuple(x.shape)}"
    if tuple(weight.shape) != (x.shape[-1],) or weight.stride(0) != 1:
        return f"rms_norm needs a contiguous weight of shape ({x.shape[-1]},), not {tuple(weight.shape)}"
    if weight.dtype not in (x.dtype, torch.float32):
        return f"rms_norm needs a weight of x's dtype {x.dtype} or of float32, not {weight.dtype}"
    if residual is not None and (tuple(residual.shape) != tuple(x.shape) or residual.dtype != x.dtype):
        expected, given = f"{tuple(x.shape)} {x.dtype}", f"{tuple(residual.shape)} {residual.dtype}"
        return f"rms_norm needs a residual like x, {expected}, not {given}"
    return None
