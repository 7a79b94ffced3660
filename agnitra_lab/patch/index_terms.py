"""What a graph's moves and products do to single elements: each value as a sum of products of elements of its sources.

A value is a few terms. A term has, for every element of the value, a factor and one element's index in each source that
it multiplies. Views, slices and concatenations move indices, products join them, sums put terms side by side; so the
many spellings of one formula (a rotation of halves by chunk and cat, of neighbours by stack) end in the same terms.

All tensors here are small and real: a node's op runs on the indices themselves.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.patch.ops import fake_of, is_cast, op_name

MAX_ELEMENTS = 1 << 19
_MAX_TERMS = 16
_MOVES = {
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "unflatten", "expand", "contiguous",
    "narrow", "select", "getitem", "chunk", "split", "unbind", "tensor_split", "swapaxes", "movedim", "detach", "alias",
    "clone", "repeat_interleave", "flip", "t",
}  # fmt: skip
_JOINS = {torch.cat: "cat", torch.concat: "cat", torch.concatenate: "cat", torch.stack: "stack"}
_MORE_MOVES = {torch.roll, torch.clone, torch.Tensor.contiguous}


class UnreadableError(Exception):
    """A node that is no move, sum or product, or has terms without end."""


@dataclass(frozen=True)
class Term:
    """One product a value's element.

    Attributes:
        factor: of the value's shape, 0 where the element has no such term.
        sources: (node, index of its element in logical order), by node name.
    """

    factor: Tensor
    sources: tuple[tuple[fx.Node, Tensor], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The sources' names, what terms are matched by."""
        return tuple(node.name for node, _ in self.sources)


Terms = list[Term]


class Reader:
    """Reads values of one graph as terms over given sources.

    Args:
        sources: nodes that are not looked into.
    """

    def __init__(self, sources: Collection[fx.Node] = ()) -> None:
        self._sources = frozenset(sources)
        self._known: dict[fx.Node, Any] = {}

    def read(self, node: fx.Node) -> Terms:
        """Return a node's terms; a node that is not understood is a source of its own.

        Raises:
            UnreadableError: for values without a known, small shape.
        """
        value = self._value(node)
        if not isinstance(value, list):
            raise UnreadableError(f"{node.name} is no single tensor")
        return value

    def _value(self, node: fx.Node) -> Any:
        if node not in self._known:
            value = None if node in self._sources else self._apply(node)
            self._known[node] = _source(node) if value is None else value
        return self._known[node]

    def _apply(self, node: fx.Node) -> Any:
        """Return the terms of what a node makes of its arguments, None when it is not understood."""
        name = op_name(node)
        if is_cast(node):
            before, after = fake_of(node.args[0]), fake_of(node)
            is_float = before is not None and after is not None and before.dtype.is_floating_point
            return self._value(node.args[0]) if is_float and after.dtype.is_floating_point else None  # type: ignore[union-attr,arg-type]
        if name in _MOVES or node.target in _MORE_MOVES or (node.op == "call_method" and node.target in ("roll",)):
            return self._moved(node)
        if node.op == "call_function" and node.target in _JOINS:
            return self._joined(node, _JOINS[node.target])  # type: ignore[index]
        if name == "neg" and len(node.args) == 1:
            return _scaled(self._value(node.args[0]), -1.0)  # type: ignore[arg-type]
        if name in ("mul", "div", "add", "sub") and len(node.args) == 2 and not node.kwargs:
            return self._combined(name, *node.args)
        return None

    def _moved(self, node: fx.Node) -> Any:
        source = node.args[0] if node.args else None
        # Sizes and indices must be numbers: an index that is a tensor makes a source.
        if not isinstance(source, fx.Node) or any(other is not source for other in node.all_input_nodes):
            return None
        fake = fake_of(source)
        if fake is not None and fake.numel() > MAX_ELEMENTS:
            return None
        value = self._value(source)
        if isinstance(value, tuple):
            index = node.args[1] if node.target is operator.getitem else None
            return value[index] if isinstance(index, int) else None
        return _each(lambda tensor: _call(node, tensor), value)

    def _joined(self, node: fx.Node, name: str) -> Terms | None:
        pieces = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        if not isinstance(pieces, (list, tuple)) or not isinstance(dim, int):
            return None
        if not pieces or not all(isinstance(piece, fx.Node) for piece in pieces):
            return None
        values = [self._value(piece) for piece in pieces]  # type: ignore[arg-type]
        join = torch.cat if name == "cat" else torch.stack
        return None if not all(isinstance(value, list) for value in values) else _join(values, join, dim)

    def _combined(self, name: str, left: Any, right: Any) -> Terms | None:
        if name in ("mul", "div") and isinstance(right, (int, float)) and isinstance(left, fx.Node):
            return _scaled(self._value(left), float(right) if name == "mul" else 1.0 / right) if right else None
        if name == "mul" and isinstance(left, (int, float)) and isinstance(right, fx.Node):
            return _scaled(self._value(right), float(left))
        if name == "div" or not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        first, second = self._value(left), self._value(right)
        if not isinstance(first, list) or not isinstance(second, list):
            return None
        if name == "mul":
            return _product(first, second)
        shape = torch.broadcast_shapes(first[0].factor.shape, second[0].factor.shape)
        both = first + (second if name == "add" else _scaled(second, -1.0))
        return _limited([_expanded(term, shape) for term in both])


