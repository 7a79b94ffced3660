"""What every template needs around its kernel: the enumeration of its space and the checks before a launch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.errors import TemplateError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
_SMALLEST_TILE = 1024


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number` (1 for 0)."""
    return 1 << max(0, number - 1).bit_length()


def dtype_name(dtype: torch.dtype | str) -> str | None:
    """Return "bfloat16" for torch.bfloat16, "torch.bfloat16" or "bfloat16"; None for a dtype that no template takes."""
    name = str(dtype).removeprefix("torch.")
    return name if name in DTYPES else None


def enumerate_space(
    template: str,
    shape: tuple[int, ...],
    dtype: str,
    params: dict[str, tuple[int, ...]],
    is_valid: Callable[[dict[str, int]], bool],
    *,
    rank: int | None = None,
) -> SearchSpace:
    """Enumerate the points of a grid that satisfy the template's constraints, in the grid's order.

    Args:
        template: the template's name.
        shape: the tensor's shape, every number at least 1.
        dtype: name of the element type.
        params: every parameter with its values in rising order.
        is_valid: the constraint, over one point.
        rank: how many numbers the shape must have; None for any.

    Raises:
        TemplateError: for an empty or zero-sized shape, one of another rank, or a dtype that no template takes.
    """
    name = dtype_name(dtype)
    if name is None:
        raise TemplateError(f"{template} takes {', '.join(DTYPES)}, not {dtype}.")
    if not shape or min(shape) < 1 or rank not in (None, len(shape)):
        numbers = "numbers" if rank is None else f"{rank} numbers"
        raise TemplateError(f"{template} needs a shape of {numbers} of at least 1, not {tuple(shape)}.")
    points = (dict(zip(params, values, strict=True)) for values in itertools.product(*params.values()))
    configs = tuple(KernelConfig(template=template, params=point) for point in points if is_valid(point))
    used = {
        key: tuple(value for value in values if any(c.params[key] == value for c in configs))
        for key, values in params.items()
    }
    return SearchSpace(template=template, shape=tuple(shape), dtype=name, params=used, configs=configs)


def check_call(template: str, tensors: tuple[Any, ...], refusal: str | None, is_compiled: bool) -> None:
    """Refuse a launch that would be wrong: unsupported tensors, a backward that does not exist, no device.

    Raises:
        TemplateError: with the reason and the way out.
    """
    import torch

    if refusal is not None:
        raise TemplateError(f"{refusal}.")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise TemplateError(
            f"{template} has no backward, and grad is enabled for one of its inputs.",
            hint="Call it under torch.inference_mode() or torch.no_grad().",
        )
    device_type = tensors[0].device.type
    if any(tensor.device != tensors[0].device for tensor in tensors):
        raise TemplateError(f"{template} needs all its tensors on one device.")
    if is_compiled and device_type not in ("cuda", "meta"):
        raise TemplateError(
            f"{template} is a GPU kernel and was given a tensor on {device_type}.",
            hint="Move the tensors to a CUDA device, or set TRITON_INTERPRET=1 before the import to check results.",
        )


def row_rule(shape: tuple[int, ...], *, block_n: int, values_per_thread: int) -> dict[str, int]:
    """Rule of thumb of a kernel over rows: short rows share a program, warps by the loads that each thread has.

    Args:
        shape: the tensor's shape; the last number is the row's length.
        block_n: elements of a row that a program holds at once.
        values_per_thread: how many of them a thread should hold.
    """
    num_rows = math.prod(shape[:-1])
    # Few rows stay in programs of their own: the machine has more multiprocessors than rows.
    rows = max(1, _SMALLEST_TILE // block_n) if num_rows >= 1024 else 1
    warps = max(1, block_n * rows // (32 * values_per_thread))
    return {"BLOCK_N": block_n, "ROWS_PER_PROGRAM": rows, "num_warps": min(16, warps), "num_stages": 2}


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View x as [rows, columns] with contiguous columns; copies only where no such view exists."""
    x_MN = x.reshape(-1, x.shape[-1])  # noqa: N806
    return x_MN if x_MN.stride(1) == 1 else x_MN.contiguous()


def launcher(function: Any) -> Any:
    """Make launches of a Triton function visible to torch.compile; those of the interpreter run as they are."""
    import triton
    from torch.library import wrap_triton

    # wrap_triton takes JITFunctions, and nothing else.
    return wrap_triton(function) if isinstance(function, triton.JITFunction) else function


def drawer(dtype: str, device: torch.device | str) -> Callable[..., torch.Tensor]:
    """Return `draw(*shape)`: standard normal tensors of one dtype on one device, the same ones at each run."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    name = dtype_name(dtype) or "float32"

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(getattr(torch, name))

    return draw


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of a dtype that templates take."""
    return 4 if dtype_name(dtype) == "float32" else 2
