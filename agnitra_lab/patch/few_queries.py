"""Attention of a few queries over many keys as graphs call it: what a kernel can take, and heads repeated for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.patch.layouts import is_dense
from agnitra_lab.patch.ops import argument, fake_of, is_written_between, memory_root, op_name

MAX_QUERIES = 4
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = (None, None, None, None, 0.0, False, None, False)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a `scaled_dot_product_attention` by name."""
    return {name: argument(node, index, name, _DEFAULTS[index]) for index, name in enumerate(_NAMES)}


def site(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """Return (batch, key/value heads, query rows a key/value head, keys, head size)."""
    batch, num_heads, num_queries, head_size = (int(size) for size in q.shape)
    num_kv_heads, num_keys = int(k.shape[1]), int(k.shape[2])
    return batch, num_kv_heads, num_heads // num_kv_heads * num_queries, num_keys, head_size


def why_not(node: fx.Node, arguments: dict[str, Any]) -> str | None:
    """Say why a kernel cannot take this call, None when it can."""
    q, k, v, out = (fake_of(part) for part in (arguments["query"], arguments["key"], arguments["value"], node))
    if q is None or k is None or v is None or out is None:
        return "query, key or value is not a tensor of known shape"
    if not q.dim() == k.dim() == v.dim() == 4 or 0 in (*q.shape, *k.shape):
        return "query, key and value do not have four dimensions"
    if q.shape[2] > MAX_QUERIES:
        return f"attention has more than {MAX_QUERIES} queries"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        return f"query, key and value are not of one floating dtype ({q.dtype}, {k.dtype}, {v.dtype})"
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        return "key and value differ in shape, or their heads do not divide the query's"
    if arguments["dropout_p"] != 0.0 or arguments["is_causal"] is not False:
        return "attention has dropout, or is_causal, which hides all keys but the first few from so few queries"
    if isinstance(arguments["scale"], fx.Node) or isinstance(arguments["enable_gqa"], fx.Node):
        return "scale or enable_gqa is computed in the graph"
    if any(tensor.stride(3) != 1 for tensor in (q, k, v, out)) or not is_dense(out):
        return "the head dimension is not contiguous"
    return _why_not_mask(arguments["attn_mask"], q, k)


def _why_not_mask(mask: Any, q: Tensor, k: Tensor) -> str | None:
    if mask is None:
        return None
    fake = fake_of(mask)
    if fake is None or fake.dtype not in (torch.bool, q.dtype) or fake.dim() > 4:
        return "the mask is not a boolean tensor or one of the query's dtype"
    wanted = (*q.shape[:3], k.shape[2])[4 - fake.dim() :]
    if any(size not in (1, full) for size, full in zip(fake.shape, wanted, strict=True)):
        return "the mask does not broadcast to the scores"
    return None


def unrepeated(node: fx.Node, call: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Return the heads that were repeated in blocks to give `node`, and the nodes of the repetition."""
    found = _repeated_by_interleave(node) or _repeated_by_expand(node)
    if found is None:
        return node, ()
    source, nodes = found
    fake, repeated = fake_of(source), fake_of(node)
    if fake is None or repeated is None or fake.dim() != 4 or fake.stride(3) != 1 or repeated.shape[1] % fake.shape[1]:
        return node, ()
    if (fake.shape[0], *fake.shape[2:]) != (repeated.shape[0], *repeated.shape[2:]):
        return node, ()
    # The repetition is a copy: a later write of the source must not show.
    return (node, ()) if is_written_between(memory_root(source), nodes[0], call) else (source, nodes)


def _repeated_by_interleave(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    if op_name(node) != "repeat_interleave" or not isinstance(argument(node, 1, "repeats"), int):
        return None
    source = node.args[0] if node.args else None
    is_of_heads = argument(node, 2, "dim") in (1, -3)
    return (source, (node,)) if isinstance(source, fx.Node) and is_of_heads else None


def _repeated_by_expand(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """Match x[:, :, None].expand(b, g, n, s, d).reshape(b, g * n, s, d), with unsqueeze(2) for the index too."""
    if op_name(node) not in ("reshape", "flatten", "view") or not node.args:
        return None
    expanded: Any = node.args[0]
    if op_name(expanded) != "expand":
        return None
    widened: Any = expanded.args[0]
    if len(shape(widened)) != 5 or len(shape(expanded)) != 5:
        return None
    is_widening = op_name(widened) == "unsqueeze" and argument(widened, 1, "dim") in (2, -3)
    if op_name(widened) == "getitem" and isinstance(widened.args[1], tuple):
        index: Any = widened.args[1]
        is_widening = index[:3] == (slice(None), slice(None), None) and all(
            item == slice(None) or item is Ellipsis for item in index[3:]
        )
    source = widened.args[0]
    shapes = [shape(part) for part in (source, widened, expanded)]
    if not is_widening or not isinstance(source, fx.Node) or (*shapes[0][:2], 1, *shapes[0][2:]) != shapes[1]:
        return None
    return (source, (widened, expanded, node)) if shapes[2][:2] == shapes[0][:2] else None


def shape(node: Any) -> tuple[int, ...]:
    """Return a node's shape, () where it is not known."""
    fake = fake_of(node)
    return tuple(int(size) for size in fake.shape) if fake is not None else ()
