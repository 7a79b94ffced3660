"""Finding the write of new keys or values into a cache that an attention reads right after it.

Spellings: `cache.index_copy_(2, position, k)`, `cache[:, :, position] = k`, `index_put_`, `cache[:, :, 5:6] = k`, and
`copy_` into such a slice or `narrow`; the cache [B, G, S, D], or [B, S, G, D] and turned for the attention.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from agnitra_lab.patch.ops import argument, fake_of, is_in_place, memory_root, op_name, written_nodes

_WHOLE_NUMBERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class CacheWrite:
    """One write of L slots.

    Attributes:
        cache: the tensor that holds the memory, [B, G, S, D], or [B, S, G, D] with `slot_dim` 1.
        position: [L] whole numbers, or the first slot.
        value: what is written, [B, G, L, D], or [B, L, G, D] with `is_value_turned`.
        node: the write.
        nodes: views between cache, write and attention, the write included.
    """

    cache: fx.Node
    slot_dim: int
    position: fx.Node | int
    value: fx.Node
    is_value_turned: bool
    node: fx.Node
    nodes: tuple[fx.Node, ...]


def find_write(read: fx.Node, call: fx.Node, passed: Collection[fx.Node] = ()) -> CacheWrite | str:
    """Find the write that gives `read`, keys or values [B, G, S, D] of the attention `call`, or say why there is none.

    It is the last one before the call, and nothing else touches the cache between both.

    Args:
        read: as it lies in the cache, before its heads are repeated.
        call: the attention.
        passed: what repeats the heads for the call.
    """
    cache = memory_root(read)
    writes = [node for node in _up_to(call) if any(memory_root(target) is cache for target in written_nodes(node))]
    if not writes:
        return "keys or values do not come out of a cache that the graph writes"
    write = writes[-1]
    path = _path(read, cache)
    target = write.args[0] if write.args else None
    if path is None or not isinstance(target, fx.Node):
        return "the attention reads a part of the cache or a copy of it"
    is_turned, nodes = path
    found = _slots(write, target)
    if found is None:
        return f"a write by {write.target} is not understood"
    view, dim, position, value = found
    target_path, slot_dim = _path(view, cache), 1 if is_turned else 2
    fake, written = fake_of(view), fake_of(value)
    if target_path is None or fake is None or written is None:
        return "the write goes to a part of the cache"
    sizes = [*fake.shape[:dim], written.shape[dim], *fake.shape[dim + 1 :]]
    # Counted in the cache's own dimensions.
    if ({1: 2, 2: 1}.get(dim, dim) if target_path[0] else dim) != slot_dim or list(written.shape) != sizes:
        return "what is written is not one block of slots of the cache"
    if written.dtype != fake.dtype:
        return "what is written is of another dtype than the cache"
    inside = tuple(dict.fromkeys([*nodes, *target_path[1], write, *((target,) if target is not view else ())]))
    if _is_touched(cache, write, call, {*inside, *passed, read}):
        return "the cache is used between its write and the attention"
    return CacheWrite(cache, slot_dim, position, value, dim == 1, write, inside)


def _up_to(call: fx.Node) -> list[fx.Node]:
    nodes = []
    for node in call.graph.nodes:
        if node is call:
            break
        nodes.append(node)
    return nodes


def _path(node: fx.Node, cache: fx.Node) -> tuple[bool, list[fx.Node]] | None:
    """Return whether dimensions 1 and 2 are exchanged between the cache and a view of all of it, and the views."""
    is_turned, nodes = False, []
    while node is not cache:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        name = op_name(node)
        if _is_exchange(node, name):
            is_turned = not is_turned
        elif not (name in ("contiguous", "detach") or (is_in_place(node) and node.args[0] is source)):
            return None
        nodes.append(node)
        node = source
    return is_turned, nodes


def _is_exchange(node: fx.Node, name: str | None) -> bool:
    """Whether a node exchanges dimensions 1 and 2 of four."""
    if name in ("transpose", "swapaxes"):
        return {dim % 4 for dim in node.args[1:] if isinstance(dim, int)} == {1, 2}
    return name == "permute" and _dims(node) == [0, 2, 1, 3]


def _dims(node: fx.Node) -> list[Any]:
    given = node.args[1] if len(node.args) == 2 else node.args[1:]
    return list(given) if isinstance(given, (list, tuple)) else []


def _slots(write: fx.Node, target: fx.Node) -> tuple[fx.Node, int, fx.Node | int, fx.Node] | None:
    """Return the view that is written, its slot dimension, the slots, and the value."""
    name = write.target if write.op == "call_method" else getattr(write.target, "__name__", "")
    if name == "index_copy_":
        dim, index, value = (argument(write, i, key) for i, key in ((1, "dim"), (2, "index"), (3, "source")))
        return _checked(target, dim, index, value)
    if name in ("setitem", "index_put_") and len(write.args) == 3 and not write.kwargs:
        found = _indexed(target, write.args[1])
        return None if found is None else _checked(target, *found, write.args[2])
    if name == "copy_" and len(write.args) == 2:
        base = target.args[0] if target.args else None
        found = _sliced(target)
        return None if found is None or not isinstance(base, fx.Node) else _checked(base, *found, write.args[1])
    return None


def _checked(target: fx.Node, dim: Any, index: Any, value: Any) -> tuple[fx.Node, int, fx.Node | int, fx.Node] | None:
    fake, written = fake_of(target), fake_of(value)
    if fake is None or written is None or not isinstance(dim, int) or fake.dim() != 4 or written.dim() != 4:
        return None
    dim %= 4
    if isinstance(index, fx.Node):
        slots = fake_of(index)
        if slots is None or slots.dtype not in _WHOLE_NUMBERS or slots.numel() != written.shape[dim]:
            return None
        if slots.dim() > 1:
            return None
    return target, dim, index, value


def _indexed(target: fx.Node, index: Any) -> tuple[int, fx.Node | int] | None:
    """Read `target[index] = ...` with one index that is no whole slice: (dimension, slots or first slot)."""
    fake = fake_of(target)
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if fake is None or fake.dim() != 4 or len(items) > 5:
        return None
    dots = [at for at, item in enumerate(items) if item is Ellipsis]
    if len(dots) == 1:
        at = dots[0]
        items[at : at + 1] = [slice(None)] * (5 - len(items))
    found: list[tuple[int, fx.Node | int]] = []
    for dim, item in enumerate(items):
        whole = item is None or (isinstance(item, slice) and _range(item, int(fake.shape[dim])) == (0, fake.shape[dim]))
        if whole:
            continue
        if isinstance(item, fx.Node):
            slots = fake_of(item)
            if slots is None or slots.dim() != 1:
                return None
            found.append((dim, item))
        else:
            span = _range(item, int(fake.shape[dim])) if isinstance(item, slice) else None
            if span is None:
                return None
            found.append((dim, span[0]))
    return found[0] if len(found) == 1 else None


def _range(item: slice, size: int) -> tuple[int, int] | None:
    """Return the numbers of a slice of step 1, None for one that the graph computes."""
    if any(isinstance(part, fx.Node) for part in (item.start, item.stop, item.step)):
        return None
    start, stop, step = item.indices(size)
    return (start, stop) if step == 1 and stop > start else None


def _sliced(node: fx.Node) -> tuple[int, fx.Node | int] | None:
    """Read a slice of one dimension as (dimension, first slot)."""
    base = node.args[0] if node.args else None
    if not isinstance(base, fx.Node):
        return None
    if op_name(node) == "narrow":
        dim, start = argument(node, 1, "dim"), argument(node, 2, "start")
        return (dim, start) if isinstance(dim, int) and isinstance(start, int) and start >= 0 else None
    if op_name(node) == "getitem":
        found = _indexed(base, node.args[1])
        # An index that is a tensor makes a copy, not a view.
        return found if found is not None and isinstance(found[1], int) else None
    return None


def _is_touched(cache: fx.Node, write: fx.Node, call: fx.Node, known: Collection[fx.Node]) -> bool:
    """Whether a node between the write and the attention, other than its own, reads or writes the cache."""
    node = write.next
    while node is not call:
        if node not in known and any(memory_root(source) is cache for source in node.all_input_nodes):
            return True
        node = node.next
    # A copy on the way that others read too would be taken before the write, once that moves to the attention.
    return any(
        op_name(view) in ("contiguous", "expand", "reshape", "flatten", "repeat_interleave")
        and any(user not in known and user is not call for user in view.users)
        for view in known
    )
