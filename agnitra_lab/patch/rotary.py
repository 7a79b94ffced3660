"""Recognising rotary position embedding by what happens to each element, however it is written.

    y[d] = x[d] cos[a(d)] - x[p(d)] sin[a(d)]      d the first of its pair
    y[d] = x[d] cos[a(d)] + x[p(d)] sin[a(d)]      d the second
    y[d] = x[d]                                    past the part that turns

Source: Su et al., "RoFormer", arXiv 2104.09864; the pairs of GPT-NeoX (halves) and GPT-J (neighbours).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from agnitra_lab.patch.index_terms import Reader, Term, Terms, UnreadableError, is_move
from agnitra_lab.patch.ops import fake_of

HALVES, NEIGHBOURS, NONE = "halves", "neighbours", "none"
_MAX_NODES = 400


@dataclass(frozen=True)
class Angles:
    """Where cos or sin lies.

    Attributes:
        node: a tensor of batches, tokens and rows in this order, whatever its shape.
        batches, tokens: 1 for what all share.
        width: numbers taken of a row of `row_size`, from `offset` on, every `step`-th.
    """

    node: fx.Node
    batches: int
    tokens: int
    width: int
    row_size: int
    offset: int
    step: int


@dataclass(frozen=True)
class Rotary:
    """One rotation of [B, H, L, D].

    Attributes:
        x: the value before it, a node of [B, H, L, D] or, with `is_turned`, [B, L, H, D].
        form: "halves", "neighbours", or "none" where nothing turns.
        size: how many of the first values of a head turn.
        mode: what of a row of angles belongs to value d: "each" d, "halves" d modulo size / 2, "neighbours" d // 2.
        scale: a factor of the whole result.
        nodes: what computes the result from x, in graph order, the result last.
    """

    x: fx.Node
    is_turned: bool
    form: str
    size: int
    mode: str
    cos: Angles | None
    sin: Angles | None
    scale: float
    nodes: tuple[fx.Node, ...]


def find_rotary(result: fx.Node, opaque: frozenset[fx.Node], *, is_result_turned: bool = False) -> Rotary | str:
    """Read a value [B, H, L, D] as the rotation of some other, or say why it is none.

    Args:
        result: the value.
        is_result_turned: it is [B, L, H, D].
        opaque: nodes that are not looked into, such as norms.

    Returns:
        The rotation nearest to `result`; one of form "none" over `result` itself where there is none.
    """
    try:
        terms = Reader(opaque).read(result)
        if not any(len(term.sources) > 1 for term in terms):
            return Rotary(result, is_result_turned, NONE, 0, "each", None, None, 1.0, (result,))
        for root in _roots(terms):
            dependent = _between(root, result)
            # Angles under their views first: cos and sin may be columns of one table. Then as they enter.
            candidates = _candidates(dependent, result, is_result_turned)
            for (x, is_turned), is_deep in itertools.product(candidates, (True, False)):
                read = Reader(_edge(dependent, x, is_deep)).read(result)
                found = _match(_turned(read) if is_result_turned else read, x, is_turned, result)
                if found is not None:
                    return found
    except UnreadableError as error:
        return str(error)
    return "they are products and sums, but no rotation of pairs of one tensor"


def _roots(terms: Terms) -> list[fx.Node]:
    """Return the sources that every term has once: what is rotated, and angles that lie in one tensor with theirs."""
    shared = [node for node, _ in terms[0].sources]
    return [node for node in shared if all(sum(node is other for other, _ in term.sources) == 1 for term in terms)]


def _between(root: fx.Node, result: fx.Node) -> list[fx.Node]:
    """Return the nodes that depend on `root` and lead to `result`, both included, in graph order."""
    behind, stack = {result}, [result]
    while stack and len(behind) < _MAX_NODES:
        node = stack.pop()
        if node is root:
            continue
        for source in node.all_input_nodes:
            if source not in behind:
                behind.add(source)
                stack.append(source)
    dependent = {root}
    node = root
    while node is not result:
        node = node.next
        if node in behind and any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
    return [node for node in root.graph.nodes if node in dependent]


def _turned(terms: Terms) -> Terms:
    return [
        Term(term.factor.transpose(1, 2), tuple((node, index.transpose(1, 2)) for node, index in term.sources))
        for term in terms
    ]


def _candidates(dependent: list[fx.Node], result: fx.Node, is_result_turned: bool) -> Iterator[tuple[fx.Node, bool]]:
    """Yield nodes that may be what is rotated, the latest first, and whether tokens stand before heads in them."""
    wanted = fake_of(result)
    assert wanted is not None
    batch, heads, tokens, size = wanted.transpose(1, 2).shape if is_result_turned else wanted.shape
    for node in reversed(dependent):
        fake = fake_of(node)
        if fake is None or fake.dim() != 4:
            continue
        if tuple(fake.shape) == (batch, heads, tokens, size):
            yield node, False
        if tuple(fake.shape) == (batch, tokens, heads, size):
            yield node, True


def _edge(dependent: list[fx.Node], x: fx.Node, is_deep: bool) -> set[fx.Node]:
    """Return where reading ends: at x, and at what enters without depending on the root; deep: under its views."""
    inside, edge = set(dependent), {x}
    stack = [source for node in dependent for source in node.all_input_nodes if source not in inside]
    while stack:
        node = stack.pop()
        if is_deep and is_move(node):
            stack += node.all_input_nodes
        else:
            edge.add(node)
    return edge


def _match(terms: Terms, x: fx.Node, is_turned: bool, result: fx.Node) -> Rotary | None:
    fake = fake_of(x)
    assert fake is not None
    own = torch.arange(fake.numel()).view(fake.shape)
    own = own.transpose(1, 2) if is_turned else own
    if any(sum(node is x for node, _ in term.sources) != 1 or len(term.sources) > 2 for term in terms):
        return None
    if not any(len(term.sources) == 2 for term in terms):
        return None
    found = _elements(terms, x, own)
    if found is None:
        return None
    near, far, straight = found
    size = int(near.is_here[0, 0, 0].sum())
    is_part = torch.arange(own.shape[3]) < size
    if size < 2 or size % 2 or not all(bool((part.is_here == is_part).all()) for part in (near, far)):
        return None
    if not bool((straight.is_here == ~is_part).all()):
        return None
    scale = float(near.factor[0, 0, 0, 0])
    every = near.factor[..., :size], straight.factor[..., size:]
    if scale <= 0.0 or not all(bool((factor == scale).all()) for factor in every):
        return None
    form = _form(far, own, size, scale)
    cos, sin = _angles(near, size), _angles(far, size)
    if form is None or cos is None or sin is None or cos[1] != sin[1]:
        return None
    nodes = _inner(x, result)
    return Rotary(x, is_turned, form, size, cos[1], cos[0], sin[0], scale, nodes)


@dataclass
class _Part:
    """The terms of one kind, an element's at most one: where there is one, its factor, its x and its angle."""

    is_here: Tensor
    factor: Tensor
    x_index: Tensor
    angle_index: Tensor
    angles: fx.Node | None = None

    @classmethod
    def empty(cls, shape: torch.Size) -> _Part:
        """Nothing yet."""
        zeros = torch.zeros(shape, dtype=torch.int64)
        return cls(zeros.bool(), zeros.double(), zeros, zeros.clone())

    def take(self, where: Tensor, term: Term, x_index: Tensor, angles: tuple[fx.Node, Tensor] | None) -> bool:
        """Add a term where it is; False when an element would have two, or angles come from two tensors."""
        if not bool(where.any()):
            return True
        if bool((self.is_here & where).any()):
            return False
        if angles is not None:
            if self.angles not in (None, angles[0]):
                return False
            self.angles = angles[0]
            self.angle_index = torch.where(where, angles[1], self.angle_index)
        self.is_here = self.is_here | where
        self.factor = torch.where(where, term.factor, self.factor)
        self.x_index = torch.where(where, x_index, self.x_index)
        return True


