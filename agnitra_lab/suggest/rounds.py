"""Up to four questions with measured answers between them: ask, measure elsewhere, tell, ask again.

    rounds = Rounds(record, profile, device, sites=sites, client=client)
    while (made := rounds.ask()) is not None:
        for suggestion in made.suggestions: ...      # measure suggestion.config at suggestion.site
        rounds.tell(site, trials)
    rounds.proposal

The first round always has the presets, so a model that is absent, slow or wrong costs nothing that they would have
found. A later question is asked only when the last one lowered some site's best time, and within the budgets.

Source: the round structure (measure, feed the best and the failures back, stop on a plateau) is that of Helion's
LLM-guided search; 33 kernels on a B200 reached the speed of its Bayesian search with a tenth of the configs.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import WorkloadProfile
from agnitra_lab.contracts.search import KernelConfig, Trial
from agnitra_lab.contracts.suggestion import (
    Fallback,
    FallbackReason,
    Proposal,
    StopReason,
    Suggestion,
    SuggestionRound,
)
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.errors import LLMError, LLMRefusalError, LLMTimeoutError, MissingError
from agnitra_lab.llm.questions import prompt_sha256
from agnitra_lab.llm.reply import LanguageModel, Reply
from agnitra_lab.suggest import evidence, landscapes, parsing, presets, prompts
from agnitra_lab.suggest.answer_schema import KERNEL_FIELDS, SCHEMA_NAME, answer_schema
from agnitra_lab.suggest.budget import Limits, Spending
from agnitra_lab.suggest.kernel_presets import ranked
from agnitra_lab.suggest.sites import MAX_SITES, KernelSite

MAX_SUGGESTIONS = 24

_NOT_CONFIGURED = (
    "no language model is configured. Set AGNITRA_LLM_BASE_URL (and AGNITRA_LLM_API_KEY, AGNITRA_LLM_MODEL), or "
    "OPENAI_API_KEY."
)


class Rounds:
    """One conversation about one profiled workload.

    Attributes:
        rounds: the rounds so far.
        stopped_because: why no further question is asked; None while one may be.
        fallback: why presets stand in, when a model was asked or asked for and gave nothing.
    """

    def __init__(
        self,
        record: TelemetryRecord,
        profile: WorkloadProfile,
        device: DeviceInfo,
        *,
        findable: Collection[str] | None = None,
        sites: Sequence[KernelSite] = (),
        client: LanguageModel | None = None,
        limits: Limits | None = None,
        is_llm_requested: bool = False,
    ) -> None:
        """Take what the questions are about.

        Args:
            record: the measured profile.
            profile: the workload's type, phase and patterns.
            device: where it ran.
            findable: actions that the rewrites found something for; None where nobody asked them.
            sites: search spaces of known templates, most frequent first; all have presets, the first MAX_SITES are
                asked about.
            client: the language model; None asks nobody.
            limits: what asking may take.
            is_llm_requested: the user asked for a model, so that its absence is a fallback and not the normal case.
        """
        self.rounds: list[SuggestionRound] = []
        self.stopped_because: StopReason | None = None
        self.fallback: Fallback | None = None
        self._record, self._profile, self._device = record, profile, device
        self._findable = findable
        self._sites = tuple(site for site in sites if site.space.configs and site.space.template in ACTIONS)
        self._client = client
        self._limits = limits or Limits()
        self._spending = Spending(self._limits)
        self._possible = prompts.choices(record, profile, device, findable, self._sites)
        self._possible_here = evidence.possible_actions(record, profile, device, findable)
        self._heuristic = presets.suggest(record, profile, device, findable)
        self._trials: dict[str, list[Trial]] = {}
        self._actions: dict[str, str] = {}
        self._num_told = 0
        if client is None and is_llm_requested:
            self.fallback = Fallback(reason="not_configured", detail=_NOT_CONFIGURED)

    def ask(self) -> SuggestionRound | None:
        """Make the next round, None when there is none.

        Never raises for what a server or a model does: the round says what went wrong.
        """
        if self.stopped_because is None:
            self.stopped_because = self._reason_to_stop()
        if self.stopped_because is not None and self.rounds:
            return None
        made = self._round()
        self.rounds.append(made)
        self._num_told = 0
        return made

    def tell(self, site: str, trials: Iterable[Trial]) -> None:
        """Learn what was measured at a site, proposed here or not; failed trials are feedback too."""
        told = list(trials)
        self._trials.setdefault(site, []).extend(told)
        self._num_told += len(told)

    def tell_actions(self, outcomes: Mapping[str, str]) -> None:
        """Learn what became of actions: a measured speedup, or the reason why one was not kept, in a few words."""
        known = {name: " ".join(text.split())[:120] for name, text in outcomes.items() if name in self._possible}
        self._actions |= known
        self._num_told += len(known)

    @property
    def proposal(self) -> Proposal:
        """Everything proposed so far, best first, with the record of how it came about."""
        answered = [s for made in self.rounds for s in made.suggestions if s.source.startswith("llm:")]
        named = [suggestion for suggestion in answered if suggestion.action in self._possible_here]
        models = [made.model for made in self.rounds if made.model is not None and made.error is None]
        is_llm = bool(answered)
        return Proposal(
            suggestions=tuple(self._merged(named)[:MAX_SUGGESTIONS]),
            source="llm" if is_llm else "preset",
            model=models[0] if is_llm and models else None,
            fallback=self.fallback,
            rounds=tuple(self.rounds),
            usage=self._spending.usage if self._client is not None else None,
            stopped_because=self.stopped_because,
        )

    # --- one round ---

    def _reason_to_stop(self) -> StopReason | None:
        if self._client is None:
            return "no_model"
        if len(self.rounds) >= self._limits.max_rounds:
            return "rounds"
        if not self.rounds:
            return None
        if not self._num_told:
            return "no_feedback"
        return None if self._has_gained() else "gains_faded"

    def _has_gained(self) -> bool:
        """Whether the last round lowered some site's best time, or is the first that anything is known of."""
        before = self.rounds[-1].best_latency_ms
        if not before:
            return True
        after = self._best()
        return any(
            key not in before or latency_ms < before[key] * (1 - self._limits.min_gain)
            for key, latency_ms in after.items()
        )

    def _round(self) -> SuggestionRound:
        index, known = len(self.rounds), self._known()
        first = self._preset_configs() if index == 0 else []
        bare = SuggestionRound(
            index=index, prompt_version=prompts.PROMPT_VERSION, prompt_sha256=None, suggestions=tuple(first),
            best_latency_ms=self._best(),
            measured_on={s.key: f"recorded: {s.device.name}" for s in self._sites if s.device is not None},
        )  # fmt: skip
        if self._client is None:
            return bare
        asked_about = self._sites[:MAX_SITES]
        feedback = prompts.Feedback(self.rounds, self._trials, self._actions)
        messages = prompts.build(
            self._record, self._profile, self._device, self._findable, sites=asked_about,
            configs_per_site=self._limits.configs_per_round,
            feedback=feedback if self.rounds or self._actions else None,
        )  # fmt: skip
        over = self._spending.why_not(messages)
        if over is not None:
            self.stopped_because = over
            text = f"the {over.replace('_', ' ')} does not allow a question."
            if index == 0:
                self.fallback = Fallback(reason="budget", detail=text)
            return bare.model_copy(update={"error": text})
        known |= {parsing.identity_of(suggestion) for suggestion in first}
        asked = parsing.Asked(self._possible, asked_about, known, self._limits.configs_per_round)
        return self._answered(bare, messages, asked)

    def _answered(self, bare: SuggestionRound, messages: list[dict[str, str]], asked: parsing.Asked) -> SuggestionRound:
        """Ask, and add what the answer gives to a round that has its presets already."""
        schema = answer_schema(self._possible, asked.sites)
        started_s = time.perf_counter()
        facts: dict[str, Any] = {"prompt_sha256": prompt_sha256(messages, schema)}
        reply: Reply | None = None
        try:
            assert self._client is not None
            reply = self._client.complete(messages, schema_name=SCHEMA_NAME, json_schema=schema)
            facts |= {"model": _shown_model(reply.model), "reply_source": reply.source}
            answer = parsing.parse(reply.text, model=reply.model, asked=asked)
            # Rewrites in the order of what is expected of them; configs in the model's own order.
            taken = sorted(answer.suggestions, key=lambda s: 0.0 if s.config is not None else s.expected_latency_ms)
            facts |= {
                "raw_text": answer.raw_text,
                "suggestions": (*bare.suggestions, *(_without_copy(suggestion) for suggestion in taken)),
                "num_proposed": answer.num_proposed,
                "rejected": answer.rejected,
            }
        except (LLMError, MissingError) as error:
            facts["error"] = str(error)
            self._give_up(error, _wall_ms(started_s))
        wait_ms = 0.0 if isinstance(reply, Reply) and reply.source != "server" else _wall_ms(started_s)
        facts["usage"] = self._spending.add(messages, reply, wait_ms)
        return bare.model_copy(update=facts)

    def _give_up(self, error: LLMError | MissingError, wall_ms: float) -> None:
        self.stopped_because = "error"
        if not self.rounds:
            self.fallback = Fallback(reason=_reason(error), detail=str(error), wall_ms=wall_ms)

    # --- what is known ---

    def _known(self) -> set[tuple[str, str]]:
        proposed = {parsing.identity_of(suggestion) for made in self.rounds for suggestion in made.suggestions}
        measured = {(site, trial.config.key()) for site, trials in self._trials.items() for trial in trials}
        return proposed | measured

    def _best(self) -> dict[str, float]:
        best = {site: landscapes.best_latency_ms(trials) for site, trials in self._trials.items()}
        return {site: latency_ms for site, latency_ms in best.items() if latency_ms is not None}

    def _preset_configs(self) -> list[Suggestion]:
        base_ms = evidence.base_latency_ms(self._record) or 1.0
        expected = {suggestion.action: suggestion for suggestion in self._heuristic}
        return [
            _preset(site, config, rank, expected.get(site.space.template), base_ms)
            for site in self._sites
            for rank, config in enumerate(
                ranked(site.space, site.device or self._device, limit=self._limits.configs_per_round)
            )
        ]

    def _merged(self, answered: list[Suggestion]) -> list[Suggestion]:
        """Each action once, the model's before the presets'; further configs of an action that was named come last."""
        ordered = sorted(answered, key=lambda suggestion: suggestion.expected_latency_ms)
        first: dict[str, Suggestion] = {}
        for suggestion in (*ordered, *self._heuristic):
            first.setdefault(suggestion.action, suggestion)
        unique: dict[tuple[str, str], Suggestion] = {}
        for suggestion in (*first.values(), *ordered):
            unique.setdefault(parsing.identity_of(suggestion), suggestion)
        return list(unique.values())


