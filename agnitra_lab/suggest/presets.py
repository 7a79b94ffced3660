"""The heuristics: one ordered table of rules, each with the gain it expects of a profile and where that comes from.

A rule's expectation is an estimate from shares of the measured profile. It only ranks what is tried first: whether a
change is kept is for the benchmark to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import WorkloadProfile
from agnitra_lab.contracts.suggestion import Suggestion
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.suggest import evidence

TARGET_SHARE = 0.85
"""The goal for every call: at least 15% less latency (the design's success metric)."""
MAX_SAVED = 0.95


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


def _idle_share(situation: Situation) -> float:
    utilisation = situation.record.gpu.gpu_utilisation
    if utilisation is None:
        # Without GPU truth: one token a call is bound by launches, a large batch is not.
        return 0.5 if situation.is_decode else 0.1
    return 1.0 - utilisation


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
)


def suggest(
    record: TelemetryRecord,
    profile: WorkloadProfile,
    device: DeviceInfo,
    findable: Collection[str] | None = None,
) -> list[Suggestion]:
    """Apply the table to one profile.

    Args:
        record: the measured profile; every expectation is a share of its times.
        profile: the workload's type, phase and patterns.
        device: where it ran.
        findable: actions that the rewrites found something for; None where nobody asked them.

    Returns:
        At most one suggestion a rule, lowest expected latency first, ties in table order. Empty when the profile
        holds no time at all: there is nothing to expect anything of.
    """
    base_ms = evidence.base_latency_ms(record)
    if base_ms is None:
        return []
    situation = Situation(record, profile, device)
    possible = evidence.possible_actions(record, profile, device, findable)
    suggestions = [
        _suggestion(rule, situation, base_ms) for rule in RULES if rule.action in possible and rule.applies(situation)
    ]
    return sorted(suggestions, key=lambda suggestion: suggestion.expected_latency_ms)


def _suggestion(rule: Rule, situation: Situation, base_ms: float) -> Suggestion:
    saved = rule.expected_share_saved(situation)
    if not rule.saves_idle:
        saved *= evidence.busy_share(situation.record, situation.device)
    fields = rule.kernel_fields(situation)
    bottleneck = situation.record.bottleneck
    return Suggestion(
        action=rule.action,
        block_size=fields.block_size,
        tile_shape=fields.tile_shape,
        unroll_factor=fields.unroll_factor,
        target_latency_ms=base_ms * TARGET_SHARE,
        expected_latency_ms=base_ms * (1.0 - min(max(saved, 0.0), MAX_SAVED)),
        rationale=rule.reason,
        source=f"preset:{rule.name}",
        num_warps=fields.num_warps,  # type: ignore[arg-type]
        num_stages=fields.num_stages,
        node=bottleneck.node if bottleneck else None,
    )
