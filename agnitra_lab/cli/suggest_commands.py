"""`agnitra suggest`: what to try on a target, from a language model or by rule, with measured feedback if asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agnitra_lab.cli.app import app
from agnitra_lab.cli.loop_commands import (
    Artifacts,
    BudgetS,
    Json,
    LLMModel,
    LLMUrl,
    SuggestFrom,
    SuggestOption,
    Target,
    new_loop,
)

Rounds = Annotated[
    int, typer.Option(min=1, max=16, help="Questions at most; above 1, kernel configs are measured in between.")
]
Price = Annotated[
    str | None, typer.Option("--llm-price", help="INPUT/OUTPUT, USD per million tokens; else AGNITRA_LLM_PRICE.")
]
MaxCost = Annotated[str | None, typer.Option("--llm-max-usd", help="Budget of all questions; needs a price.")]
MaxTokens = Annotated[int | None, typer.Option("--llm-max-tokens", min=1, help="Budget of all questions, in tokens.")]
Deadline = Annotated[float, typer.Option("--llm-deadline", min=0.1, help="Seconds for one answer.")]
Replies = Annotated[Path | None, typer.Option("--llm-replies", help="Answer from this recording; ask no server.")]
Record = Annotated[Path | None, typer.Option("--llm-record", help="Write the replies to this file, redacted.")]
After = Annotated[
    Path | None,
    typer.Option("--after", help="Report of an earlier run: the model is told what became of its rewrites."),
]
Cache = Annotated[bool, typer.Option("--llm-cache/--no-llm-cache", help="Keep replies in the user's cache folder.")]


@app.command()
def suggest(
    target: Target,
    source: SuggestOption = SuggestFrom.AUTO,
    rounds: Rounds = 1,
    llm_url: LLMUrl = None,
    llm_model: LLMModel = None,
    llm_deadline_s: Deadline = 20.0,
    llm_price: Price = None,
    llm_max_usd: MaxCost = None,
    llm_max_tokens: MaxTokens = None,
    llm_replies: Replies = None,
    llm_record: Record = None,
    is_llm_cached: Cache = True,
    after: After = None,
    budget_s: BudgetS = 300.0,
    is_json: Json = False,
    artifacts: Artifacts = Path("artifacts"),
) -> int:
    """Profile TARGET and list what to try, best first."""
    from agnitra_lab.cli import suggest_console

    loop = new_loop(
        target, artifacts=artifacts, suggest=source.value, llm_base_url=llm_url, llm_model=llm_model,
        llm_deadline_s=llm_deadline_s, llm_rounds=rounds, llm_price=llm_price, llm_max_cost_usd=llm_max_usd,
        llm_max_tokens=llm_max_tokens, llm_replies=llm_replies, llm_record=llm_record, is_llm_cached=is_llm_cached,
        llm_after=after, budget_s=budget_s,
    )  # fmt: skip
    try:
        loop.profile()
        loop.suggest()
        if rounds > 1:
            loop.refine()
        suggest_console.print_proposal(loop.proposal, is_json=is_json)
        loop.finish_early()
    finally:
        loop.close()
    return 0