def _preset(site: KernelSite, config: KernelConfig, rank: int, rule: Suggestion | None, base_ms: float) -> Suggestion:
    fields = parsing.kernel_fields(config)
    tile = fields.pop("tile_shape")
    return Suggestion(
        action=site.space.template,
        **{name: fields[name] for name in KERNEL_FIELDS if name in fields},
        tile_shape=tuple(tile) if tile else None,
        target_latency_ms=rule.target_latency_ms if rule else base_ms,
        expected_latency_ms=rule.expected_latency_ms if rule else base_ms,
        rationale=f"Number {rank + 1} of the template's rules of thumb for this shape and class of device.",
        source=f"preset:kernel_rules/{site.space.template}",
        template=site.space.template,
        site=site.key,
        config=config,
    )


def _without_copy(suggestion: Suggestion) -> Suggestion:
    """Leave the answer's text with the round: a copy for each of its many configs would be most of the file."""
    return suggestion if suggestion.config is None else suggestion.model_copy(update={"raw_text": None})


def _wall_ms(started_s: float) -> float:
    return max((time.perf_counter() - started_s) * 1e3, 1e-6)


def _shown_model(model: str) -> str:
    return parsing.printable(model)[: parsing.MAX_MODEL_CHARS] or "unnamed"


def _reason(error: LLMError | MissingError) -> FallbackReason:
    if isinstance(error, MissingError):
        return "not_configured"
    if isinstance(error, LLMTimeoutError):
        return "timeout"
    if isinstance(error, LLMRefusalError):
        return "refusal"
    return (
        "out_of_range"
        if isinstance(error, parsing.InvalidAnswerError) and error.kind == "out_of_range"
        else "malformed"
    )
