"""Reading an einsum of two tensors as the batched matrix product that it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from agnitra_lab.patch.ops import fake_of


@dataclass(frozen=True)
class Terms:
    """An einsum with the ellipsis spelled out: one letter a dimension, no letter twice in a term.

    Attributes:
        operands: both tensors.
        letters: the dimensions of each.
        out: the dimensions of the result.
    """

    operands: tuple[fx.Node, fx.Node]
    letters: tuple[str, str]
    out: str


def read(node: fx.Node) -> Terms | None:
    """Return the terms of an einsum call over two tensors, None when it has others or implicit parts."""
    equation, *rest = node.args
    operands: Sequence[Any] = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    fakes = [fake_of(operand) for operand in operands]
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2 or None in fakes:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    spelled = [_spelled(term, fake.dim()) for term, fake in zip(terms, fakes, strict=True) if fake is not None]
    num_free = max((fake.dim() - len(term) + 3 for term, fake in zip(terms, fakes, strict=True)
                    if fake is not None and "..." in term), default=0)  # fmt: skip
    result = out.replace("...", _free(num_free))
    for term in (*spelled, result):
        if len(set(term)) != len(term):
            return None
    if any(len(term) != fake.dim() for term, fake in zip(spelled, fakes, strict=True) if fake is not None):
        return None
    if set(result) - set(spelled[0]) - set(spelled[1]):
        return None
    return Terms((operands[0], operands[1]), (spelled[0], spelled[1]), result)


def _free(number: int) -> str:
    # Letters for the dimensions behind "...", aligned at the right as einsum aligns them.
    return "".join(chr(0x100 + index) for index in reversed(range(number)))


def _spelled(term: str, rank: int) -> str:
    return term.replace("...", _free(rank - len(term) + 3)) if "..." in term else term
