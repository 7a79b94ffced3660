"""The suggest stage: ask the language model where there is one, and let presets fill in, or stand in and say why."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import Any

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import WorkloadProfile
from agnitra_lab.contracts.suggestion import Fallback, FallbackReason, Proposal, Suggestion
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.errors import LLMError, LLMRefusalError, LLMTimeoutError, MissingError
from agnitra_lab.llm.reply import LanguageModel
from agnitra_lab.suggest import evidence, parsing, presets, prompts

MAX_SUGGESTIONS = 24

_NOT_CONFIGURED = (
    "no language model is configured. Set AGNITRA_LLM_BASE_URL (and AGNITRA_LLM_API_KEY, AGNITRA_LLM_MODEL), or "
    "OPENAI_API_KEY."
)


def propose(
    record: TelemetryRecord,
    profile: WorkloadProfile,
    device: DeviceInfo,
    *,
    findable: Collection[str] | None = None,
    client: LanguageModel | None = None,
    is_llm_requested: bool = False,
    max_suggestions: int = MAX_SUGGESTIONS,
) -> Proposal:
    """Propose what to try on a profiled workload, best first.

    What the model names goes in front, in order of its expected latency; presets for the actions that it did not
    name follow, with their own source, so that a lazy or wrong model costs nothing that the presets would have found.

    Args:
        record: the measured profile.
        profile: the workload's type, phase and patterns.
        device: where it ran.
        findable: actions that the rewrites found something for; None where nobody asked them.
        client: the language model to ask; None asks nobody.
        is_llm_requested: the user asked for a language model, so its absence is a fallback and not the normal case.
        max_suggestions: most suggestions that are returned.

    Returns:
        The proposal; `fallback` says why presets stand in, when a model was asked or asked for and gave nothing.
        Never raises for what a server or a model does.
    """
    heuristic = presets.suggest(record, profile, device, findable)
    if client is None:
        fallback = Fallback(reason="not_configured", detail=_NOT_CONFIGURED) if is_llm_requested else None
        return _from_presets(heuristic, fallback, max_suggestions)
    started_s = time.perf_counter()
    try:
        suggestions, model = _ask(client, record, profile, device, findable)
    except (LLMError, MissingError) as error:
        wall_ms = max((time.perf_counter() - started_s) * 1e3, 1e-6)
        fallback = Fallback(reason=_reason(error), detail=str(error), wall_ms=wall_ms)
        return _from_presets(heuristic, fallback, max_suggestions)
    merged = _merge(suggestions, heuristic)
    return Proposal(suggestions=tuple(merged[:max_suggestions]), source="llm", model=model)


def _ask(
    client: LanguageModel,
    record: TelemetryRecord,
    profile: WorkloadProfile,
    device: DeviceInfo,
    findable: Collection[str] | None,
) -> tuple[list[Suggestion], str]:
    """Return the model's usable suggestions, lowest expected latency first, and its name."""
    possible = evidence.possible_actions(record, profile, device, findable)
    reply = client.complete(
        prompts.build(record, profile, device, findable),
        schema_name=parsing.SCHEMA_NAME,
        json_schema=parsing.answer_schema(possible),
    )
    answered = parsing.parse(reply.text, model=reply.model)
    usable = [suggestion for suggestion in answered if suggestion.action in possible]
    if not usable:
        named = ", ".join(sorted({suggestion.action for suggestion in answered}))
        raise parsing.InvalidAnswerError(
            f"The language model named only actions that are not possible here: {named}.", kind="out_of_range"
        )
    return sorted(usable, key=lambda suggestion: suggestion.expected_latency_ms), answered[0].source.removeprefix(
        "llm:"
    )


def _merge(answered: list[Suggestion], heuristic: list[Suggestion]) -> list[Suggestion]:
    """Each action once, the model's before the presets'; further configs of an action that was named come last."""
    first: dict[str, Suggestion] = {}
    for suggestion in (*answered, *heuristic):
        first.setdefault(suggestion.action, suggestion)
    return _unique((*first.values(), *answered))


def _unique(suggestions: Iterable[Suggestion]) -> list[Suggestion]:
    unique: dict[tuple[Any, ...], Suggestion] = {}
    for suggestion in suggestions:
        unique.setdefault(_what_it_changes(suggestion), suggestion)
    return list(unique.values())


def _what_it_changes(suggestion: Suggestion) -> tuple[Any, ...]:
    return (
        suggestion.action,
        suggestion.block_size,
        suggestion.tile_shape,
        suggestion.unroll_factor,
        suggestion.num_warps,
        suggestion.num_stages,
    )


def _from_presets(heuristic: list[Suggestion], fallback: Fallback | None, max_suggestions: int) -> Proposal:
    return Proposal(suggestions=tuple(_unique(heuristic)[:max_suggestions]), source="preset", fallback=fallback)


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
