"""act(norm(x) @ W^T + bias) + residual for few rows of x: the weight is read once, at the speed of memory.

With num_stages=1, up to MOST_REDUCED_ROWS rows of x, a program keeps whole rows of W in registers: all its loads are
in flight before the first multiplication. With more, W passes through a pipeline of shared memory into tensor cores, as
their A operand, with x padded to 16 columns; that form takes two rows and more. SPLIT cuts K into parts whose fp32 sums
are added in order by a second kernel, without atomics.

x is tiny and stays in the caches, so each program norms the row again instead of waiting for a kernel that does. Values
are rounded where separate ops round them: after the norm (on tensor cores; in registers its scale multiplies the sum,
and nothing is rounded before), after the linear, after the activation, after the product with up, after the residual.

PDL=2 launches programmatically dependent on the kernel before: the weights are requested before gdc_wait(), all else is
read after it. The weight must then not be written by the kernel that runs before.

Source: NVIDIA, CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PyTorch labs, gpt-fast.
"""

from typing import Any

import torch
import triton
from torch.library import custom_op, triton_op, wrap_triton

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate.points import check_call, drawer, enumerate_space, itemsize, next_power_of_two
from agnitra_lab.generate.templates.skinny_gemm_kernels import activate, combine, dot, finish, reduce

PARAMS = ("BLOCK_N", "BLOCK_K", "SPLIT", "PDL", "num_warps", "num_stages")
MAX_ROWS = 16
MOST_REDUCED_ROWS = 4
MOST_TILES = 32
"""Tiles of K that a program loads by unrolled code; registers end before."""
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid")
GATES = ("none", "gate_first", "up_first")


kernel = (activate, finish, reduce, dot, combine)
_IS_COMPILED = isinstance(reduce, triton.JITFunction)
_SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on Hopper (compute capability 9.0)."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Config = tuple[int, int, int, int, int]
"""BLOCK_N, BLOCK_K, SPLIT, num_warps, num_stages."""


