"""softmax(q k^T * scale + mask) v for a few queries against a long cache, split over the cache.

One program takes all query heads of a key/value head (they read the same keys) and a part of the cache; a second kernel
adds the parts with their softmax weights, in order. With SPLIT=1 there is no second kernel. A query that may see no key
at all gets zeros, as `scaled_dot_product_attention` gives.

Shape legend: B batch, H query heads, G key/value heads, L queries, S keys, D head size, R = H / G * L query rows that
share a key/value head.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Milakov and Gimelshein, arXiv 1805.02867.
"""

import math

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.generate.points import check_call, drawer, itemsize, next_power_of_two
from agnitra_lab.generate.templates.attention_blocks import add_parts, keys, seen
from agnitra_lab.generate.templates.attention_points import (
    MAX_HEAD_SIZE,
    MAX_QUERIES,
    MAX_ROWS,
    split_rule,
    split_space,
)

PARAMS = ("BLOCK_N", "SPLIT", "num_warps", "num_stages")


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    num_kv_heads,
    num_keys,
    keys_per_part,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_mb,
    stride_mh,
    stride_ml,
    stride_ms,
    stride_ob,
    stride_oh,
    stride_ol,
    scale,
    NUM_QUERIES: tl.constexpr,
    NUM_R: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # 64-bit: a cache of a large batch passes 2^31 elements.
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    part = tl.program_id(1)
    offs_r = tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = offs_r < NUM_R
    mask_d = offs_d < HEAD_SIZE
    head = kv_head * (NUM_R // NUM_QUERIES) + offs_r // NUM_QUERIES
    query = offs_r % NUM_QUERIES

    q_rows = q_ptr + batch * stride_qb + head * stride_qh + query * stride_ql
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0)
    k_rows = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_rows = v_ptr + batch * stride_vb + kv_head * stride_vh
    mask_rows = mask_ptr + batch * stride_mb + head * stride_mh + query * stride_ml

    start = part * keys_per_part
    end = tl.minimum(start + keys_per_part, num_keys)
    # Scores in units of log2: exp2 is one instruction.
    factor = tl.cast(scale * 1.4426950408889634, tl.float32)
    highest = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for n in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        k, v, given = keys(
            k_rows, v_rows, mask_rows, offs_n, mask_n, mask_r, stride_ks, stride_vs, stride_ms,
            HEAD_SIZE, BLOCK_D, MASK,
        )  # fmt: skip
        highest, total, acc = seen(q, k, v, given, mask_n, factor, highest, total, acc, MASK)

    mask_out = mask_r[:, None] & mask_d[None, :]
    if SPLIT == 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_rows = out_ptr + batch * stride_ob + head * stride_oh + query * stride_ol
        tl.store(out_rows[:, None] + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask_out)
    else:
        row = (tl.program_id(0).to(tl.int64) * NUM_R + offs_r) * SPLIT + part
        tl.store(partial_ptr + row[:, None] * HEAD_SIZE + offs_d[None, :], acc, mask=mask_out)
        tl.store(stats_ptr + row * 2, highest, mask=mask_r)
        tl.store(stats_ptr + row * 2 + 1, total, mask=mask_r)


kernel = (keys, seen, _attend, add_parts)
_IS_COMPILED = isinstance(_attend, triton.JITFunction)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MASK_DTYPES = (torch.bool, *_DTYPES)


