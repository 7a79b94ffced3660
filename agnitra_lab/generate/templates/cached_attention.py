"""One decoding step of attention: rotate the new queries and keys, write keys and values into the cache, attend.

As `decode_attention`, split over the cache, and the first kernel does all that stands between the projections and the
attention: each part norms and rotates the queries again (they are tiny), the part that a new key's slot lies in writes
it there and takes it from registers. What the slot held before never counts, so no order between parts is needed.
With SPLIT=1 there is no second kernel. Everything is fp32 up to one rounding of the rotated value.

PDL=2 launches both kernels programmatically dependent on the one before: the part's keys and values are asked into the
L2 before gdc_wait(), which reads nothing; all reads and writes come after it.

Shape legend: B batch, H query heads, G key/value heads, L new tokens, S slots of the cache, D head size,
R = H / G * L query rows that share a key/value head, W values of cos and sin a token.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Su et al., RoFormer, arXiv 2104.09864; NVIDIA,
CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

import math
from typing import Any

import torch
import triton
from torch.library import custom_op

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
from agnitra_lab.generate.templates.cached_attention_kernels import attend, old, prefetch, turn

PARAMS = ("BLOCK_N", "SPLIT", "PDL", "num_warps", "num_stages")
FORMS = ("none", "halves", "neighbours")
"""Which values of a head turn together: d and d + rotary / 2, or 2d and 2d + 1."""
ANGLES = ("each", "halves", "neighbours")
"""What value d takes of a row of cos and sin: d, d modulo rotary / 2, or d // 2."""

kernel = (turn, prefetch, old, keys, seen, attend, add_parts)
_IS_COMPILED = isinstance(attend, triton.JITFunction)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MASK_DTYPES = (torch.bool, *_DTYPES)


def _layout_tags() -> tuple[torch.Tag, ...]:
    """Return the tag that says that any layout is taken, none where torch does not have it.

    Where strides are demanded, Inductor computes a mask or an angle that is no buffer yet once more for each layer
    (torch 2.13): slower, and nothing else.
    """
    tag = getattr(torch.Tag, "flexible_layout", None)
    return () if tag is None else (tag,)


