"""Search spaces, trials and their outcome, in ask/tell words."""

from __future__ import annotations

from typing import Literal

from agnitra_lab.contracts.base import Contract, Count, NonNegative, Positive


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


class Trial(Contract):
    """One measured config. A failed trial has no latency, and says why."""

    index: Count
    config: KernelConfig
    latency_ms: Positive | None
    status: Literal["ok", "failed"] = "ok"
    detail: str | None = None
    elapsed_s: NonNegative = 0.0
    """Since the search began."""


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
    stopped_because: Literal["budget", "exhausted", "time", "cancelled"]
    schema_version: str = "agnitra.search.v1"
