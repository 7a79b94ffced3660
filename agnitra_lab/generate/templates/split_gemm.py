"""fp32 products on the tensor cores with the error of an fp32 product: every value is the sum of two fp16 values.

With a = a_hi + 2^-11 a_lo and b likewise, a * b = a_hi b_hi + 2^-11 (a_hi b_lo + a_lo b_hi) up to 2^-22, in three fp16
products of exact terms. Three things keep the error at that of SGEMM or under it:

- values are scaled by one power of two per row of A and per column of B (`fp16_parts`), so that each uses fp16's range
  whatever its magnitude;
- tensor cores cut off what does not fit their accumulator instead of rounding, a bias that grows with the number of
  additions: a_hi b_hi leaves it every K_CHUNK of K and is added, rounded, in registers. Simulated mean error against
  SGEMM's at K_CHUNK 64: 0.6 at K = 256, 0.2 at 4096; at K_CHUNK 512 it is 1.6 to 2.0 at K = 1024. On an H200 it is
  0.54 at K = 256 and 0.19 at 4096. What is left of the bias is 2.0e-7 for sums of one sign, whatever K, and 0.9e-7 at
  K_CHUNK 32, where SGEMM's error is 1.23e-8 sqrt(K): shorter sums, and those that SGEMM splits, take chunks of 32
  (`most_chunk`);
- infinities and NaNs pass through a_hi b_hi alone, and meet there what they meet in SGEMM.

The product reads the parts through tensor descriptors (TMA on Hopper), which fill in zeros past the edges.

Source: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical
peak performance", 2022, arXiv 2203.03341, section 4.
"""

import math

import torch
import triton
import triton.language as tl
from torch.library import custom_op
from triton.tools.tensor_descriptor import TensorDescriptor

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate.points import check_call, drawer, enumerate_space
from agnitra_lab.generate.templates.fp16_parts import KERNELS, split_fp16

PARAMS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "K_CHUNK", "GROUP_M", "num_warps", "num_stages")
ACTIVATIONS = ("none", "relu", "sigmoid", "silu", "gelu", "gelu_tanh")


