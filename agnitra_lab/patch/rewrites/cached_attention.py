"""One decoding step of attention becomes one kernel: norms and rotation of q and k, the cache's new slots, attention.

Trigger: `scaled_dot_product_attention` with at most 4 queries whose keys and values are a cache that the graph writes
just before (`patch.cache_writes`). A rotation of pairs before it is taken along (`patch.rotary`: halves or neighbours,
the whole head or its first part), and an RMSNorm of each query and key head before that.
Algebra: as `decode_attention`; the part of the keys that a new slot lies in takes the new key from registers.
Guard: q and k turn alike by the same angles, nothing else touches the caches between write and attention, nothing that
the kernel reads is written in between; the caches get their slots and no other element.
Source: Su et al., RoFormer, arXiv 2104.09864; Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import JsonValue
from torch import fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.cache_writes import CacheWrite, find_write
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.emit import emit
from agnitra_lab.patch.few_queries import arguments_of, site, unrepeated, why_not
from agnitra_lab.patch.norms import RMSNorm, find_rms_norms
from agnitra_lab.patch.ops import fake_of, is_cast, is_widening, memory_root, op_name, written_nodes
from agnitra_lab.patch.rotary import NONE, Angles, Rotary, find_rotary

ACTION = "cached_attention"
INDUCTOR_OPTIONS = {"score_fusion_memory_threshold": 8}
"""The rows of cos and sin at a new token's position become one kernel: the 8 bytes of the position are all that they
share, and Inductor leaves kernels apart that share less than 10. Where little else is Inductor's, launches are it."""
_LAYOUTS = ("transpose", "permute", "swapaxes", "contiguous")
_LARGEST_STEP = 64


@dataclass(frozen=True)
class _Head:
    """Queries or keys before norm and rotation.

    Attributes:
        source: the tensor; `views` make [B, H, L, D] of it.
        norm: of each head, None for none.
    """

    source: fx.Node
    views: tuple[fx.Node, ...]
    is_turned: bool
    norm: RMSNorm | None
    rotary: Rotary
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Step:
    """Everything of one decoding step of attention."""

    call: fx.Node
    arguments: dict[str, Any]
    query: _Head
    key: _Head
    writes: tuple[CacheWrite, CacheWrite]
    repeated: tuple[fx.Node, ...]


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each decoding step of attention.

    Returns:
        One descriptor per step.
    """
    descriptors = []
    calls = [node for node in graph_module.graph.nodes if op_name(node) == "sdpa"]
    if not calls:
        context.refuse(ACTION, "the graph has no scaled_dot_product_attention")
        return []
    norms = {norm.result: norm for norm in find_rms_norms(graph_module.graph)}
    for node in calls:
        step = _find(node, norms)
        if isinstance(step, str):
            context.refuse(ACTION, step)
            continue
        q, cache = fake_of(step.arguments["query"]), fake_of(step.writes[0].cache)
        assert q is not None and cache is not None
        cache = cache.transpose(1, 2) if step.writes[0].slot_dim == 1 else cache
        kernel = context.kernel(ACTION, site(q, cache), q.dtype)
        if kernel is not None:
            descriptors.append(_replace(step, kernel, context))
    return descriptors


def _find(node: fx.Node, norms: dict[fx.Node, RMSNorm]) -> _Step | str:
    arguments = arguments_of(node)
    problem = why_not(node, arguments)
    if problem:
        return problem
    writes, repeated = [], []
    for name in ("key", "value"):
        read, passed = _without_copies(arguments[name], node)
        write = find_write(read, node, passed)
        if isinstance(write, str):
            return write
        writes.append(write)
        repeated += passed
    k_write, v_write = writes
    if any(write.cache.op not in ("placeholder", "get_attr") for write in writes):
        return "the cache is made in the graph itself"
    if k_write.cache is v_write.cache or k_write.slot_dim != v_write.slot_dim:
        return "keys and values lie in one cache, or in two of different layouts"
    if k_write.position != v_write.position:
        return "keys and values are written at different positions"
    query = _head(arguments["query"], norms, False)
    key_head = _head(k_write.value, norms, k_write.is_value_turned)
    if isinstance(query, str) or isinstance(key_head, str):
        return f"queries: {query}" if isinstance(query, str) else f"keys: {key_head}"
    step = _Step(node, arguments, query, key_head, (k_write, v_write), tuple(repeated))
    return _why_not(step) or step


def _without_copies(node: fx.Node, call: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return keys or values before their heads are repeated and laid out anew, and what does that."""
    copies: list[fx.Node] = []
    while op_name(node) == "contiguous" and isinstance(node.args[0], fx.Node):
        copies.append(node)
        node = node.args[0]
    source, repeated = unrepeated(node, call)
    return source, [*repeated, *copies]


