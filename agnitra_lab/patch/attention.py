"""Recognising attention by what a graph computes: softmax(scale * q k^T + masks) v in any spelling.

The scores may be capped in between: softmax(scale * tanh(squash * q k^T) + masks) v.

Shape legend: L leading dimensions (batch, heads), S queries, T keys, D and E head sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from agnitra_lab.patch import einsum
from agnitra_lab.patch.constants import Constants
from agnitra_lab.patch.matmuls import swaps_last_two
from agnitra_lab.patch.ops import argument, fake_of, is_cast, value_name

_RESHAPES = {"view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as"}
_LIKE = {"type_as", "view_as", "reshape_as", "expand_as"}
_PASSED = {"contiguous", "clone", "detach"}


class UnfitError(Exception):
    """The attention is one, and cannot be replaced for the reason given."""


@dataclass(frozen=True)
class Operand:
    """One tensor, and how its dimensions are brought into order."""

    node: fx.Node
    permutation: tuple[int, ...]
    new_axes: tuple[int, ...] = ()
    """Positions where a dimension of size one is put in, after the permutation, lowest first."""


@dataclass(frozen=True)
class Mask:
    """A tensor that is added to the scores, or a condition under which they are replaced.

    Attributes:
        node: broadcasts against [*leading, S, T].
        leading: the leading dimensions of the scores where the mask meets them.
        factor: what the mask is multiplied with (a sum), the sign included.
        fill: the value that replaces scores; None for a sum.
        is_inverted: scores are replaced where the condition is False.
    """

    node: fx.Node
    leading: tuple[int, ...]
    factor: float = 1.0
    fill: float | None = None
    is_inverted: bool = False


@dataclass
class Attention:
    """One attention in a graph.

    Attributes:
        query: [*leading, S, D] once in order.
        key: [*leading, T, D].
        value: [*value_leading, T, E].
        scale: factor of the scores; masks come on top.
        squash: factor of the scores before a tanh that caps them, `scale` then is the one after it; None without.
        is_shifted: whether a constant was added to all scores.
        scalings: tensors whose last two dimensions are one, which multiply the scores too.
        masks: in the order in which they apply.
        result: the node whose value is the attention's.
        result_permutation: from [*value_leading, S, E] to the dimensions of `result`.
        nodes: all nodes of the pattern, in graph order; the product of queries and keys first, `result` last.
        turns: what turned the keys for the product.
    """

    query: Operand
    key: Operand
    value: Operand
    leading: tuple[int, ...]
    value_leading: tuple[int, ...]
    result: fx.Node
    result_permutation: tuple[int, ...]
    scale: float = 1.0
    squash: float | None = None
    is_shifted: bool = False
    scalings: list[fx.Node] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    nodes: tuple[fx.Node, ...] = ()
    turns: tuple[fx.Node, ...] = ()


def find_attentions(graph: fx.Graph, constants: Constants) -> Iterator[Attention | str]:
    """Yield each attention in graph order, or why one cannot be taken apart."""
    for node in list(graph.nodes):
        if value_name(node) != "softmax" or not _is_over_last(node):
            continue
        try:
            found = _match(node, constants)
        except UnfitError as unfit:
            yield str(unfit)
        else:
            if found is not None:
                yield found


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node's elements; `x.type_as(node)` reads its dtype alone."""
    return [user for user in node.users if value_name(user) not in _LIKE or user.args[:1] == (node,)]


def _is_over_last(softmax: fx.Node) -> bool:
    fake, dim = fake_of(softmax), argument(softmax, 1, "dim")
    return fake is not None and fake.dim() >= 2 and dim in (-1, fake.dim() - 1)