@triton.jit
def _block_of(pid, num_m, num_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return row and column of a program's block: GROUP_M blocks of A share those of B while both are in the L2."""
    num_pid_m, num_pid_n = tl.cdiv(num_m, BLOCK_M), tl.cdiv(num_n, BLOCK_N)
    first_m = pid // (GROUP_M * num_pid_n) * GROUP_M
    group_size = tl.minimum(num_pid_m - first_m, GROUP_M)
    place = pid % (GROUP_M * num_pid_n)
    return first_m + place % group_size, place // group_size


@triton.jit
def _unscaled(total, a_exponent, b_exponent):
    """Multiply by 2^(a_exponent + b_exponent), by halves: the whole may be no fp32 number where the result is one."""
    a_half, b_half = a_exponent >> 1, b_exponent >> 1
    first = ((a_half + 127) << 23).to(tl.float32, bitcast=True) * ((b_half + 127) << 23).to(tl.float32, bitcast=True)
    a_rest, b_rest = a_exponent - a_half + 127, b_exponent - b_half + 127
    return total * first * ((a_rest << 23).to(tl.float32, bitcast=True) * (b_rest << 23).to(tl.float32, bitcast=True))


@triton.jit
def _activated(out, ACTIVATION: tl.constexpr):
    """Apply the activation at this place of ACTIVATIONS."""
    if ACTIVATION == 1:
        out = tl.where(out < 0.0, 0.0, out)
    elif ACTIVATION == 2:
        out = 1.0 / (1.0 + tl.exp(-out))
    elif ACTIVATION == 3:
        out = out / (1.0 + tl.exp(-out))
    elif ACTIVATION == 4:
        out = 0.5 * out * (1.0 + tl.erf(out * 0.7071067811865476))
    elif ACTIVATION == 5:
        inner = 1.5957691216057308 * (out + 0.044715 * out * out * out)
        out = out / (1.0 + tl.exp(-inner))
    return out


@triton.jit
def _gemm(
    a_hi_desc,
    a_lo_desc,
    b_hi_desc,
    b_lo_desc,
    a_exponent_ptr,
    b_exponent_ptr,
    bias_ptr,
    out_ptr,
    num_m,
    num_n,
    num_k,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_CHUNK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = _block_of(tl.program_id(0), num_m, num_n, BLOCK_M, BLOCK_N, GROUP_M)
    batch = tl.program_id(1)
    a_row = batch * num_m + pid_m * BLOCK_M
    b_row = batch * num_n + pid_n * BLOCK_N

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    cross = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, num_k, BLOCK_K):
        a_hi = a_hi_desc.load([a_row, k])
        b_hi = b_hi_desc.load([b_row, k])
        a_lo = a_lo_desc.load([a_row, k])
        b_lo = b_lo_desc.load([b_row, k])
        part = tl.dot(a_hi, b_hi.T, part)
        cross = tl.dot(a_hi, b_lo.T, cross)
        cross = tl.dot(a_lo, b_hi.T, cross)
        # Under an `if`, and never a plain `total += tl.dot(...)`: the compiler would make that the accumulator of the
        # MMA. It also lets the additions run while the tensor cores do the last cross product.
        is_chunk_full = k < num_k if K_CHUNK == BLOCK_K else (k + BLOCK_K) % K_CHUNK == 0
        if is_chunk_full:
            total += part
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total += part

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < num_m, offs_n < num_n
    # An infinity makes the cross terms NaN where hi * hi has the answer.
    total += tl.where(tl.abs(cross) < float("inf"), cross, 0.0) * 0.00048828125
    a_exponent = tl.load(a_exponent_ptr + batch.to(tl.int64) * num_m + offs_m, mask=mask_m, other=0)
    b_exponent = tl.load(b_exponent_ptr + batch.to(tl.int64) * num_n + offs_n, mask=mask_n, other=0)
    out = _unscaled(total, -a_exponent[:, None], -b_exponent[None, :])
    if HAS_BIAS:
        out += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    out = _activated(out, ACTIVATION)
    offs = (batch.to(tl.int64) * num_m + offs_m)[:, None] * num_n + offs_n[None, :]
    tl.store(out_ptr + offs, out, mask=mask_m[:, None] & mask_n[None, :])


kernel = (*KERNELS, _block_of, _unscaled, _activated, _gemm)

_IS_COMPILED = isinstance(_gemm, triton.JITFunction)
_SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on Hopper (compute capability 9.0)."""
_MOST_BATCHES = 65535


# Not a triton_op: Inductor would have to trace the descriptors, and there is nothing in them for it to fuse.
@custom_op("agnitra::split_gemm", mutates_args=())
def _multiply(
    a_parts: torch.Tensor,
    a_exponent: torch.Tensor,
    b_parts: torch.Tensor,
    b_exponent: torch.Tensor,
    bias: torch.Tensor | None,
    num_batches: int,
    num_k: int,
    activation: int,
    block_m: int,
    block_n: int,
    block_k: int,
    k_chunk: int,
    group_m: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    num_m, num_n = a_exponent.numel() // num_batches, b_exponent.numel() // num_batches
    out = torch.empty((num_batches, num_m, num_n), dtype=torch.float32, device=a_parts.device)
    a_block, b_block = [block_m, block_k], [block_n, block_k]
    grid = ((num_m + block_m - 1) // block_m * ((num_n + block_n - 1) // block_n), num_batches)
    _gemm[grid](
        TensorDescriptor.from_tensor(a_parts[0, :, :num_k], a_block),
        TensorDescriptor.from_tensor(a_parts[1, :, :num_k], a_block),
        TensorDescriptor.from_tensor(b_parts[0, :, :num_k], b_block),
        TensorDescriptor.from_tensor(b_parts[1, :, :num_k], b_block),
        a_exponent,
        b_exponent,
        a_exponent if bias is None else bias,
        out,
        num_m,
        num_n,
        num_k,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        K_CHUNK=k_chunk,
        GROUP_M=group_m,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


@_multiply.register_fake
def _(a_parts, a_exponent, b_parts, b_exponent, bias, num_batches, *rest):
    shape = (num_batches, a_exponent.numel() // num_batches, b_exponent.numel() // num_batches)
    return a_parts.new_empty(shape, dtype=torch.float32)


def launch(
    params: dict[str, int],
    a: torch.Tensor,
    b: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    b_exponent: torch.Tensor | None = None,
    activation: str = "none",
    most_chunk: int = 128,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Run the product with one config, or, without `b`, split a weight once for many products.

    Args:
        params: BLOCK_M, BLOCK_N, BLOCK_K, K_CHUNK (K between two additions outside the MMA), GROUP_M, num_warps,
            num_stages.
        a: fp32, [..., M, K] with a `b` of two dimensions, else [..., M, K] with the leading dimensions of `b`; on a
            CUDA device (any device in the interpreter). Any strides; read in place where one dimension is contiguous.
        b: fp32, [K, N] or [..., K, N], as torch.matmul takes it, or the parts of [N, K] that `launch(params, weight)`
            gave. None: split `a`, [N, K].
        bias: fp32, [N], added before the activation.
        b_exponent: the exponents that belong to the parts of `b`.
        activation: one of ACTIVATIONS, applied to the result.
        most_chunk: of K between two additions outside the MMA, whatever the config says.

    Returns:
        activation(a @ b + bias), fp32, contiguous; or (parts, exponents) of the weight.

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    tensors = tuple(tensor for tensor in (a, b, bias, b_exponent) if tensor is not None)
    check_call("split_gemm", tensors, supports(a, b, bias, b_exponent, activation), _IS_COMPILED)
    if b is None:
        return split_fp16(a.unsqueeze(0))
    if b_exponent is not None or b.dim() == 2:
        a_BMK = a.reshape(1, -1, a.shape[-1])
        num_n = b.shape[1] if b_exponent is None else b_exponent.shape[0]
    else:
        a_BMK, num_n = a.reshape(-1, *a.shape[-2:]), b.shape[-1]
    if b_exponent is None:
        b, b_exponent = split_fp16(b.reshape(-1, *b.shape[-2:]).transpose(1, 2))
    a_parts, a_exponent = split_fp16(a_BMK)
    params = params | {name: min(params[name], most_chunk) for name in ("BLOCK_K", "K_CHUNK")}
    out = torch.ops.agnitra.split_gemm(
        a_parts,
        a_exponent,
        b,
        b_exponent,
        bias,
        a_BMK.shape[0],
        a.shape[-1],
        ACTIVATIONS.index(activation),
        *(params[name] for name in PARAMS),
    )
    return out.view(*a.shape[:-1], num_n)


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one product.

    Args:
        shape: (batches, M, N, K).
        dtype: "float32", the dtype of the operands.

    Raises:
        TemplateError: for a shape of another rank, or a dtype that the template has no config for.
    """
    num_k = shape[3] if len(shape) == 4 else 0

    def is_valid(point: dict[str, int]) -> bool:
        block_m, block_n, block_k = point["BLOCK_M"], point["BLOCK_N"], point["BLOCK_K"]
        return (
            # Three accumulators: 192 of a thread's 255 registers at 64 elements.
            block_m * block_n == 2048 * point["num_warps"]
            and block_m * point["num_warps"] >= 64 * 4
            and 4 * (block_m + block_n) * block_k * point["num_stages"] <= _SHARED_MEMORY_BYTES - 1024
            and block_k <= point["K_CHUNK"] <= _longest_chunk(num_k)
            # Where 64 will do, 32 is a fifth slower at 4096^3.
            and (point["K_CHUNK"] >= 64 or num_k < 256)
        )

    found = enumerate_space(
        "split_gemm",
        shape,
        dtype,
        {
            "BLOCK_M": (64, 128),
            "BLOCK_N": (64, 128, 256),
            "BLOCK_K": (32, 64),
            "K_CHUNK": (32, 64, 128),
            "GROUP_M": (4, 8),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5, 6),
        },
        is_valid,
    )
    if found.dtype != "float32":
        raise TemplateError(f"split_gemm takes float32, not {dtype}.")
    if len(shape) != 4:
        raise TemplateError(f"split_gemm needs a shape of four numbers, (batches, M, N, K), not {tuple(shape)}.")
    return found