def _head(result: fx.Node, norms: dict[fx.Node, RMSNorm], is_turned: bool) -> _Head | str:
    """Find what is rotated to give queries or keys, and the norm before that."""
    rotary = find_rotary(result, frozenset(norms), is_result_turned=is_turned)
    if isinstance(rotary, str):
        return rotary
    wanted = fake_of(result)
    assert wanted is not None
    source, nodes = rotary.x, list(rotary.nodes)
    while is_widening(source) and isinstance(source.args[0], fx.Node) and source not in norms:
        nodes.append(source)
        source = source.args[0]
    norm, views = _norm_of(source, wanted, norms)
    if norm is not None:
        source = norm.x
        nodes += [*views, *norm.nodes]
    fake = fake_of(source)
    if fake is None or fake.dtype != wanted.dtype:
        return f"the rotation starts from another dtype than {wanted.dtype}"
    return _Head(source, tuple(reversed(views)), rotary.is_turned, norm, rotary, tuple(nodes))


def _norm_of(
    source: fx.Node, wanted: torch.Tensor, norms: dict[fx.Node, RMSNorm]
) -> tuple[RMSNorm | None, list[fx.Node]]:
    """Return the norm of heads of `wanted` that gives a value through layouts, and those, the last one first."""
    passed: list[fx.Node] = []
    while op_name(source) in _LAYOUTS and isinstance(source.args[0], fx.Node) and source not in norms:
        passed.append(source)
        source = source.args[0]
    norm = norms.get(source)
    if norm is None:
        return None, []
    x, result, weight = fake_of(norm.x), fake_of(norm.result), fake_of(norm.weight)
    if x is None or result is None or weight is None or x.dim() != 4:
        return None, []
    is_of_heads = tuple(weight.shape) == (wanted.shape[3],) and weight.is_contiguous()
    return (norm, passed) if is_of_heads and x.dtype == wanted.dtype and x.shape == result.shape else (None, [])


def _why_not(step: _Step) -> str | None:
    query, key = step.query.rotary, step.key.rotary
    is_alike = (query.form, query.size, query.mode) == (key.form, key.size, key.mode)
    if not is_alike or not _is_same_angles(query.cos, key.cos) or not _is_same_angles(query.sin, key.sin):
        return "queries and keys do not turn by the same angles"
    if key.scale != 1.0:
        return "the rotated keys are scaled"
    for node in (step.query.source, step.key.source, step.writes[1].value):
        fake = fake_of(node)
        if fake is None or fake.stride(-1) != 1:
            return "the head dimension of queries, keys or values is not contiguous"
    return _why_not_still(step)


def _is_same_angles(left: Angles | None, right: Angles | None) -> bool:
    if left is None or right is None:
        return left is right
    return replace(left, node=right.node) == right and _is_same(left.node, right.node)


def _is_same(left: Any, right: Any, depth: int = _LARGEST_STEP) -> bool:
    """Whether two nodes give the same value because they do the same, by views and casts, to one node."""
    if left is right:
        return True
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or not depth:
        return not isinstance(left, fx.Node) and not isinstance(right, fx.Node) and left == right
    is_one_op = left.op == right.op and left.target == right.target and left.kwargs == right.kwargs
    is_view = op_name(left) in ("getitem", "view", "reshape", "unsqueeze", "select", "narrow", "chunk", "transpose")
    if not is_one_op or not (is_view or is_cast(left)) or len(left.args) != len(right.args):
        return False
    return all(_is_same(a, b, depth - 1) for a, b in zip(left.args, right.args, strict=True))


def _inputs(step: _Step) -> list[fx.Node]:
    """Return every node that the kernel reads, beside the caches."""
    heads = (step.query, step.key)
    angles = [part.node for head in heads for part in (head.rotary.cos, head.rotary.sin) if part is not None]
    weights = [head.norm.weight for head in heads if head.norm is not None]
    given = [head.source for head in heads] + [step.writes[1].value, *angles, *weights]
    given += [node for node in (step.arguments["attn_mask"], step.writes[0].position) if isinstance(node, fx.Node)]
    return given


def _why_not_still(step: _Step) -> str | None:
    """Everything moves to where the attention stands: what it reads must be the same there."""
    own = {write.node for write in step.writes}
    inner = {*step.query.nodes, *step.key.nodes}
    roots = {memory_root(node) for node in (*_inputs(step), *inner)}
    if roots & {memory_root(write.cache) for write in step.writes}:
        return "the cache itself is rotated or masks the scores"
    order = {node: index for index, node in enumerate(step.call.graph.nodes)}
    first = min(order[node] for node in (*inner, *own, step.call))
    for node, index in order.items():
        is_between = first <= index < order[step.call] and node not in own
        if is_between and any(memory_root(target) in roots for target in written_nodes(node)):
            return "something that the step reads is written before the attention"
    return None


