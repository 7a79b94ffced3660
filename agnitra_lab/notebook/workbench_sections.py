"""What each step of a workbench produced, as one panel of its card. Every figure is a field of a contract."""

from __future__ import annotations

from collections.abc import Callable

from agnitra_lab.contracts.measurement import Comparison, Latency
from agnitra_lab.contracts.patch import PatchLog
from agnitra_lab.contracts.report import Report, StageName
from agnitra_lab.notebook import cards, profile_rows, workbench_pictures
from agnitra_lab.notebook.cards import Column, Table
from agnitra_lab.notebook.findings import Findings
from agnitra_lab.notebook.profile_sentences import bottleneck_sentence
from agnitra_lab.notebook.rollback_card import rollback_facts, rollback_sentence
from agnitra_lab.notebook.search_panel import search_panel
from agnitra_lab.report import metrics, numbers, palette, sections
from agnitra_lab.report.html import Html, join, tag

_MAX_SUGGESTIONS, _MAX_RATIONALE = 8, 160
_MAX_KERNELS, _MAX_SOURCES, _MAX_SOURCE_LENGTH = 5, 1, 1_500
_MAX_TOP, _MAX_DESCRIPTORS, _MAX_CANDIDATES = 6, 5, 5
_MAX_REASON = 180
_MONO = "font-family:ui-monospace,'SF Mono',Menlo,Consolas,monospace"
_PRE = (
    f"background:{palette.SURFACE};color:{palette.TEXT};{_MONO};font-size:12px;line-height:1.45;padding:12px;"
    "border-radius:8px;margin:6px 0 0 0;max-height:320px;overflow:auto;white-space:pre"
)


def panel(known: Findings, stage: StageName) -> Html | None:
    """The panel of a step that has ended; of a search that is under way, its curve. None for others."""
    if not known.steps[stage].has_ended and not (stage == "refine" and known.live_trials):
        return None
    return _PANELS[stage](known)


def rollback_panel(known: Findings) -> Html | None:
    """The proof of the last rollback."""
    if known.proof is None:
        return None
    facts = Table(
        rollback_sentence(known.proof), (Column("What", 28), Column("Found", 72)), rollback_facts(known.proof)
    )
    return cards.table(facts)


def printed_panel(known: Findings) -> Html | None:
    """What the model printed while a step ran."""
    return source_text("What the model printed", known.printed.strip()) if known.printed.strip() else None


def source_text(summary: str, text: str) -> Html:
    """Text of any kind, folded away."""
    return cards.details(summary, tag("pre", text, style=_PRE))


def _profile(known: Findings) -> Html:
    assert known.telemetry is not None
    record = known.telemetry.record
    caption, shown = profile_rows.top_rows(record, record.peaks)
    columns = (
        Column("Node", 34),
        Column("Where", 34),
        Column("Self time", 12, is_number=True),
        Column("Share", 10, is_number=True),
        Column("Calls", 10, is_number=True),
    )
    rows = [(row.name, row.place, row.latency, numbers.share(row.share), str(row.calls)) for row in shown[:_MAX_TOP]]
    return join([cards.paragraph(bottleneck_sentence(record, record.peaks), bottom=10),
                 cards.table(Table(caption, columns, rows))])  # fmt: skip


def _suggest(known: Findings) -> Html:
    proposal = known.proposal
    assert proposal is not None
    accepted = known.settings.accept
    columns = (
        Column("Action", 18),
        Column("Taken", 8),
        Column("Expected", 12, is_number=True),
        Column("Source", 25),
        Column("Why", 37),
    )
    rows = [
        (
            each.action,
            "yes" if accepted is None or each.action in accepted else "no",
            numbers.milliseconds(each.expected_latency_ms),
            each.source,
            numbers.shortened(numbers.plain_text(each.rationale), _MAX_RATIONALE),
        )
        for each in proposal.suggestions[:_MAX_SUGGESTIONS]
    ]
    num_left = len(proposal.suggestions) - len(rows)
    return join(
        [
            _warning(proposal.fallback.banner) if proposal.fallback else None,
            cards.table(Table("Suggestions, best first", columns, rows))
            if rows
            else cards.paragraph("Nothing to try was found."),
            cards.paragraph(f"{num_left} more in suggestions.json.", top=6) if num_left > 0 else None,
        ]
    )


def _generate(known: Findings) -> Html:
    kernels = known.kernels
    if not kernels:
        return cards.paragraph(known.steps["generate"].headline)
    columns = (Column("Kernel", 34), Column("Config", 46), Column("sha256", 20))
    rows = [(kernel.name, kernel.config.key().partition("/")[2], kernel.content_hash[:12]) for kernel in kernels]
    sources = [
        source_text(f"Triton source of {kernel.name}", _cut(kernel.source, f"perf/kernels/{kernel.name}.py"))
        for kernel in kernels[:_MAX_SOURCES]
    ]
    return join([cards.table(Table("Generated kernels", columns, rows[:_MAX_KERNELS])), *sources])


