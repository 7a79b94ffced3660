"""Kernel bugs as people plant them: right computations with one defect each, by family, on small CPU shapes.

A family has a reference module, inputs whose shapes change with the seed (the held-out ones are odd), and a control:
a right computation in another order, which the gate must let pass. A candidate takes the module and its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FP32, BF16 = torch.float32, torch.bfloat16
BOTH = (FP32, BF16)
Candidate = Callable[..., Any]


@dataclass(frozen=True)
class Family:
    """One kind of kernel: reference, inputs, a right computation in another order, and defects by name.

    Attributes:
        build: dtype -> the module; inputs: (dtype, size, generator) -> arguments of one call.
        sizes: of the seeds 0, 1, 2: the workload's own and two held-out ones.
        control: (module, *inputs) -> what the module returns.
        bugs: defect -> candidate, beside the ones of every output.
        fp32_only, bf16_only: defects that rounding hides in the other dtype, or that it does not have.
        has_output_bugs: whether `OUTPUT_BUGS` are planted too.
    """

    build: Callable[[torch.dtype], nn.Module]
    inputs: Callable[[torch.dtype, int, torch.Generator], tuple[Any, ...]]
    control: Candidate
    bugs: dict[str, Candidate]
    sizes: tuple[int, int, int] = (32, 37, 64)
    fp32_only: frozenset[str] = frozenset()
    bf16_only: frozenset[str] = frozenset()
    has_output_bugs: bool = True


class Op(nn.Module):
    """A formula over the module's weights, as a module, so that the gate has its fp64 oracle."""

    def __init__(self, formula: Candidate, dtype: torch.dtype, **weights: Tensor) -> None:
        super().__init__()
        self.formula = formula
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value.to(dtype), requires_grad=False))

    def forward(self, *inputs: Any) -> Any:
        return self.formula(self, *inputs)


class Remembered:
    """Calls the model once and returns that output again for equal keys: a cache that nobody invalidates."""

    def __init__(self, key: Callable[..., Any]) -> None:
        self.key, self.memory = key, {}

    def __call__(self, m: nn.Module, *inputs: Any) -> Any:
        return self.memory.setdefault((m, self.key(*inputs)), m(*inputs)).clone()


class OneBuffer:
    """Returns a view of an internal buffer, which the next call of the same model overwrites."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def __call__(self, m: nn.Module, *inputs: Any) -> Tensor:
        out = m(*inputs)
        buffer = self.buffers.setdefault((m, out.dtype), torch.zeros(400_000, dtype=out.dtype))
        return buffer[: out.numel()].view(out.shape).copy_(out)


def randn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def weight(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def patched(change: Callable[[Tensor], Any]) -> Candidate:
    """Return a candidate whose output is right until `change` writes into it."""

    def candidate(m: nn.Module, *inputs: Any) -> Any:
        out = m(*inputs)
        change(out)
        return out

    return candidate


def returns(change: Callable[[Tensor], Any]) -> Candidate:
    """Return a candidate that returns `change` of the right output."""
    return lambda m, *inputs: change(m(*inputs))


def writes(change: Callable[[Tensor], Any]) -> Candidate:
    """Return a candidate with the right output that leaves its first floating input changed."""

    def candidate(m: nn.Module, *inputs: Any) -> Any:
        out = m(*inputs)
        change(next(item for item in inputs if isinstance(item, Tensor) and item.is_floating_point()))
        return out

    return candidate


def _tail(out: Tensor) -> Tensor:
    """Return the last partial block of 16 of the flattened output, at least one element."""
    flat = out.view(-1)
    return flat[(flat.numel() - 1) // 16 * 16 :]


def _racing(out: Tensor) -> None:
    """Let every fifth block of 8 hold what its left neighbour computed: read before the barrier."""
    flat = out.view(-1)
    source = flat.clone()
    for start in range(40, flat.numel() - 8, 40):
        flat[start : start + 8] = source[start - 8 : start]


OUTPUT_BUGS: dict[str, Callable[[], Candidate]] = {
    "leaves NaN in the last partial block": lambda: patched(lambda out: _tail(out).fill_(float("nan"))),
    "leaves zeros in the last partial block": lambda: patched(lambda out: _tail(out).zero_()),
    "leaves stale values in the last partial block": lambda: patched(
        lambda out: _tail(out).copy_(out.view(-1)[: _tail(out).numel()].flip(0).clone())
    ),
    "reads a neighbour's block before the barrier": lambda: patched(_racing),
    "gets only the first batch element right": lambda: patched(lambda out: out[1:].copy_(out[:1].expand_as(out[1:]))),
    "gets the sign of the last row wrong": lambda: patched(lambda out: out[-1].neg_()),
    "overflows to infinity at one element": lambda: patched(lambda out: out.view(-1)[7:8].fill_(float("inf"))),
    "returns another dtype": lambda: returns(lambda out: out.double()),
    "returns a transposed layout": lambda: returns(lambda out: out.transpose(0, 1).contiguous().transpose(0, 1)),
    "returns a row too few": lambda: returns(lambda out: out[:-1].clone()),
    "returns the output of the first call": lambda: Remembered(lambda *inputs: 0),
    "returns a buffer that the next call overwrites": OneBuffer,
    "scales its input in place": lambda: writes(lambda x: x.mul_(2)),
    "nudges one element of its input": lambda: writes(lambda x: x.view(-1)[:1].mul_(1.0 + 2**-7)),
}
"""Defects that any kernel with one floating output of two dimensions or more can have."""


def truncated(wide: Tensor) -> Tensor:
    """Round fp32 to bf16 toward zero."""
    return (wide.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()


def tf32(x: Tensor) -> Tensor:
    return (x.float().contiguous().view(torch.int32) & -8192).view(torch.float32)
