"""ReLU and GELU after a product are applied by the matrix library itself, to its fp32 sums.

Trigger: an activation of linear(x, W, b), with or without a bias, in any spelling of product and activation
(`pointwise_chains`), of half-precision values; nothing else reads the product.
Algebra: the same function, rounded once where eager rounds after each step. The library's one GELU is that by tanh,
which is within 4.8e-4 of that by erf. In bf16 that is less than what is not rounded any more: over normal values of
deviations 0.3 to 4 the error of erf's GELU falls from 2.6e-3 of its size (1.8e-3 at 4) to 1.7e-3, and erf itself in
the same place would be at 1.66e-3. In fp16, with an eighth of the rounding, GELU by erf stays.
Guard: W is no value of the graph's, its sides are multiples of 8; something other than pointwise ops reads the result,
with which the compiler would fuse the activation. Both forms are measured on random tensors, each distinct product
once: this one must give the same values, be as near to fp64, and be more than 3% faster. It spares a read and a write
of the widest values of a transformer's MLP.
Source: cuBLASLt's epilogues CUBLASLT_EPILOGUE_RELU_BIAS and CUBLASLT_EPILOGUE_GELU_BIAS; Hendrycks and Gimpel,
"Gaussian Error Linear Units", 2016, arXiv 1606.08415, for GELU by tanh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.library import custom_op
from torch.nn import functional

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.device.call_time import time_ms
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.convolutions import random_like, real_tensors
from agnitra_lab.patch.matmuls import MatMul, match_half_product
from agnitra_lab.patch.measured import Measured, Times, layouts_of
from agnitra_lab.patch.neighbours import is_read_by_pointwise_alone
from agnitra_lab.patch.ops import fake_of, mutated_roots
from agnitra_lab.patch.pointwise_chains import Chain, find_chain
from agnitra_lab.patch.products import is_plain, is_static, over_views
from agnitra_lab.patch.weights import why_not_derivable

ACTION = "activation_gemm"
_LEAST_ROWS = 17
"""Products of fewer rows are `skinny_gemm`'s, which applies activations too."""
_MULTIPLE = 8
"""Weights of other widths are `padded_linear`'s."""


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu_tanh": _gelu_tanh,
    "gelu": functional.gelu,
}
_CHECKED_ROWS = 512


# Opaque to Inductor, which takes the library's call apart into a product and a pointwise kernel.
@custom_op("agnitra::activation_gemm", mutates_args=())
def activated_product(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool, activation: str) -> Tensor:
    """Multiply, add a bias and activate.

    Args:
        x: [..., K].
        weight: [N, K] where it is transposed, as `linear` takes it, else [K, N].
        bias: [N].
        is_transposed: which of the two.
        activation: a key of `_ACTIVATIONS`; on a CUDA device "gelu" is computed as "gelu_tanh" is.

    Returns:
        [..., N].
    """
    rows, columns = x.reshape(-1, x.shape[-1]), weight.t() if is_transposed else weight
    added = bias if bias is not None else x.new_zeros(columns.shape[1])
    if x.is_cuda:
        out = torch._addmm_activation(added, rows, columns, use_gelu=activation != "relu")
    else:
        # Elsewhere it applies the GELU by erf.
        out = _ACTIVATIONS[activation](torch.addmm(added, rows, columns))
    return out.view(*x.shape[:-1], columns.shape[1])


@activated_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0 if is_transposed else 1])


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[object], context: RewriteContext
) -> list[PatchDescriptor]:
    """Let the library apply each activation for which that measures faster.

    Returns:
        One descriptor per product.
    """
    descriptors = []
    measured = Measured(ACTION, context)
    written = mutated_roots(graph_module.graph)
    num_found = 0
    for node in list(graph_module.graph.nodes):
        product = match_half_product(node, _LEAST_ROWS)
        value, views = over_views(node) if product is not None else (node, [])
        chain = find_chain(value, _activations_of(product)) if product is not None else None
        if product is None or chain is None:
            continue
        num_found += 1
        problem = _why_not(product, chain, written, context)
        if problem:
            context.refuse(ACTION, problem)
        elif (times := _judge(product, chain, measured)) is not None:
            descriptors.append(_replace(product, views, chain, times, context))
    if not num_found:
        context.refuse(ACTION, "no half-precision product has a ReLU or a GELU after it")
    return descriptors


def _activations_of(product: MatMul) -> dict[str, Callable[[Tensor], Tensor]]:
    x = fake_of(product.a)
    is_coarse = x is not None and x.dtype is torch.bfloat16
    return {name: function for name, function in _ACTIVATIONS.items() if is_coarse or name != "gelu"}