def _replace(step: _Step, kernel: Kernel, context: RewriteContext) -> PatchDescriptor:
    node, (k_write, v_write) = step.call, step.writes
    q, out, cache = fake_of(step.arguments["query"]), fake_of(node), fake_of(k_write.cache)
    assert q is not None and out is not None and cache is not None
    order = {item: index for index, item in enumerate(node.graph.nodes)}
    inside = {*step.query.nodes, *step.key.nodes, *step.repeated, *k_write.nodes, *v_write.nodes, node}
    gone = sorted(inside, key=lambda item: order[item])
    config: dict[str, JsonValue] = {
        "kernel": kernel.config.key(),
        "shape": list(site(q, cache.transpose(1, 2) if k_write.slot_dim == 1 else cache)),
        "form": step.query.rotary.form,
        "rotary": step.query.rotary.size,
        "has_norms": [head.norm is not None for head in (step.query, step.key)],
        "has_mask": step.arguments["attn_mask"] is not None,
        "is_repetition_dropped": bool(step.repeated),
    }
    descriptor = context.describe(ACTION, node, gone, f"kernel {kernel.name}", config, kernel.content_hash)
    call = context.call(node, _writing(kernel.call), *_tensors(step, context), **_options(step, out))
    call.meta["example_value"] = out
    node.replace_all_uses_with(call)
    for write in step.writes:
        write.node.replace_all_uses_with(_target(write))
    # In-place writes count as used by what they write: they go by name.
    erase_unused(gone)
    return descriptor


def _target(write: CacheWrite) -> fx.Node:
    target = write.node.args[0]
    assert isinstance(target, fx.Node)
    return target


def _writing(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel's call as a function that says that it writes, for rewrites after this one."""

    def cached_attention_(*tensors: Any, **options: Any) -> Any:
        return call(*tensors, **options)

    cached_attention_.__wrapped__ = call  # type: ignore[attr-defined]
    cached_attention_._schema = _MutableSchema()  # type: ignore[attr-defined]
    return cached_attention_


class _MutableSchema:
    """What `patch.ops` and torch.fx ask of an operator's schema: whether a call may write its arguments."""

    is_mutable = True


def _tensors(step: _Step, context: RewriteContext) -> list[Any]:
    """Emit the views that the kernel takes, in front of the attention, and return its tensors in order."""
    node = step.call
    heads = [_viewed(head, node, context) for head in (step.query, step.key)]
    value = step.writes[1].value
    if step.writes[1].is_value_turned:
        value = emit(context, node, torch.transpose, value, 1, 2)
    rotary, position = step.query.rotary, step.writes[0].position
    angles = [None if part is None else _rows(part, node, context) for part in (rotary.cos, rotary.sin)]
    caches = [write.cache for write in step.writes]
    positions = position if isinstance(position, fx.Node) else None
    return [*heads, value, *caches, positions, step.arguments["attn_mask"], *angles]


def _rows(angles: Angles, node: fx.Node, context: RewriteContext) -> fx.Node:
    rows = emit(context, node, torch.reshape, angles.node, (angles.batches, angles.tokens, angles.row_size))
    if angles.width == angles.row_size:
        return rows
    end = angles.offset + (angles.width - 1) * angles.step + 1
    index = (slice(None), slice(None), slice(angles.offset, end, angles.step))
    return emit(context, node, operator.getitem, rows, index)


def _viewed(head: _Head, node: fx.Node, context: RewriteContext) -> fx.Node:
    source = head.source
    for view in head.views:
        source = context.again(node, view, source)
    return emit(context, node, torch.transpose, source, 1, 2) if head.is_turned else source


def _options(step: _Step, out: torch.Tensor) -> dict[str, Any]:
    query, rotary, position = step.query, step.query.rotary, step.writes[0].position
    scale = step.arguments["scale"]
    if rotary.scale != 1.0:
        scale = rotary.scale * (out.shape[3] ** -0.5 if scale is None else scale)
    options: dict[str, Any] = {"scale": scale, "out_stride": tuple(int(stride) for stride in out.stride())}
    if step.writes[0].slot_dim == 1:
        options["slot_dim"] = 1
    if not isinstance(position, fx.Node):
        options["first_position"] = position
    if rotary.form != NONE:
        options |= {"form": rotary.form, "rotary": rotary.size, "angles": rotary.mode}
    norms = (query.norm, step.key.norm)
    if any(norms):
        options |= {
            f"{name}_weight": norm.weight for name, norm in zip(("q", "k"), norms, strict=True) if norm is not None
        }
        options["eps"] = tuple(norm.eps if norm is not None else 0.0 for norm in norms)
    return options
