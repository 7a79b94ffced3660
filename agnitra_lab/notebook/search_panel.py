"""What the refine step found, as a panel: the curves, and of each search its configs and what decides their time."""

from __future__ import annotations

from collections.abc import Sequence

from agnitra_lab.contracts.search import Trial
from agnitra_lab.errors import UsageError
from agnitra_lab.notebook import cards, search_pictures
from agnitra_lab.notebook.cards import Column, Table
from agnitra_lab.notebook.findings import Findings
from agnitra_lab.notebook.search_facts import Searched, searches_of
from agnitra_lab.report import numbers, palette
from agnitra_lab.report.dashboard_sections import microseconds
from agnitra_lab.report.html import Child, Html, join, tag

_MAX_SEARCHES, _MAX_ROWS = 5, 40
_MAX_PARALLEL = 2
"""Searches whose configs are drawn: a card with its charts may add 60 kB to a notebook."""
_LEAST_TRIALS, _MAX_NAMED = 4, 3
_WHERE = (
    "A search's configs as a card of their own: workbench.show_search(1). All trials as a frame: workbench.trials. The "
    "ledgers are among the files."
)
_BAR_PX = 150
_LIST = (
    "font-family:ui-monospace,'SF Mono',Menlo,Consolas,monospace;font-size:12px;line-height:1.45;margin:6px 0 0 0;"
    f"max-height:240px;overflow:auto;white-space:pre;background:{palette.PANEL};color:{palette.TEXT}"
)


def search_panel(known: Findings) -> Html:
    """Render the panel: of searches that have ended all of it, of those under way the curves."""
    searches = searches_of(known)
    step = known.steps["refine"]
    parts: list[Html | None] = []
    if searches:
        picture = search_pictures.search_picture(searches)
        alt = f"Line chart of the kernel search. {'; '.join(map(_sentence, searches))}."
        parts += [
            cards.heading("Kernel search"),
            cards.picture(picture, alt, search_pictures.SEARCH_HEIGHT),
            cards.table(_curves_table(searches)),
        ]
    if searches and step.has_ended:
        drawn = [(at, search) for at, search in enumerate(searches) if _is_worth_drawing(search)][:_MAX_PARALLEL]
        # A notebook may grow by 60 kB for a card with its chart: beside what the later steps found, a line has to do.
        is_newest = not known.steps["patch"].has_ended
        parts += [_configs(at, search) if is_newest else _decided(at, search) for at, search in drawn]
        parts.append(cards.paragraph(_WHERE, top=8))
    if not searches or step.status == "skipped":
        parts.append(cards.paragraph(step.headline, top=4))
    return join(parts)


def search_card_html(known: Findings, number: int) -> Html:
    """Render one search as a card of its own.

    Args:
        known: the workbench.
        number: of the search, from 1 on, as the panel's table has it.

    Raises:
        UsageError: there is no such search, or too little was measured in it.
    """
    searches = searches_of(known) if known.searches else []
    if not 1 <= number <= len(searches):
        have = f"There are {len(searches)}" if searches else "None has ended"
        raise UsageError(f"There is no search {number}. {have}.", hint="workbench.searches lists them.")
    search = searches[number - 1]
    if not _is_worth_drawing(search):
        raise UsageError(
            f"Search {number} ({search.name}) has fewer than {_LEAST_TRIALS} configs with a time to compare.",
            hint="workbench.trials has them as a frame.",
        )
    picture = search_pictures.search_picture([search])
    return cards.block(
        cards.kicker(["search", known.workload.name, known.device_name]),
        cards.title(f"{search.name}: best {_time(search.best_ms)} of {_trials_text(search)} configs"),
        cards.section(
            cards.picture(picture, f"Line chart: {_sentence(search)}.", search_pictures.SEARCH_HEIGHT),
            cards.table(_curves_table([search])),
            _configs(0, search),
        ),
    )


def search_card_text(known: Findings, number: int) -> str:
    """Render one search as plain text: the trials, fastest first."""
    search = searches_of(known)[number - 1]
    return f"{_sentence(search)}.\n{_lines(search.trials)}\n"


def _curves_table(searches: Sequence[Searched]) -> Table:
    columns = (
        Column("Search", 40),
        Column("Trials", 13, is_number=True),
        Column("Failed", 9, is_number=True),
        Column("First", 12, is_number=True),
        Column("Best", 12, is_number=True),
        Column("Optimum", 14, is_number=True),
    )
    rows = [
        (
            f"{at + 1}  {search.name} {search.how}",
            _trials_text(search),
            str(sum(trial.latency_ms is None for trial in search.trials)),
            _time(search.first_ms),
            _time(search.best_ms),
            _optimum_text(search),
        )
        for at, search in enumerate(searches[:_MAX_SEARCHES])
    ]
    return Table(None, columns, rows)


