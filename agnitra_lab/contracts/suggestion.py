"""A suggestion: the seed's fields, and which known action they parametrise. The language model's answer is
untrusted, so every field is closed and ranged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.base import Contract, Positive

BlockSize = Annotated[int, Field(ge=16, le=65536)]
TileEdge = Annotated[int, Field(ge=1, le=65536)]
LatencyMs = Annotated[float, Field(gt=0.0, le=3_600_000.0)]


class Suggestion(Contract):
    """One thing to try. The kernel fields are null for actions that have no kernel."""

    action: str
    block_size: BlockSize | None
    tile_shape: tuple[TileEdge, TileEdge] | None
    unroll_factor: Annotated[int, Field(ge=1, le=16)] | None
    target_latency_ms: LatencyMs
    """What the whole call should come down to."""
    expected_latency_ms: LatencyMs
    """What the proposer expects of the whole call after this action alone."""
    rationale: Annotated[str, Field(min_length=1, max_length=2000)]
    source: Annotated[str, Field(min_length=1, max_length=200)]
    """"preset:<rule>" or "llm:<model>"."""
    raw_text: str | None = None
    num_warps: Literal[1, 2, 4, 8, 16] | None = None
    num_stages: Annotated[int, Field(ge=1, le=8)] | None = None
    node: str | None = None

    @field_validator("action")
    @classmethod
    def _known_action(cls, value: str) -> str:
        if value not in ACTIONS:
            raise ValueError(f"unknown action {value!r}; known: {', '.join(ACTIONS)}")
        return value

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int | None) -> int | None:
        if value is not None and value & (value - 1):
            raise ValueError(f"block_size must be a power of two, got {value}")
        return value


FallbackReason = Literal["timeout", "refusal", "malformed", "out_of_range", "not_configured"]


class Fallback(Contract):
    """Why presets stand in for the language model."""

    reason: FallbackReason
    detail: str
    wall_ms: Positive | None = None

    @property
    def banner(self) -> str:
        """The line that every surface shows."""
        return f"Suggestions come from heuristic presets: {self.detail}"


class Proposal(Contract):
    """What the suggest stage gives: ranked suggestions, best first."""

    suggestions: tuple[Suggestion, ...]
    source: Literal["llm", "preset"]
    model: str | None = None
    fallback: Fallback | None = None
    schema_version: str = "agnitra.proposal.v1"
