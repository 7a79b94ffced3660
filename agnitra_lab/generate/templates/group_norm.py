"""GroupNorm over contiguous [N, C, spatial...], with weight and bias per channel and, if asked, the SiLU after it.

Each group of an image is one row of C / G x spatial values, normalised by the kernels of `row_moments`: in one read
where it fits in a block, split over programs where groups are long and few. InstanceNorm is the case G = C. Statistics
are fp32 and centred; the result, SiLU included, is rounded once.

Source: Wu and He, "Group Normalization", 2018, arXiv 1803.08494, section 3.
"""

import math

import torch
from torch.library import triton_op

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.generate.points import check_call, drawer, itemsize
from agnitra_lab.generate.templates.row_moments import IS_COMPILED, KERNELS, normalise_rows
from agnitra_lab.generate.templates.row_points import PARAMS, row_default, row_space

kernel = KERNELS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton_op("agnitra::group_norm", mutates_args=())
def _group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    is_silu: bool,
    block_n: int,
    rows_per_program: int,
    split: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    spatial = math.prod(x.shape[2:])
    x_MN = x.contiguous().view(x.shape[0] * num_groups, x.shape[1] // num_groups * spatial)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = (block_n, rows_per_program, split, num_warps, num_stages)
    normalise_rows(
        x_MN, None, weight, bias, out, None, eps, config, num_groups=num_groups, spatial=int(spatial), is_silu=is_silu
    )
    return out


def launch(
    params: dict[str, int],
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    is_silu: bool = False,
) -> torch.Tensor:
    """Run the kernels with one config.

    Args:
        params: BLOCK_N, ROWS_PER_PROGRAM, SPLIT, num_warps, num_stages.
        x: [N, C, spatial...] floating tensor on a CUDA device (any device in the interpreter).
        num_groups: divides C.
        weight: None or [C], the dtype of x or float32.
        bias: as the weight.
        eps: added to the variance.
        is_silu: apply SiLU to the result.

    Returns:
        The normed tensor, of x's shape and contiguous.

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    tensors = tuple(tensor for tensor in (x, weight, bias) if tensor is not None)
    check_call("group_norm", tensors, supports(x, num_groups, weight, bias), IS_COMPILED)
    return torch.ops.agnitra.group_norm(x, num_groups, weight, bias, eps, is_silu, *(params[name] for name in PARAMS))


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one tensor.

    Args:
        shape: (N x G, C / G, spatial): groups of all images, channels of a group, values of a channel.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    num_rows = shape[0] if shape else 1
    return row_space("group_norm", shape, dtype, num_rows, math.prod(shape[1:]), rank=3)


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """A whole group in one block where it fits; longer ones in loops, or in parts that wait for each other."""
    rule = row_default(shape[0], math.prod(shape[1:]), dtype, run=math.prod(shape[2:]))
    # One stage: the weights of a block are gathered, and a pipeline would copy them value by value. Of split rows the
    # loop that gathers nothing gains by three.
    return rule if rule["SPLIT"] > 1 else rule | {"num_stages": 1}


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw the groups as images of one group each, [N x G, C / G, spatial], weight and bias, from a fixed seed."""
    draw = drawer(dtype, device)
    return (draw(*shape), 1, draw(shape[1]), draw(shape[1]), 1e-5), {}


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """One stream in and one out; eight operations an element."""
    num_elements = math.prod(shape)
    return 2 * num_elements * itemsize(dtype), 8 * num_elements


def reference(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    is_silu: bool = False,
) -> torch.Tensor:
    """Compute the same in plain torch; fp64 stays fp64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, shift = (None if tensor is None else tensor.to(wide) for tensor in (weight, bias))
    out = torch.nn.functional.group_norm(x.to(wide), num_groups, scale, shift, eps)
    return (torch.nn.functional.silu(out) if is_silu else out).to(x.dtype)


def supports(x: torch.Tensor, num_groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if x.dtype not in _DTYPES:
        return f"group_norm takes float32, bfloat16 or float16, not {x.dtype}"
    if x.dim() < 2 or x.numel() < 1:
        return f"group_norm needs [N, C, ...] with at least one value, not shape {tuple(x.shape)}"
    if num_groups < 1 or x.shape[1] % num_groups:
        return f"group_norm needs a number of groups that divides {x.shape[1]} channels, not {num_groups}"
    if math.prod(x.shape[1:]) // num_groups >= 2**30:
        return f"group_norm takes groups of fewer than 2^30 values, not those of {tuple(x.shape)}"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (x.shape[1],) or tensor.stride(0) != 1:
            return f"group_norm needs a contiguous {name} of shape ({x.shape[1]},), not {tuple(tensor.shape)}"
        if tensor.dtype not in (x.dtype, torch.float32):
            return f"group_norm needs a {name} of x's dtype {x.dtype} or float32, not {tensor.dtype}"
    return None