def _configs(at: int, search: Searched) -> Html:
    """One search's configs as parallel lines, what decides their time, and the same numbers as text."""
    from agnitra_lab.refine.importance import importance

    found = importance(search.trials)
    names = [effect.name for effect in found.effects] or _varying(search.trials)
    best = min((trial for trial in search.trials if trial.latency_ms), key=lambda trial: trial.latency_ms or 0.0)
    alt = (
        f"Parallel coordinates of {len(search.trials)} configs of {search.name}: {', '.join(names)}, and the time. "
        f"Best: {_config_text(best)}, {_time(best.latency_ms)}."
    )
    effects: Html | None
    if found.effects:
        about = (
            f"A sum of one effect a parameter predicts {numbers.share(found.explained)} of the variance of the log "
            f"time of left-out trials ({found.num_trials} trials); shares are of what it predicts of "
            "the configs tried."
        )
        rows: list[tuple[Child, ...]] = [
            (effect.name, _share_bar(effect.share), str(effect.best), _factors_text(effect.factors))
            for effect in found.effects
        ]
        columns = (Column("Parameter", 22), Column("Share of the time's variance", 34),
                   Column("Fastest value", 14), Column("Factor on the time by value", 30))  # fmt: skip
        effects = join([cards.table(Table(f"What decides the time of {search.name}", columns, rows)),
                        cards.paragraph(about, top=4)])  # fmt: skip
    else:
        effects = cards.paragraph(
            f"Which parameter decides cannot be said: {found.num_trials} trials predict a left-out one no better than "
            "their mean does.", top=4,
        )  # fmt: skip
    return join(
        [
            tag("div", cards.heading(f"{at + 1}  Configs of {search.name}"), style="margin:14px 0 0 0"),
            cards.picture(search_pictures.parallel_picture(search.trials, names), alt, search_pictures.PARALLEL_HEIGHT),
            effects,
            cards.details(
                f"The {len(search.trials)} trials in numbers", tag("pre", _lines(search.trials), style=_LIST)
            ),
        ]
    )


def _decided(at: int, search: Searched) -> Html:
    """What decides a search's time, in one line."""
    from agnitra_lab.refine.importance import importance

    found = importance(search.trials)
    shares = ", ".join(f"{effect.name} {numbers.share(effect.share)}" for effect in found.effects[:_MAX_NAMED])
    told = f"{shares} of the {numbers.share(found.explained)} that can be predicted" if shares else "cannot be said"
    return cards.paragraph(cards.label(f"{at + 1}  What decides the time of {search.name}:"), f" {told}.", top=4)


def _is_worth_drawing(search: Searched) -> bool:
    return sum(bool(trial.latency_ms) for trial in search.trials) >= _LEAST_TRIALS and bool(_varying(search.trials))


def _varying(trials: Sequence[Trial]) -> list[str]:
    values: dict[str, set[int]] = {}
    for trial in trials:
        for name, value in trial.config.params.items():
            values.setdefault(name, set()).add(value)
    return [name for name, seen in values.items() if len(seen) > 1]


def _lines(trials: Sequence[Trial]) -> str:
    """The trials, fastest first: the numbers behind the lines."""
    ranked = sorted(trials, key=lambda trial: (trial.latency_ms is None, trial.latency_ms or 0.0))
    lines = [
        f"{_time(trial.latency_ms) if trial.latency_ms else trial.failure or 'failed':>10}  {_config_text(trial)}"
        for trial in ranked[:_MAX_ROWS]
    ]
    num_left = len(ranked) - len(lines)
    return "\n".join([*lines, *([f"{num_left} more in workbench.trials"] if num_left else [])])


def _sentence(search: Searched) -> str:
    best = f"{search.name} {search.how}: best {_time(search.best_ms)} of {len(search.trials)} trials"
    return f"{best}, optimum {_time(search.optimum_ms)}" if search.optimum_ms else best


def _trials_text(search: Searched) -> str:
    return f"{len(search.trials)} of {search.num_configs:,}" if search.num_configs else str(len(search.trials))


def _optimum_text(search: Searched) -> str:
    if search.optimum_ms is None or search.above_optimum is None:
        return "not known"
    return f"{_time(search.optimum_ms)}, +{search.above_optimum:.1%}"


def _share_bar(share: float) -> Html:
    return join([tag("span", numbers.share(share), style="display:inline-block;width:52px"),
                 cards.bar(share, _BAR_PX, palette.SECONDARY)])  # fmt: skip


def _factors_text(factors: object) -> str:
    assert isinstance(factors, dict)
    return ", ".join(f"{value}: {factor:.2f}" for value, factor in sorted(factors.items()))


def _config_text(trial: Trial) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(trial.config.params.items()))


def _time(value: float | None) -> str:
    return microseconds(value) if value else numbers.ABSENT
