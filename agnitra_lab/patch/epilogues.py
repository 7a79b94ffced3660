"""What follows a product and can be computed where its result still lies in registers: gate, activation, residual."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from agnitra_lab.patch.ops import argument, binary, fake_of, op_name
from agnitra_lab.patch.products import over_views


@dataclass
class Epilogue:
    """The steps after a product, in the order of the kernel.

    Attributes:
        final: the node whose value the kernel gives.
        nodes: what goes away besides the product, in graph order; `final` is among them unless nothing follows.
        activation: "none", "relu", "gelu", "gelu_tanh", "silu" or "sigmoid".
        gate: "none", or which half of the product's columns the activation is for: "gate_first", "up_first".
        residual: what is added last.
    """

    final: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    activation: str = "none"
    gate: str = "none"
    residual: fx.Node | None = None

    def take(self, node: fx.Node, passed: list[fx.Node]) -> None:
        """Move the end of the chain to `node`, over the views in between."""
        self.nodes += [*passed, node]
        self.final = node


def find_epilogue(product: fx.Node) -> Epilogue:
    """Follow a product's result as far as one kernel goes: [gate or activation] [residual]."""
    found = Epilogue(product)
    if not _take_gate(found):
        _take_activation(found)
    _take_residual(found)
    return found


def _take_gate(found: Epilogue) -> bool:
    value, passed = over_views(found.final)
    halves = _halves(value)
    if halves is None:
        return False
    first, second, pieces = halves
    for gate, up, name in ((first, second, "gate_first"), (second, first, "up_first")):
        for product in up.users:
            operands = binary(product, "mul")
            other = next((node for node in operands or () if node is not up), None)
            activation = activation_of(other)
            if activation is None or activation[1] is not gate or list(up.users) != [product]:
                continue
            kind, _, inner = activation
            if set(gate.users) <= {*inner, product} and all(set(node.users) <= {*inner, product} for node in inner):
                found.nodes += [*passed, *pieces, *inner]
                found.take(product, [])
                found.activation, found.gate = kind, name
                return True
    return False


def _halves(value: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """Return both halves of the last dimension when they are all that is read of a value, and the nodes on the way."""
    fake = fake_of(value)
    if fake is None or fake.dim() < 1 or fake.shape[-1] % 2:
        return None
    half, starts = int(fake.shape[-1]) // 2, {}
    users = list(value.users)
    if len(users) == 1 and op_name(users[0]) in ("chunk", "split", "tensor_split", "unbind"):
        whole, users = users[0], list(users[0].users)
        starts = {user: _start_of_part(user, whole) for user in users}
        nodes = [whole, *users]
    else:
        starts = {user: _start_of_slice(user, fake.dim()) for user in users}
        nodes = users
    by_start = {start: user for user, start in starts.items()}
    widths = [fake_of(user) for user in users]
    if len(users) != 2 or set(by_start) != {0, half}:
        return None
    if any(width is None or (*width.shape,) != (*fake.shape[:-1], half) for width in widths):
        return None
    return by_start[0], by_start[half], nodes


def _start_of_part(part: fx.Node, whole: fx.Node) -> int | None:
    """Return the column where a getitem of chunk or split begins, None when it is none of the last dimension."""
    fake, source = fake_of(part), fake_of(whole.args[0])
    if op_name(part) != "getitem" or fake is None or source is None or not isinstance(part.args[1], int):
        return None
    if argument(whole, 2, "dim", 0) not in (-1, source.dim() - 1):
        return None
    return part.args[1] % 2 * int(fake.shape[-1])


def _start_of_slice(piece: fx.Node, num_dims: int) -> int | None:
    """Return the column where a narrow or a slice of the last dimension begins, None for any other node."""
    if op_name(piece) == "narrow" and argument(piece, 1, "dim") in (-1, num_dims - 1):
        start = argument(piece, 2, "start")
        return start if isinstance(start, int) else None
    if op_name(piece) != "getitem" or not isinstance(piece.args[1], tuple) or not piece.args[1]:
        return None
    *leading, last = piece.args[1]
    is_whole = all(item is Ellipsis or item == slice(None) for item in leading)
    reaches = num_dims == len(leading) + 1 or Ellipsis in leading
    if not is_whole or not reaches or not isinstance(last, slice) or last.step not in (None, 1):
        return None
    return (last.start or 0) if isinstance(last.start, (int, type(None))) else None


def activation_of(node: Any) -> tuple[str, fx.Node, list[fx.Node]] | None:
    """Return (name, argument, nodes) of an activation in one of its spellings, None for anything else."""
    name = op_name(node)
    if name in ("relu", "gelu", "silu", "sigmoid"):
        source = argument(node, 0, "input")
        if node.kwargs.get("inplace") or not isinstance(source, fx.Node) or (name != "gelu" and len(node.args) > 1):
            return None
        kinds = {"none": "gelu", "tanh": "gelu_tanh"}
        kind = kinds.get(node.kwargs.get("approximate", "none")) if name == "gelu" else name
        return (kind, source, [node]) if kind and len(node.args) <= 1 else None
    operands = binary(node, "mul")
    for own, other in (operands, operands[::-1]) if operands else ():
        if isinstance(own, fx.Node) and op_name(other) == "sigmoid" and other.args[:1] == (own,):
            return "silu", own, [other, node]
    return None


def _take_activation(found: Epilogue) -> None:
    value, passed = over_views(found.final)
    for user in value.users:
        activation = activation_of(user)
        if activation is None or activation[1] is not value:
            continue
        kind, _, nodes = activation
        if set(value.users) <= set(nodes) and all(set(node.users) <= set(nodes) for node in nodes[:-1]):
            found.activation = kind
            found.nodes += [*passed, *nodes[:-1]]
            found.take(nodes[-1], [])
            return


def _take_residual(found: Epilogue) -> None:
    value, passed = over_views(found.final)
    users = list(value.users)
    operands = binary(users[0], "add") if len(users) == 1 else None
    if operands is None:
        return
    other = operands[1] if operands[0] is value else operands[0]
    fakes = [fake_of(node) for node in (value, other, users[0])]
    if other is value or any(fake is None for fake in fakes):
        return
    if len({(tuple(fake.shape), fake.dtype, fake.device) for fake in fakes if fake is not None}) == 1:
        found.residual = other
        found.take(users[0], passed)
