"""The usage event: what a run saved and what it bills, field for field as the seed fixes it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agnitra_lab.contracts.base import Contract, Count, ExactNumber


class UsageEvent(Contract):
    """One optimisation as a billable event. Money is in `currency`, four decimals, parts sum to totals."""

    project_id: Annotated[str, Field(min_length=1)]
    model_name: Annotated[str, Field(min_length=1)]
    tokens_processed: Count
    baseline_latency_ms: ExactNumber
    optimized_latency_ms: ExactNumber
    baseline_tokens_per_sec: ExactNumber
    optimized_tokens_per_sec: ExactNumber
    gpu_hours_before: ExactNumber
    gpu_hours_after: ExactNumber
    gpu_hours_saved: ExactNumber
    performance_uplift_pct: ExactNumber
    cost_before: ExactNumber
    cost_after: ExactNumber
    cost_savings: ExactNumber
    usage_charge: ExactNumber
    success_fee: ExactNumber
    total_billable: ExactNumber
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    metadata: dict[str, str]
    schema_version: str = "agnitra.usage.v1"