def _run(
    is_dependent: bool,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: tuple[float, bool],
    codes: tuple[int, int],
    config: Config,
) -> torch.Tensor:
    """Launch one or two kernels: dependent on the one before, or through the launcher that torch can trace."""
    block_n, block_k, split, num_warps, num_stages = config
    x_MK = _as_rows(x)
    num_rows, num_cols = x_MK.shape
    num_out = weight.shape[0] // 2 if codes[1] else weight.shape[0]
    out = torch.empty((*x.shape[:-1], num_out), dtype=x.dtype, device=x.device)
    # What a kernel does not read is x: the output a second time would look like a write to the compiler.
    residual_MN = x_MK if residual is None else _as_rows(residual)
    partial = x_MK
    if split > 1:
        partial = torch.empty((split, num_rows, weight.shape[0]), dtype=torch.float32, device=x.device)
    num_all_tiles = -(-num_cols // block_k)
    num_tiles = -(-num_all_tiles // split)
    is_reduced = num_stages == 1
    after: dict[str, Any] = {
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": codes[0],
        "GATED": codes[1],
        "SPLIT": split,
        "PDL": 2 if is_dependent and _IS_COMPILED else 1,
    }
    if after["PDL"] == 2:
        after["launch_pdl"] = True
    row_bytes = num_tiles * block_k * x.element_size() // (32 * num_warps)
    rows_at_once = max(1, min(num_rows, _BYTES_OF_X // max(row_bytes, 1)))
    own: dict[str, Any] = {"NUM_ROWS": num_rows, "ROWS_AT_ONCE": rows_at_once, "NUM_ALL_TILES": num_all_tiles}
    if not is_reduced:
        own = {"NUM_STAGES": num_stages, "CAST_BEFORE_WEIGHT": norm[1]}
    smallest = 1 if is_reduced else 16
    grid = (-(-num_out // (block_n // 2 if codes[1] and block_n > smallest else block_n)), split)
    bias_N = x if bias is None else bias
    _launcher(reduce if is_reduced else dot, is_dependent)[grid](
        x_MK, weight, bias_N, x if norm_weight is None else norm_weight, residual_MN, out, partial,
        num_rows, num_out, num_cols, x_MK.stride(0), weight.stride(0), residual_MN.stride(0), norm[0],
        NUM_TILES=num_tiles, IS_EVEN=num_cols == num_tiles * split * block_k,
        HAS_NORM=norm_weight is not None,
        BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages, **own, **after,
    )  # fmt: skip
    if split > 1:
        _launcher(combine, is_dependent)[(-(-num_out // _COMBINED), num_rows)](
            partial, bias_N, residual_MN, out, num_rows, num_out, residual_MN.stride(0),
            BLOCK=_COMBINED, num_warps=2, **after,
        )  # fmt: skip
    return out


_BYTES_OF_X = 192
"""Of x in a thread's registers at once, beside its part of W; rows that do not fit are read in turns."""
_COMBINED = 256
"""Columns of the result that a program of the second kernel adds."""


def _launcher(function, is_dependent: bool):
    # Neither the interpreter's kernel nor a launch option that Inductor does not know can be traced.
    return wrap_triton(function) if _IS_COMPILED and not is_dependent else function


@triton_op("agnitra::skinny_gemm", mutates_args=())
def _skinny_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    cast_before_weight: bool,
    activation: int,
    gate: int,
    block_n: int,
    block_k: int,
    split: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    config = (block_n, block_k, split, num_warps, num_stages)
    norm, codes = (eps, cast_before_weight), (activation, gate)
    return _run(False, x, weight, bias, norm_weight, residual, norm, codes, config)


# Inductor launches a traced kernel by itself and knows no launch_pdl, so this one is opaque to it.
@custom_op("agnitra::skinny_gemm_dependent", mutates_args=())
def _skinny_gemm_dependent(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    cast_before_weight: bool,
    activation: int,
    gate: int,
    block_n: int,
    block_k: int,
    split: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    config = (block_n, block_k, split, num_warps, num_stages)
    norm, codes = (eps, cast_before_weight), (activation, gate)
    return _run(True, x, weight, bias, norm_weight, residual, norm, codes, config)


@_skinny_gemm_dependent.register_fake
def _(x, weight, bias, norm_weight, residual, eps, cast_before_weight, activation, gate, *config):
    num_out = weight.shape[0] // 2 if gate else weight.shape[0]
    return x.new_empty((*x.shape[:-1], num_out))


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """View x as [rows, columns] with contiguous columns; copies only where no such view exists."""
    x_MK = x.reshape(-1, x.shape[-1])
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()


def launch(
    params: dict[str, int],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    cast_before_weight: bool = True,
    activation: str = "none",
    gate: str = "none",
) -> torch.Tensor:
    """Run the kernel with one config.

    Args:
        params: BLOCK_N (rows of W a program), BLOCK_K, SPLIT (parts of K), PDL (2: programmatic dependent launch),
            num_warps, num_stages.
        x: [..., K] floating tensor of at most MAX_ROWS rows on a CUDA device (any device in the interpreter).
        weight: [N, K] with contiguous rows, the dtype of x; with a gate N = 2 * N_out.
        bias: None or [N].
        residual: None or a tensor of the result's shape, added last.
        norm_weight: None, or [K]: x is RMS-normed with it first.
        eps: of that norm.
        cast_before_weight: where the norm rounds before a tensor-core product, as in the template rms_norm.
        activation: one of ACTIVATIONS, of the linear's result or of the gate.
        gate: one of GATES: which half of W's rows the activation is for; the other half multiplies it.

    Returns:
        [..., N_out] of x's dtype, contiguous.

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    given = (x, weight, bias, residual, norm_weight)
    refusal = supports(x, weight, bias, residual, norm_weight, gate)
    check_call("skinny_gemm", tuple(t for t in given if t is not None), refusal, _IS_COMPILED)
    is_dependent = params["PDL"] == 2 and _has_dependent_launch(x.device)
    op = torch.ops.agnitra.skinny_gemm_dependent if is_dependent else torch.ops.agnitra.skinny_gemm
    config = tuple(params[name] for name in PARAMS if name != "PDL")
    codes = (ACTIVATIONS.index(activation), GATES.index(gate))
    return op(x, weight, bias, norm_weight, residual, eps, cast_before_weight, *codes, *config)


def _has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may begin before the one in front of it has ended: from compute capability 9.0."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] >= 9


def _is_valid_reduction(point: dict[str, int], num_cols: int, dtype: str) -> bool:
    """Every tile of the program in registers, at least two 16-byte loads a thread, little of it past the row's end."""
    num_tiles = -(-num_cols // (point["BLOCK_K"] * point["SPLIT"]))
    per_thread = num_tiles * point["BLOCK_K"] * point["BLOCK_N"] * itemsize(dtype) / (32 * point["num_warps"])
    return (
        num_tiles <= MOST_TILES
        and 32 <= per_thread <= 448
        # All warps along K, one load a thread and row: x lies in the threads of the columns that it multiplies.
        and point["BLOCK_K"] * itemsize(dtype) == 512 * point["num_warps"]
        and num_tiles * point["BLOCK_K"] * point["SPLIT"] <= 1.25 * num_cols
    )


def _is_valid_product(point: dict[str, int], num_cols: int, dtype: str) -> bool:
    """Warps for the rows of W, and a pipeline that fits the shared memory of one program or two."""
    row_bytes = point["BLOCK_K"] * itemsize(dtype)
    stage_bytes = (point["BLOCK_N"] + MAX_ROWS) * row_bytes
    return (
        row_bytes in (256, 512)
        and point["num_warps"] in _WARPS_OF_PRODUCT.get(point["BLOCK_N"], ())
        and point["num_stages"] * stage_bytes <= _SHARED_MEMORY_BYTES
        and (point["SPLIT"] == 1 or 2 * point["SPLIT"] * point["BLOCK_K"] <= num_cols)
    )


_WARPS_OF_PRODUCT = {16: (2, 4), 32: (2, 4), 64: (4,), 128: (4, 8)}


def _is_fallback(point: dict[str, int], num_rows: int, num_cols: int) -> bool:
    """One config for what the rules leave without any, such as very short rows; none for rows past all registers."""
    if num_rows == 1 and num_cols > MOST_TILES * 4096:
        return False
    wanted = (1, 4096, 1, 8, 1) if num_rows == 1 else (16, 64, 1, 4, 3)
    return tuple(point[name] for name in PARAMS if name != "PDL") == wanted


# What PDL saves lies between kernels, which a search of one kernel cannot see: the rule decides it. The chain of a 1.1B
# decoder's token took 0.680 ms with it and 0.717 without on one H200.
_REDUCTION: dict[str, tuple[int, ...]] = {
    "BLOCK_N": (1, 2, 4, 8, 16), "BLOCK_K": (128, 256, 512, 1024, 2048, 4096), "SPLIT": (1, 2, 4), "PDL": (2,),
    "num_warps": (1, 2, 4, 8, 16), "num_stages": (1,),
}  # fmt: skip
_PRODUCT: dict[str, tuple[int, ...]] = {
    "BLOCK_N": (16, 32, 64, 128), "BLOCK_K": (64, 128, 256), "SPLIT": (1, 2, 4), "PDL": (2,), "num_warps": (2, 4, 8),
    "num_stages": (3, 4, 6),
}  # fmt: skip


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one product.

    Args:
        shape: (M, N, K): rows of x, rows of W, and the columns of both.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    if shape and min(shape) >= 1 and (len(shape) != 3 or shape[0] > MAX_ROWS):
        raise TemplateError(f"skinny_gemm needs a shape (M, N, K) with M at most {MAX_ROWS}, not {tuple(shape)}.")
    num_rows, num_weight_rows, num_cols = shape if len(shape) == 3 else (1, 1, 1)

    def is_wanted(point: dict[str, int]) -> bool:
        is_valid = _is_valid_reduction if point["num_stages"] == 1 else _is_valid_product
        num_programs = -(-num_weight_rows // point["BLOCK_N"])
        is_split_useful = point["SPLIT"] == 1 or num_programs < _NUM_PROGRAMS_FOR_ONE_WAVE
        return is_split_useful and is_valid(point, num_cols, dtype)

    forms = [*([_REDUCTION] if num_rows <= MOST_REDUCED_ROWS else []), *([_PRODUCT] if num_rows > 1 else [])]
    params = {name: tuple(sorted({value for form in forms for value in form[name]})) for name in PARAMS}
    found = enumerate_space("skinny_gemm", shape, dtype, params, is_wanted)
    if found.configs:
        return found
    return enumerate_space("skinny_gemm", shape, dtype, params, lambda point: _is_fallback(point, num_rows, num_cols))


_NUM_PROGRAMS_FOR_ONE_WAVE = 264
"""Two programs on each of an H200's 132 multiprocessors: with fewer, their loads cannot fill the memory."""


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """Few rows: whole rows of W in registers, 8 loads a thread. More: tensor-core tiles, 32 KB or more in flight."""
    num_rows, num_weight_rows, num_cols = shape
    if num_rows <= MOST_REDUCED_ROWS:
        # Measured on an H200 in a chain of dependent launches, 2048 and 5632 columns of bf16: 8 warps along K. With
        # more rows of W a program asks for more before it waits, and reads x for more of them; but too few programs
        # leave multiprocessors idle, and rows of 11 KB fill the registers.
        num_warps = max(1, min(8, next_power_of_two(num_cols * itemsize(dtype) // 512)))
        block_n = 2 if num_cols * itemsize(dtype) > 4096 else 8 if 8192 <= num_weight_rows < 16384 else 4
        return {
            "BLOCK_N": block_n, "BLOCK_K": 512 * num_warps // itemsize(dtype), "SPLIT": 1, "PDL": 2,
            "num_warps": num_warps, "num_stages": 1,
        }  # fmt: skip
    block_n = 64 if num_weight_rows >= 64 * _NUM_PROGRAMS_FOR_ONE_WAVE else 32 if num_weight_rows >= 4096 else 16
    block_k = 512 // itemsize(dtype)
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": 1, "PDL": 2, "num_warps": 4, "num_stages": 4}


def is_ruled(shape: tuple[int, ...]) -> bool:
    """Whether `default` is to be used as it is: for one row it was chosen in a chain of dependent launches."""
    return shape[0] == 1


def library(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product as the vendor's library computes it; what it would be fused with is not in it."""
    return torch.nn.functional.linear(x, weight)


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw x [M, K] and weight [N, K], from a fixed seed."""
    num_rows, num_weight_rows, num_cols = shape
    draw = drawer(dtype, device)
    return (draw(num_rows, num_cols), draw(num_weight_rows, num_cols)), {}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """x and W once in, the result out; two operations a weight and row."""
    num_rows, num_weight_rows, num_cols = shape
    num_values = num_rows * num_cols + num_weight_rows * num_cols + num_rows * num_weight_rows
    return num_values * itemsize(dtype), 2 * num_rows * num_weight_rows * num_cols


_PLAIN = {
    "none": lambda y: y,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    cast_before_weight: bool = True,
    activation: str = "none",
    gate: str = "none",
) -> torch.Tensor:
    """Compute the same in plain torch, op by op; fp64 stays fp64."""
    if norm_weight is not None:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        rounded = normed.to(x.dtype) * norm_weight
        x = rounded if cast_before_weight else (normed * norm_weight.to(normed.dtype)).to(x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    if gate == "none":
        y = _PLAIN[activation](y)
    else:
        first, second = y.chunk(2, dim=-1)
        gated, up = (first, second) if gate == "gate_first" else (second, first)
        y = _PLAIN[activation](gated) * up
    return y if residual is None else (residual + y).contiguous()


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    gate: str = "none",
) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if x.dtype not in _DTYPES:
        return f"skinny_gemm takes float32, bfloat16 or float16, not {x.dtype}"
    if x.dim() < 1 or x.numel() < 1 or x.numel() // x.shape[-1] > MAX_ROWS:
        return f"skinny_gemm takes 1 to {MAX_ROWS} rows, not shape {tuple(x.shape)}"
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] < 1:
        return f"skinny_gemm needs a weight of shape (N, {x.shape[-1]}), not {tuple(weight.shape)}"
    if weight.stride(1) != 1:
        return f"skinny_gemm needs a weight with contiguous rows, not strides {tuple(weight.stride())}"
    if gate != "none" and weight.shape[0] % 2:
        return f"skinny_gemm needs as many rows of gate as of up, not {weight.shape[0]} in all"
    num_out = weight.shape[0] // 2 if gate != "none" else weight.shape[0]
    needed = {
        "bias": (bias, (weight.shape[0],)),
        "norm weight": (norm_weight, (x.shape[-1],)),
        "residual": (residual, (*x.shape[:-1], num_out)),
    }
    if weight.dtype != x.dtype:
        return f"skinny_gemm needs a weight of x's dtype {x.dtype}, not {weight.dtype}"
    for name, (tensor, expected) in needed.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(expected) or tensor.dtype != x.dtype:
            wanted, found = f"{tuple(expected)} and {x.dtype}", f"{tuple(tensor.shape)} and {tensor.dtype}"
            return f"skinny_gemm needs a {name} of shape {wanted}, not {found}"
        if name != "residual" and tensor.stride(0) != 1:
            return f"skinny_gemm needs a contiguous {name}"
    return None
