"""Depthwise convolution over one to three dimensions: each channel by itself, from planes or with channels innermost.

A lane computes a block of outputs and keeps its inputs in registers for all the taps that need them: neighbours of a
row and rows below one another where a channel is a plane, neighbours of a row for a vector of channels where these lie
innermost. Sums start from the bias and are fp32 to the end; one rounding, and one more after an activation, as two ops
would. So 7 x 7 taps take about as many instructions as they have products, where one load for each product takes many.

Source: Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", arXiv 1410.0759, section 3, for direct
convolution; Lu, Zhang and Wang, "Optimizing Depthwise Separable Convolution Operations on GPUs", IEEE TPDS 33(1), 2022,
for the reuse of rows and columns in registers.
"""

import math
from collections.abc import Sequence

import torch
from torch.library import triton_op

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.generate.points import check_call, drawer, enumerate_space, itemsize, launcher, next_power_of_two
from agnitra_lab.generate.templates.depthwise_kernels import IS_COMPILED, KERNELS, _channels_kernel, _planes_kernel

PARAMS = ("BLOCK_W", "BLOCK_C", "BLOCK_H", "LANES_C", "num_warps", "num_stages")
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid")
"""In the order of the kernels' numbers for them."""
PLANES, CHANNELS_INNERMOST = 1, 2
"""The last number of a site's shape: the layout of the input."""
MOST_COLUMNS = 64
"""Taps along a row are straight code; longer rows of taps would compile for minutes."""
kernel = KERNELS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_UNROLLED = (27, 320)
"""Taps and products in straight code. With 49 taps and 32 outputs it saves 12% of the instructions for 17 times the
compile time (Triton 3.6: 36 s against 2 s)."""
_ENOUGH_LANES = 132 * 512
"""Lanes that keep the multiprocessors of an H200 busy; fewer get smaller blocks."""


