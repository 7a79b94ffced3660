"""An eval-mode batch norm right after a convolution or a linear is folded into its weight and bias.

Trigger: `batch_norm(layer(x, W, b), mean, var, gamma, beta, training=False)`, the batch norm the only user; the layer
is a convolution of one to three dimensions, a transposed one without groups, or a product of rows of features with a
weight, in any spelling.
Algebra: with s = gamma / sqrt(var + eps), s * (W * x + b - mean) + beta = (s W) * x + (s (b - mean) + beta).
Guard: all weights and statistics are given to the graph, none is written in it, and training is False there; the
folded copies follow updates of their sources. Folding is computed in float64 and rounded once.
Source: Jacob et al., arXiv 1712.05877, section 3.2; `torch.nn.utils.fusion.fuse_conv_bn_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.matmuls import match_product
from agnitra_lab.patch.ops import argument, fake_of, memory_root, mutated_roots, op_name
from agnitra_lab.patch.weights import why_not_derivable

ACTION = "conv_bn_fold"
_BATCH_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_BATCH_NORM_DEFAULTS = (None, None, None, None, None, False, 0.1, 1e-5)
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Fold each batch norm that can be folded.

    Returns:
        One descriptor per folded pair.
    """
    descriptors = []
    norms = [node for node in graph_module.graph.nodes if op_name(node) == "batch_norm"]
    if not norms:
        context.refuse(ACTION, "the graph has no batch norm")
    for norm in norms:
        arguments = _batch_norm_arguments(norm)
        problem = _why_not_foldable(arguments, context)
        if problem:
            context.refuse(ACTION, problem)
        else:
            descriptors.append(_fold(norm, arguments, context))
    return descriptors


def _batch_norm_arguments(norm: fx.Node) -> dict[str, Any]:
    defaults = zip(_BATCH_NORM_ARGUMENTS, _BATCH_NORM_DEFAULTS, strict=True)
    return {name: argument(norm, index, name, default) for index, (name, default) in enumerate(defaults)}


def _why_not_foldable(norm: dict[str, Any], context: RewriteContext) -> str | None:
    conv = norm["input"]
    layer = _layer_of(conv)
    if layer is None:
        return "the batch norm does not follow a convolution or a linear directly"
    if norm["training"] is not False:
        return "the batch norm uses batch statistics (training mode, or no running statistics)"
    if len(conv.users) != 1:
        return "the layer's own result is used elsewhere too"
    sources = _sources(layer, norm)
    tensors = [context.real_tensor(source) for source in sources]
    problem = why_not_derivable(tensors)
    if problem:
        return problem
    if len({(tensor.dtype, tensor.device) for tensor in tensors if tensor is not None}) > 1:
        return "layer and batch norm differ in dtype or device"
    if any(tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors):
        # Measured on an H100, ResNet-50 in bf16: 1.8 times eager's error against fp64.
        return "in half precision the folded weights are rounded once more, and the error grows"
    written = mutated_roots(context.graph_module.graph)
    if any(source in written for source in sources) or memory_root(conv) in written:
        return "the graph writes to the layer's result or to a weight"
    return None


@dataclass(frozen=True)
class _Layer:
    """A linear map of its weight, whose output channels are the second dimension of the result.

    Attributes:
        axis: the weight's dimension of output channels.
        call: (x, weight, bias) -> how the layer is called again, the weight of a product as `linear` takes it.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    axis: int
    call: Callable[..., Any]
    rest: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    is_product: bool = False


def _layer_of(node: Any) -> _Layer | None:
    name, product = op_name(node), match_product(node)
    if product is not None:
        weight, result = fake_of(product.b), fake_of(node)
        # A batch norm of three dimensions counts the tokens of a product as channels.
        if weight is None or result is None or weight.dim() != 2 or result.dim() != 2:
            return None
        axis, linear = 1 - int(product.is_b_transposed), torch._C._nn.linear
        return _Layer(product.a, product.b, product.bias, axis, linear, is_product=True)
    if name not in _CONVOLUTIONS and not (name in _TRANSPOSED and argument(node, 6, "groups", 1) == 1):
        return None
    x, weight, bias = (argument(node, index, key) for index, key in enumerate(("input", "weight", "bias")))
    kwargs = {key: value for key, value in node.kwargs.items() if key not in ("input", "weight", "bias")}
    return _Layer(x, weight, bias, int(name in _TRANSPOSED), node.target, node.args[3:], kwargs)


def _sources(layer: _Layer, norm: dict[str, Any]) -> list[fx.Node]:
    candidates = [layer.weight, layer.bias, norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"]]
    return [source for source in candidates if source is not None]


def _fold(norm: fx.Node, arguments: dict[str, Any], context: RewriteContext) -> PatchDescriptor:
    conv: fx.Node = arguments["input"]
    layer = _layer_of(conv)
    assert layer is not None
    present = (layer.bias is not None, arguments["weight"] is not None, arguments["bias"] is not None)
    eps, axis, is_turned = float(arguments["eps"]), layer.axis, layer.is_product and layer.axis == 1

    def build_weight(*sources: Tensor) -> Tensor:
        weight = _folded(sources, present, eps, axis)[0]
        return weight.t() if is_turned else weight

    def build_bias(*sources: Tensor) -> Tensor:
        return _folded(sources, present, eps, axis)[1]

    replacement = f"{op_name(conv)}(folded weight, folded bias)"
    descriptor = context.describe(ACTION, norm, [conv, norm], replacement, {"eps": eps})
    sources, variant = _sources(layer, arguments), (present, eps, axis, is_turned)
    weight = context.derive(f"{ACTION}_weight", sources, build_weight, norm, variant)
    bias = context.derive(f"{ACTION}_bias", sources, build_bias, norm, variant)
    folded = context.call(norm, layer.call, layer.x, weight, bias, *layer.rest, **layer.kwargs)
    folded.meta["example_value"] = fake_of(norm)
    norm.replace_all_uses_with(folded)
    context.graph_module.graph.erase_node(norm)
    context.graph_module.graph.erase_node(conv)
    return descriptor


def _folded(
    sources: Sequence[Tensor], present: tuple[bool, bool, bool], eps: float, axis: int
) -> tuple[Tensor, Tensor]:
    given = iter(source.double() for source in sources)
    weight = next(given)
    conv_bias = next(given) if present[0] else weight.new_zeros(weight.shape[axis])
    mean, variance = next(given), next(given)
    gamma = next(given) if present[1] else torch.ones_like(mean)
    beta = next(given) if present[2] else torch.zeros_like(mean)
    scale = gamma * torch.rsqrt(variance + eps)
    along = [-1 if dim == axis else 1 for dim in range(weight.dim())]
    folded_bias = (conv_bias - mean) * scale + beta
    dtype = sources[0].dtype
    return (weight * scale.view(along)).to(dtype), folded_bias.to(dtype)
