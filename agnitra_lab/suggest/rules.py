"""The heuristics: one ordered table of rules, each with the gain it expects of a profile and where that comes from.

A rule's expectation is an estimate from shares of the measured profile. It only ranks what is tried first: whether a
change is kept is for the benchmark to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import WorkloadProfile
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.suggest import evidence


@dataclass(frozen=True)
class Situation:
    """What a rule looks at."""

    record: TelemetryRecord
    profile: WorkloadProfile
    device: DeviceInfo

    @property
    def is_cuda(self) -> bool:
        """Whether the profile's device is a GPU."""
        return self.device.type == "cuda"

    @property
    def is_decode(self) -> bool:
        """Whether the workload makes one token a call."""
        return "decode" in (self.record.phase, self.profile.phase)

    @property
    def linear_share(self) -> float:
        """Share of self time in matrix products."""
        return evidence.share_of(self.record, evidence.LINEAR_OPS)

    @property
    def conv_share(self) -> float:
        """Share of self time in convolutions."""
        return evidence.share_of(self.record, evidence.CONV_OPS)

    def share_inside(self, pattern: str, ops: frozenset[str], *, should_count_all: bool = False) -> float:
        """Share of self time of `ops` (or all ops) inside a pattern."""
        return evidence.share_inside(self.record, self.profile, pattern, ops, should_count_all=should_count_all)


@dataclass(frozen=True)
class KernelFields:
    """Where a template's search starts; all None for actions without a kernel."""

    block_size: int | None = None
    tile_shape: tuple[int, int] | None = None
    unroll_factor: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None


@dataclass(frozen=True)
class Rule:
    """One heuristic.

    Attributes:
        name: what suggestions cite, as "preset:<name>".
        action: what it asks for.
        applies: whether the situation calls for it, beyond the action being possible at all.
        expected_share_saved: share of the device's busy time that it should save, 0 to 1.
        saves_idle: the saving is of the whole call's wall time instead (launch gaps are idle time).
        kernel_fields: the first config of its kernel.
        reason: why, with the source that the expectation rests on.
    """

    name: str
    action: str
    applies: Callable[[Situation], bool]
    expected_share_saved: Callable[[Situation], float]
    reason: str
    kernel_fields: Callable[[Situation], KernelFields] = lambda situation: KernelFields()
    saves_idle: bool = False


_SMALL_KERNEL_MS = 0.005


def _idle_share(situation: Situation) -> float:
    utilisation = situation.record.gpu.gpu_utilisation
    if utilisation is None:
        # Without GPU truth: one token a call is bound by launches, a large batch is not.
        return 0.5 if situation.is_decode else 0.1
    return 1.0 - utilisation


def _small_kernel_share(situation: Situation) -> float:
    """Return the share of the kernels' time in kernels of at most 5 us: about what a launch costs."""
    kernels = situation.record.kernels
    total_ms = sum(kernel.device_ms for kernel in kernels)
    small_ms = sum(k.device_ms for k in kernels if k.num_launches and k.device_ms <= _SMALL_KERNEL_MS * k.num_launches)
    return small_ms / total_ms if total_ms else 0.0