def _patch(known: Findings) -> Html:
    log = _shown_log(known)
    parts: list[Html | None] = []
    if log is not None and (log.descriptors or log.refusals):
        columns = (Column("Change", 34), Column("Node", 22), Column("Replaced by", 44))
        rows = [(each.name, each.node, each.replacement) for each in log.descriptors[:_MAX_DESCRIPTORS]]
        rows += [(each.action, "", f"refused: {each.reason}") for each in log.refusals[:_MAX_DESCRIPTORS]]
        parts.append(cards.table(Table(f"Patch descriptors of {log.candidate}", columns, rows)))
    results = known.results
    columns = (Column("Candidate", 34), Column("Compiled in", 14, is_number=True), Column("First verdict", 52))
    rows = [
        (
            each.name,
            numbers.seconds(each.compile_s) if each.compile_s is not None else "",
            numbers.shortened(each.reason, _MAX_REASON),
        )
        for each in results[:_MAX_CANDIDATES]
    ]
    parts.append(cards.table(Table("Candidates", columns, rows)))
    return join(parts)


def _benchmark(known: Findings) -> Html:
    comparison = known.comparison
    assert comparison is not None
    picture = workbench_pictures.distribution_picture(comparison)
    return join(
        [
            cards.heading(f"A/B: {comparison.baseline} and {comparison.candidate}, interleaved"),
            cards.picture(picture, distribution_alt(comparison), workbench_pictures.DISTRIBUTION_HEIGHT),
            cards.table(latency_table(comparison)),
            *(
                cards.paragraph(cards.label(f"{label}:"), f" {text}", top=4)
                for label, text in verdict_facts(comparison)
            ),
        ]
    )


def _report(known: Findings) -> Html:
    report = known.report
    assert report is not None
    return join(
        [
            cards.tiles([_tile(metric) for metric in metrics.metric_cards(report)]),
            *(cards.paragraph(text) for text in _conclusions(report)),
        ]
    )


def latency_table(comparison: Comparison) -> Table:
    """The numbers of the distribution's picture."""
    columns = (
        Column("Side", 28),
        Column("p20", 16, is_number=True),
        Column("Median", 16, is_number=True),
        Column("p80", 16, is_number=True),
        Column("p95", 14, is_number=True),
        Column("Samples", 10, is_number=True),
    )
    sides = (
        (f"{comparison.baseline} (baseline, striped)", comparison.baseline_latency),
        (f"{comparison.candidate} (candidate, solid)", comparison.candidate_latency),
    )
    return Table(
        None, columns, [(name, *_quantile_texts(latency), str(latency.num_samples)) for name, latency in sides]
    )


def distribution_alt(comparison: Comparison) -> str:
    """The distribution's picture in a sentence."""
    before, after = comparison.baseline_latency, comparison.candidate_latency
    return (
        f"Distribution of the latencies: {comparison.baseline}, striped, median "
        f"{numbers.milliseconds(before.latency_ms_p50)}; {comparison.candidate}, solid, median "
        f"{numbers.milliseconds(after.latency_ms_p50)}."
    )


def verdict_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What decides between faster and no change."""
    speedup, noise = comparison.speedup, comparison.noise
    facts = [
        ("Verdict", sections.VERDICT_WORDS[comparison.verdict].lower()),
        (
            "Speed-up",
            f"{numbers.times(speedup.median)} {numbers.interval(speedup.low, speedup.high)}, median of paired ratios",
        ),
        ("Noise (A/A)", numbers.interval(noise.low, noise.high)),
        ("Equivalence", sections.equivalence_sentence(comparison)),
    ]
    return facts + [("Problem", problem) for problem in comparison.equivalence.problems[:3]]


def _conclusions(report: Report) -> list[str]:
    return [text for text in (sections.head_to_head(report), sections.advice(report), _saved(report)) if text]


def _saved(report: Report) -> str | None:
    """The honest null in words: nothing kept, nothing saved."""
    if metrics.is_faster(report):
        return None
    return f"GPU hours saved: {numbers.hours(report.usage.gpu_hours_saved)}. No saving and no fee is claimed."


def _tile(metric: metrics.Metric) -> cards.Tile:
    change = ", ".join(metrics.change_lines(metric))
    return metric.label, metric.value, f"{change}. {metric.note}" if change else metric.note


def _shown_log(known: Findings) -> PatchLog | None:
    """The log of the winner, else of the candidate with the most changes."""
    named = [log for log in known.patches if log.candidate == known.winner]
    ranked = named or sorted(known.patches, key=lambda log: -len(log.descriptors))
    return ranked[0] if ranked else None


def _quantile_texts(latency: Latency) -> tuple[str, str, str, str]:
    slow = numbers.milliseconds(latency.latency_ms_quantiles[19]) if len(latency.latency_ms_quantiles) > 19 else ""
    middle = (latency.latency_ms_p20, latency.latency_ms_p50, latency.latency_ms_p80)
    first, second, third = (numbers.milliseconds(value) for value in middle)
    return first, second, third, slow


def _cut(source: str, path: str) -> str:
    if len(source) <= _MAX_SOURCE_LENGTH:
        return source
    lines = source[:_MAX_SOURCE_LENGTH].rsplit("\n", 1)[0]
    return f"{lines}\n# ... the whole file: {path}"


def _warning(text: str) -> Html:
    return tag("p", tag("strong", "Note: "), text, style=f"color:{palette.WARNING};margin:0 0 10px 0;font-size:13px")


_PANELS: dict[StageName, Callable[[Findings], Html]] = {
    "profile": _profile,
    "suggest": _suggest,
    "refine": search_panel,
    "generate": _generate,
    "patch": _patch,
    "benchmark": _benchmark,
    "report": _report,
}