def is_move(node: fx.Node) -> bool:
    """Whether a node only puts elements of its arguments elsewhere."""
    return op_name(node) in _MOVES or (node.op == "call_function" and node.target in _JOINS)


def _source(node: fx.Node) -> Terms:
    fake = fake_of(node)
    if fake is None or not all(isinstance(size, int) for size in fake.shape) or not 0 < fake.numel() <= MAX_ELEMENTS:
        raise UnreadableError(f"{node.name} has no small known shape")
    index = torch.arange(fake.numel()).view(fake.shape)
    return [Term(torch.ones(fake.shape, dtype=torch.float64), ((node, index),))]


def _each(move: Any, terms: Terms) -> Any:
    """Move the elements of all terms; a tuple of values where the move makes several."""
    moved = [(move(term.factor), [move(index) for _, index in term.sources], term) for term in terms]
    if isinstance(moved[0][0], Tensor):
        return [_term(factor, term, indices) for factor, indices, term in moved]
    return tuple(
        [_term(factor[i], term, [index[i] for index in indices]) for factor, indices, term in moved]
        for i in range(len(moved[0][0]))
    )


def _term(factor: Tensor, like: Term, indices: Sequence[Tensor]) -> Term:
    return Term(factor, tuple((node, index) for (node, _), index in zip(like.sources, indices, strict=True)))


def _call(node: fx.Node, tensor: Tensor) -> Any:
    try:
        if node.op == "call_method":
            # A view of an index that a broadcast or a transposition made may need a copy.
            name = "reshape" if node.target == "view" else str(node.target)
            return getattr(tensor, name)(*node.args[1:], **node.kwargs)
        assert callable(node.target)
        return node.target(tensor, *node.args[1:], **node.kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UnreadableError(f"{node.name} cannot be followed: {error}") from error


def _scaled(terms: Any, number: float) -> Any:
    return [Term(term.factor * number, term.sources) for term in terms] if isinstance(terms, list) else None


def _expanded(term: Term, shape: torch.Size) -> Term:
    return _term(term.factor.expand(shape), term, [index.expand(shape) for _, index in term.sources])


def _limited(terms: Terms) -> Terms:
    if len(terms) > _MAX_TERMS:
        raise UnreadableError("a value has too many terms")
    return terms


def _product(left: Terms, right: Terms) -> Terms:
    found = []
    for first, second in itertools.product(left, right):
        shape = torch.broadcast_shapes(first.factor.shape, second.factor.shape)
        first, second = _expanded(first, shape), _expanded(second, shape)
        sources = sorted([*first.sources, *second.sources], key=lambda pair: pair[0].name)
        found.append(Term(first.factor * second.factor, tuple(sources)))
    return _limited(found)


def _join(values: Sequence[Terms], join: Any, dim: int) -> Terms:
    """Join values: terms of one kind become one, with the factor 0 in the pieces that lack it."""
    slots: dict[tuple[Any, int], list[Term | None]] = {}
    for position, terms in enumerate(values):
        counts: dict[Any, int] = {}
        for term in terms:
            number = counts.get(term.names, 0)
            counts[term.names] = number + 1
            slots.setdefault((term.names, number), [None] * len(values))[position] = term
    joined = []
    for pieces in slots.values():
        like = next(piece for piece in pieces if piece is not None)
        zeros = [torch.zeros(terms[0].factor.shape, dtype=torch.int64) for terms in values]
        factors = [zero.double() if piece is None else piece.factor for piece, zero in zip(pieces, zeros, strict=True)]
        indices = [
            join(
                [zero if piece is None else piece.sources[i][1] for piece, zero in zip(pieces, zeros, strict=True)], dim
            )
            for i in range(len(like.sources))
        ]
        joined.append(_term(join(factors, dim), like, indices))
    return _limited(joined)
