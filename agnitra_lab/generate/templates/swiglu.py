"""act(gate) * up in one pass over memory, where gate and up may be halves of one merged projection.

The activation (silu, gelu, gelu_tanh, relu or sigmoid) is computed in fp32 and rounded to the input dtype before the
product, as two separate ops would; with `round_silu=False` the product is rounded once, as `F.glu` does.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv 2002.05202, section 2.
"""

import math

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.generate.points import check_call, drawer, enumerate_space, itemsize, next_power_of_two, row_rule

PARAMS = ("BLOCK_N", "ROWS_PER_PROGRAM", "num_warps", "num_stages")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
"""Their places are the numbers that the kernel knows them by."""
MAX_TILE = 8192
"""Elements of gate that one program may hold: with up and the result about 96 fp32 values a thread at 8 warps."""


@triton.jit
def kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    num_rows,
    num_cols,
    stride_gm,
    stride_um,
    ROUND_SILU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    ACTIVATION: tl.constexpr = 0,
):
    num_blocks = tl.cdiv(num_cols, BLOCK_N)
    pid = tl.program_id(0)
    # 64-bit row offsets: a prefill batch passes 2^31 elements.
    offs_m = (pid // num_blocks).to(tl.int64) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)
    offs_n = (pid % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < num_rows)[:, None] & (offs_n < num_cols)[None, :]
    gate = tl.load(gate_ptr + offs_m[:, None] * stride_gm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_m[:, None] * stride_um + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    if ACTIVATION == 1:
        activated = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == 2:
        # 0.5 (1 + tanh(u)) is the sigmoid of 2u: no cancellation where tanh nears -1.
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        activated = gate / (1.0 + tl.exp(-inner))
    elif ACTIVATION == 3:
        # A comparison, because a maximum would swallow NaN.
        activated = tl.where(gate < 0.0, 0.0, gate)
    elif ACTIVATION == 4:
        activated = 1.0 / (1.0 + tl.exp(-gate))
    else:
        activated = gate / (1.0 + tl.exp(-gate))
    if ROUND_SILU:
        activated = activated.to(dtype).to(tl.float32)
    tl.store(out_ptr + offs_m[:, None] * num_cols + offs_n[None, :], (activated * up).to(dtype), mask=mask)


_IS_COMPILED = isinstance(kernel, triton.JITFunction)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton_op("agnitra::swiglu", mutates_args=())
def _swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    round_silu: bool,
    block_n: int,
    rows_per_program: int,
    num_warps: int,
    num_stages: int,
    activation: str = "silu",
) -> torch.Tensor:
    gate_MN = _as_rows(gate)
    up_MN = _as_rows(up)
    num_rows, num_cols = gate_MN.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    num_programs = ((num_rows + rows_per_program - 1) // rows_per_program) * ((num_cols + block_n - 1) // block_n)
    # The interpreter's kernel is no JITFunction, and wrap_triton takes nothing else.
    launcher = wrap_triton(kernel) if _IS_COMPILED else kernel
    launcher[(num_programs,)](
        gate_MN,
        up_MN,
        out,
        num_rows,
        num_cols,
        gate_MN.stride(0),
        up_MN.stride(0),
        ROUND_SILU=round_silu,
        BLOCK_N=block_n,
        ROWS_PER_PROGRAM=rows_per_program,
        ACTIVATION=ACTIVATIONS.index(activation),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """View x as [rows, columns] with contiguous columns; copies only where no such view exists."""
    x_MN = x.reshape(-1, x.shape[-1])
    return x_MN if x_MN.stride(1) == 1 else x_MN.contiguous()


def launch(
    params: dict[str, int],
    gate: torch.Tensor,
    up: torch.Tensor,
    round_silu: bool = True,
    activation: str = "silu",
) -> torch.Tensor:
    """Run the kernel with one config.

    Args:
        params: BLOCK_N, ROWS_PER_PROGRAM, num_warps, num_stages.
        gate: [..., N] floating tensor on a CUDA device (any device in the interpreter); any row stride.
        up: shape and dtype of gate; any row stride.
        round_silu: round the activated gate to the input dtype before the product.
        activation: "silu", "gelu" (by the error function), "gelu_tanh", "relu" or "sigmoid".

    Returns:
        act(gate) * up, of gate's shape and contiguous.

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    check_call("swiglu", (gate, up), supports(gate, up, activation), _IS_COMPILED)
    config = (params["BLOCK_N"], params["ROWS_PER_PROGRAM"], params["num_warps"], params["num_stages"])
    return torch.ops.agnitra.swiglu(gate, up, round_silu, *config, activation)


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one tensor.

    Args:
        shape: shape of gate; the last number is the row's length.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    num_rows, num_cols = math.prod(shape[:-1]), shape[-1] if shape else 0
    widest = max(128, next_power_of_two(num_cols))
    most_rows = next_power_of_two(num_rows)

    def is_valid(point: dict[str, int]) -> bool:
        tile = point["BLOCK_N"] * point["ROWS_PER_PROGRAM"]
        values_per_thread = tile / (32 * point["num_warps"])
        return (
            point["ROWS_PER_PROGRAM"] <= most_rows
            and point["BLOCK_N"] <= widest
            and tile <= MAX_TILE
            and 2 <= values_per_thread <= 32
        )

    return enumerate_space(
        "swiglu",
        shape,
        dtype,
        {
            "BLOCK_N": (128, 256, 512, 1024, 2048, 4096, 8192),
            "ROWS_PER_PROGRAM": (1, 2, 4, 8),
            "num_warps": (1, 2, 4, 8, 16),
            # The kernel has no loop, so there is nothing to stage.
            "num_stages": (1,),
        },
        is_valid,
    )


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """Blocks of 1024, one 16-byte load of bf16 a thread in each stream."""
    return row_rule(shape, block_n=min(1024, next_power_of_two(shape[-1])), values_per_thread=8)


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw gate and up, from a fixed seed."""
    draw = drawer(dtype, device)
    return (draw(*shape), draw(*shape)), {}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Two streams in and one out; five operations an element."""
    num_elements = math.prod(shape)
    return 3 * num_elements * itemsize(dtype), 5 * num_elements


def reference(gate: torch.Tensor, up: torch.Tensor, round_silu: bool = True, activation: str = "silu") -> torch.Tensor:
    """Compute the same in plain torch; fp64 stays fp64."""
    if round_silu:
        return _activate(gate, activation) * up
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (_activate(gate.to(wide), activation) * up.to(wide)).to(gate.dtype)


def _activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation.startswith("gelu"):
        return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return {"silu": torch.nn.functional.silu, "relu": torch.relu, "sigmoid": torch.sigmoid}[activation](gate)


def supports(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if activation not in ACTIVATIONS:
        return f"swiglu knows {', '.join(ACTIVATIONS)}, not {activation!r}"
    if gate.dtype not in _DTYPES:
        return f"swiglu takes float32, bfloat16 or float16, not {gate.dtype}"
    if gate.dim() < 1 or gate.numel() < 1:
        return f"swiglu needs at least one value, not shape {tuple(gate.shape)}"
    if tuple(up.shape) != tuple(gate.shape):
        return f"swiglu needs gate and up of one shape, not {tuple(gate.shape)} and {tuple(up.shape)}"
    if up.dtype != gate.dtype:
        return f"swiglu needs gate and up of one dtype, not {gate.dtype} and {up.dtype}"
    return None