def _row_kernel(
    ops: frozenset[str], *, default_width: int, max_block: int, values_per_thread: int
) -> Callable[[Situation], KernelFields]:
    """Return the first config of a kernel over rows: one row a program, blocks as wide as the row up to `max_block`,
    and as many warps as leave each thread `values_per_thread` values to load."""

    def fields(situation: Situation) -> KernelFields:
        width = evidence.widest_row(situation.record, ops) or default_width
        block_size = min(max(_next_power_of_two(width), 16), max_block)
        num_warps = min(max(block_size // (32 * values_per_thread), 1), 16)
        return KernelFields(block_size, (1, block_size), 1, num_warps, 1)

    return fields


def _next_power_of_two(value: int) -> int:
    return 1 << (max(value, 1) - 1).bit_length()


def _share_rule(name: str, action: str, ops: frozenset[str], saved: float, reason: str) -> Rule:
    """Return a rule that expects to save a part of what some ops take. That it applies, the rewrites have found out."""
    return Rule(
        name=name,
        action=action,
        applies=lambda situation: True,
        expected_share_saved=lambda situation: saved * evidence.share_of(situation.record, ops),
        reason=reason,
    )


RULES: tuple[Rule, ...] = (
    Rule(
        name="launch_gaps",
        action="cuda_graph",
        applies=lambda s: s.is_cuda and _idle_share(s) > 0.05,
        expected_share_saved=lambda s: 0.95 * _idle_share(s),
        saves_idle=True,
        reason="The GPU waits for launches; one graph replay removes the gaps. Measured on one H200 (torch 2.11): a "
        "1.1B decoder, one token, torch.compile 10.2 ms without and 1.53 ms with a CUDA graph.",
    ),
    Rule(
        name="norm_bandwidth",
        action="rms_norm",
        applies=lambda s: s.is_cuda,
        expected_share_saved=lambda s: 0.9 * s.share_inside("rms_norm", evidence.RMS_NORM_OPS, should_count_all=True),
        kernel_fields=_row_kernel(evidence.RMS_NORM_OPS, default_width=2048, max_block=16384, values_per_thread=16),
        reason="RMSNorm is bound by memory and eager makes many passes. Measured on one H200 (torch 2.11), 16384 x "
        "4096 bf16: eager 0.31 TB/s, max-autotune 3.94 TB/s, which is the device's copy bandwidth at that size.",
    ),
    Rule(
        name="weights_ahead",
        action="fold_weights",
        applies=lambda s: True,
        expected_share_saved=lambda s: 0.02,
        reason="What depends on weights alone (1 + weight of a norm, weight norm, a bias of relative positions) is the "
        "same at each call; the saving is its kernels, an estimate until it is measured here.",
    ),
    Rule(
        name="conv_bn",
        action="conv_bn_fold",
        applies=lambda s: True,
        expected_share_saved=lambda s: evidence.share_of(s.record, evidence.BATCH_NORM_OPS),
        reason="An eval-mode batch norm is an affine map per channel, so it disappears into the convolution's weights "
        "(Jacob et al. 2018, arXiv:1712.05877, section 3.2).",
    ),
    Rule(
        name="gate_times_up",
        action="swiglu",
        applies=lambda s: s.is_cuda,
        expected_share_saved=lambda s: 0.4 * s.share_inside("gated_mlp", evidence.SILU_OPS | {"aten::mul"}),
        kernel_fields=_row_kernel(evidence.SILU_OPS, default_width=1024, max_block=1024, values_per_thread=8),
        reason="silu and the multiply pass over memory five times, one kernel three times: 40% fewer bytes (counted; "
        "the same fusion as in Liger Kernel, arXiv:2410.10989).",
    ),
    Rule(
        name="packed_weights",
        action="freezing",
        applies=lambda s: not s.is_cuda and s.linear_share + s.conv_share > 0.1,
        expected_share_saved=lambda s: 0.15 * (s.linear_share + s.conv_share),
        reason="On a CPU, constant weights are laid out once for oneDNN instead of at each call (Inductor's `freezing` "
        "and `cpp.weight_prepack` options); the gain is an estimate until it is measured here.",
    ),
    Rule(
        name="gate_and_up",
        action="gate_up_concat",
        applies=lambda s: True,
        expected_share_saved=lambda s: (
            (0.1 if s.is_decode else 0.05) * s.share_inside("gated_mlp", evidence.LINEAR_OPS)
        ),
        reason="Two GEMMs that read one input become one: the input is read once and there is one launch less. vLLM "
        "and SGLang ship the same merge (MergedColumnParallelLinear); the gain is an estimate, larger for few rows.",
    ),
    Rule(
        name="query_key_value",
        action="qkv_concat",
        applies=lambda s: True,
        expected_share_saved=lambda s: (
            (0.2 if s.is_decode else 0.1) * s.share_inside("transformer_attention", evidence.LINEAR_OPS)
        ),
        reason="Three GEMMs that read one input become one; key and value projections of grouped-query attention are "
        "too small to fill a device alone. vLLM ships the same merge (QKVParallelLinear); the gain is an estimate.",
    ),
    Rule(
        name="small_kernels",
        action="combo_kernels",
        applies=lambda s: s.is_cuda and _small_kernel_share(s) > 0.3,
        expected_share_saved=lambda s: 0.1 * _small_kernel_share(s),
        reason="Most of the kernels' time is in kernels as short as their launch; Inductor can put independent ones in "
        "one launch (`combo_kernels`), an estimate until it is measured here.",
    ),
    Rule(
        name="digits_of_layouts",
        action="as_laid_out",
        applies=lambda s: s.conv_share > 0.1,
        expected_share_saved=lambda s: 0.05 * s.conv_share,
        reason="Compiled convolutions run with the channels innermost, with larger errors on some machines: a ConvNeXt "
        "on a Xeon (fp32, torch 2.13) 1.36 times eager's, and 1.14 in eager's own layout, at the same speed. Tried "
        "where the error alone stands against what is compiled; the gain is an estimate until it is measured here.",
    ),
    Rule(
        name="gemm_choices",
        action="max_autotune",
        applies=lambda s: s.linear_share + s.conv_share > 0.3,
        expected_share_saved=lambda s: (0.12 if s.is_cuda else 0.02) * (s.linear_share + s.conv_share),
        reason="Inductor times its GEMM choices at these shapes. Measured on one H200 (torch 2.11): a 1.1B decoder, "
        "one token, reduce-overhead 1.53 ms and max-autotune 1.30 ms, for 72 s of compiling; a CPU gains little.",
    ),
    Rule(
        name="attention_backend",
        action="sdpa_backend",
        applies=lambda s: s.is_cuda,
        expected_share_saved=lambda s: 0.1 * s.share_inside("transformer_attention", evidence.ATTENTION_OPS),
        reason="Which attention backend is fastest depends on shape and mask (pytorch issue 138907). Measured on one "
        "H200 (torch 2.11), causal B4 H32 S2048 D128 bf16: flash 0.484 ms, cuDNN 0.284; the default was cuDNN there.",
    ),
    _share_rule(
        "attention_modules",
        "open_layers",
        evidence.ATTENTION_BY_HAND_OPS | evidence.ATTENTION_OPS,
        0.3,
        "nn.MultiheadAttention writes its scores to memory where its weights are asked for, by default and read by "
        "nobody (KernelBench level 3, problem 31); an encoder layer's one call cannot fuse with what is around it.",
    ),
    _share_rule(
        "fused_attention",
        "attention_by_hand",
        evidence.ATTENTION_BY_HAND_OPS,
        0.6,
        "The scores of attention in single steps go through memory several times; one kernel keeps them on the chip "
        "(Dao et al. 2022, arXiv:2205.14135). Measured elsewhere: 8 to 10 times for minGPT's attention (CUDA-L1).",
    ),
    _share_rule(
        "capped_attention",
        "capped_attention",
        evidence.ATTENTION_BY_HAND_OPS,
        0.5,
        "No kernel of scaled_dot_product_attention caps scores, so that attention in single steps sends them through "
        "memory several times; flex attention compiles the cap into its own (Dong et al. 2024, arXiv:2412.05496).",
    ),
    _share_rule(
        "decode_products",
        "skinny_gemm",
        evidence.LINEAR_OPS,
        0.3,
        "With few rows a product is one read of its weights. Measured on one H200, weights from memory: cuBLAS 6.1, "
        "6.2, 13.9 and 11.6 us for the four products of a 1.1B decoder's layer, one Triton kernel 3.8, 3.2, 12.4, 7.0.",
    ),
    _share_rule(
        "decode_step",
        "cached_attention",
        evidence.ATTENTION_OPS,
        0.6,
        "Between the projections and the attention of a decoding step stand only tiny kernels. Measured on one H200 "
        "(1.1B decoder, one token): four kernels for rotation and cache 5.6 us a layer, attention itself 4.2 us.",
    ),
    _share_rule(
        "decode_attention",
        "decode_attention",
        evidence.ATTENTION_OPS,
        0.4,
        "One query over a cache needs the cache split over the device. Measured on one H200 (1.1B decoder, 1024 keys): "
        "SDPA with a mask 11.1 us, split kernel 5.2 us.",
    ),
    _share_rule(
        "split_precision",
        "split_gemm",
        evidence.LINEAR_OPS,
        0.6,
        "fp32 products run at 51 TFLOP/s on an H200's CUDA cores; three fp16 products on its tensor cores reach fp32's "
        "error (Ootomo and Yokota 2022, arXiv:2203.03341).",
    ),
    _share_rule(
        "algebra",
        "linear_algebra",
        evidence.LINEAR_OPS | evidence.CONV_OPS,
        0.8,
        "A sum or mean after a linear map, or a product with a diagonal, is a smaller linear map.",
    ),
    _share_rule(
        "towers",
        "batched_linears",
        evidence.LINEAR_OPS,
        0.3,
        "Small products one after another leave most of the device idle; a batched product runs them side by side "
        "(horizontal fusion, Wang et al. 2021, arXiv:2102.02344), an estimate until it is measured here.",
    ),
    _share_rule(
        "last_position",
        "last_token_head",
        evidence.LINEAR_OPS,
        0.3,
        "Where only the last position of a head's output is used, the others need not be computed.",
    ),
    _share_rule(
        "convolution_layout",
        "channels_last",
        evidence.CONV_OPS,
        0.2,
        "Tensor cores read channels last. Measured on one H200: conv3d 128 to 128 channels, 1.2 to 1.3 times as fast.",
    ),
    _share_rule(
        "patches",
        "patch_conv",
        evidence.CONV_OPS,
        0.7,
        "Windows that do not overlap are a permutation of the image, and the convolution a product. Measured on one "
        "H200 in bf16: patches of 16 x 16 of 64 images 515 us, as a product 62.",
    ),
    _share_rule(
        "few_groups",
        "grouped_conv",
        evidence.CONV_OPS,
        0.5,
        "Some convolutions with groups run without tensor cores. Measured on one H200 in bf16: 16 groups of 48 "
        "channels with 128 taps, 11 TFLOP/s with the library's best algorithm; each is measured where it stands.",
    ),
    _share_rule(
        "one_tap",
        "pointwise_conv",
        evidence.CONV_OPS,
        0.05,
        "A convolution with a single tap is a matrix product on the same memory, and the matrix library is often the "
        "faster; each is measured where it stands, so the share is an estimate.",
    ),
    _share_rule(
        "odd_widths",
        "padded_linear",
        evidence.LINEAR_OPS,
        0.1,
        "Half-precision products whose rows are no multiple of 16 bytes run on slow kernels; each odd weight is "
        "measured with zeros up to the next multiple of 8, and its copy is made once.",
    ),
    _share_rule(
        "residual_streams",
        "residual_gemm",
        evidence.LINEAR_OPS,
        0.03,
        "A product can add its fp32 sums to the residual in place; the norm after it then reads one tensor and writes "
        "one, instead of two and two. Measured on one H200 (bf16, 4096 x 2048 times 2048 x 2048): product 45.9 us, "
        "with the sum 46.3; RMSNorm with a residual 18.1 us, without 6.7.",
    ),
    _share_rule(
        "activated_products",
        "activation_gemm",
        evidence.LINEAR_OPS,
        0.03,
        "The matrix library can apply ReLU and GELU to its fp32 sums, which spares a read and a write of an MLP's "
        "widest values; each product is measured where it stands, so the share is an estimate.",
    ),
    _share_rule(
        "channel_by_channel",
        "depthwise_conv",
        evidence.CONV_OPS,
        0.5,
        "A depthwise convolution is bound by memory and by its load instructions. Measured on one H200 (torch 2.11), "
        "7 x 7 taps over 32 x 384 x 56 x 56 bf16: eager 1.37 ms, torch.compile 0.52, a copy of the tensor 0.04.",
    ),
    _share_rule(
        "library_kernels",
        "keep_eager",
        evidence.CONV_OPS | evidence.RNN_OPS,
        0.1,
        "Depthwise convolutions and recurrent layers were slower compiled than as one library call (KernelBench's "
        "H100 timings: 0.16x and 0.73x of eager).",
    ),
    _share_rule(
        "long_rows",
        "softmax",
        evidence.SOFTMAX_OPS,
        0.4,
        "Softmax is bound by memory: one read and one write where rows fit a block, and the second read from the L2 "
        "where they do not.",
    ),
    _share_rule(
        "one_read_of_the_logits",
        "cross_entropy",
        evidence.LOSS_OPS,
        0.6,
        "The loss of a token needs one read of its logits, in their own precision (Hsu et al. 2024, Liger Kernel, "
        "arXiv:2410.10989).",
    ),
    _share_rule(
        "no_logits",
        "linear_cross_entropy",
        evidence.LOSS_OPS,
        0.8,
        "The loss of a head's logits needs no logits in memory: each tile of the product is reduced where it is made "
        "(Wijmans et al. 2024, arXiv:2411.09009). What it saves is their write and read, an estimate until measured.",
    ),
    _share_rule(
        "running_sums",
        "cumsum",
        evidence.SCAN_OPS,
        0.4,
        "A scan over rows is one read and one write; eager's makes further passes.",
    ),
    _share_rule(
        "norm_passes",
        "layer_norm",
        evidence.LAYER_NORM_OPS,
        0.5,
        "LayerNorm is bound by memory; rows too long for a block are split over the device, which eager and Inductor "
        "leave to one block a row (KernelBench level 1, problem 40: eager 8.1 ms for 0.13 ms of bytes).",
    ),
    _share_rule(
        "norm_over_channels",
        "channel_norm",
        evidence.RMS_NORM_OPS | evidence.LAYER_NORM_OPS,
        0.5,
        "A norm over a middle dimension reads each element once when a block holds all channels of its positions.",
    ),
    _share_rule(
        "norm_over_groups",
        "group_norm",
        evidence.GROUP_NORM_OPS,
        0.4,
        "Group norm is two passes: statistics split over the device, then the affine map with its activation.",
    ),
)
