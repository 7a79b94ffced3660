"""LayerNorm over the last dimensions, alone or with the residual addition before it.

Rows that fit in a block are read once; longer rows are read twice in one kernel; very long rows are SPLIT over programs
in two kernels (`row_moments`). Statistics are fp32 and centred; the result is rounded once, as `F.layer_norm` does. The
residual sum is rounded to the input dtype before it is normalised, as two separate ops would.

Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv 1607.06450, section 3.
"""

import math

import torch
from torch.library import triton_op

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.generate.points import check_call, drawer, itemsize
from agnitra_lab.generate.templates.row_moments import IS_COMPILED, KERNELS, normalise_rows
from agnitra_lab.generate.templates.row_points import MAX_TILE, PARAMS, row_default, row_space

kernel = KERNELS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton_op("agnitra::layer_norm", mutates_args=())
def _layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    eps: float,
    block_n: int,
    rows_per_program: int,
    split: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = (block_n, rows_per_program, split, num_warps, num_stages)
    normalise_rows(_as_rows(x, num_dims), None, weight, bias, out, None, eps, config)
    return out


@triton_op("agnitra::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_dims: int,
    eps: float,
    block_n: int,
    rows_per_program: int,
    split: int,
    num_warps: int,
    num_stages: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = (block_n, rows_per_program, split, num_warps, num_stages)
    normalise_rows(_as_rows(x, num_dims), _as_rows(residual, num_dims), weight, bias, out, summed, eps, config)
    return out, summed


def _as_rows(x: torch.Tensor, num_dims: int) -> torch.Tensor:
    """View x as [rows, columns] with contiguous columns; copies only where no such view exists."""
    x_MN = x.reshape(-1, math.prod(x.shape[x.dim() - num_dims :]))
    return x_MN if x_MN.stride(1) == 1 else x_MN.contiguous()


def launch(
    params: dict[str, int],
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    num_dims: int = 1,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Run the kernels with one config.

    Args:
        params: BLOCK_N, ROWS_PER_PROGRAM, SPLIT, num_warps, num_stages.
        x: floating tensor on a CUDA device (any device in the interpreter).
        weight: None, or of the shape of x's last `num_dims` dimensions; the dtype of x or float32.
        bias: as the weight.
        eps: added to the variance.
        residual: None, or a tensor of x's shape and dtype that is added to x first.
        num_dims: how many of the last dimensions are normalised together.

    Returns:
        The normed tensor, of x's shape and contiguous; with a residual (normed, x + residual).

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    tensors = tuple(tensor for tensor in (x, weight, bias, residual) if tensor is not None)
    check_call("layer_norm", tensors, supports(x, weight, bias, residual, num_dims), IS_COMPILED)
    config = tuple(params[name] for name in PARAMS)
    if residual is None:
        return torch.ops.agnitra.layer_norm(x, weight, bias, num_dims, eps, *config)
    return torch.ops.agnitra.add_layer_norm(x, residual, weight, bias, num_dims, eps, *config)


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one tensor.

    Args:
        shape: (..., N): the last number is the row's length, all normalised dimensions together.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    return row_space("layer_norm", shape, dtype, math.prod(shape[:-1]), shape[-1] if shape else 0)


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """A whole row in one block where it fits; longer ones in loops, or in parts that wait for each other."""
    return row_default(math.prod(shape[:-1]), shape[-1], dtype)


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw x [rows, N], weight and bias [N] and, where a row fits in a block, a residual like x, from a fixed seed."""
    draw = drawer(dtype, device)
    options = {"residual": draw(*shape)} if shape[-1] <= MAX_TILE else {}
    return (draw(*shape), draw(shape[-1]), draw(shape[-1]), 1e-5), options


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Two streams in and two out with a residual, as `example` has it, else one each; eight operations an element."""
    num_elements, num_cols = math.prod(shape), shape[-1]
    streams = 4 if num_cols <= MAX_TILE else 2
    return (streams * num_elements + 2 * num_cols) * itemsize(dtype), 8 * num_elements


def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    num_dims: int = 1,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute the same in plain torch; fp64 stays fp64."""
    summed = x if residual is None else x + residual
    shape = tuple(x.shape[x.dim() - num_dims :])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, shift = (None if tensor is None else tensor.to(wide) for tensor in (weight, bias))
    out = torch.nn.functional.layer_norm(summed.to(wide), shape, scale, shift, eps).to(x.dtype)
    return out if residual is None else (out, summed)


def supports(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    num_dims: int = 1,
) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if x.dtype not in _DTYPES:
        return f"layer_norm takes float32, bfloat16 or float16, not {x.dtype}"
    if not 1 <= num_dims <= x.dim() or x.numel() < 1:
        return f"layer_norm needs at least one value and dimension, not shape {tuple(x.shape)} and {num_dims}"
    shape = tuple(x.shape[x.dim() - num_dims :])
    if math.prod(shape) >= 2**30:
        return f"layer_norm takes rows of fewer than 2^30 values, not {shape}"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            return f"layer_norm needs a contiguous {name} of shape {shape}, not {tuple(tensor.shape)}"
        if tensor.dtype not in (x.dtype, torch.float32):
            return f"layer_norm needs a {name} of x's dtype {x.dtype} or float32, not {tensor.dtype}"
    if residual is not None and (tuple(residual.shape) != tuple(x.shape) or residual.dtype != x.dtype):
        expected, given = f"{tuple(x.shape)} {x.dtype}", f"{tuple(residual.shape)} {residual.dtype}"
        return f"layer_norm needs a residual like x, {expected}, not {given}"
    return None
