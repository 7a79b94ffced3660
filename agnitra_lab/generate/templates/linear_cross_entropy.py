"""Cross-entropy of x W^T + b with class indices, whose logits [T, V] are never in memory.

A program multiplies a block of tokens with one part of the vocabulary, tile after tile on the tensor cores, and keeps
of each tile its maximum, its sum of exponentials and the target's logit, in fp32 and not rounded to x's dtype on the
way. A second, short kernel joins the parts of a token. Programs that run together read one part of the weight, so that
it comes from memory once; x and the weight are read through tensor descriptors (TMA on Hopper), with zeros past the
edges.

Source: Milakov and Gimelshein, arXiv 1805.02867, section 3.1; Wijmans et al., "Cut Your Losses in Large-Vocabulary
Language Models", arXiv 2411.09009, section 4.1.
"""

import math

import torch
import triton
import triton.language as tl
from torch.library import custom_op
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate.points import check_call, drawer, enumerate_space, itemsize, next_power_of_two
from agnitra_lab.generate.templates import cross_entropy
from agnitra_lab.generate.templates.cross_entropy import REDUCTIONS, _loss, _reduced

PARAMS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT", "FLATTEN", "num_warps", "num_stages")


@triton.jit
def _parts(
    x_desc,
    weight_desc,
    bias_ptr,
    target_ptr,
    part_ptr,
    num_tokens,
    num_classes,
    num_k,
    num_blocks,
    tiles_per_part,
    plane,
    HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_m, part = pid % num_blocks, pid // num_blocks
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_tokens
    target = tl.load(target_ptr + offs_m, mask=mask_m, other=-1)
    # The lowest finite number, not -inf: a part of nothing but -inf then has the sum 0, as in torch.
    m = tl.full((BLOCK_M,), -3.4028234663852886e38, tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    picked = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tl.cdiv(num_classes, BLOCK_N))
    for tile in tl.range(first, last, flatten=FLATTEN == 2):
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, num_k, BLOCK_K, num_stages=NUM_STAGES):
            x = x_desc.load([pid_m * BLOCK_M, k])
            weight = weight_desc.load([tile * BLOCK_N, k])
            acc = tl.dot(x, weight.T, acc)
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_classes
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        picked += tl.sum(tl.where(offs_n[None, :] == target[:, None], acc, 0.0), axis=1)
        if HAS_SMOOTHING:
            total += tl.sum(tl.where(mask_n[None, :], acc, 0.0), axis=1)
        acc = tl.where(mask_n[None, :], acc, -float("inf"))
        m_new = tl.maximum(m, tl.max(acc, axis=1))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(acc - m_new[:, None]), axis=1)
        m = m_new
    offs = part.to(tl.int64) * num_tokens + offs_m
    tl.store(part_ptr + offs, m, mask=mask_m)
    tl.store(part_ptr + plane + offs, s, mask=mask_m)
    tl.store(part_ptr + 2 * plane + offs, picked, mask=mask_m)
    if HAS_SMOOTHING:
        tl.store(part_ptr + 3 * plane + offs, total, mask=mask_m)


