"""Everything that steers a run of the loop."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.errors import UsageError
from agnitra_lab.generate.tuned import default_folder
from agnitra_lab.refine.sampler import SAMPLERS


@dataclass(frozen=True)
class Settings:
    """Everything that steers a run.

    Attributes:
        suggest: "auto" asks a language model where one is configured, "llm" insists, "preset" never asks.
        llm_rounds: questions to the language model at most; from the second on with what was measured of its configs.
        llm_max_tokens: of all questions together; None for no limit.
        llm_max_cost_usd: of all questions together; needs llm_price.
        llm_price: "INPUT/OUTPUT", USD per million tokens; by default AGNITRA_LLM_PRICE; without it no cost is shown.
        is_llm_cached: take and keep replies in the user's cache folder.
        llm_replies: recorded replies to answer from; no server is asked.
        llm_record: file to record the replies in.
        llm_after: report of an earlier run; what became of its rewrites is told to the language model.
        sampler: "rl" (contextual bandit) or another of `refine.sampler.SAMPLERS`; None for the preset kernel configs.
        max_trials: measurements a kernel search may make.
        budget_s: seconds for building and screening candidates: one is begun while they last, the others are listed
            as skipped. Kernel searches may take another 30% of them.
        is_warm: take kernel configs that earlier runs found on this machine, and what they learnt of the same model.
        tuned_folder: where both lie; by default AGNITRA_CACHE_DIR, else the user's cache folder.
        timing_s: seconds of interleaved timing a candidate.
        seed: of every random choice.
        tokens_processed: volume that the usage event accounts for, in the workload's items.
        is_isolated: compile and time each candidate in a process of its own first, on a copy of the model; only what
            leads there is built here.
        is_explained: profile what was installed too, for the report's times by part of the model.
        accept: actions of the suggestions to take up; None for all.
        only: name of the one candidate to build; None for all.
        artifacts: folder of the runs.
        command: the line that runs this again, for the record.
    """

    project_id: str = "default"
    suggest: Literal["auto", "llm", "preset"] = "auto"
    llm_base_url: str | None = None
    llm_api_key: str | None = None
    llm_model: str | None = None
    llm_deadline_s: float = 20.0
    llm_rounds: int = 4
    llm_max_tokens: int | None = None
    llm_max_cost_usd: Decimal | str | None = None
    llm_price: str | None = None
    is_llm_cached: bool = True
    llm_replies: Path | str | None = None
    llm_record: Path | str | None = None
    llm_after: Path | str | None = None
    sampler: str | None = "rl"
    max_trials: int = 24
    budget_s: float = 300.0
    timing_s: float = 4.0
    seed: int = 0
    tokens_processed: int = 262_144
    price_per_gpu_hour: Decimal | str = "2.50"
    success_fee_rate: Decimal | str = "0.20"
    is_warm: bool = True
    tuned_folder: Path | str | None = None
    is_isolated: bool = False
    is_explained: bool = True
    accept: tuple[str, ...] | None = None
    only: str | None = None
    artifacts: Path | str = "artifacts"
    command: str | None = None

    @classmethod
    def of(cls, **given: Any) -> Settings:
        """Make settings of keyword arguments.

        Raises:
            UsageError: for an unknown name, with the known ones, or a value that no run could use.
        """
        known = cls.__dataclass_fields__
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise UsageError(f"Unknown settings: {', '.join(unknown)}.", hint=f"Known: {', '.join(known)}.")
        return cls(**given)

    def __post_init__(self) -> None:
        choices = {"suggest": ("auto", "llm", "preset"), "sampler": (*SAMPLERS, None)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}.", hint=f"Expected one of {allowed}.")
        unknown = [name for name in self.accept or () if name not in ACTIONS]
        if unknown:
            raise UsageError(f"accept names {unknown[0]!r}, which is no action.", hint=f"Known: {', '.join(ACTIONS)}.")
        for name in ("budget_s", "timing_s", "llm_deadline_s", "llm_rounds", "max_trials", "tokens_processed"):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, Real) or not float(given) > 0:
                raise UsageError(f"{name} is {given!r}.", hint="Expected a number above 0.")
        for name in ("price_per_gpu_hour", "success_fee_rate"):
            try:
                value = Decimal(getattr(self, name))
            except (ArithmeticError, TypeError, ValueError):
                value = Decimal("NaN")
            if not (value.is_finite() and value >= 0):
                raise UsageError(f"{name} is {getattr(self, name)!r}.", hint="Expected a decimal number, such as 2.50.")

    @property
    def memory(self) -> Path:
        """Folder of what runs on this machine have found."""
        return default_folder() if self.tuned_folder is None else Path(self.tuned_folder)

    def public(self) -> dict[str, Any]:
        """Return what may be written down: all but the key."""
        hidden = ("llm_api_key", "llm_replies", "llm_record", "llm_after", "artifacts", "command", "tuned_folder")
        return {
            name: str(value) if isinstance(value, Decimal) else value
            for name, value in vars(self).items()
            if name not in hidden
        }
