"""A suggestion: the seed's fields, and which known action they parametrise. The language model's answer is
untrusted, so every field is closed and ranged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.base import Contract, Count, ExactNumber, NonNegative, Positive
from agnitra_lab.contracts.search import KernelConfig

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
    num_warps: Literal[1, 2, 4, 8, 16, 32] | None = None
    num_stages: Annotated[int, Field(ge=1, le=8)] | None = None
    node: str | None = None
    template: str | None = None
    """The kernel family, for actions of that kind; what `config` belongs to."""
    site: str | None = None
    """Which search space `config` was chosen from, as "template/shape/dtype"."""
    config: KernelConfig | None = None
    """A valid point of that space; None where no space was handed in. The seed's kernel fields are read off it."""

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


FallbackReason = Literal["timeout", "refusal", "malformed", "out_of_range", "not_configured", "budget"]


class Fallback(Contract):
    """Why presets stand in for the language model."""

    reason: FallbackReason
    detail: str
    wall_ms: Positive | None = None

    @property
    def banner(self) -> str:
        """The line that every surface shows."""
        return f"Suggestions come from heuristic presets: {self.detail}"


RejectReason = Literal[
    "not_an_object", "unknown_key", "bad_field", "unknown_action", "not_possible", "unknown_site", "outside_space",
    "repeated", "over_limit",
]  # fmt: skip
"""Why one suggestion of an answer was not taken: no object, a key that was not asked for, a field of the wrong form
or range, an action or place that is not listed, a config that is no valid point of its space, one that was proposed
before, one more than a round may have."""


class Rejected(Contract):
    """One suggestion of a language model that was not taken."""

    position: Count
    """In the answer's list."""
    reason: RejectReason
    detail: str


class TokenPrices(Contract):
    """What a language model's tokens cost, as somebody said: never guessed."""

    input_usd_per_million: Annotated[ExactNumber, Field(ge=0)]
    output_usd_per_million: Annotated[ExactNumber, Field(ge=0)]
    source: Annotated[str, Field(min_length=1, max_length=200)]


class LLMUsage(Contract):
    """What asking took. Replies from a cache or a recording cost nothing and count no tokens."""

    num_questions: Count = 0
    """Answered or not."""
    num_replayed: Count = 0
    """Of them, answered from the cache or a recording."""
    input_tokens: Count = 0
    output_tokens: Count = 0
    is_estimated: bool = False
    """A server did not count its tokens, or gave no answer: those are upper bounds by the length of the text."""
    cost_usd: ExactNumber | None = None
    """None where no price is known."""
    wait_ms: NonNegative = 0.0


class SuggestionRound(Contract):
    """One question and what came of its answer."""

    index: Count
    prompt_version: str
    prompt_sha256: str | None
    """None where nobody was asked: the presets alone."""
    model: str | None = None
    reply_source: Literal["server", "cache", "recording"] | None = None
    suggestions: tuple[Suggestion, ...] = ()
    """What was taken, in the order in which to measure it: presets of the first round, then the model's."""
    num_proposed: Count = 0
    """Suggestions in the model's answer."""
    rejected: tuple[Rejected, ...] = ()
    best_latency_ms: dict[str, Positive] = {}
    """The best measurement of each site when the question was asked."""
    measured_on: dict[str, str] = {}
    """Sites whose figures are of another device, such as "recorded: NVIDIA H200"."""
    usage: LLMUsage = LLMUsage()
    error: str | None = None
    """Why the answer could not be used at all."""
    raw_text: str | None = None
    """The answer, redacted and cut."""


StopReason = Literal[
    "rounds", "gains_faded", "no_feedback", "token_budget", "cost_budget", "wait_budget", "error", "no_model",
]  # fmt: skip
"""Why no further question is asked."""


class Proposal(Contract):
    """What the suggest stage gives: ranked suggestions, best first."""

    suggestions: tuple[Suggestion, ...]
    source: Literal["llm", "preset"]
    model: str | None = None
    fallback: Fallback | None = None
    rounds: tuple[SuggestionRound, ...] = ()
    """How they came about, where search spaces were handed in or a model was asked."""
    usage: LLMUsage | None = None
    """None where nobody was asked."""
    stopped_because: StopReason | None = None
    """None while a further question may be asked."""
    schema_version: str = "agnitra.proposal.v1"

    def configs_for(self, site: str) -> tuple[KernelConfig, ...]:
        """Return every config that was chosen for a site, each once, in the order of the rounds."""
        chosen = [s.config for item in self.rounds for s in item.suggestions if s.site == site and s.config is not None]
        return tuple({config.key(): config for config in chosen}.values())
