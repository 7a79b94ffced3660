"""Apply the table of heuristics (`rules`) to a profile: a suggestion a rule at most, lowest expected latency first."""

from __future__ import annotations

from collections.abc import Collection

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import WorkloadProfile
from agnitra_lab.contracts.suggestion import Suggestion
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.suggest import evidence
from agnitra_lab.suggest.rules import RULES, Rule, Situation

TARGET_SHARE = 0.85
"""The goal for every call: at least 15% less latency (the design's success metric)."""
MAX_SAVED = 0.95


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
