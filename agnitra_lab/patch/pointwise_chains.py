"""What a chain of pointwise ops computes, told by evaluating it: one function has many spellings.

A tanh GELU is one op, or nine in single steps with the constants in any order. The ops between a value and a later one
are run on sample numbers in fp64 and held against the functions that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.patch.convolutions import real_tensors
from agnitra_lab.patch.neighbours import is_pointwise
from agnitra_lab.patch.ops import fake_of, is_cast, is_in_place

_MOST_OPS = 16
"""Of one chain: the tanh GELU has nine."""
_TOLERANCE = 2e-7
"""Models write their constants with eight digits."""


@dataclass(frozen=True)
class Chain:
    """Ops that compute one function of one value.

    Attributes:
        name: the function's.
        nodes: the ops in graph order; the last one's value is the function's.
    """

    name: str
    nodes: tuple[fx.Node, ...]

    @property
    def result(self) -> fx.Node:
        """The node with the function's value."""
        return self.nodes[-1]


def find_chain(value: fx.Node, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Chain | None:
    """Return the longest chain from a value on that is one of some functions, and all that reads the value.

    Args:
        value: what the function is of.
        functions: name -> the function, over fp64 tensors.
    """
    nodes = _readers(value)
    for end in range(len(nodes), 0, -1):
        inside = nodes[:end]
        if not _is_closed(value, inside) or not _looks_like(value, inside[-1]):
            continue
        name = _function_of(value, inside, functions)
        if name is not None:
            return Chain(name, tuple(inside))
    return None


def _readers(value: fx.Node) -> list[fx.Node]:
    """Return the ops whose only tensors are the value and each other, in graph order, up to the first other reader."""
    found: list[fx.Node] = []
    reached, waiting, node = {value}, set(value.users), value.next
    while waiting and len(found) < _MOST_OPS:
        if node in waiting:
            if not _is_step(node) or not set(node.all_input_nodes) <= reached:
                break
            found.append(node)
            reached.add(node)
            waiting = (waiting | set(node.users)) - {node}
        node = node.next
    return found


def _is_step(node: fx.Node) -> bool:
    return (is_pointwise(node) or is_cast(node)) and not is_in_place(node)


def _is_closed(value: fx.Node, inside: Sequence[fx.Node]) -> bool:
    """Whether nobody outside reads the value, or anything but the last op."""
    return all(set(node.users) <= set(inside) for node in (value, *inside[:-1]))


def _looks_like(value: fx.Node, result: fx.Node) -> bool:
    before, after = fake_of(value), fake_of(result)
    return before is not None and after is not None and (before.shape, before.dtype) == (after.shape, after.dtype)


def _function_of(
    value: fx.Node, inside: Sequence[fx.Node], functions: Mapping[str, Callable[[Tensor], Tensor]]
) -> str | None:
    with real_tensors():
        sample = torch.cat([torch.linspace(-9, 9, 181, dtype=torch.float64), torch.tensor([-1e3, 0.0, 1e-3, 1e3])])
        values: dict[fx.Node, Any] = {value: sample}
        try:
            for node in inside:
                if is_cast(node):
                    values[node] = values[node.all_input_nodes[0]]
                    continue
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                values[node] = _run(node, args, kwargs)
        except Exception:
            # Whatever does not run on one row of numbers is none of the functions.
            return None
        found = values[inside[-1]]
        if not isinstance(found, Tensor) or found.shape != sample.shape or found.dtype != sample.dtype:
            return None
        alike = (
            name
            for name, function in functions.items()
            if torch.allclose(found, function(sample), rtol=_TOLERANCE, atol=_TOLERANCE)
        )
        return next(alike, None)


def _run(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)