@triton.jit
def _join(
    target_ptr,
    loss_ptr,
    part_ptr,
    num_tokens,
    num_classes,
    plane,
    ignore_index,
    smoothing,
    HAS_SMOOTHING: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = tokens < num_tokens
    parts = tl.arange(0, BLOCK_SPLIT)
    offs = parts.to(tl.int64)[:, None] * num_tokens + tokens[None, :]
    mask = (parts < SPLIT)[:, None] & mask_t[None, :]
    m = tl.load(part_ptr + offs, mask=mask, other=-3.4028234663852886e38)
    s = tl.load(part_ptr + plane + offs, mask=mask, other=0.0)
    m_row = tl.max(m, axis=0)
    s_row = tl.sum(s * tl.exp(m - m_row[None, :]), axis=0)
    picked = tl.sum(tl.load(part_ptr + 2 * plane + offs, mask=mask, other=0.0), axis=0)
    total = tl.zeros((BLOCK_T,), tl.float32)
    if HAS_SMOOTHING:
        total = tl.sum(tl.load(part_ptr + 3 * plane + offs, mask=mask, other=0.0), axis=0)
    target = tl.load(target_ptr + tokens, mask=mask_t, other=0)
    # A class that does not exist ends eager with an error on the device; here its loss is NaN.
    picked = tl.where((target >= 0) & (target < num_classes), picked, float("nan"))
    loss = _loss(m_row, s_row, total, picked, target, num_classes, ignore_index, smoothing, HAS_SMOOTHING)
    tl.store(loss_ptr + tokens, loss.to(loss_ptr.dtype.element_ty), mask=mask_t)


kernel = (_loss, _parts, _join)

_IS_COMPILED = isinstance(_parts, triton.JITFunction)
_SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on Hopper (compute capability 9.0)."""
_DTYPES = (torch.bfloat16, torch.float16)
_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_PARTS_OF_A_PROGRAM = 8192
"""Values that a program of the joining kernel holds."""


# Not a triton_op: Inductor would have to trace the descriptors, and there is nothing in them for it to fuse.
@custom_op("agnitra::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    out_dtype: torch.dtype,
    block_m: int,
    block_n: int,
    block_k: int,
    split: int,
    flatten: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    x_TK = x.reshape(-1, x.shape[-1]).contiguous()
    target_T = target.reshape(-1).contiguous()
    num_tokens, num_classes = x_TK.shape[0], weight.shape[0]
    num_blocks = (num_tokens + block_m - 1) // block_m
    tiles_per_part = ((num_classes + block_n - 1) // block_n + split - 1) // split
    has_smoothing = label_smoothing != 0.0
    part = torch.empty((4 if has_smoothing else 3, split, num_tokens), dtype=torch.float32, device=x.device)
    loss = torch.empty(num_tokens, dtype=out_dtype, device=x.device)
    _parts[(num_blocks * split,)](
        TensorDescriptor.from_tensor(x_TK, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        target_T if bias is None else bias,
        target_T,
        part,
        num_tokens,
        num_classes,
        x_TK.shape[1],
        num_blocks,
        tiles_per_part,
        num_tokens * split,
        HAS_BIAS=bias is not None,
        HAS_SMOOTHING=has_smoothing,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLIT=split,
        FLATTEN=flatten,
        NUM_STAGES=num_stages,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    _join_parts(part, target_T, loss, num_classes, (ignore_index, label_smoothing))
    return loss.view(target.shape)


def _join_parts(
    part: torch.Tensor, target: torch.Tensor, loss: torch.Tensor, num_classes: int, rule: tuple[int, float]
) -> None:
    _, split, num_tokens = part.shape
    block_split = next_power_of_two(split)
    block_t = max(1, min(128, _MOST_PARTS_OF_A_PROGRAM // block_split))
    _join[((num_tokens + block_t - 1) // block_t,)](
        target,
        loss,
        part,
        num_tokens,
        num_classes,
        num_tokens * split,
        *rule,
        HAS_SMOOTHING=rule[1] != 0.0,
        SPLIT=split,
        BLOCK_SPLIT=block_split,
        BLOCK_T=block_t,
        num_warps=4,
    )


@_linear_cross_entropy.register_fake
def _(x, weight, bias, target, ignore_index, label_smoothing, out_dtype, *config):
    return x.new_empty(target.shape, dtype=out_dtype)


def launch(
    params: dict[str, int],
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Run both kernels with one config; means and sums are torch's.

    Args:
        params: BLOCK_M, BLOCK_N, BLOCK_K, SPLIT (parts of the vocabulary), FLATTEN (2: tiles are prefetched over their
            borders), num_warps, num_stages.
        x: [..., K], bfloat16 or float16, on a CUDA device (any device in the interpreter).
        weight: [V, K], the dtype of x, contiguous rows of a multiple of 16 bytes.
        target: [...] int64 classes.
        bias: [V], the dtype of x or float32.
        ignore_index: the class whose tokens count nothing.
        label_smoothing: from 0 to 1.
        reduction: "none", "mean" (over the tokens that count; NaN when there is none) or "sum".
        out_dtype: of the result; the dtype of x when None. Means and sums are taken in fp32 and rounded once.

    Returns:
        The losses [...], or a number.

    Raises:
        TemplateError: under grad, on a CPU, or for arguments that `supports` refuses.
    """
    refusal = supports(x, weight, target, bias)
    if refusal is None and (reduction not in REDUCTIONS or out_dtype not in (None, *_OUT_DTYPES)):
        refusal = f"linear_cross_entropy takes the reductions {', '.join(REDUCTIONS)}, and a floating dtype"
    tensors = tuple(tensor for tensor in (x, weight, target, bias) if tensor is not None)
    check_call("linear_cross_entropy", tensors, refusal, _IS_COMPILED)
    dtype = out_dtype or x.dtype
    config = tuple(params[name] for name in PARAMS)
    loss_dtype = dtype if reduction == "none" else torch.float32
    rules = (ignore_index, label_smoothing, loss_dtype)
    loss = torch.ops.agnitra.linear_cross_entropy(x, weight, bias, target, *rules, *config)
    return _reduced(loss, target, ignore_index, reduction, dtype)


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one head.

    Args:
        shape: (tokens, K, classes).
        dtype: "bfloat16" or "float16".

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    num_tokens, num_k, num_classes = shape if len(shape) == 3 else (1, 1, 1)
    largest = min(128, max(16, next_power_of_two(num_tokens)))

    def is_valid(point: dict[str, int]) -> bool:
        """Leave out what spills or does not fit, blocks of another shape than the work, too few or many programs."""
        block_m, block_n, block_k = point["BLOCK_M"], point["BLOCK_N"], point["BLOCK_K"]
        num_tiles = (num_classes + block_n - 1) // block_n
        num_programs = (num_tokens + block_m - 1) // block_m * point["SPLIT"]
        return (
            # The accumulator and its exponentials live in registers together.
            block_m * block_n <= 4096 * point["num_warps"]
            and (point["num_warps"] == 4 or block_m * block_n >= 16384)
            and 2 * (block_m + block_n) * block_k * point["num_stages"] <= _SHARED_MEMORY_BYTES - 1024
            # Blocks of few tokens are bound by the weight, of which they load long rows.
            and (block_k == 64 or block_m <= 32)
            and (point["num_stages"] > 2 or block_m <= 32)
            and (block_m == largest or (block_m == 64 and largest == 128))
            # Programs enough for the device, where there are tiles enough, and not more than some rounds of it.
            and (point["SPLIT"] == 1 or (point["SPLIT"] <= num_tiles and num_programs <= 2048))
            and (2 * num_programs >= 132 or 2 * point["SPLIT"] > num_tiles)
        )

    found = enumerate_space(
        "linear_cross_entropy",
        shape,
        dtype,
        {
            "BLOCK_M": (16, 32, 64, 128),
            "BLOCK_N": (64, 128, 256),
            "BLOCK_K": (64, 128),
            "SPLIT": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            "FLATTEN": (1, 2),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4),
        },
        is_valid,
        rank=3,
    )
    if found.dtype == "float32":
        raise TemplateError("linear_cross_entropy takes bfloat16 or float16, not float32.")
    if num_k % 8:
        raise TemplateError(f"linear_cross_entropy needs rows of a multiple of 8 values, not {num_k}.")
    return found


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """Tiles as a GEMM has them, and parts enough for four rounds of programs on the 132 multiprocessors of a Hopper."""
    num_tokens, _, _ = shape
    block_m = min(128, max(16, next_power_of_two(num_tokens)))
    num_blocks = (num_tokens + block_m - 1) // block_m
    split = next_power_of_two(max(1, 528 // num_blocks))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": 128,
        "BLOCK_K": 64,
        "SPLIT": split,
        "FLATTEN": 1,
        "num_warps": 8 if block_m == 128 else 4,
        "num_stages": 3 if block_m == 128 else 4,
    }


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw x, the weight and the classes, from fixed seeds; the loss of each token."""
    num_tokens, num_k, num_classes = shape
    generator = torch.Generator(device).manual_seed(1)
    target = torch.randint(0, num_classes, (num_tokens,), generator=generator, device=device)
    draw = drawer(dtype, device)
    weight = draw(num_classes, num_k) * num_k**-0.5
    return (draw(num_tokens, num_k), weight, target), {"reduction": "none", "out_dtype": torch.float32}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Both operands in, a class and a loss a token; the product's operations and four a logit."""
    num_tokens, num_k, num_classes = shape
    values = num_tokens * num_k + num_classes * num_k
    return values * itemsize(dtype) + 12 * num_tokens, num_tokens * num_classes * (2 * num_k + 4)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute the same in plain torch, with logits in fp32; fp64 stays fp64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = functional.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return cross_entropy.reference(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction,
        out_dtype=out_dtype or x.dtype,
    )  # fmt: skip


def supports(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None = None
) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return f"linear_cross_entropy takes x and a weight of bfloat16 or float16, not {x.dtype} and {weight.dtype}"
    if x.dim() < 1 or x.numel() < 1 or weight.numel() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        return f"linear_cross_entropy needs x [..., K] and a weight [V, K], not {tuple(x.shape)}, {tuple(weight.shape)}"
    if weight.stride(1) != 1 or weight.stride(0) % 8 or weight.shape[1] % 8:
        return "linear_cross_entropy needs contiguous rows of the weight, of a multiple of 16 bytes"
    if target.dtype != torch.int64 or tuple(target.shape) != tuple(x.shape[:-1]):
        expected, given = tuple(x.shape[:-1]), f"{tuple(target.shape)} {target.dtype}"
        return f"linear_cross_entropy needs int64 classes of shape {expected}, not {given}"
    if bias is not None and (
        tuple(bias.shape) != (weight.shape[0],) or bias.stride(0) != 1 or bias.dtype not in (x.dtype, torch.float32)
    ):
        return f"linear_cross_entropy needs a contiguous bias of shape ({weight.shape[0]},) in x's dtype or float32"
    if max(math.prod(x.shape[:-1]), weight.shape[0]) >= 2**31 - 2**16:
        return "linear_cross_entropy takes fewer than 2^31 tokens and classes"
    return None