def _match(softmax: fx.Node, constants: Constants) -> Attention | None:
    chain = _down(argument(softmax, 0, "input"), constants, set())
    if chain is None:
        return None
    above = _up(softmax)
    if above is None:
        return None
    upper, weights = above
    product = chain[-1]
    if any(len(_readers(node)) != 1 for node in (*chain, softmax, *upper[:-1])):
        raise UnfitError("the scores or the attention weights are used elsewhere too")
    _refuse_dropout(upper)
    query, key, leading = _scores_of(product)
    value, value_leading, permutation = _values_of(upper[-1], weights)
    attention = Attention(query, key, value, leading, value_leading, upper[-1], permutation)
    if value_name(product) == "baddbmm":
        _take_baddbmm(product, attention)
    for outer, inner in reversed(list(itertools.pairwise(chain))):
        _take_step(outer, inner, attention, constants)
    members = {*chain, softmax, *upper}
    attention.nodes = tuple(node for node in softmax.graph.nodes if node in members)
    attention.turns = tuple(node for node in product.all_input_nodes if swaps_last_two(node))
    return attention


# --- from the softmax down to the scores -----------------------------------------------------------------------------


def _down(node: Any, constants: Constants, seen: set[fx.Node]) -> list[fx.Node] | None:
    """Return the chain of nodes from the softmax's argument down to the product of queries and keys, it included."""
    if not isinstance(node, fx.Node) or fake_of(node) is None or node in seen:
        return None
    seen.add(node)
    name = value_name(node)
    if name in ("matmul", "baddbmm") or (name == "einsum" and einsum.read(node) is not None):
        return [node]
    for inner in _inner(node, name, constants):
        chain = _down(inner, constants, seen)
        if chain is not None:
            return [node, *chain]
    return None


def _inner(node: fx.Node, name: str | None, constants: Constants) -> list[Any]:
    """Return the arguments of a step that may be the scores, the likeliest first."""
    if not node.args:
        return []
    if is_cast(node) or name in _PASSED or name in _RESHAPES or name in ("masked_fill", "dropout", "tanh"):
        return [node.args[0]]
    if name in ("mul", "add") and len(node.args) == 2 and not node.kwargs:
        return [operand for operand in node.args if not _is_scalar(operand, constants)]
    if name in ("div", "sub") and len(node.args) == 2 and not node.kwargs:
        return [node.args[0]]
    if name == "where" and node.op == "call_function" and len(node.args) == 3:
        return [operand for operand in node.args[1:] if not _is_scalar(operand, constants)]
    if name == "where" and node.op == "call_method" and len(node.args) == 3:
        return [node.args[0]]
    return []


def _is_scalar(value: Any, constants: Constants) -> bool:
    return constants.number(value) is not None


def _take_step(node: fx.Node, inner: fx.Node, attention: Attention, constants: Constants) -> None:
    """Add what one node does to the scores `inner` to the attention."""
    name = value_name(node)
    if name in ("mul", "div"):
        _take_factor(node, inner, attention, constants)
    elif name in ("add", "sub"):
        other = node.args[1] if node.args[0] is inner else node.args[0]
        number = constants.number(other)
        if number is not None:
            # A softmax does not see a constant that is added to all scores.
            attention.is_shifted = True
            return
        sign = -1.0 if name == "sub" else 1.0
        attention.masks.append(Mask(_tensor(other), _leading(node), sign))
    elif name == "masked_fill":
        fill = constants.number(argument(node, 2, "value"))
        _take_fill(_tensor(argument(node, 1, "mask")), fill, False, node, attention)
    elif name == "where":
        is_method = node.op == "call_method"
        condition = node.args[1] if is_method else node.args[0]
        kept, other = (node.args[0], node.args[2]) if is_method else (node.args[1], node.args[2])
        is_kept_first = kept is inner
        fill = constants.number(other if is_kept_first else kept)
        _take_fill(_tensor(condition), fill, is_kept_first, node, attention)
    elif name == "dropout":
        _refuse_dropout([node])
    elif name == "tanh":
        if attention.masks or attention.is_shifted or attention.squash is not None:
            raise UnfitError("more than one factor of the scores is capped")
        attention.squash, attention.scale = attention.scale, 1.0
    elif name in _RESHAPES:
        before, after = fake_of(inner), fake_of(node)
        if before is None or after is None or before.shape[-2:] != after.shape[-2:]:
            raise UnfitError("the scores are reshaped across queries and keys")
    if fake_of(node) is None or _shape(node)[-2:] != _shape(inner)[-2:]:
        raise UnfitError("a mask enlarges the scores")


