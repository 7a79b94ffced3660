"""fp32 matrix products that are bound by arithmetic run on the tensor cores, in fp16 parts that add up to fp32.

Trigger: linear, matmul, `@`, mm, bmm, addmm or einsum of two fp32 tensors, large enough that three tensor-core products
and the passes that split the operands cost less than SGEMM by a roofline estimate; relu, sigmoid, silu or gelu right
after it becomes part of the kernel. A weight that is a Parameter is split once, ahead of the calls. A long sum with a
small result is a batch of shorter ones, which fill the GPU, and their sum.
Algebra: a = a1 + a2 and b = b1 + b2 in fp16 parts, a * b = a1 b1 + a1 b2 + a2 b1 up to 2^-22 (the template `split_gemm`
says how its error is kept down).
Guard: torch asks for full fp32 products (allow_tf32 off, precision "highest"); operands and result are fp32; the error
of SGEMM for sums of one sign, measured where it may split its chain of additions, is no less than what is left in ours.
Source: Ootomo and Yokota, arXiv 2203.03341, section 4.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.matmuls import MatMul, find_products, match_product
from agnitra_lab.patch.ops import argument, fake_of, memory_root, mutated_roots, op_name
from agnitra_lab.patch.weights import why_not_derivable

ACTION = "split_gemm"
_SGEMM_FLOP_PER_S = 51e12
_SPLIT_FLOP_PER_S = 225e12
_BYTES_PER_S = 2.7e12
_LAUNCH_S = 3e-6
_NUM_MULTIPROCESSORS = 132
_K_LOST, _SGEMM_K_LOST = 192, 32
"""Rates of one H100, measured at 4096 x 4096 x 4096 and 1024 x 1024 x 4096 (tests/benchmarks/split_gemm.py); what short
sums lose of them, on one H200 at K from 64 to 1024."""
_LEAST_CHAIN = 256
_CHAIN_ERROR = 1.23e-8
"""Of SGEMM for values of one sign, times the root of K: mean, relative; 64 to 4096, one H200."""
_OUR_ERRORS = ((128, 4.2e-7, 8e-10), (64, 2.0e-7, 8e-10), (32, 8.5e-8, 2.1e-9))
"""K_CHUNK, the bias that is left of it, and what the root of K is multiplied with for the additions outside."""
_MOST_ERROR_RATIO = 1.15
"""Of ours to SGEMM's: the check of a candidate refuses 1.25 times eager's."""
_FEW_BLOCKS = 4 * _NUM_MULTIPROCESSORS
"""Of 128 x 128. A product of fewer may be split by SGEMM, and takes a moment to ask."""
_MOST_ASKED_VALUES = 2**28
_CHUNK_32_RATE = 0.83
_LEAST_GAIN = 1.2
_ONE_BLOCK_K = 8192
_LEAST_PART = 1024
"""Of K. Parts of 2048 to 16384 were measured."""
_LEAST_SIDE = 128
_LEAST_K = 48
"""Where K alone is short, the result is what moves, and SGEMM takes three times as long as its writes."""
_LEAST_VOLUME = 2**27


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each product that should gain by the kernel.

    Returns:
        One descriptor per product.
    """
    descriptors = []
    products = find_products(graph_module.graph)
    if not products:
        context.refuse(ACTION, "the graph has no product of two matrices")
    for found in products:
        # Again, because the kernel of the one before may have taken the activation that this one reads.
        product = match_product(found.node)
        assert product is not None
        part = _part_of(product, can_keep_b=_can_keep(product.b, context))
        problem = _why_not(product, part, context)
        if problem:
            context.refuse(ACTION, problem)
            continue
        shape = (part.num_batches, part.num_m, part.num_n, part.num_k)
        kernel = context.kernel(ACTION, shape, torch.float32)
        if kernel is not None:
            descriptors.append(_replace(product, part, kernel, context))
    return descriptors