def _elements(terms: Terms, x: fx.Node, own: Tensor) -> tuple[_Part, _Part, _Part] | None:
    """Sort terms into those of an element itself with an angle, those of another with one, and those without."""
    near, far, straight = (_Part.empty(own.shape) for _ in range(3))
    for term in terms:
        if term.factor.shape != own.shape:
            return None
        (x_index,) = (index for node, index in term.sources if node is x)
        rest = [(node, index) for node, index in term.sources if node is not x]
        is_here, is_own = term.factor != 0, x_index == own
        if not rest:
            if bool((is_here & ~is_own).any()) or not straight.take(is_here, term, x_index, None):
                return None
            continue
        parts = ((near, is_here & is_own), (far, is_here & ~is_own))
        if not all(part.take(where, term, x_index, rest[0]) for part, where in parts):
            return None
    return near, far, straight


def _form(far: _Part, own: Tensor, size: int, scale: float) -> str | None:
    d = torch.arange(size)
    for form, is_first, step in (
        (HALVES, d < size // 2, size // 2),
        (NEIGHBOURS, d % 2 == 0, 1),
    ):
        other = torch.where(is_first, d + step, d - step)
        signs = torch.where(is_first, -scale, scale)
        is_partner = bool((far.x_index[..., :size] == own[..., other]).all())
        if is_partner and bool((far.factor[..., :size] == signs).all()):
            return form
    return None


def _angles(part: _Part, size: int) -> tuple[Angles, str] | None:
    """Return where a factor's angles lie and how a head's values share them."""
    fake = fake_of(part.angles)
    if part.angles is None or fake is None or not fake.dtype.is_floating_point:
        return None
    index = part.angle_index[..., :size]
    batch, _, tokens, _ = index.shape
    d = torch.arange(size)
    for mode, taken, width in (
        ("each", d, size),
        (HALVES, d % (size // 2), size // 2),
        (NEIGHBOURS, d // 2, size // 2),
    ):
        offset = int(index[0, 0, 0, 0])
        step = int(index[0, 0, 0, int((taken == 1).nonzero()[0])]) - offset if width > 1 else 1
        for batches, length in itertools.product({1, batch}, {1, tokens}):
            row_size = fake.numel() // (batches * length)
            rows = torch.arange(batch)[:, None] % batches * length + torch.arange(tokens)[None, :] % length
            expected = rows[:, None, :, None] * row_size + offset + taken * step
            if row_size * batches * length == fake.numel() and step > 0 and bool((index == expected).all()):
                return Angles(part.angles, batches, length, width, row_size, offset, step), mode
    return None


def _inner(x: fx.Node, result: fx.Node) -> tuple[fx.Node, ...]:
    """Return the nodes after x that lead from it to the result, in graph order."""
    return tuple(node for node in _between(x, result) if node is not x)