def _take_factor(node: fx.Node, inner: fx.Node, attention: Attention, constants: Constants) -> None:
    is_left = node.args[0] is inner
    other = node.args[1] if is_left else node.args[0]
    number = constants.number(other)
    if number is not None and (value_name(node) == "mul" or is_left) and number != 0.0:
        factor = number if value_name(node) == "mul" else 1.0 / number
        attention.scale *= factor
        attention.masks = [
            replace(mask, factor=mask.factor * factor, fill=None if mask.fill is None else mask.fill * factor)
            for mask in attention.masks
        ]
        return
    shape = _shape(other)
    is_linear = not attention.masks and attention.squash is None
    if value_name(node) == "mul" and is_linear and shape[-2:] in ((1, 1), (1,), ()):
        attention.scalings.append(_tensor(other))
        return
    raise UnfitError("the scores are multiplied by a tensor")


def _take_fill(condition: fx.Node, fill: float | None, is_inverted: bool, node: fx.Node, attention: Attention) -> None:
    if fill is None:
        raise UnfitError("the masked scores are replaced by a value that is computed in the graph")
    attention.masks.append(Mask(condition, _leading(node), 1.0, fill, is_inverted))


def _take_baddbmm(product: fx.Node, attention: Attention) -> None:
    alpha: Any = product.kwargs.get("alpha", 1)
    beta: Any = product.kwargs.get("beta", 1)
    if isinstance(alpha, fx.Node) or isinstance(beta, fx.Node):
        raise UnfitError("alpha or beta of baddbmm is computed in the graph")
    attention.scale *= float(alpha)
    if beta != 0:
        attention.masks.append(Mask(_tensor(argument(product, 0, "input")), _leading(product), float(beta)))


# --- from the softmax up to the result -------------------------------------------------------------------------------


def _up(softmax: fx.Node) -> tuple[list[fx.Node], fx.Node] | None:
    """Return the nodes above the softmax, the product with the values last, and the weights that it reads."""
    chain: list[fx.Node] = []
    weights = softmax
    while True:
        for user in weights.users:
            if value_name(user) == "matmul" and user.args[:1] == (weights,) and user.args[1:2] != (weights,):
                return [*chain, user], weights
            if value_name(user) == "einsum" and einsum.read(user) is not None:
                return [*chain, user], weights
        following = [user for user in weights.users if user.args[:1] == (weights,) and _is_passed(user)]
        if not following:
            return None
        weights = following[0]
        chain.append(weights)


def _is_passed(node: fx.Node) -> bool:
    if value_name(node) in _RESHAPES and not is_cast(node):
        return fake_of(node) is not None and _shape(node)[-2:] == _shape(node.args[0])[-2:]
    return is_cast(node) or value_name(node) in _PASSED or value_name(node) == "dropout"


def _refuse_dropout(nodes: list[fx.Node]) -> None:
    for node in nodes:
        if value_name(node) != "dropout":
            continue
        default = node.target is not None and getattr(node.target, "__module__", "") == "torch.nn.functional"
        if argument(node, 1, "p", 0.5) != 0.0 and argument(node, 2, "training", default) is not False:
            raise UnfitError("dropout on the attention weights draws random numbers")


# --- the two products ------------------------------------------------------------------------------------------------