@triton_op("agnitra::decode_attention", mutates_args=())
def _decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    out_stride: list[int],
    block_n: int,
    split: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    batch, num_heads, num_queries, head_size = q.shape
    num_kv_heads, num_keys = k.shape[1], k.shape[2]
    num_r = num_heads // num_kv_heads * num_queries
    out = torch.empty_strided(q.shape, out_stride, dtype=q.dtype, device=q.device)
    partial = stats = q
    if split > 1:
        num_parts = batch * num_kv_heads * num_r * split
        partial = torch.empty((num_parts, head_size), dtype=torch.float32, device=q.device)
        stats = torch.empty((num_parts, 2), dtype=torch.float32, device=q.device)
    seen = None if mask is None else mask.expand(batch, num_heads, num_queries, num_keys)
    # The interpreter's kernel is no JITFunction, and wrap_triton takes nothing else.
    launcher = wrap_triton if _IS_COMPILED else lambda function: function
    sizes = {
        "NUM_QUERIES": num_queries,
        "NUM_R": num_r,
        "HEAD_SIZE": head_size,
        "BLOCK_D": max(16, next_power_of_two(head_size)),
        "SPLIT": split,
    }
    num_blocks = -(-num_keys // block_n)
    launcher(_attend)[(batch * num_kv_heads, split)](
        q, k, v, q if mask is None else mask, out, partial, stats,
        num_kv_heads, num_keys, -(-num_blocks // split) * block_n,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *((0, 0, 0, 0) if seen is None else seen.stride()), *out.stride()[:3], scale,
        MASK=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        BLOCK_R=max(16, next_power_of_two(num_r)), BLOCK_N=block_n, NUM_STAGES=num_stages,
        num_warps=num_warps, num_stages=num_stages, **sizes,
    )  # fmt: skip
    if split > 1:
        launcher(add_parts)[(batch * num_kv_heads * num_r,)](
            partial, stats, out, num_kv_heads, *out.stride()[:3],
            BLOCK_P=next_power_of_two(split), PDL=1, num_warps=4, **sizes,
        )  # fmt: skip
    return out


def launch(
    params: dict[str, int],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    out_stride: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Run the kernels with one config.

    Args:
        params: BLOCK_N (keys that a program holds at once), SPLIT (parts of the cache), num_warps, num_stages.
        q: [B, H, L, D] floating tensor on a CUDA device (any device in the interpreter), L at most MAX_QUERIES; D
            contiguous, other strides free.
        k: [B, G, S, D] of q's dtype, H a multiple of G; D contiguous.
        v: like k.
        mask: None, or a tensor that broadcasts to [B, H, L, S]: boolean (True is seen) or added to the scores.
        scale: of the scores; 1 / sqrt(D) by default.
        out_stride: strides of the result; contiguous by default.

    Returns:
        [B, H, L, D] of q's dtype.

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    given = (q, k, v) if mask is None else (q, k, v, mask)
    check_call("decode_attention", given, supports(q, k, v, mask, out_stride), _IS_COMPILED)
    _, num_heads, num_queries, head_size = q.shape
    contiguous = (num_heads * num_queries * head_size, num_queries * head_size, head_size, 1)
    return torch.ops.agnitra.decode_attention(
        q,
        k,
        v,
        mask,
        1.0 / math.sqrt(head_size) if scale is None else float(scale),
        list(contiguous if out_stride is None else out_stride),
        *(params[name] for name in PARAMS),
    )


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one attention.

    Args:
        shape: (B, G, R, S, D); see the legend of the module.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    return split_space("decode_attention", shape, dtype)


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """Parts for two programs on each of 132 multiprocessors, of at least 64 keys."""
    return split_rule(shape, dtype)


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw q of one query with R / 1 heads a key/value head, k and v, from a fixed seed."""
    batch, num_kv_heads, num_r, num_keys, head_size = shape
    draw = drawer(dtype, device)
    q = draw(batch, num_kv_heads * num_r, 1, head_size)
    cache = (batch, num_kv_heads, num_keys, head_size)
    return (q, draw(*cache), draw(*cache)), {}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Keys and values once in; four operations for each of their elements and query row."""
    batch, num_kv_heads, num_r, num_keys, head_size = shape
    num_cached = batch * num_kv_heads * num_keys * head_size
    num_rows = 2 * batch * num_kv_heads * num_r * head_size
    return (2 * num_cached + num_rows) * itemsize(dtype), 4 * num_cached * num_r


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    out_stride: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Compute the same with torch's own attention; fp64 stays fp64."""
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    if out_stride is None:
        return out.contiguous()
    return torch.empty_strided(out.shape, out_stride, dtype=out.dtype, device=out.device).copy_(out)


library = reference


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    out_stride: tuple[int, ...] | None = None,
) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        dtypes = f"{q.dtype}, {k.dtype} and {v.dtype}"
        return f"decode_attention takes q, k and v of one dtype, float32, bfloat16 or float16, not {dtypes}"
    if not q.dim() == k.dim() == v.dim() == 4 or 0 in (*q.shape, *k.shape):
        return f"decode_attention takes 4-dimensional tensors with values, not {tuple(q.shape)} and {tuple(k.shape)}"
    if k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[1] % k.shape[1]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        return f"decode_attention needs q [B, H, L, D] and k and v [B, G, S, D] with H a multiple of G, not {shapes}"
    if q.shape[2] > MAX_QUERIES or q.shape[3] > MAX_HEAD_SIZE or q.shape[1] // k.shape[1] * q.shape[2] > MAX_ROWS:
        limits = f"{MAX_QUERIES} queries, a head size of {MAX_HEAD_SIZE} and {MAX_ROWS} rows a key/value head"
        return f"decode_attention takes at most {limits}, not {tuple(q.shape)} over {k.shape[1]} heads"
    if any(tensor.stride(3) != 1 for tensor in (q, k, v)) or (out_stride is not None and out_stride[3] != 1):
        return "decode_attention needs a contiguous last dimension in q, k, v and the result"
    if mask is None:
        return None
    if mask.dtype not in _MASK_DTYPES:
        return f"decode_attention takes a boolean or floating mask, not {mask.dtype}"
    full = (*q.shape[:3], k.shape[2])
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(size not in (1, wanted) for size, wanted in zip(shape, full, strict=True)):
        return f"decode_attention needs a mask that broadcasts to {full}, not {tuple(mask.shape)}"
    return None