def _longest_chunk(num_k: int) -> int:
    """Return the K_CHUNK from which on there is more bias than SGEMM has error: its one chain of K is too short."""
    return next(chunk for chunk, least_k in ((128, 2048), (64, 256), (32, 0)) if num_k >= least_k)


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """Blocks of 128 x 128 where there are enough of them for the 132 multiprocessors of a Hopper GPU.

    Of short sums, where a block is hardly begun before it is written, two small ones share a multiprocessor: 671 us and
    not 760 at 16384 x 16384 x 64 (H200; SGEMM 1008), 206 and not 246 at 8192 x 8192 x 128 (449).
    """
    num_batches, num_m, num_n, num_k = shape
    chunk = min(_longest_chunk(num_k), 64)
    num_blocks = num_batches * ((num_m + 127) // 128) * ((num_n + 127) // 128)
    is_large = num_blocks >= 100 and num_k >= 256
    return {
        "BLOCK_M": 128 if is_large else 64,
        "BLOCK_N": 128,
        "BLOCK_K": chunk,
        "K_CHUNK": chunk,
        "GROUP_M": 8,
        "num_warps": 8 if is_large else 4,
        "num_stages": 3 if is_large or num_k < 256 else 4,
    }


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw both operands, from a fixed seed."""
    num_batches, num_m, num_n, num_k = shape
    draw = drawer(dtype, device)
    return (draw(num_batches, num_m, num_k), draw(num_batches, num_k, num_n)), {}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Both operands in and the result out; the FLOPs of the fp32 product, of which the tensor cores do three times."""
    num_batches, num_m, num_n, num_k = shape
    values = num_m * num_k + num_k * num_n + num_m * num_n
    return 4 * num_batches * values, 2 * num_batches * num_m * num_n * num_k


def reference(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    b_exponent: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """Compute the same in plain torch; fp64 stays fp64. A `b` that comes in parts is put together first."""
    if b_exponent is not None:
        wide = b[0].double() + b[1].double() / 2048
        b = torch.ldexp(wide, -b_exponent[:, None])[:, : a.shape[-1]].t().to(a.dtype)
    out = a @ b if bias is None else a @ b + bias
    functional = torch.nn.functional
    return {
        "none": lambda x: x,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }[activation](out)


def supports(
    a: torch.Tensor,
    b: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    b_exponent: torch.Tensor | None = None,
    activation: str = "none",
) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if a.dtype != torch.float32:
        return f"split_gemm takes float32, not {a.dtype}"
    if a.dim() < 2 or a.numel() < 1:
        return f"split_gemm needs matrices with at least one value, not shape {tuple(a.shape)}"
    if activation not in ACTIVATIONS:
        return f"split_gemm knows the activations {', '.join(ACTIVATIONS)}, not {activation!r}"
    if b is None:
        return None if a.dim() == 2 else f"split_gemm splits weights of two dimensions, not {tuple(a.shape)}"
    if b_exponent is not None:
        return _why_not_parts(a, b, bias, b_exponent)
    if b.dtype != torch.float32:
        return f"split_gemm takes float32, not {b.dtype}"
    if b.dim() < 2 or b.numel() < 1 or (b.dim() > 2 and b.shape[:-2] != a.shape[:-2]):
        return f"split_gemm needs b of two dimensions or with the leading ones of a, not {tuple(b.shape)}"
    if math.prod(b.shape[:-2]) > _MOST_BATCHES:
        return f"split_gemm takes at most {_MOST_BATCHES} matrices at once, not {tuple(b.shape)}"
    if b.shape[-2] != a.shape[-1]:
        return f"split_gemm cannot multiply {tuple(a.shape)} with {tuple(b.shape)}"
    return _why_not_bias(bias, b.shape[-1])


def _why_not_parts(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, exponent: torch.Tensor) -> str | None:
    pitch = (a.shape[-1] + 7) // 8 * 8
    if b.dtype != torch.float16 or exponent.dtype != torch.int32 or not b.is_contiguous():
        return "split_gemm needs the parts and exponents that it made itself"
    if exponent.dim() != 1 or tuple(b.shape) != (2, exponent.shape[0], pitch):
        return f"split_gemm cannot multiply {tuple(a.shape)} with parts of shape {tuple(b.shape)}"
    return _why_not_bias(bias, exponent.shape[0])


def _why_not_bias(bias: torch.Tensor | None, num_n: int) -> str | None:
    if bias is None:
        return None
    if bias.dtype != torch.float32 or tuple(bias.shape) != (num_n,) or not bias.is_contiguous():
        return f"split_gemm needs a contiguous float32 bias of shape ({num_n},), not {bias.dtype} {tuple(bias.shape)}"
    return None
