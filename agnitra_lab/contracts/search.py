"""Search spaces, trials and their outcome, in ask/tell words."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from agnitra_lab.contracts.base import Contract, Count, NonNegative, Positive, Share


class KernelConfig(Contract):
    """One point of a template's search space."""

    template: str
    params: dict[str, int]

    def key(self) -> str:
        """A deterministic name, such as "rms_norm/BLOCK_N=2048,num_warps=4"."""
        return f"{self.template}/" + ",".join(f"{name}={value}" for name, value in sorted(self.params.items()))


class SearchSpace(Contract):
    """The enumerated valid configs of one template at one shape."""

    template: str
    shape: tuple[int, ...]
    dtype: str
    params: dict[str, tuple[int, ...]]
    """Every parameter with its values in order."""
    configs: tuple[KernelConfig, ...]
    """The valid points: constraints are membership in this tuple."""


FailureClass = Literal["compile", "launch", "oom", "timeout", "wrong", "constraint", "crash", "unknown"]
"""Why a config has no latency: in the words of a recording, and two for what a recording never holds."""

Provenance = Literal["measured", "llm", "preset", "ledger", "landscape"]
"""Who measured: this search, a round of a language model's, a preset's trial, an earlier ledger, a recording."""


class Measurement(Contract):
    """What one config cost: the answer of a `measure` that knows more than the latency."""

    latency_ms: Positive | None
    samples_ms: tuple[Positive, ...] = ()
    """The single timings behind the latency, in the order in which they were taken."""
    failure: FailureClass | None = None
    detail: str | None = None
    is_aborted: bool = False
    """Sampling ended early because the config is slower than the best one beyond doubt."""
    compile_s: NonNegative | None = None
    clock_s: NonNegative | None = None
    """What the measurement would have cost where it was recorded; None where it was really made."""

    @model_validator(mode="after")
    def _has_a_latency_or_a_reason(self) -> Measurement:
        if (self.latency_ms is None) == (self.failure is None):
            raise ValueError("a measurement has either a latency or a failure class")
        return self


class Trial(Contract):
    """One measured config. A failed trial has no latency, and says why."""

    index: Count
    config: KernelConfig
    latency_ms: Positive | None
    status: Literal["ok", "failed"] = "ok"
    detail: str | None = None
    elapsed_s: NonNegative = 0.0
    """Since the search began."""
    failure: FailureClass | None = None
    samples_ms: tuple[Positive, ...] = ()
    is_aborted: bool = False
    compile_s: NonNegative | None = None
    clock_s: NonNegative | None = None
    provenance: Provenance = "measured"


class ForeignResult(Contract):
    """A measurement that somebody else made of a config of the same template."""

    config: KernelConfig
    latency_ms: Positive | None
    failure: FailureClass | None = None
    samples_ms: tuple[Positive, ...] = ()
    is_aborted: bool = False


class SearchResult(Contract):
    """What a search found, with everything that it measured."""

    space_template: str
    shape: tuple[int, ...]
    dtype: str
    sampler: str
    seed: int
    measured_on: str
    """Device name, or "recorded: <device>" when the measurements were replayed."""
    trials: tuple[Trial, ...]
    best: Trial | None
    num_configs: Count
    stopped_because: Literal["budget", "exhausted", "time", "cancelled", "hanging"]
    attached: tuple[Trial, ...] = ()
    """Foreign results that the search began with; they are no measurements of its own."""
    finals: tuple[Trial, ...] = ()
    """The second measurements of the finalists, in the order in which they were taken."""
    trust: dict[str, Share] = {}
    """How much the sampler relies on each sibling in the end, where it has siblings."""
    ledger: str | None = None
    """File name of the ledger, where one was kept."""
    schema_version: str = "agnitra.search.v1"
