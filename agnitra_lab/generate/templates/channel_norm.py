"""Normalisation over a middle dimension, [B, C, inner...]: a program holds all of C for a block of inner positions.

Three kinds: "rms" x / sqrt(mean(x^2) + eps), "layer" (x - mean) / sqrt(var + eps), "l2" x / max(norm(x), eps); then
weight and bias per channel. Read once and written once where C fits in a block. Without inner dimensions the outer ones
take their place: rows are then normalised, several to a program. Statistics are fp32, centred for
"layer"; the result is rounded once.

Sources: Zhang and Sennrich, arXiv 1910.07467, section 4 (RMS); Liu et al., "A ConvNet for the 2020s", arXiv 2201.03545
(layer normalisation over channels).
"""

import math

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.generate.points import check_call, drawer, enumerate_space, itemsize, next_power_of_two, row_rule
from agnitra_lab.generate.templates.moments import _merge_moments, _two_parts, _update_moments

PARAMS = ("BLOCK_C", "BLOCK_S", "num_warps", "num_stages")
KINDS = ("rms", "layer", "l2")
MAX_TILE = 32768
"""Elements that one program may hold: 512 threads with 64 fp32 values each."""


@triton.jit
def _scaled(
    h, root, weight_ptr, bias_ptr, offs_c, num_channels, dtype, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr
):
    # In fp32 a true division, as the models write it: a product with the reciprocal would round once more.
    normed = tl.div_rn(h, root[None, :]) if dtype == tl.float32 else h * tl.div_rn(1.0, root)[None, :]
    mask_c = offs_c < num_channels
    if HAS_WEIGHT:
        normed *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        normed += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None]
    return normed.to(dtype)


@triton.jit
def _root(squares, total, eps, IS_L2: tl.constexpr):
    # Inductor gives a kernel its numbers in float64.
    eps = tl.cast(eps, tl.float32)
    # Comparisons, because a maximum would swallow NaN.
    if IS_L2:
        norm = tl.sqrt_rn(squares)
        root = tl.where(norm < eps, eps, norm)
    else:
        root = tl.sqrt_rn(tl.div_rn(tl.where(squares < 0.0, 0.0, squares), total) + eps)
    return root