def _scores_of(product: fx.Node) -> tuple[Operand, Operand, tuple[int, ...]]:
    """Return queries and keys of a product [*leading, S, T]."""
    if value_name(product) == "einsum":
        return _scores_of_einsum(product)
    first = 1 if value_name(product) == "baddbmm" else 0
    names = ("batch1", "batch2") if first else ("input", "other")
    left, right = (argument(product, first + index, name) for index, name in enumerate(names))
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or min(_rank(left), _rank(right)) < 2:
        raise UnfitError("the scores are not a product of two matrices")
    query, places = Operand(left, tuple(range(_rank(left)))), range(_rank(right))
    # Keys that were turned for the product are taken from before that: who reads a cache is then seen to.
    turned = right.args[0] if swaps_last_two(right) else None
    if isinstance(turned, fx.Node):
        return query, Operand(turned, tuple(places)), _leading(product)
    return query, Operand(right, (*places[:-2], places[-1], places[-2])), _leading(product)


def _scores_of_einsum(product: fx.Node) -> tuple[Operand, Operand, tuple[int, ...]]:
    terms = einsum.read(product)
    assert terms is not None
    *batch, row, column = list(terms.out)
    ordered = sorted(zip(terms.letters, terms.operands, strict=True), key=lambda pair: row not in pair[0])
    (query_letters, query), (key_letters, key) = ordered
    contracted = (set(query_letters) & set(key_letters)) - set(terms.out)
    is_product = row not in key_letters and column in key_letters and column not in query_letters
    if not is_product or len(contracted) != 1:
        raise UnfitError("the einsum of the scores is not a batched product of queries and keys")
    (depth,) = contracted
    return (
        _in_order(query, query_letters, [*batch, row, depth]),
        _in_order(key, key_letters, [*batch, column, depth]),
        _leading(product),
    )


def _values_of(product: fx.Node, weights: fx.Node) -> tuple[Operand, tuple[int, ...], tuple[int, ...]]:
    """Return the values, the leading dimensions of the product, and the permutation that its result needs."""
    if value_name(product) != "einsum":
        value = _tensor(argument(product, 1, "other"))
        if _rank(value) < 2:
            raise UnfitError("the values are a vector")
        leading = _leading(product)
        return Operand(value, tuple(range(_rank(value)))), leading, tuple(range(len(leading) + 2))
    terms = einsum.read(product)
    assert terms is not None
    position = terms.operands.index(weights)
    *batch, row, column = list(terms.letters[position])
    value, letters = terms.operands[1 - position], terms.letters[1 - position]
    width = set(terms.out) - {*batch, row}
    is_product = value is not weights and len(width) == 1 and {*batch, row} <= set(terms.out)
    if not is_product or column in terms.out or column not in letters or row in letters or not width <= set(letters):
        raise UnfitError("the einsum with the values is not a batched product")
    natural = [*batch, row, *width]
    sizes = dict(zip(terms.out, _shape(product), strict=True))
    return (
        _in_order(value, letters, [*batch, column, *width]),
        tuple(sizes[letter] for letter in batch),
        tuple(natural.index(letter) for letter in terms.out),
    )


def _in_order(node: fx.Node, letters: str, wanted: list[str]) -> Operand:
    if set(letters) - set(wanted):
        raise UnfitError("the einsum sums over a dimension of one operand")
    present = [letter for letter in wanted if letter in letters]
    missing = tuple(index for index, letter in enumerate(wanted) if letter not in letters)
    return Operand(node, tuple(letters.index(letter) for letter in present), missing)


def _tensor(value: Any) -> fx.Node:
    if not isinstance(value, fx.Node) or fake_of(value) is None:
        raise UnfitError("a mask is not a tensor of known shape")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    fake: Tensor | None = fake_of(value)
    if fake is None:
        raise UnfitError("shapes are not known")
    return tuple(int(size) for size in fake.shape)


def _rank(value: Any) -> int:
    return len(_shape(value))


def _leading(node: fx.Node) -> tuple[int, ...]:
    return _shape(node)[:-2]