def _part_of(product: MatMul, *, can_keep_b: bool) -> MatMul:
    """Return one of the shorter products that a product is the sum of, as a batch of them; itself where it stays whole.

    Args:
        product: the product.
        can_keep_b: B is split ahead of the calls, as it is.
    """
    left, blocks = fake_of(product.a), _num_blocks(product, 128, 128)
    if can_keep_b or product.num_batches != 1 or left is None or left.dim() != 2 or 2 * blocks > _NUM_MULTIPROCESSORS:
        return product
    num_parts = 2 ** int(math.log2(2 * _NUM_MULTIPROCESSORS / blocks))
    while num_parts > 1 and (product.num_k % (8 * num_parts) or product.num_k < _LEAST_PART * num_parts):
        num_parts //= 2
    return dataclasses.replace(product, num_batches=num_parts, num_k=product.num_k // num_parts)


def _why_not(product: MatMul, part: MatMul, context: RewriteContext) -> str | None:
    tensors = [fake_of(node) for node in (product.a, product.b, product.bias, product.node) if node is not None]
    if any(tensor is None or tensor.dtype is not torch.float32 for tensor in tensors):
        return "an operand or the result is not float32"
    if not _is_full_precision():
        return "TF32 is allowed for fp32 products here, and it is faster"
    bias, result = fake_of(product.bias), fake_of(product.node)
    if result is None or not result.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        return "the result or the bias is not contiguous"
    sizes = (product.num_m, product.num_n, product.num_k)
    if min(sizes) < _LEAST_SIDE and not (product.num_k == min(sizes) and product.num_k >= _LEAST_K):
        return f"a product of {product.num_batches} x {sizes} has too short a side"
    most_chunk = _most_chunk(product, part)
    if most_chunk is None:
        return f"for {product.num_batches} x {sizes} SGEMM adds in so short chains that its error may be under ours"
    gain = estimated_gain(part, can_keep_b=_can_keep(product.b, context), most_chunk=most_chunk)
    if math.prod(sizes) * product.num_batches < _LEAST_VOLUME or gain < _LEAST_GAIN:
        return f"a product of {product.num_batches} x {sizes} is not bound by arithmetic enough to gain"
    return None


def _is_full_precision() -> bool:
    # torch refuses to answer when a program mixes its old and new TF32 switches.
    try:
        return torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return False


def _most_chunk(product: MatMul, part: MatMul) -> int | None:
    """Return the longest K_CHUNK whose error is no more than SGEMM's; None where it may be more whatever the values.

    Args:
        product: what SGEMM adds up.
        part: what the kernel does.
    """
    allowed = _MOST_ERROR_RATIO * _sgemm_error(product)
    # Of several parts the roundings average out, and the bias does not: 8.5e-8 for 64 parts of 8192, chunks of 32.
    chain = part.num_k * product.num_batches / part.num_batches
    for chunk, bias, growth in _OUR_ERRORS:
        if allowed >= math.hypot(bias, growth * math.sqrt(chain)):
            return chunk
    # Of values of both signs ours is a fraction of SGEMM's error even where that splits long chains; on those of one
    # sign the check of the candidate decides.
    return _OUR_ERRORS[-1][0] if product.num_k >= _LEAST_CHAIN * _sgemm_splits(product) ** 2 else None


def _sgemm_splits(product: MatMul) -> float:
    """Return into how many sums SGEMM may split K to fill the GPU, on the safe side: its error falls as much.

    Measured on an H100: 7 at 512 x 768 x 1024, 11 at 512 x 768 x 8192.
    """
    return max(1.0, 1.5 * _NUM_MULTIPROCESSORS / _num_blocks(product, 128, 128))


def _sgemm_error(product: MatMul) -> float:
    """Return SGEMM's mean error for values of one sign, as a share of the result."""
    blocks = _num_blocks(product, 128, 128)
    fake = fake_of(product.a)
    sides = (product.num_m * product.num_k, product.num_n * product.num_k, product.num_m * product.num_n)
    is_small = product.num_batches * max(sides) <= _MOST_ASKED_VALUES
    if fake is not None and fake.device.type == "cuda" and blocks <= _FEW_BLOCKS and is_small:
        # Beside a model that fills the device there may be no room to ask.
        with contextlib.suppress(torch.OutOfMemoryError):
            return _asked_error(product.num_batches, *product.shape, product.is_b_transposed, fake.device)
    return _CHAIN_ERROR * math.sqrt(product.num_k) / _sgemm_splits(product)


@functools.lru_cache(maxsize=256)
def _asked_error(
    num_batches: int, num_m: int, num_n: int, num_k: int, is_b_transposed: bool, device: torch.device
) -> float:
    draw = functools.partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    a = draw(num_batches, num_m, num_k).abs_()
    b = draw(num_batches, num_n, num_k).mT.abs_() if is_b_transposed else draw(num_batches, num_k, num_n).abs_()
    if num_batches == 1:
        a, b = a[0], b[0]
    found = (a @ b)[..., :64, :64].double()
    expected = a[..., :64, :].double() @ b[..., :64].double()
    return float((found - expected).abs().mean() / expected.mean())


def _num_blocks(product: MatMul, block_m: int, block_n: int) -> int:
    return product.num_batches * math.ceil(product.num_m / block_m) * math.ceil(product.num_n / block_n)


def estimated_gain(product: MatMul, *, can_keep_b: bool, most_chunk: int = 128) -> float:
    """Return SGEMM's time over ours, by the rates of one H100.

    Args:
        product: the sizes.
        can_keep_b: B is split once, not at each call.
        most_chunk: of the kernel.
    """
    batches, m, n, k = product.num_batches, product.num_m, product.num_n, product.num_k
    flops = 2 * batches * m * n * k
    rate = _SPLIT_FLOP_PER_S * max(_share_busy(product, 128, 128), 0.85 * _share_busy(product, 64, 128))
    # A block fills its pipeline and writes its result while the tensor cores wait.
    rate *= k / (k + _K_LOST) * (1.0 if most_chunk > 32 else _CHUNK_32_RATE)
    left = fake_of(product.a)
    bytes_per_s = _bytes_per_s(None if left is None else left.device)
    # Splitting reads a value once, where a row fits a block, or twice, and writes two halves of it.
    is_read_once = left is not None and left.stride(-1) == 1 and k <= _ONE_BLOCK_K
    split_s = batches * (m * k * (8 if is_read_once else 12) + (0 if can_keep_b else 12 * n * k)) / bytes_per_s
    num_launches = 2 if can_keep_b else 4
    ours_s = max(flops / rate, 4 * batches * (m * n + m * k + n * k) / bytes_per_s) + split_s
    sgemm_s = flops / (_SGEMM_FLOP_PER_S * k / (k + _SGEMM_K_LOST))
    return sgemm_s / (ours_s + num_launches * _LAUNCH_S)


@functools.cache
def _bytes_per_s(device: torch.device | None) -> float:
    """Return what passes over memory reach: four fifths of the device's peak, or what they reach on an H100."""
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return _BYTES_PER_S
    facts = torch.cuda.get_device_properties(device)
    peak = 2e3 * getattr(facts, "memory_clock_rate", 0) * getattr(facts, "memory_bus_width", 0) / 8
    return 0.8 * peak or _BYTES_PER_S


def _share_busy(product: MatMul, block_m: int, block_n: int) -> float:
    """Return the share of the multiprocessors' time that is spent on elements of the result."""
    waves = math.ceil(_num_blocks(product, block_m, block_n) / _NUM_MULTIPROCESSORS)
    covered = waves * _NUM_MULTIPROCESSORS * block_m * block_n
    return product.num_batches * product.num_m * product.num_n / covered


def _replace(product: MatMul, part: MatMul, kernel: Kernel, context: RewriteContext) -> PatchDescriptor:
    is_whole = part == product
    activation, last = _activation_after(product.node) if is_whole else ("none", product.node)
    most_chunk = _most_chunk(product, part)
    assert most_chunk is not None
    gone = [product.node] if last is product.node else [product.node, last]
    is_kept = _can_keep(product.b, context)
    config: dict[str, JsonValue] = {
        "kernel": kernel.config.key(),
        "shape": [part.num_batches, *part.shape],
        "activation": activation,
        "most_chunk": most_chunk,
        "is_weight_split_before": is_kept,
    }
    descriptor = context.describe(ACTION, product.node, gone, f"kernel {kernel.name}", config, kernel.content_hash)
    b, exponent = _right_operand(product, is_kept, kernel, context)
    options: dict[str, Any] = {"activation": activation} | ({"most_chunk": most_chunk} if most_chunk < 128 else {})
    if is_whole:
        call = context.call(product.node, kernel.call, product.a, b, product.bias, exponent, **options)
    else:
        call = _sum_of_parts(product, part, b, kernel, context, options)
    call.meta["example_value"] = fake_of(last)
    last.replace_all_uses_with(call)
    erase_unused(gone)
    return descriptor


def _sum_of_parts(
    product: MatMul, part: MatMul, b: fx.Node, kernel: Kernel, context: RewriteContext, options: dict[str, Any]
) -> fx.Node:
    """Insert a product as a batch of products over parts of K, and their sum."""
    before, sizes = product.node, (part.num_batches, part.num_k)
    parts_of_a = context.call(before, torch.transpose, context.call(before, torch.unflatten, product.a, 1, sizes), 0, 1)
    parts_of_b = context.call(before, torch.unflatten, b, 0, sizes)
    products = context.call(before, kernel.call, parts_of_a, parts_of_b, None, None, **options)
    total = context.call(before, torch.sum, products, 0)
    return total if product.bias is None else context.call(before, torch.add, total, product.bias)


def _can_keep(b: fx.Node, context: RewriteContext) -> bool:
    if not context.is_weight(b) or why_not_derivable([context.real_tensor(b)]):
        return False
    fake = fake_of(b)
    return fake is not None and fake.dim() == 2 and b not in mutated_roots(context.graph_module.graph)


def _right_operand(
    product: MatMul, is_kept: bool, kernel: Kernel, context: RewriteContext
) -> tuple[fx.Node, fx.Node | None]:
    """Return B as the kernel takes it: its parts and exponents where they can be kept, else [..., K, N]."""
    is_transposed = product.is_b_transposed

    def split(weight: Tensor) -> tuple[Tensor, Tensor]:
        return kernel.call(weight if is_transposed else weight.t())  # type: ignore[no-any-return]

    def build_parts(weight: Tensor) -> Tensor:
        return split(weight)[0]

    def build_exponent(weight: Tensor) -> Tensor:
        return split(weight)[1]

    if is_kept:
        parts = context.derive(f"{ACTION}_parts", [product.b], build_parts, product.node, (is_transposed,))
        exponent = context.derive(f"{ACTION}_exponent", [product.b], build_exponent, product.node, (is_transposed,))
        return parts, exponent
    if not is_transposed:
        return product.b, None
    turned = context.call(product.node, torch.transpose, product.b, -2, -1)
    fake = fake_of(product.b)
    turned.meta["example_value"] = None if fake is None else fake.transpose(-2, -1)
    return turned, None


def _activation_after(node: fx.Node) -> tuple[str, fx.Node]:
    """Return the activation that alone reads a value, and its node; "none" and the value itself otherwise."""
    users = list(node.users)
    if len(users) != 1 or users[0].args[:1] != (node,) or memory_root(node) is not node:
        return "none", node
    user = users[0]
    name = op_name(user)
    if name == "gelu":
        approximate = argument(user, 1, "approximate", "none")
        return ("gelu_tanh" if approximate == "tanh" else "gelu"), user
    return (name, user) if name in ("relu", "sigmoid", "silu") else ("none", node)
