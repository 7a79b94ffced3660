"""Recognising matrix products by what a graph computes: linear, matmul, `@`, mm, bmm, addmm and two-operand einsum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from agnitra_lab.patch.ops import argument, fake_of, op_name


@dataclass(frozen=True)
class MatMul:
    """One product a @ b + bias in a graph.

    Attributes:
        node: the node whose value is the product.
        a: the left operand, [..., M, K], or [K] beside a matrix.
        b: the right operand: [K, N], [..., K, N] with the leading dimensions of `a`, or with its last two swapped.
        bias: [N], None when nothing is added.
        is_b_transposed: `b` is given as [..., N, K], as `linear` takes its weight.
        num_batches: how many products of one size there are, each with its own `b`.
        num_m, num_n, num_k: sizes of one product.
        turns: the transpositions of `b` that were looked through, in graph order.
    """

    node: fx.Node
    a: fx.Node
    b: fx.Node
    bias: fx.Node | None
    is_b_transposed: bool
    num_batches: int
    num_m: int
    num_n: int
    num_k: int
    turns: tuple[fx.Node, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K) of one product."""
        return self.num_m, self.num_n, self.num_k


def find_products(graph: fx.Graph) -> list[MatMul]:
    """Return every matrix product, in graph order."""
    found = []
    for node in graph.nodes:
        match = match_product(node)
        if match is not None:
            found.append(match)
    return found


def match_product(node: Any) -> MatMul | None:
    """Return the product that a node computes, None when it is none, or one that broadcasts its left operand."""
    name = op_name(node)
    operands: tuple[Any, Any, Any, bool] | None = None
    if name == "linear":
        bias = argument(node, 2, "bias")
        operands = argument(node, 0, "input"), argument(node, 1, "weight"), bias, True
    elif name in ("matmul", "mm", "bmm") and len(node.args) == 2 and not node.kwargs:
        operands = node.args[0], node.args[1], None, False
    elif name == "addmm" and len(node.args) == 3 and all(node.kwargs.get(key, 1) == 1 for key in ("beta", "alpha")):
        operands = node.args[1], node.args[2], node.args[0], False
    elif name == "einsum":
        operands = _einsum(node)
    if operands is None:
        return None
    a, b, bias, is_transposed = operands
    b, turns = _without_transpose(b)
    return _product(node, a, b, bias, is_transposed == (len(turns) % 2 == 0), turns)


def match_half_product(node: Any, least_rows: int) -> MatMul | None:
    """Return the one product of half-precision values that a node computes; None for a batch, or one of fewer rows."""
    product = match_product(node)
    if product is None or product.num_batches != 1 or product.num_m < least_rows:
        return None
    fakes = [fake_of(each) for each in (product.node, product.a, product.b)]
    is_half = all(fake is not None and fake.dtype in (torch.bfloat16, torch.float16) for fake in fakes)
    return product if is_half else None


def _product(
    node: fx.Node, a: Any, b: Any, bias: Any, is_transposed: bool, turns: tuple[fx.Node, ...]
) -> MatMul | None:
    left, right, result, added = fake_of(a), fake_of(b), fake_of(node), fake_of(bias)
    if left is None or right is None or result is None or left.dim() < 1 or right.dim() < 2:
        return None
    if right.dim() > 2 and right.shape[:-2] != left.shape[:-2]:
        return None
    num_k, num_n = int(left.shape[-1]), int(right.shape[-2 if is_transposed else -1])
    if right.shape[-1 if is_transposed else -2] != num_k or result.shape != (*left.shape[:-1], num_n):
        return None
    if bias is not None and (added is None or tuple(added.shape) != (num_n,)):
        return None
    num_batches = math.prod(map(int, right.shape[:-2]))
    num_m = math.prod(map(int, left.shape[:-1])) // max(num_batches, 1)
    return MatMul(node, a, b, bias, is_transposed, num_batches, num_m, num_n, num_k, turns)


def _without_transpose(b: Any) -> tuple[Any, tuple[fx.Node, ...]]:
    """Look through swaps of the last two dimensions of the right operand; return it and them."""
    turns: list[fx.Node] = []
    while isinstance(b, fx.Node) and swaps_last_two(b):
        turns.insert(0, b)
        b = b.args[0]
    return b, tuple(turns)


def swaps_last_two(node: fx.Node) -> bool:
    """Whether a node exchanges the last two dimensions of its argument, and does no more."""
    fake = fake_of(node)
    if fake is None or fake.dim() < 2:
        return False
    name, rank = op_name(node), fake.dim()
    if name in ("t", "matrix_transpose"):
        return name == "matrix_transpose" or rank == 2
    if name in ("transpose", "swapaxes"):
        dims = argument(node, 1, "dim0"), argument(node, 2, "dim1")
        return all(isinstance(dim, int) for dim in dims) and {dim % rank for dim in dims} == {rank - 2, rank - 1}
    if name == "permute":
        given: Any = node.args[1:]
        given = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        order = [*range(rank - 2), rank - 1, rank - 2]
        return all(isinstance(dim, int) for dim in given) and [dim % rank for dim in given] == order
    return False


def _einsum(node: fx.Node) -> tuple[Any, Any, Any, bool] | None:
    """Read an equation such as `bik,kn->bin`, `bik,bkj->bij` or `bik,bjk->bij` as a product."""
    if len(node.args) != 3 or not isinstance(node.args[0], str) or node.kwargs:
        return None
    sides = node.args[0].replace(" ", "").split("->")
    letters = sides[0].split(",")
    if len(sides) != 2 or len(letters) != 2 or not all(part.isalpha() for part in (*letters, sides[1])):
        return None
    left, right, out = letters[0], letters[1], sides[1]
    if any(len(set(part)) != len(part) for part in (left, right, out)) or len(left) < 2 or len(right) < 2:
        return None
    batch = right[:-2] if len(right) > 2 else ""
    for k, n, is_transposed in ((right[-2], right[-1], False), (right[-1], right[-2], True)):
        rows = left[len(batch) : -1]
        is_one_row = not batch or len(rows) == 1
        if left == batch + rows + k and out == batch + rows + n and n not in left and rows and is_one_row:
            return node.args[1], node.args[2], None, is_transposed
    return None