def _why_not(product: MatMul, chain: Chain, written: set[fx.Node], context: RewriteContext) -> str | None:
    x, weight, bias = (fake_of(each) for each in (product.a, product.b, product.bias))
    assert x is not None and weight is not None
    if weight.dim() != 2 or weight.dtype is not x.dtype or not is_static(product.b, context, written):
        return "the right operand of the product is no weight of x's dtype"
    if product.num_n % _MULTIPLE or product.num_k % _MULTIPLE:
        return "the weight has an odd width"
    if not (is_plain(product.node) and is_plain(chain.result)):
        return "the product or its activation is not contiguous"
    if product.bias is not None and (
        bias is None or tuple(bias.shape) != (product.num_n,) or bias.dtype != x.dtype or bias.stride(0) != 1
    ):
        return "the bias is not one contiguous value of x's dtype a column"
    if is_read_by_pointwise_alone(chain.result):
        return "only pointwise ops read the activation, and the compiler fuses them with it"
    return None


def _judge(product: MatMul, chain: Chain, measured: Measured) -> Times | None:
    """Return the times in ms of product and activation, and of both in one, where that is faster."""
    x, weight, bias = (fake_of(each) for each in (product.a, product.b, product.bias))
    assert x is not None and weight is not None
    return measured.faster(
        (product.is_b_transposed, chain.name, layouts_of(x, weight, bias)),
        lambda: measure(x, weight, bias, product.is_b_transposed, chain.name),
        f"the product of {product.num_n} x {product.num_k} and the {chain.name} after it", "in one",
    )  # fmt: skip


def measure(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool, activation: str) -> Times | None:
    """Time both forms on random tensors like these fakes; None where they do not give the same."""
    with real_tensors():
        x, weight = random_like(x), random_like(weight).mul_(x.shape[-1] ** -0.5)
        added = random_like(bias) if bias is not None else x.new_zeros(weight.shape[0 if is_transposed else 1])
        columns = weight.t() if is_transposed else weight

        def in_two() -> Tensor:
            product = torch.matmul(x, columns) if bias is None else functional.linear(x, columns.t(), added)
            return _ACTIVATIONS[activation](product)

        def in_one() -> Tensor:
            return activated_product(x, weight, added, is_transposed, activation)

        found, expected = in_one(), in_two()
        if not torch.allclose(found, expected, rtol=2e-2, atol=2e-2):
            return None
        rows = x.reshape(-1, x.shape[-1])[:_CHECKED_ROWS].double()
        truth = _ACTIVATIONS[activation](torch.addmm(added.double(), rows, columns.double()))
        if _distance(found, truth) > _distance(expected, truth):
            return None
        apart, together = time_ms(in_two, x.device), time_ms(in_one, x.device)
    return None if apart is None or together is None else (apart, together)


def _distance(values: Tensor, truth: Tensor) -> float:
    """Return how far the first rows are from the truth."""
    return float((values.reshape(-1, values.shape[-1])[: len(truth)].double() - truth).norm())


def _replace(
    product: MatMul, views: list[fx.Node], chain: Chain, times: Times, context: RewriteContext
) -> PatchDescriptor:
    result = chain.result
    descriptor = context.describe(
        ACTION, result, [product.node, *chain.nodes], f"{chain.name} of {product.num_n} x {product.num_k} in one call",
        {"activation": chain.name, "computed_as": "relu" if chain.name == "relu" else "gelu_tanh",
         "apart_ms": round(times[0], 6), "together_ms": round(times[1], 6)},
    )  # fmt: skip
    call = context.call(
        result, torch.ops.agnitra.activation_gemm.default, product.a, product.b, _bias(product, context),
        product.is_b_transposed, chain.name,
    )  # fmt: skip
    before, after = fake_of(product.node), fake_of(result)
    assert before is not None and after is not None
    call.meta["example_value"] = before
    if before.shape != after.shape:
        call = context.call(result, "reshape", call, tuple(int(size) for size in after.shape))
        call.meta["example_value"] = after
    result.replace_all_uses_with(call)
    erase_unused([*product.turns, product.node, *views, *chain.nodes])
    return descriptor


def _bias(product: MatMul, context: RewriteContext) -> fx.Node | None:
    """Return the bias; zeros that are made once where there is none, since the library's call takes one."""
    num_n = product.num_n
    if product.bias is not None or not context.is_weight(product.b):
        return product.bias
    if why_not_derivable([context.real_tensor(product.b)]):
        return None

    def zeros(weight: Tensor) -> Tensor:
        return weight.new_zeros(num_n)

    return context.derive(f"{ACTION}_zeros", [product.b], zeros, product.node, (num_n,))
