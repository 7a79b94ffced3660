"""Fresh inputs that look like the given ones, and copies at other addresses, so that no result can be remembered."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.graph.tree import ADDRESS_MARK, map_tensors, put_back, span_of, tensors

# Additive attention masks hold such values for "never look here"; normal values of that size would overflow.
_MASK_MAGNITUDE = 1e4
_FIRST_FRESH_SEED = 1_000_003
_NUM_KEPT = 3


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
        return _as_fixed(_draw_like(tensor.detach(), generators[tensor.device]), tensor)

    with torch.no_grad():
        return map_tensors((tuple(workload.args), dict(workload.kwargs)), draw)


class FreshInputs:
    """The inputs of one round of calls after the other, no two alike, so that no call can answer from memory.

    The first rounds have the seeds that the check had, later ones seeds of their own. Where drawing takes longer than
    it may, the rounds go on with the last few in turn.
    """

    def __init__(
        self, workload: Workload, seeds: tuple[int, ...], *, draw_budget_s: float, is_fresh: bool = True
    ) -> None:
        """Make a stream.

        Args:
            workload: whose inputs are redrawn.
            seeds: of the check, at least one.
            draw_budget_s: time for drawing beyond `seeds`.
            is_fresh: False keeps to `seeds`.
        """
        self._workload = with_own_inputs(workload)
        self._places = fixed_tensors(workload)
        self._seeds = seeds
        self._left_s = draw_budget_s if is_fresh else 0.0
        self._kept: deque[tuple[int, Inputs]] = deque(maxlen=max(len(seeds), _NUM_KEPT))
        self._seed_of_round: list[int] = []

    def __call__(self, index: int) -> Inputs:
        """Return a copy of the inputs of a round: this one, the one before it, or the next."""
        while len(self._seed_of_round) <= index:
            self._add_round()
        wanted = self._seed_of_round[index]
        return shifted_copy(next(inputs for seed, inputs in self._kept if seed == wanted), self._places)

    def seed(self, index: int) -> int:
        """Return the seed of a round that was asked for."""
        return self._seed_of_round[index]

    def _add_round(self) -> None:
        index = len(self._seed_of_round)
        if index >= len(self._seeds) and self._left_s <= 0.0:
            self._kept.rotate(-1)
            self._seed_of_round.append(self._kept[-1][0])
            return
        seed = self._seeds[index] if index < len(self._seeds) else _FIRST_FRESH_SEED + index
        started_s = time.perf_counter()
        self._kept.append((seed, redraw(self._workload, seed)))
        self._left_s -= time.perf_counter() - started_s if index >= len(self._seeds) else 0.0
        self._seed_of_round.append(seed)


def fixed_tensors(workload: Workload) -> list[torch.Tensor]:
    """Return the inputs of a workload whose memory a caller has promised to keep (`torch._dynamo.mark_static_address`).

    transformers promises it of static caches, for Inductor's CUDA graphs to write to them where they are. At another
    address in each call they would be recorded anew each time, or not at all.
    """
    given = tensors((workload.args, dict(workload.kwargs)))
    return list({id(tensor): tensor for _, tensor in given if _is_fixed(tensor)}.values())


def with_own_inputs(workload: Workload) -> Workload:
    """Return the workload with copies of its inputs where calls write to some of them: what is drawn looks like the
    inputs as they are given, and not like what calls have left of them."""
    if not fixed_tensors(workload):
        return workload

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return _as_fixed(_copy(tensor), tensor)

    with torch.no_grad():
        args, kwargs = map_tensors((tuple(workload.args), dict(workload.kwargs)), copy)
    return replace(workload, args=args, kwargs=kwargs)


def shifted_copy(inputs: Inputs, places: Sequence[torch.Tensor] = ()) -> Inputs:
    """Copy inputs into new memory, with equal values, strides and alignment.

    While the caller keeps an earlier copy alive, no tensor of the new copy has the address of one of the earlier.

    Args:
        inputs: what is copied.
        places: where those go whose memory is promised to stay, in their order; without them they move too.
    """
    left = iter(places)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        place = next(left, None) if places and _is_fixed(tensor) else None
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            return _copy(tensor)
        put_back(place, tensor)
        return place

    with torch.no_grad():
        return map_tensors(inputs, copy)


def _as_fixed(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if _is_fixed(like):
        setattr(tensor, ADDRESS_MARK, getattr(like, ADDRESS_MARK))
    return tensor


def _is_fixed(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, ADDRESS_MARK)


def num_bytes(inputs: Inputs) -> int:
    """Return the bytes that the tensors of `inputs` hold."""
    total = 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    map_tensors(inputs, add)
    return total


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_nested:
        return tensor.clone()
    # The whole span is copied, so that strides of 0 and overlapping windows keep their layout.
    flat = torch.as_strided(tensor, (span_of(tensor),), (1,)).clone()
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
    picks = torch.randint(values.numel(), (span_of(tensor),), generator=generator, device=tensor.device)
    return values[picks].as_strided(tensor.shape, tensor.stride())


def _draw_floating(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    wide = tensor if tensor.is_complex() else tensor.float()
    if not bool(torch.isfinite(wide).all()) or float(wide.abs().max()) >= _MASK_MAGNITUDE:
        return _permute_rows(tensor, generator)
    mean = wide.mean()
    std = (wide - mean).abs().square().mean().sqrt()
    # Unit normal, complex or real: E|z|^2 is 1 for both.
    noise = torch.randn(span_of(tensor), dtype=wide.dtype, device=tensor.device, generator=generator)
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
    bare = tensor
    for dim, stride in enumerate(tensor.stride()):
        # An expanded mask holds its rows once, and stays expanded: a patch is made for its strides.
        bare = bare.narrow(dim, 0, 1) if stride == 0 else bare
    if bare.numel() > span_of(tensor):
        return _copy(tensor)
    rows = bare.reshape(-1, bare.shape[-1]) if bare.dim() > 1 else bare.reshape(-1, 1)
    order = torch.randperm(rows.shape[0], generator=generator, device=tensor.device)
    memory = tensor.new_empty(span_of(tensor))
    memory.as_strided(bare.shape, tensor.stride()).copy_(rows[order].reshape(bare.shape))
    return memory.as_strided(tensor.shape, tensor.stride())