@triton_op("agnitra::depthwise_conv", mutates_args=())
def _depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    activation: str,
    is_channels_last: bool,
    block_w: int,
    block_c: int,
    block_h: int,
    lanes_c: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    num_channels, lanes = weight.numel() // math.prod(taps), 32 * num_warps
    outer = (x.shape[0], *_three(size, 1)[:2])
    names = ("D", "H", "W")
    constants = {f"{name}_IN": int(extent) for name, extent in zip(names, _three(x.shape[2:], 1), strict=True)}
    for prefix, values, default in (("K", taps, 1), ("S", stride, 1), ("P", padding, 0), ("R", dilation, 1)):
        constants |= {prefix + name: value for name, value in zip(names, _three(values, default), strict=True)}
    constants |= {f"{name}_OUT": extent for name, extent in zip(names, _three(size, 1), strict=True)}
    constants |= {
        "MULTIPLIER": num_channels // int(x.shape[1]), "NUM_CHANNELS": num_channels, "HAS_BIAS": bias is not None,
        "ACTIVATION": ACTIVATIONS.index(activation), "BLOCK_W": block_w, "LANES": lanes,
    }  # fmt: skip
    options = {"num_warps": num_warps, "num_stages": num_stages}
    num_blocks = (size[-1] + block_w - 1) // block_w
    if is_channels_last:
        x = x if x.stride(1) == 1 else x.movedim(1, -1).contiguous().movedim(-1, 1)
        weight = weight if weight.dim() == 2 else weight.reshape(num_channels, -1).t()
        weight = weight.contiguous()
        out = torch.empty((x.shape[0], *size, num_channels), dtype=x.dtype, device=x.device)
        num_places, width = math.prod(outer) * num_blocks, lanes_c * block_c
        strides = _three([int(value) for value in x.stride()[2:]], 0)
        constants |= {
            f"STRIDE_X{name}": value for name, value in zip("NDHW", (int(x.stride(0)), *strides), strict=True)
        }
        places = lanes // lanes_c
        grid = ((num_places + places - 1) // places * ((num_channels + width - 1) // width),)
        launcher(_channels_kernel)[grid](
            x, weight, x if bias is None else bias, out, num_places, **constants,
            IS_WHOLE=num_channels % block_c == 0, BLOCK_C=block_c, LANES_C=lanes_c, **options,
        )  # fmt: skip
        return out.movedim(-1, 1)
    weight = weight.t().contiguous() if weight.dim() == 2 else weight.reshape(num_channels, -1).contiguous()
    out = torch.empty((x.shape[0], num_channels, *size), dtype=x.dtype, device=x.device)
    rows = (outer[2] + block_h - 1) // block_h
    num_lanes = outer[0] * num_channels * outer[1] * rows * num_blocks
    is_unrolled = math.prod(taps) <= _MOST_UNROLLED[0] and math.prod(taps) * block_w * block_h <= _MOST_UNROLLED[1]
    launcher(_planes_kernel)[((num_lanes + lanes - 1) // lanes,)](
        x.contiguous(), weight, x if bias is None else bias, out, num_lanes, **constants,
        IS_UNROLLED=is_unrolled, BLOCK_H=block_h, **options,
    )  # fmt: skip
    return out


def _three(values: Sequence[int], default: int) -> tuple[int, ...]:
    """Fill up the numbers of one or two dimensions from the front: rows are depth 1 and height 1."""
    return (default,) * (3 - len(values)) + tuple(int(value) for value in values)


def launch(
    params: dict[str, int],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    activation: str = "none",
    is_channels_last: bool = False,
) -> torch.Tensor:
    """Run the kernel with one config.

    Args:
        params: BLOCK_W outputs of a row and BLOCK_H rows to a lane; for channels innermost BLOCK_C channels to a lane
            and LANES_C lanes side by side over them; num_warps, num_stages.
        x: [N, C, spatial...] with one to three spatial dimensions, on a CUDA device (any device in the interpreter).
        weight: [C x multiplier, 1, taps...], or laid out as [product of taps, C x multiplier], which is what the kernel
            for channels innermost reads; the other form is copied for it at each call.
        bias: None or [C x multiplier], the dtype of x or float32.
        taps: the extents of the convolution, one for each spatial dimension; as the next four.
        stride: between outputs.
        padding: zeros before the first value of each dimension. What is read after the last one is zero too.
        dilation: between taps.
        size: spatial extents of the result.
        activation: one of ACTIVATIONS, applied to the rounded sums.
        is_channels_last: read x and lay out the result with the channels innermost; else both as planes. x is copied
            where it has the other layout.

    Returns:
        [N, C x multiplier, size...] of x's dtype.

    Raises:
        TemplateError: under grad, on a CPU, or for tensors that `supports` refuses.
    """
    tensors = tuple(tensor for tensor in (x, weight, bias) if tensor is not None)
    refusal = supports(x, weight, bias, taps, stride, padding, dilation, size, activation)
    check_call("depthwise_conv", tensors, refusal, IS_COMPILED)
    numbers = (list(taps), list(stride), list(padding), list(dilation), list(size))
    config = tuple(params[name] for name in PARAMS)
    return torch.ops.agnitra.depthwise_conv(x, weight, bias, *numbers, activation, is_channels_last, *config)


def space(shape: tuple[int, ...], dtype: str) -> SearchSpace:
    """Enumerate the valid configs for one convolution.

    Args:
        shape: N, channels of the result, 3 extents of x, 3 of the taps, 3 strides, 3 dilations, each as depth, height
            and width with 1 where there is none; then PLANES or CHANNELS_INNERMOST.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        TemplateError: for a shape or dtype that the template has no config for.
    """
    numbers = shape if len(shape) == 15 else (1,) * 15
    channels, columns, layout = numbers[1], numbers[7], numbers[14]
    _, height, width = _out_extents(numbers)
    vector = 16 // itemsize(dtype)

    def is_valid(point: dict[str, int]) -> bool:
        """Leave out what cannot run, spills registers, compiles for long or only repeats another config."""
        block_w, block_h, block_c, lanes_c = (point[key] for key in ("BLOCK_W", "BLOCK_H", "BLOCK_C", "LANES_C"))
        if block_w > next_power_of_two(width) or block_h > next_power_of_two(height):
            return False
        if layout == PLANES:
            num_products = columns * block_w * block_h
            return block_c == lanes_c == 1 and block_w * block_h <= 32 and (num_products <= 1024 or block_w == 1)
        reach = block_c * lanes_c
        padded = (channels + reach - 1) // reach * reach
        return (
            layout == CHANNELS_INNERMOST
            and block_h == 1
            and block_c <= vector
            and channels % block_c == 0
            and block_c * 4 >= math.gcd(channels, vector)
            and block_w * block_c <= 64
            and columns * block_w * block_c <= 2048
            and lanes_c <= 32 * point["num_warps"]
            # Not many idle lanes, and for each place a sector of memory, or most of the channels.
            and (reach <= 8 or padded * 3 <= channels * 4)
            and (reach >= 8 or reach * 2 > channels or reach * 2 > next_power_of_two(channels) // 2)
        )

    params = {
        "BLOCK_W": (1, 2, 4, 8), "BLOCK_C": (1, 2, 4, 8), "BLOCK_H": (1, 2, 4, 8), "LANES_C": (1, 2, 4, 8, 16, 32),
        "num_warps": (2, 4, 8), "num_stages": (1,),
    }  # fmt: skip
    return enumerate_space("depthwise_conv", shape, dtype, params, is_valid, rank=15)


def default(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    """8 x 4 outputs of a plane to a lane, less where that leaves lanes idle; or 4 outputs of 16 bytes of channels."""
    images, channels, columns, layout = shape[0], shape[1], shape[7], shape[14]
    depth, height, width = _out_extents(shape)
    point = {"BLOCK_C": 1, "BLOCK_H": 1, "LANES_C": 1, "num_warps": 4, "num_stages": 1}
    if layout == PLANES:
        block_w = next((block for block in (8, 4) if shape[4] % block == 0), 8 if columns > 1 else 1)
        block_w = min(block_w, next_power_of_two(width))
        block_h = min(4, next_power_of_two(height))
        lanes = images * channels * depth * math.ceil(height / block_h) * math.ceil(width / block_w)
        while block_h > 1 and lanes < _ENOUGH_LANES:
            block_h, lanes = block_h // 2, 2 * lanes
        return point | {"BLOCK_W": block_w, "BLOCK_H": block_h}
    block_c = math.gcd(channels, 16 // itemsize(dtype))
    block_w = min(4, next_power_of_two(width))
    lanes = images * channels // block_c * depth * height * math.ceil(width / block_w)
    while block_w > 1 and lanes < _ENOUGH_LANES:
        block_w, lanes = block_w // 2, 2 * lanes
    reach = next((reach for reach in (64, 32, 16) if channels % reach == 0), 16)
    return point | {"BLOCK_W": block_w, "BLOCK_C": block_c, "LANES_C": max(1, reach // block_c)}


def _out_extents(shape: Sequence[int]) -> tuple[int, ...]:
    """The extents of a result as long as x, less what the stride leaves out: close enough to choose blocks by."""
    return tuple((extent + step - 1) // step for extent, step in zip(shape[2:5], shape[8:11], strict=True))


def example(shape: tuple[int, ...], dtype: str, device: torch.device | str) -> tuple[tuple[object, ...], dict]:
    """Draw x, weight and bias of a convolution that keeps the extents, or causes only what is later, from a fixed seed.

    Taps of an even number along one dimension see the past alone, as those of sequence models do.
    """
    draw = drawer(dtype, device)
    first = 2 if shape[2:4] == (1, 1) == shape[5:7] else 1 if shape[2] == 1 == shape[5] else 0
    extents, taps, stride, dilation = (list(shape[start + first : start + 3]) for start in (2, 5, 8, 11))
    padding = [r * (k - 1) // (2 if k % 2 else 1) for k, r in zip(taps, dilation, strict=True)]
    size = [(extent + step - 1) // step for extent, step in zip(extents, stride, strict=True)]
    num_images, channels, layout = shape[0], shape[1], shape[14]
    bias = draw(channels)
    if layout == PLANES:
        x, weight = draw(num_images, channels, *extents), draw(channels, 1, *taps)
    else:
        x, weight = draw(num_images, *extents, channels).movedim(-1, 1), draw(math.prod(taps), channels)
    options = {"is_channels_last": layout != PLANES}
    return (x, weight, bias, taps, stride, padding, dilation, size), options


def cost(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """One stream in, one out, and the weights; two operations for each tap of each output."""
    channels, taps = shape[1], math.prod(shape[5:8])
    num_outputs = shape[0] * channels * math.prod(_out_extents(shape))
    num_values = shape[0] * channels * math.prod(shape[2:5]) + num_outputs + channels * (taps + 1)
    return num_values * itemsize(dtype), 2 * taps * num_outputs


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    activation: str = "none",
    is_channels_last: bool = False,
) -> torch.Tensor:
    """Compute the same in plain torch, in x's dtype."""
    channels = weight.numel() // math.prod(taps)
    weight = (weight.t() if weight.dim() == 2 else weight).reshape(channels, 1, *taps)
    reach = [(n - 1) * s + r * (k - 1) + 1 for n, s, r, k in zip(size, stride, dilation, taps, strict=True)]
    after = [max(0, span - n - p) for span, n, p in zip(reach, x.shape[2:], padding, strict=True)]
    if any(more > p for more, p in zip(after, padding, strict=True)):
        both = [amount for pair in zip(padding[::-1], after[::-1], strict=True) for amount in pair]
        x, padding = torch.nn.functional.pad(x, both), [0] * len(size)
    convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[len(size) - 1]
    shift = None if bias is None else bias.to(x.dtype)
    out = convolution(x, weight, shift, list(stride), list(padding), list(dilation), x.shape[1])
    out = out[(slice(None), slice(None), *(slice(int(n)) for n in size))]
    if activation.startswith("gelu"):
        out = torch.nn.functional.gelu(out, approximate="tanh" if activation == "gelu_tanh" else "none")
    elif activation != "none":
        out = getattr(torch.nn.functional, activation)(out)
    return out.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last else out.contiguous()


library = reference


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    activation: str = "none",
) -> str | None:
    """Say why these tensors (real, fake or meta) must keep their own ops, or None when the template takes them."""
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return f"depthwise_conv takes float32, bfloat16 or float16, x and weight alike, not {x.dtype}, {weight.dtype}"
    if activation not in ACTIVATIONS:
        return f"depthwise_conv knows {', '.join(ACTIVATIONS)}, not {activation!r}"
    lengths = {len(numbers) for numbers in (taps, stride, padding, dilation, size)}
    if lengths != {x.dim() - 2} or not 1 <= len(size) <= 3 or x.numel() < 1:
        return f"depthwise_conv needs [N, C, ...] with one to three dimensions, not {tuple(x.shape)}, size {size}"
    if min(*taps, *stride, *dilation, *size) < 1 or min(padding) < 0:
        return "depthwise_conv needs taps, strides, dilations and sizes of at least 1, and no negative padding"
    channels, num_taps = weight.numel() // math.prod(taps), math.prod(taps)
    if channels < 1 or channels % x.shape[1]:
        return f"depthwise_conv needs the channels of the result to be a multiple of {x.shape[1]}, not {channels}"
    if tuple(weight.shape) not in ((channels, 1, *taps), (num_taps, channels)):
        return f"depthwise_conv needs a weight of {(channels, 1, *taps)} or {(num_taps, channels)}, not {weight.shape}"
    if bias is not None and (tuple(bias.shape) != (channels,) or bias.dtype not in (x.dtype, torch.float32)):
        return f"depthwise_conv needs a bias of shape ({channels},) in {x.dtype} or float32, not {tuple(bias.shape)}"
    if bias is not None and bias.stride(0) != 1:
        return "depthwise_conv needs a contiguous bias"
    if taps[-1] > MOST_COLUMNS:
        return f"depthwise_conv takes at most {MOST_COLUMNS} taps along a row, not {taps[-1]}"
    if max(math.prod(x.shape[2:]), math.prod(size), channels * num_taps, x.shape[0] * math.prod(size)) >= 2**30:
        return f"depthwise_conv takes planes of fewer than 2^30 values, not those of {tuple(x.shape)}"
    if x.shape[0] * channels * math.prod(size) >= 2**31 - 2**16:
        return f"depthwise_conv takes results of fewer than 2^31 values, not {(x.shape[0], channels, *size)}"
    return None
