"""The cross-entropy of a head's logits becomes one kernel with the head, and the logits are never in memory.

Trigger: a loss as `cross_entropy` finds it (F.cross_entropy, nll_loss of a log_softmax, -gather of one) over a product
with a weight in any spelling; between them casts that widen, views that merge tokens, and slices of tokens such as the
shift `logits[..., :-1, :]`, which are then taken of x.
Rule: fusing saves one write and one read of the logits, 367 / K of the product's time on an H200 (790 TFLOP/s, 4.3
TB/s), and its product is expected to reach 0.85 of the library's: from K = 3072 on the library's is the faster way.
Algebra: the same sums in fp32; the logits are not rounded to x's dtype on the way.
Guard: bfloat16 or float16, nobody else reads the logits, nothing is written in between, int64 classes without weights.
A weight that lies [K, V] is kept turned, and follows its source.
Source: Wijmans et al., arXiv 2411.09009; Liger Kernel (Hsu et al., arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.emit import emit
from agnitra_lab.patch.matmuls import MatMul, match_product
from agnitra_lab.patch.ops import fake_of, is_widening, op_name
from agnitra_lab.patch.rewrites.cross_entropy import Loss, match_loss
from agnitra_lab.patch.rewrites.last_token_head import is_row_index
from agnitra_lab.patch.rows import has_same_rows, is_written, merges_rows, rank
from agnitra_lab.patch.weights import why_not_derivable

ACTION = "linear_cross_entropy"
_DTYPES = (torch.bfloat16, torch.float16)
_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_K = 3072
_FEW_TOKENS = 256


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each loss with its head by the kernel.

    Returns:
        One descriptor per loss.
    """
    descriptors = []
    num_found = 0
    for node in list(graph_module.graph.nodes):
        found = match_loss(node)
        head = _head_of(found) if isinstance(found, Loss) else None
        if not isinstance(found, Loss) or head is None:
            continue
        num_found += 1
        chain, product = head
        problem = _why_not(found, chain, product, context)
        if problem:
            context.refuse(ACTION, problem)
            continue
        fake, x = fake_of(found.x), fake_of(product.a)
        assert fake is not None and x is not None
        shape = (fake.numel() // product.num_n, product.num_k, product.num_n)
        kernel = context.kernel(ACTION, shape, x.dtype)
        if kernel is not None:
            descriptors.append(_replace(found, chain, product, kernel, context))
    if not num_found:
        context.refuse(ACTION, "the graph has no cross-entropy of a product's rows")
    return descriptors


def _head_of(found: Loss) -> tuple[list[fx.Node], MatMul] | None:
    """Return the nodes between the loss and the product whose rows it reads, the loss's own first, and the product."""
    chain: list[fx.Node] = []
    node: Any = found.x
    if found.class_dim != rank(node) - 1:
        # Classes in the middle were brought there by a turn of a product's result.
        if op_name(node) not in ("transpose", "swapaxes", "matrix_transpose") or rank(node) != 3:
            return None
        chain.append(node)
        node = node.args[0]
    while (product := match_product(node)) is None:
        if not isinstance(node, fx.Node) or not (is_widening(node) or _keeps_classes(node)):
            return None
        chain.append(node)
        node = node.args[0]
    return chain, product


def _keeps_classes(node: fx.Node) -> bool:
    """Whether a node reads rows of its first argument, whole and unchanged."""
    is_index = isinstance(node.args[0], fx.Node) and is_row_index(node, node.args[0]) if node.args else False
    return merges_rows(node) or (is_index and has_same_rows(node) and len(node.all_input_nodes) == 1)


def _why_not(found: Loss, chain: Sequence[fx.Node], product: MatMul, context: RewriteContext) -> str | None:
    x, weight, logits, result = (fake_of(node) for node in (product.a, product.b, found.x, found.result))
    if x is None or weight is None or logits is None or result is None:
        return "shapes are not known"
    if x.dtype not in _DTYPES or weight.dtype != x.dtype or product.node.meta["example_value"].dtype != x.dtype:
        return f"the product is of {x.dtype} and {weight.dtype}, and the kernel multiplies bfloat16 or float16"
    if result.dtype not in _OUT_DTYPES or logits.dtype not in _OUT_DTYPES:
        return f"the loss is computed in {logits.dtype} and given in {result.dtype}"
    if any(len(node.users) != 1 for node in (product.node, *chain)):
        return "the logits are read elsewhere too"
    if is_written([product.a, product.b, found.target, product.node, *chain], product.node, found.result):
        return "the logits, or what they are made of, are written in between"
    num_tokens = logits.numel() // product.num_n
    if weight.dim() != 2 or product.num_k % 8 or num_tokens < 1:
        return "the head is no matrix with rows of a multiple of 16 bytes"
    if product.num_k > _LARGEST_K and num_tokens > _FEW_TOKENS:
        return f"with {product.num_k} columns the library's product is faster than what fusing saves"
    if not product.is_b_transposed:
        problem = why_not_derivable([context.real_tensor(product.b)])
        if problem or not context.is_weight(product.b):
            return problem or "the weight lies [K, V] and is no Parameter, so no turned copy can be kept"
    elif weight.stride(1) != 1 or weight.stride(0) % 8:
        return "the weight's rows are not contiguous"
    return _why_not_bias(product, x)


def _why_not_bias(product: MatMul, x: Tensor) -> str | None:
    bias = fake_of(product.bias)
    if bias is not None and (bias.stride(0) != 1 or bias.dtype not in (x.dtype, torch.float32)):
        return "the bias is not one contiguous value a class"
    return None


def _replace(
    found: Loss, chain: Sequence[fx.Node], product: MatMul, kernel: Kernel, context: RewriteContext
) -> PatchDescriptor:
    at, result = found.result, fake_of(found.result)
    assert result is not None
    gone = [*product.turns, product.node, *reversed(chain), *(node for node in found.nodes if node not in chain)]
    logits = fake_of(found.x)
    assert logits is not None
    shape = (logits.numel() // product.num_n, product.num_k, product.num_n)
    config: dict[str, JsonValue] = {"kernel": kernel.config.key(), "shape": list(shape)}
    config |= {"has_bias": product.bias is not None, **found.rules}
    descriptor = context.describe(ACTION, at, gone, f"kernel {kernel.name}", config, kernel.content_hash)
    rows = _rows(chain, product, at, context)
    tokens = tuple(int(size) for size in rows.meta["example_value"].shape[:-1])
    target = emit(context, at, torch.squeeze, found.target, -1) if found.is_gather else found.target
    if tuple(target.meta["example_value"].shape) != tokens:
        target = emit(context, at, torch.reshape, target, tokens)
    weight = product.b if product.is_b_transposed else context.derive(ACTION, [product.b], _turn, at)
    loss = context.call(at, kernel.call, rows, weight, target, product.bias, **found.rules, out_dtype=result.dtype)
    loss.meta["example_value"] = result
    if found.rules["reduction"] == "none":
        loss.meta["example_value"] = result.new_empty(tokens)
        loss = emit(context, at, torch.neg, loss) if found.is_gather else loss
        if tuple(result.shape) != tokens:
            loss = emit(context, at, torch.reshape, loss, tuple(int(size) for size in result.shape))
    at.replace_all_uses_with(loss)
    erase_unused(gone)
    return descriptor


def _turn(weight: Tensor) -> Tensor:
    return weight.t()


def _rows(chain: Sequence[fx.Node], product: MatMul, before: fx.Node, context: RewriteContext) -> fx.Node:
    """Take of x the rows that the loss reads of the product, as the loss has them."""
    value = product.a
    for node in reversed(chain):
        fake = fake_of(node)
        assert fake is not None
        if op_name(node) in ("view", "reshape", "flatten"):
            value = emit(
                context, before, torch.reshape, value, (*(int(size) for size in fake.shape[:-1]), product.num_k)
            )
        elif op_name(node) in ("getitem", "select", "narrow"):
            value = context.again(before, node, value)
    return value