# Opaque to Inductor: it launches a traced kernel by itself and knows no launch_pdl. That the caches are written is in
# the signature, so they are written where they lie.
@custom_op("agnitra::cached_attention", mutates_args=("k_cache", "v_cache"), tags=_layout_tags())
def _cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    position: torch.Tensor | None,
    mask: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    first_position: int,
    slot_dim: int,
    rotation: list[int],
    eps: list[float],
    scale: float,
    out_stride: list[int],
    config: list[int],
) -> torch.Tensor:
    """Launch one or two kernels on tensors as they lie."""
    block_n, split, pdl, num_warps, num_stages = config
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    q_weight, k_weight = (None if x is None else x.contiguous() for x in (q_weight, k_weight))
    if slot_dim == 1:
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    batch, num_heads, num_queries, head_size = q.shape
    num_kv_heads, num_keys = k_cache.shape[1], k_cache.shape[2]
    num_r = num_heads // num_kv_heads * num_queries
    out = torch.empty_strided(q.shape, out_stride, dtype=q.dtype, device=q.device)
    num_blocks = -(-num_keys // block_n)
    partial, stats = _parts(batch * num_kv_heads * num_r * split, out) if split > 1 else (out, out)
    seen = None if mask is None else mask.expand(batch, num_heads, num_queries, num_keys)
    sizes: dict[str, Any] = {"NUM_QUERIES": num_queries, "NUM_R": num_r, "HEAD_SIZE": head_size, "SPLIT": split}
    sizes |= {"BLOCK_D": max(16, next_power_of_two(head_size)), "PDL": pdl}
    if pdl == 2:
        sizes["launch_pdl"] = True
    attend[(batch * num_kv_heads, split)](
        q, k, v, k_cache, v_cache, _or(position, q), _or(cos, q), _or(sin, q), _or(q_weight, q), _or(k_weight, q),
        _or(mask, q), out, partial, stats,
        num_kv_heads, num_keys, -(-num_blocks // split) * block_n, first_position,
        0 if position is None or position.dim() == 0 else position.stride(0),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        *_angle_strides(cos, batch, num_queries), *_angle_strides(sin, batch, num_queries),
        *((0, 0, 0, 0) if seen is None else seen.stride()), *out.stride()[:3], scale, *eps,
        HAS_POSITION=position is not None, HAS_Q_NORM=q_weight is not None, HAS_K_NORM=k_weight is not None,
        FORM=rotation[0], ROTARY=rotation[1], ANGLES=rotation[2],
        MASK=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        BLOCK_R=max(16, next_power_of_two(num_r)), BLOCK_N=block_n, NUM_STAGES=num_stages,
        num_warps=num_warps, num_stages=num_stages, **sizes,
    )  # fmt: skip
    if split > 1:
        add_parts[(batch * num_kv_heads * num_r,)](
            partial, stats, out, num_kv_heads, *out.stride()[:3],
            BLOCK_P=next_power_of_two(split), num_warps=4, **sizes,
        )  # fmt: skip
    return out


@_cached_attention.register_fake
def _(q, k, v, k_cache, v_cache, position, mask, cos, sin, q_weight, k_weight, first, slot_dim, rotation, eps, scale,
      out_stride, config):  # fmt: skip
    return q.new_empty_strided(q.shape, out_stride)


def _parts(number: int, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make room for the unfinished results of parts, and for the maximum and sum of each."""
    sizes = ((number, out.shape[3]), (number, 2))
    partial, stats = (torch.empty(size, dtype=torch.float32, device=out.device) for size in sizes)
    return partial, stats


def _or(tensor: torch.Tensor | None, unread: torch.Tensor) -> torch.Tensor:
    return unread if tensor is None else tensor


def _angle_strides(angles: torch.Tensor | None, batch: int, num_queries: int) -> tuple[int, ...]:
    return (0, 0, 0) if angles is None else angles.expand(batch, num_queries, angles.shape[2]).stride()


def launch(
    params: dict[str, int],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    position: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: tuple[float, float] = (0.0, 0.0),
    first_position: int = 0,
    slot_dim: int = 2,
    form: str = "none",
    rotary: int = 0,
    angles: str = "each",
    scale: float | None = None,
    out_stride: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Run the kernels with one config; the new keys and values are in the cache afterwards.

    Args:
        params: BLOCK_N (keys that a program holds at once), SPLIT (parts of the cache), PDL, num_warps, num_stages.
        q: [B, H, L, D] floating tensor on a CUDA device (any device in the interpreter) before its rotation, L at most
            MAX_QUERIES; D contiguous, other strides free.
        k: [B, G, L, D] of q's dtype before its rotation, H a multiple of G; v: like k.
        k_cache: [B, G, S, D] of q's dtype, [B, S, G, D] with `slot_dim` 1; D contiguous. New slots alone are written.
        v_cache: like k_cache.
        position: [L] (or one number) int64 or int32 slots of the new tokens; None: L slots from `first_position` on.
        mask: None, or a tensor that broadcasts to [B, H, L, S]: boolean (True is seen) or added to the scores.
        cos: None, or [1 or B, 1 or L, W] factors of a value itself; sin: of the one that it turns with.
        q_weight: None, or [D]: each query head is RMS-normed with it before the rotation; k_weight: each key head.
        eps: of both norms.
        form: one of FORMS; rotary: how many of the first values of a head turn; angles: one of ANGLES.
        scale: of the scores, 1 / sqrt(D) by default; out_stride: of the result, contiguous by default.

    Returns:
        [B, H, L, D] of q's dtype.

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    turns = (form, rotary, angles)
    refusal = supports(q, k, v, k_cache, v_cache, position, mask, cos, sin, (q_weight, k_weight), slot_dim, turns)
    given = (q, k, v, k_cache, v_cache, position, mask, cos, sin, q_weight, k_weight)
    check_call("cached_attention", tuple(tensor for tensor in given if tensor is not None), refusal, _IS_COMPILED)
    return torch.ops.agnitra.cached_attention(
        *given,
        first_position,
        slot_dim,
        [FORMS.index(form), rotary, ANGLES.index(angles)],
        list(eps),
        1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale),
        list(_contiguous(q.shape) if out_stride is None else out_stride),
        _config(params, q.device),
    )


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1


def _config(params: dict[str, int], device: torch.device) -> list[int]:
    """Return the parameters in order, without the dependent launch where nothing can do one."""
    is_dependent = params["PDL"] == 2 and _IS_COMPILED and _has_dependent_launch(device)
    return [2 if name == "PDL" and is_dependent else 1 if name == "PDL" else params[name] for name in PARAMS]


def _has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may begin before the one in front of it has ended: from compute capability 9.0."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] >= 9


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one attention.

    Args:
        shape: (B, G, R, S, D); see the legend of the module.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    # What dependent launches save lies between kernels, which a search of one kernel cannot see: the rule decides it.
    return split_space("cached_attention", shape, dtype, PDL=(2,))


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """Parts for two programs on each of 132 multiprocessors, of at least 64 keys, with 8 warps.

    Measured on an H200 in the chain of a 1.1B decoder's token, (1, 4, 8, 1024, 64) of bf16, 22 layers: 16 parts in
    blocks of 64 keys 0.732 ms with 8 warps, 0.748 with 4; 32 parts in blocks of 32 0.736 with 4; 8 parts in blocks of
    128 0.762 with 8; 8 parts in blocks of 64 0.780 with 8, 0.793 with 4.
    """
    # That the last program adds the parts, with no second launch, was tried and is slower everywhere (0.826 ms against
    # 0.748, 4 warps): each program ends by waiting for its counter, where a dependent launch overlaps.
    return {**split_rule(shape, dtype), "num_warps": 8, "PDL": 2}


def is_ruled(shape: tuple[int, ...]) -> bool:
    """Whether `default` is to be used as it is: it was chosen between the products that stand around a step."""
    return True


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw one token for the last slot, with halves that turn where the head size is even, from a fixed seed."""
    batch, num_kv_heads, num_r, num_keys, head_size = shape
    draw = drawer(dtype, device)
    q, k, v = (draw(batch, heads, 1, head_size) for heads in (num_kv_heads * num_r, num_kv_heads, num_kv_heads))
    cache = (batch, num_kv_heads, num_keys, head_size)
    position = torch.full((1,), num_keys - 1, device=device)
    tensors = (q, k, v, draw(*cache), draw(*cache), position)
    if head_size % 2:
        return tensors, {}
    angle = draw(1, 1, head_size)
    return (*tensors, None, angle.cos(), angle.sin()), {"form": "halves", "rotary": head_size}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Keys and values once in; four operations for each of their elements and query row."""
    batch, num_kv_heads, num_r, num_keys, head_size = shape
    num_cached = batch * num_kv_heads * num_keys * head_size
    num_rows = 2 * batch * num_kv_heads * num_r * head_size
    return (2 * num_cached + num_rows) * itemsize(dtype), 4 * num_cached * num_r


def _normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _turned(
    x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, turns: tuple[str, int, str]
) -> torch.Tensor:
    form, rotary, angles = turns
    if form == "none" or cos is None or sin is None:
        return x
    d = torch.arange(rotary, device=x.device)
    taken = {"each": d, "halves": d % (rotary // 2), "neighbours": d // 2}[angles]
    cos, sin = cos[..., taken].unsqueeze(1), sin[..., taken].unsqueeze(1)
    is_first = d < rotary // 2 if form == "halves" else d % 2 == 0
    other = torch.where(is_first, d + rotary // 2, d - rotary // 2) if form == "halves" else d ^ 1
    near = x[..., :rotary]
    far = torch.where(is_first, -near[..., other], near[..., other])
    return torch.cat(((near * cos + far * sin).to(x.dtype), x[..., rotary:]), dim=-1)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    position: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: tuple[float, float] = (0.0, 0.0),
    first_position: int = 0,
    slot_dim: int = 2,
    form: str = "none",
    rotary: int = 0,
    angles: str = "each",
    scale: float | None = None,
    out_stride: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Compute the same in single steps of torch, the writes into the caches included; fp64 stays fp64."""
    turns = (form, rotary, angles)
    q = _turned(_normed(q, q_weight, eps[0]), cos, sin, turns)
    k = _turned(_normed(k, k_weight, eps[1]), cos, sin, turns)
    if slot_dim == 1:
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    if position is None:
        slots = torch.arange(first_position, first_position + q.shape[2], device=q.device)
    else:
        slots = position.reshape(-1).long() % k_cache.shape[2]
    k_cache.index_copy_(2, slots, k)
    v_cache.index_copy_(2, slots, v)
    out = torch.nn.functional.scaled_dot_product_attention(q, k_cache, v_cache, mask, scale=scale, enable_gqa=True)
    if out_stride is None:
        return out.contiguous()
    return torch.empty_strided(out.shape, out_stride, dtype=out.dtype, device=out.device).copy_(out)


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    position: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    weights: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    slot_dim: int = 2,
    turns: tuple[str, int, str] = ("none", 0, "each"),
) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    tensors = (q, k, v, k_cache, v_cache)
    if q.dtype not in _DTYPES or any(tensor.dtype != q.dtype for tensor in tensors):
        dtypes = ", ".join(str(tensor.dtype) for tensor in tensors)
        return f"cached_attention takes q, k, v and caches of one dtype, float32, bfloat16 or float16, not {dtypes}"
    if any(tensor.dim() != 4 or tensor.numel() == 0 for tensor in tensors):
        return "cached_attention takes 4-dimensional tensors with values"
    batch, num_heads, num_queries, head_size = q.shape
    cache = k_cache.shape if slot_dim == 2 else (k_cache.shape[0], k_cache.shape[2], k_cache.shape[1], k_cache.shape[3])
    is_one_shape = k.shape == v.shape and k_cache.shape == v_cache.shape
    if not is_one_shape or tuple(k.shape) != (batch, cache[1], num_queries, head_size) or num_heads % cache[1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        return f"cached_attention needs q [B, H, L, D], k and v [B, G, L, D], H a multiple of G, not {shapes}"
    if (cache[0], cache[3]) != (batch, head_size) or cache[2] < num_queries:
        return f"cached_attention needs caches of {batch} x {head_size}, not {tuple(k_cache.shape)}"
    if num_queries > MAX_QUERIES or head_size > MAX_HEAD_SIZE or num_heads // cache[1] * num_queries > MAX_ROWS:
        limits = f"{MAX_QUERIES} tokens, a head size of {MAX_HEAD_SIZE} and {MAX_ROWS} rows a key/value head"
        return f"cached_attention takes at most {limits}, not {tuple(q.shape)} over {cache[1]} heads"
    if any(tensor.stride(3) != 1 for tensor in tensors):
        return "cached_attention needs a contiguous last dimension in q, k, v and the caches"
    if position is not None and (position.dtype not in (torch.int64, torch.int32) or position.numel() != num_queries):
        return f"cached_attention needs {num_queries} whole numbers as positions, not {tuple(position.shape)}"
    return (
        _why_not_weights(weights, head_size)
        or _why_not_turned(cos, sin, (batch, num_queries), turns, head_size)
        or _why_not_mask(mask, (batch, num_heads, num_queries, cache[2]))
    )


def _why_not_weights(weights: tuple[torch.Tensor | None, torch.Tensor | None], head_size: int) -> str | None:
    if any(weight is not None and (tuple(weight.shape) != (head_size,) or weight.stride(0) != 1) for weight in weights):
        return f"cached_attention needs norm weights of {head_size} contiguous values"
    return None


def _why_not_turned(
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    leading: tuple[int, int],
    turns: tuple[str, int, str],
    head_size: int,
) -> str | None:
    form, rotary, angles = turns
    if form not in FORMS or angles not in ANGLES:
        return f"cached_attention knows the forms {', '.join(FORMS)} and the angles {', '.join(ANGLES)}"
    if form == "none":
        return None
    if cos is None or sin is None or rotary % 2 or not 2 <= rotary <= head_size:
        return f"cached_attention turns an even number of at most {head_size} values with cos and sin, not {rotary}"
    width = rotary if angles == "each" else rotary // 2
    for angle in (cos, sin):
        is_broadcast = angle.dim() == 3 and all(
            size in (1, full) for size, full in zip(angle.shape, leading, strict=False)
        )
        if not is_broadcast or angle.shape[2] != width or not angle.is_floating_point():
            return f"cached_attention needs cos and sin that broadcast to {(*leading, width)}, not {tuple(angle.shape)}"
    return None


def _why_not_mask(mask: torch.Tensor | None, full: tuple[int, ...]) -> str | None:
    if mask is None:
        return None
    if mask.dtype not in _MASK_DTYPES:
        return f"cached_attention takes a boolean or floating mask, not {mask.dtype}"
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(size not in (1, wanted) for size, wanted in zip(shape, full, strict=True)):
        return f"cached_attention needs a mask that broadcasts to {full}, not {tuple(mask.shape)}"
    return None