@triton.jit
def _block_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_channels,
    num_inner,
    stride_xb,
    stride_xc,
    stride_xs,
    stride_ob,
    stride_oc,
    stride_os,
    eps,
    IS_CENTRED: tl.constexpr,
    IS_L2: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    num_blocks = tl.cdiv(num_inner, BLOCK_S)
    # 64-bit offsets: a batch of images passes 2^31 elements.
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    offs_s = ((tl.program_id(0) % num_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    mask_s = (offs_s < num_inner)[None, :]
    lanes = tl.arange(0, BLOCK_C).to(tl.int64)
    x_at = x_ptr + batch * stride_xb + offs_s[None, :] * stride_xs
    out_at = out_ptr + batch * stride_ob + offs_s[None, :] * stride_os
    mask_c = (lanes < num_channels)[:, None]
    h = tl.load(x_at + lanes[:, None] * stride_xc, mask=mask_c & mask_s, other=0.0).to(tl.float32)
    total = num_channels * 1.0
    if IS_CENTRED:
        mean = tl.div_rn(tl.sum(h, axis=0), total)
        h = tl.where(mask_c, h - mean[None, :], 0.0)
        # What rounding left in the mean is taken out once more: the tile is still in registers.
        h = tl.where(mask_c, h - tl.div_rn(tl.sum(h, axis=0), total)[None, :], 0.0)
    root = _root(tl.sum(h * h, axis=0), total, eps, IS_L2)
    out = _scaled(h, root, weight_ptr, bias_ptr, lanes, num_channels, dtype, HAS_WEIGHT, HAS_BIAS)
    tl.store(out_at + lanes[:, None] * stride_oc, out, mask=mask_c & mask_s)


@triton.jit
def _loop_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_channels,
    num_inner,
    stride_xb,
    stride_xc,
    stride_xs,
    stride_ob,
    stride_oc,
    stride_os,
    eps,
    IS_CENTRED: tl.constexpr,
    IS_L2: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    num_blocks = tl.cdiv(num_inner, BLOCK_S)
    # 64-bit offsets: a batch of images passes 2^31 elements.
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    offs_s = ((tl.program_id(0) % num_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    mask_s = (offs_s < num_inner)[None, :]
    lanes = tl.arange(0, BLOCK_C).to(tl.int64)
    x_at = x_ptr + batch * stride_xb + offs_s[None, :] * stride_xs
    out_at = out_ptr + batch * stride_ob + offs_s[None, :] * stride_os
    mean_lanes = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    acc = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    for start in tl.range(0, num_channels, BLOCK_C, num_stages=NUM_STAGES):
        mask_c = (start + lanes < num_channels)[:, None]
        h = tl.load(x_at + (start + lanes)[:, None] * stride_xc, mask=mask_c & mask_s, other=0.0).to(tl.float32)
        if IS_CENTRED:
            mean_lanes, acc = _update_moments(mean_lanes, acc, h, mask_c, start // BLOCK_C + 1)
        else:
            acc += h * h
    total = num_channels * 1.0
    mean = tl.zeros((BLOCK_S,), dtype=tl.float32)
    rest = tl.zeros((BLOCK_S,), dtype=tl.float32)
    squares = tl.sum(acc, axis=0)
    if IS_CENTRED:
        count = tl.cdiv(tl.maximum(num_channels - lanes, 0), BLOCK_C).to(tl.float32)
        mean, rest, squares = _merge_moments(tl.trans(mean_lanes), tl.trans(acc), count[None, :], total)
    root = _root(squares, total, eps, IS_L2)
    for start in tl.range(0, num_channels, BLOCK_C, num_stages=NUM_STAGES):
        offs_c = start + lanes
        mask = (offs_c < num_channels)[:, None] & mask_s
        h = tl.load(x_at + offs_c[:, None] * stride_xc, mask=mask, other=0.0).to(tl.float32)
        h = (h - mean[None, :]) - rest[None, :]
        out = _scaled(h, root, weight_ptr, bias_ptr, offs_c, num_channels, dtype, HAS_WEIGHT, HAS_BIAS)
        tl.store(out_at + offs_c[:, None] * stride_oc, out, mask=mask)


kernel = (_two_parts, _merge_moments, _update_moments, _root, _scaled, _block_kernel, _loop_kernel)
_IS_COMPILED = isinstance(_block_kernel, triton.JITFunction)
_SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on Hopper (compute capability 9.0)."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton_op("agnitra::channel_norm", mutates_args=())
def _channel_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dim: int,
    eps: float,
    kind: str,
    is_channels_last: bool,
    block_c: int,
    block_s: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    channels = x.shape[dim]
    outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    is_rows = bool(inner == 1)
    if is_rows:
        x_BCS = x.reshape(outer, channels).t().unsqueeze(0)
        outer, inner, is_channels_last = 1, outer, False
    else:
        x_BCS = x.reshape(outer, channels, inner)
    shape = (*x.shape[:dim], *x.shape[dim + 1 :], channels) if is_channels_last else x.shape
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    strides = (channels * inner, 1, channels) if is_channels_last or is_rows else (channels * inner, inner, 1)
    is_one_block = bool(channels <= block_c)
    chosen, looped = (_block_kernel, {}) if is_one_block else (_loop_kernel, {"NUM_STAGES": num_stages})
    # The interpreter's kernel is no JITFunction, and wrap_triton takes nothing else.
    launcher = wrap_triton(chosen) if _IS_COMPILED else chosen
    launcher[(outer * ((inner + block_s - 1) // block_s),)](
        x_BCS,
        x_BCS if weight is None else weight,
        x_BCS if bias is None else bias,
        out,
        channels,
        inner,
        *x_BCS.stride(),
        *strides,
        eps,
        IS_CENTRED=kind == "layer",
        IS_L2=kind == "l2",
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **looped,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out.movedim(-1, dim) if is_channels_last else out


def launch(
    params: dict[str, int],
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    kind: str = "rms",
    dim: int = 1,
    is_channels_last: bool = False,
) -> torch.Tensor:
    """Run the kernel with one config.

    Args:
        params: BLOCK_C, BLOCK_S, num_warps, num_stages.
        x: [outer..., C, inner...] floating tensor on a CUDA device (any device in the interpreter), any strides;
            copied where the outer or the inner dimensions cannot be viewed as one.
        weight: None or [C], the dtype of x or float32.
        bias: as the weight.
        eps: added to the mean of squares or the variance; for "l2" the least norm that is divided by.
        kind: "rms", "layer" or "l2".
        dim: which dimension is C.
        is_channels_last: lay the result out with C innermost, as a permuted contiguous tensor.

    Returns:
        The normed tensor, of x's shape; contiguous, or with C innermost.

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    tensors = tuple(tensor for tensor in (x, weight, bias) if tensor is not None)
    check_call("channel_norm", tensors, supports(x, weight, bias, kind, dim), _IS_COMPILED)
    config = tuple(params[name] for name in PARAMS)
    return torch.ops.agnitra.channel_norm(x, weight, bias, dim, eps, kind, is_channels_last, *config)


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one tensor.

    Args:
        shape: (B, C, S): the dimensions before C together, C, and those after C together.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    _, channels, inner = shape if len(shape) == 3 else (1, 1, 1)
    whole = max(16, next_power_of_two(channels))
    blocks = sorted({block for block in (64, 128, 256, 1024) if block < whole} | {min(whole, 4096)})
    widest = max(16, next_power_of_two(inner))
    places = (16, 32, 64, 128, 256, 512) if inner > 1 else (1, 2, 4, 8, 16)

    def is_valid(point: dict[str, int]) -> bool:
        """Leave out what cannot run or only repeats another config."""
        tile = point["BLOCK_C"] * point["BLOCK_S"]
        values_per_thread = tile / (32 * point["num_warps"])
        is_one_block = channels <= point["BLOCK_C"]
        return (
            point["BLOCK_S"] <= widest
            and tile <= MAX_TILE
            and (values_per_thread >= 4 or point["num_warps"] == 1)
            and values_per_thread <= (64 if is_one_block else 32)
            and (point["num_stages"] - 1) * tile * itemsize(dtype) <= _SHARED_MEMORY_BYTES
            # Stages are of the loop over channels: without the loop they would be copies of one config.
            and (not is_one_block or point["num_stages"] == 1)
        )

    return enumerate_space(
        "channel_norm",
        shape,
        dtype,
        {
            "BLOCK_C": tuple(blocks),
            "BLOCK_S": places,
            "num_warps": (1, 2, 4, 8, 16),
            "num_stages": (1, 2, 3),
        },
        is_valid,
        rank=3,
    )


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """All channels in one tile where it fits, 32 positions or more of each, 8 warps; rows by the row rule."""
    outer, channels, inner = shape
    whole = max(16, next_power_of_two(channels))
    if inner == 1:
        rule = row_rule((outer, channels), block_n=min(4096, whole), values_per_thread=16)
        return {"BLOCK_C": rule["BLOCK_N"], "BLOCK_S": rule["ROWS_PER_PROGRAM"], **rule}
    block_c = whole if whole * 32 <= MAX_TILE else 128
    block_s = max(32, min(8192 // block_c, next_power_of_two(inner)))
    warps = max(1, min(8, block_c * block_s // (32 * 32)))
    return {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": warps, "num_stages": 2}


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw x [B, C, S] for a plain "rms", from a fixed seed."""
    return (drawer(dtype, device)(*shape), None, None, 1e-5), {}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """One stream in and one out; three operations an element."""
    num_elements = math.prod(shape)
    return 2 * num_elements * itemsize(dtype), 3 * num_elements


def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    kind: str = "rms",
    dim: int = 1,
    is_channels_last: bool = False,
) -> torch.Tensor:
    """Compute the same in plain torch; fp64 stays fp64."""
    wide = x if x.dtype == torch.float64 else x.float()
    if kind == "l2":
        out = wide / wide.square().sum(dim, keepdim=True).sqrt().clamp_min(eps)
    else:
        wide = wide - wide.mean(dim, keepdim=True) if kind == "layer" else wide
        out = wide / torch.sqrt(wide.square().mean(dim, keepdim=True) + eps)
    along = [-1 if place == dim else 1 for place in range(x.dim())]
    out = out if weight is None else out * weight.to(out.dtype).view(along)
    out = (out if bias is None else out + bias.to(out.dtype).view(along)).to(x.dtype)
    return out.movedim(dim, -1).contiguous().movedim(-1, dim) if is_channels_last else out.contiguous()


def supports(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str = "rms",
    dim: int = 1,
) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if kind not in KINDS:
        return f"channel_norm knows {', '.join(KINDS)}, not {kind!r}"
    if x.dtype not in _DTYPES:
        return f"channel_norm takes float32, bfloat16 or float16, not {x.dtype}"
    if not 0 <= dim < x.dim() or x.numel() < 1:
        return f"channel_norm needs at least one value and a dimension of x, not {tuple(x.shape)} and {dim}"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (x.shape[dim],) or tensor.stride(0) != 1:
            return f"channel_norm needs a contiguous {name} of shape ({x.shape[dim]},), not {tuple(tensor.shape)}"
        if tensor.dtype not in (x.dtype, torch.float32):
            return f"channel_norm needs a {name} of x's dtype {x.dtype} or float32, not {tensor.dtype}"
    return None
