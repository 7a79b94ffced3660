"""What `agnitra suggest` prints: the ranked suggestions, the rounds behind them, and what asking took."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agnitra_lab.cli.console import ORANGE
from agnitra_lab.contracts.suggestion import LLMUsage, Proposal, SuggestionRound
from agnitra_lab.redact import redact_text

_console = Console(highlight=False, soft_wrap=True)
_STOPPED = {
    "rounds": "all rounds were asked",
    "gains_faded": "the last round gained nothing",
    "no_feedback": "nothing was measured to ask about",
    "token_budget": "the token budget is spent",
    "cost_budget": "the cost budget is spent",
    "wait_budget": "the waiting budget is spent",
    "error": "the last answer was of no use",
    "no_model": "no language model was asked",
}


def print_proposal(proposal: Proposal, *, is_json: bool) -> None:
    """Ranked suggestions, with the fallback banner if there is one."""
    if is_json:
        sys.stdout.write(redact_text(proposal.to_json()) + "\n")
        return
    if proposal.fallback:
        _line(f"[{ORANGE}]{escape(redact_text(proposal.fallback.banner))}[/]")
    table = Table("action", "expected ms", "source", "why")
    for suggestion in proposal.suggestions:
        table.add_row(
            suggestion.action, f"{suggestion.expected_latency_ms:.3f}", escape(suggestion.source),
            escape(redact_text(suggestion.rationale)),
        )  # fmt: skip
    _console.print(table)
    if any(suggestion.config is not None for made in proposal.rounds for suggestion in made.suggestions):
        _print_configs(proposal)
    if proposal.usage is not None:
        for made in proposal.rounds:
            _line(_round_line(made))
        _line(_usage_line(proposal.usage, proposal.stopped_because))


def _print_configs(proposal: Proposal) -> None:
    rows = [(made, s) for made in proposal.rounds for s in made.suggestions if s.config is not None]
    for site in dict.fromkeys(suggestion.site or "" for _, suggestion in rows):
        where = rows[0][0].measured_on.get(site)
        table = Table("round", "config", "from", title=escape(site + (f", {where}" if where else "")))
        for made, suggestion in rows:
            if suggestion.site == site and suggestion.config is not None:
                params = " ".join(f"{name}={value}" for name, value in suggestion.config.params.items())
                table.add_row(str(made.index + 1), params, escape(suggestion.source.partition("/")[0]))
        _console.print(table)


def _round_line(made: SuggestionRound) -> str:
    counts: dict[str, int] = {}
    for item in made.rejected:
        counts[item.reason] = counts.get(item.reason, 0) + 1
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    best = ", ".join(f"{site} {latency_ms * 1e3:.2f} us" for site, latency_ms in sorted(made.best_latency_ms.items()))
    parts = [
        f"Round {made.index + 1} ({made.prompt_version}): {made.num_proposed} proposed",
        f"dropped: {dropped}" if dropped else "",
        f"best before it: {best}" if best else "",
        f"error: {redact_text(made.error)}" if made.error else "",
    ]
    return escape("; ".join(part for part in parts if part))


def _usage_line(usage: LLMUsage, stopped_because: str | None) -> str:
    cost = "no price given" if usage.cost_usd is None else f"{usage.cost_usd:.6f} USD"
    bound = " at most" if usage.is_estimated else ""
    why = f" Stopped: {_STOPPED[stopped_because]}." if stopped_because else ""
    return escape(
        f"{usage.num_questions} questions ({usage.num_replayed} from cache or recording), {usage.input_tokens} tokens "
        f"in and {usage.output_tokens} out{bound}, {cost}, {usage.wait_ms / 1e3:.1f} s of waiting.{why}"
    )


def _line(text: str) -> None:
    _console.print(text)
