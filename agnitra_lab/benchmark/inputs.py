"""Fresh inputs that look like the given ones, and copies at other addresses, so that no result can be remembered."""

from __future__ import annotations

import torch

from agnitra_lab.benchmark.tree import map_tensors
from agnitra_lab.contracts.workload import Inputs, Workload

# Additive attention masks hold such values for "never look here"; normal values of that size would overflow.
_MASK_MAGNITUDE = 1e4


def redraw(workload: Workload, seed: int) -> Inputs:
    """Draw fresh inputs of a workload.

    Args:
        workload: its `make_inputs` decides; without one every tensor keeps shape, dtype, device and strides, and
            floating tensors are normal with the mean and standard deviation of the given ones (their sign and the unit
            interval are kept), integers are sampled from the given values so that indices stay valid, sorted
            integers (positions, offsets, lengths) and constants stay as they are, and masks have their rows permuted,
            so that no row loses all its entries. Other values pass unchanged.
        seed: equal seeds draw equal inputs.
    """
    if workload.make_inputs is not None:
        args, kwargs = workload.make_inputs(seed)
        return tuple(args), dict(kwargs)
    generators: dict[torch.device, torch.Generator] = {}

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(device=tensor.device).manual_seed(seed)
        return _draw_like(tensor.detach(), generators[tensor.device])

    with torch.no_grad():
        return map_tensors((tuple(workload.args), dict(workload.kwargs)), draw)


def shifted_copy(inputs: Inputs) -> Inputs:
    """Copy inputs into new memory, with equal values, strides and alignment.

    While the caller keeps an earlier copy alive, no tensor of the new copy has the address of one of the earlier.
    """
    with torch.no_grad():
        return map_tensors(inputs, _copy)


def num_bytes(inputs: Inputs) -> int:
    """Return the bytes that the tensors of `inputs` hold."""
    total = 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    map_tensors(inputs, add)
    return total


def _span(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_nested:
        return tensor.clone()
    # The whole span is copied, so that strides of 0 and overlapping windows keep their layout.
    flat = torch.as_strided(tensor, (_span(tensor),), (1,)).clone()
    return flat.as_strided(tensor.shape, tensor.stride())


def _draw_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.numel() == 0:
        return tensor.clone()
    if tensor.is_floating_point() or tensor.is_complex():
        return _draw_floating(tensor, generator)
    if tensor.dtype == torch.bool:
        return _permute_rows(tensor, generator)
    if tensor.dim() > 0 and bool((tensor.diff(dim=-1) >= 0).all()):
        return _copy(tensor)
    values = tensor.flatten()
    picks = torch.randint(values.numel(), (_span(tensor),), generator=generator, device=tensor.device)
    return values[picks].as_strided(tensor.shape, tensor.stride())


def _draw_floating(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    wide = tensor if tensor.is_complex() else tensor.float()
    if not bool(torch.isfinite(wide).all()) or float(wide.abs().max()) >= _MASK_MAGNITUDE:
        return _permute_rows(tensor, generator)
    mean = wide.mean()
    std = (wide - mean).abs().square().mean().sqrt()
    # Unit normal, complex or real: E|z|^2 is 1 for both.
    noise = torch.randn(_span(tensor), dtype=wide.dtype, device=tensor.device, generator=generator)
    drawn = noise * std + mean
    if not tensor.is_complex():
        drawn = _in_range_of(drawn, wide)
    return drawn.to(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _in_range_of(drawn: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Keep what a root, a logarithm or a probability needs: the sign, and the unit interval."""
    low, high = float(given.min()), float(given.max())
    if low >= 0.0:
        return drawn.abs().clamp(max=1.0) if high <= 1.0 else drawn.abs()
    return -drawn.abs() if high <= 0.0 else drawn


def _permute_rows(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    order = torch.randperm(rows.shape[0], generator=generator, device=tensor.device)
    permuted = rows[order].reshape(tensor.shape)
    if any(stride == 0 for stride in tensor.stride()) or _span(tensor) != tensor.numel():
        return permuted
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(permuted)
