"""What a report shows below its headline, as plain tables and facts, so that every surface shows the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agnitra_lab.contracts.base import Contract
from agnitra_lab.contracts.measurement import CandidateResult, Comparison, Equivalence, Verdict
from agnitra_lab.contracts.patch import Refusal
from agnitra_lab.contracts.report import Report
from agnitra_lab.report import numbers
from agnitra_lab.report.assemble import USUAL_SHARE
from agnitra_lab.report.metrics import is_faster, price_per_hour

MAX_OPS = 6
MAX_DESCRIPTORS = 8
MAX_REGIONS = 10
VERDICT_WORDS = {
    "faster": "Faster",
    "no_change": "No change",
    "slower": "Slower",
    "not_equivalent": "Not equivalent",
}
_PATCH_COLUMNS, _PATCH_WIDTHS = ("Name", "Node", "Module", "Change"), (29, 15, 23, 33)
_HEAD_TO_HEAD_WORDS = {
    "faster": "faster",
    "no_change": "no difference beyond the noise",
    "slower": "slower",
    "not_equivalent": "outputs differ",
}
_ORACLE_DECIDED = "fp64 decided"

Facts = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption.

    Attributes:
        caption: what the rows are.
        columns: their headings; the first column heads the row.
        rows: cells as text.
        numeric: indices of columns that hold numbers.
        emphasised: index of the row that stands out, None for none.
        note: a sentence below the table.
        widths: per cent of the row that each column needs, for front ends that lay a table out by its first row.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    emphasised: int | None = None
    note: str | None = None
    widths: tuple[int, ...] = ()


def kicker(report: Report) -> str:
    """What ran, and where: the line above the headline."""
    title, device = report.title, report.device.name
    return title if device in title else f"{title} · {device}"


def verdict(report: Report) -> Verdict:
    """The verdict on what is kept: a candidate that measured faster and was not kept changed nothing."""
    measured = report.comparison.verdict
    return "no_change" if measured == "faster" and not is_faster(report) else measured


def head_to_head(report: Report) -> str | None:
    """The winner against the best plain torch.compile mode; None when they were not held against each other."""
    rival = report.against_best
    if rival is None:
        return None
    speedup = f"{numbers.times(rival.speedup.median)} {numbers.interval(rival.speedup.low, rival.speedup.high)}"
    return f"Head to head with {rival.baseline}: {speedup}, {_HEAD_TO_HEAD_WORDS[rival.verdict]}."


def equivalence_sentence(comparison: Comparison) -> str:
    """What the outputs were held against, how much of them agreed, and how much had to."""
    check, baseline = comparison.equivalence, comparison.baseline
    required = numbers.exact_share(check.required_share)
    if is_judged_by_oracle(check):
        parts = [f"{numbers.exact_share(check.match_share)} of elements within tolerance of fp64, {required} required "
                 f"(the bar is set by {baseline}'s own share)"]  # fmt: skip
    else:
        parts = [f"{numbers.exact_share(check.match_share)} of elements within tolerance of {baseline}, "
                 f"{required} required"]  # fmt: skip
    if check.error_ratio is not None:
        parts.append(f"error against fp64 {numbers.times(check.error_ratio)} {baseline}'s")
    if check.top1_agreement is not None:
        parts.append(f"top-1 agreement {numbers.exact_share(check.top1_agreement)}")
    return "; ".join(parts)


def is_judged_by_oracle(check: Equivalence) -> bool:
    """Whether the shares are against fp64, and the required one follows from the baseline's own."""
    return check.required_share < USUAL_SHARE and _ORACLE_DECIDED in (check.oracle_note or "")


def ranked(report: Report) -> tuple[CandidateResult, ...]:
    """The candidates in reading order: the kept one, then equivalent ones by speed-up, then those not measured."""

    def rank(row: CandidateResult) -> tuple[bool, bool, bool, float]:
        comparison = row.comparison
        if comparison is None:
            return row.status == "kept", False, False, 0.0
        return row.status == "kept", True, comparison.equivalence.is_equivalent, comparison.speedup.median

    return tuple(sorted(report.candidates, key=rank, reverse=True))


def candidate_table(report: Report) -> Table:
    """Every candidate with its verdict, median latency, speed-up and equivalence."""
    rows = tuple(_candidate_row(candidate) for candidate in ranked(report))
    kept = next((index for index, row in enumerate(ranked(report)) if row.status == "kept"), None)
    return Table(
        caption=f"Candidates, each against {report.comparison.baseline}",
        columns=("Candidate", "Verdict", "Latency p50", "Speed-up", "Equivalent", "Why"),
        rows=rows,
        numeric=frozenset({2, 3}),
        emphasised=kept,
        widths=(22, 12, 12, 18, 13, 23),
    )


def ops_table(report: Report) -> Table:
    """The ops with the most self time."""
    events = sorted(report.telemetry.events, key=lambda event: event.latency_ms, reverse=True)
    rows = tuple(
        (
            event.op,
            numbers.milliseconds(event.latency_ms),
            numbers.share(event.share),
            str(event.num_calls),
            event.module_path or event.node or "outside the graph",
        )
        for event in events[:MAX_OPS]
    )
    note = "The other ops are in the JSON." if len(events) > MAX_OPS else None
    return Table(
        "Top ops by self time", ("Op", "Self time", "Share", "Calls", "Where"), rows, frozenset({1, 2, 3}), note=note,
        widths=(34, 14, 10, 9, 33),
    )  # fmt: skip


def checkpoint_table(report: Report) -> Table:
    """The stages of the loop as they went."""
    rows = tuple((step.stage, step.status, numbers.seconds(step.wall_s), step.headline) for step in report.checkpoints)
    columns = ("Stage", "Status", "Time", "Result")
    return Table("Checkpoints of the loop", columns, rows, frozenset({2}), widths=(13, 11, 10, 66))


def suggestion_table(report: Report) -> Table:
    """What was suggested, best first."""
    rows = tuple(
        (
            item.action,
            numbers.milliseconds(item.expected_latency_ms),
            item.source,
            numbers.shortened(item.rationale, 240),
        )
        for item in report.proposal.suggestions
    )
    columns = ("Action", "Expected", "Source", "Rationale")
    return Table("Suggestions, best first", columns, rows, frozenset({1}), widths=(20, 13, 27, 40))


def patch_table(report: Report) -> Table:
    """What was replaced at which node; what was refused, and why."""
    patch = report.patch
    if patch is None:
        rows = _refused(report.refusals)
        note = "No patch was kept" + ("; this is what all changes together left as it was." if rows else ".")
        return Table("Patch", _PATCH_COLUMNS, rows, note=note, widths=_PATCH_WIDTHS)
    replaced = tuple(
        (
            item.name,
            item.node,
            item.module_path or "graph",
            f"{', '.join(item.replaced) or 'options'} → {item.replacement}",
        )
        for item in patch.descriptors[:MAX_DESCRIPTORS]
    )
    refused = _refused((*patch.refusals, *report.refusals))
    notes = ["The other descriptors are in the JSON."] if len(patch.descriptors) > MAX_DESCRIPTORS else []
    if patch.rollback is not None:
        proof = "restores the original, bit for bit" if patch.rollback.is_restored else "did NOT restore the original"
        notes.append(f"Rollback was tried and {proof}.")
    if not replaced and not refused:
        notes.insert(0, "Nothing in the graph was replaced.")
    return Table(
        f"Patch of {patch.candidate}", _PATCH_COLUMNS, replaced + refused, note=" ".join(notes) or None,
        widths=_PATCH_WIDTHS,
    )  # fmt: skip


def _refused(refusals: Sequence[Refusal]) -> tuple[tuple[str, str, str, str], ...]:
    return tuple((item.action, "", "", f"refused: {item.reason}") for item in refusals)


def region_tables(report: Report) -> tuple[Table, ...]:
    """Each part of the model before and after, as one table; no table when nothing was kept or profiled."""
    if not report.regions:
        return ()
    rows = tuple(
        (
            region.place,
            numbers.milliseconds(region.baseline_ms),
            numbers.milliseconds(region.candidate_ms),
            numbers.times(region.baseline_ms / region.candidate_ms) if region.candidate_ms else "",
            numbers.share(min(region.limit_ms / region.candidate_ms, 1.0))
            if region.limit_ms and region.candidate_ms
            else "",
            ", ".join(region.changes),
        )
        for region in report.regions[:MAX_REGIONS]
    )
    hidden = len(report.regions) - len(rows)
    note = "Of the limit: the work's FLOPs at the matrix peak, or one read of its weights, over the time after."
    table = Table(
        "Where the time went, before and after",
        ("Part", "Before", "After", "Speed-up", "Of the limit", "What changed there"),
        rows,
        frozenset({1, 2, 3, 4}),
        note=f"{note} {hidden} more parts are in the JSON." if hidden > 0 else note,
        widths=(30, 12, 12, 10, 11, 25),
    )
    return (table,)


def agent_notes(report: Report) -> Facts:
    """What steered the run."""
    notes = report.notes
    sampler = f" ({notes.sampler})" if notes.sampler else ""
    facts = [
        ("RL refinement", f"{'on' if notes.is_rl_enabled else 'off'}{sampler}"),
        ("Suggestion source", notes.suggestion_source),
        ("Applied", ", ".join(notes.applied) or "nothing"),
    ]
    if notes.measured_on:
        facts.append(("Kernel timings", notes.measured_on))
    return tuple(facts)


def run_facts(report: Report) -> Facts:
    """Where and when it ran."""
    device = report.device
    peaks = report.peaks
    facts = [("Workload", report.workload), ("Device", " · ".join(filter(None, (device.name, device.arch))))]
    versions = (("PyTorch", device.torch_version), ("Triton", device.triton_version), ("CUDA", device.cuda_version))
    facts += [("Software", " · ".join(f"{name} {version}" for name, version in versions if version) or "not recorded")]
    if peaks and peaks.copy_bandwidth_gb_per_s:
        facts.append(("Copy bandwidth", f"{peaks.copy_bandwidth_gb_per_s:,.1f} GB/s measured"))
    if peaks and peaks.gemm_tflop_per_s:
        facts.append(
            ("GEMM peak", f"{peaks.gemm_tflop_per_s:,.3g} TFLOP/s {peaks.gemm_dtype or ''}".rstrip() + " measured")
        )
    return (*facts, ("Generated", report.generated_at), ("Run", report.run_id))


def proof_facts(report: Report) -> Facts:
    """What backs the verdict: noise, equivalence, the physical floor."""
    comparison, check = report.comparison, report.comparison.equivalence
    noise = numbers.interval(comparison.noise.low, comparison.noise.high)
    facts = [
        ("Measured speed-up", f"{numbers.times(comparison.speedup.median)} "
         f"{numbers.interval(comparison.speedup.low, comparison.speedup.high)}, the median of paired ratios "
         "(not the ratio of the two medians)"),
        ("Noise (A/A)", noise),
        ("Equivalence", equivalence_sentence(comparison)),
        ("Error against fp64", f"{numbers.scientific(check.error_vs_fp64)}, "
         f"{comparison.baseline} {numbers.scientific(check.baseline_error_vs_fp64)}"),
        ("Samples", f"{comparison.candidate_latency.num_samples} each, interleaved"),
    ]  # fmt: skip
    if check.oracle_note:
        facts.append(("How it was judged", check.oracle_note))
    if comparison.floor_ms:
        facts.append(
            ("Physical floor", f"{numbers.milliseconds(comparison.floor_ms)}: {comparison.floor_reason or ''}")
        )
    cost = break_even(report)
    if cost is not None:
        facts.append(("Pays for itself", cost))
    return (*facts, *(("Problem", problem) for problem in check.problems))


def break_even(report: Report) -> str | None:
    """After how many calls the run has earned the time that it took; None when nothing was kept."""
    payback = report.payback
    if payback is None:
        return None
    return (
        f"after {payback.num_calls:,} calls: {numbers.seconds(payback.spent_s)} of this run, of it "
        f"{numbers.seconds(payback.searched_s)} of kernel search, "
        f"at {numbers.milliseconds(payback.saved_ms)} saved a call"
    )


def usage_facts(report: Report) -> Facts:
    """What the usage event charges, as it has it."""
    usage = report.usage
    amounts = (
        ("Usage charge", usage.usage_charge),
        ("Success fee", usage.success_fee),
        ("Total", usage.total_billable),
    )
    basis = f"{usage.tokens_processed:,} {report.comparison.item_unit} at {price_per_hour(report)}"
    return (("Covers", basis), *((label, numbers.money(amount, usage.currency)) for label, amount in amounts))


def bottleneck_sentence(report: Report) -> str:
    """The bottleneck in one sentence."""
    bottleneck = report.telemetry.bottleneck
    if bottleneck is None:
        return "The profile shows no bottleneck."
    shape = "×".join(str(size) for size in bottleneck.shape)
    share = f", {numbers.share(bottleneck.share)} of the self time" if bottleneck.share is not None else ""
    where = bottleneck.module_path or bottleneck.node
    place = f" at {where}" if where else ""
    source = f" ({bottleneck.source})" if bottleneck.source else ""
    of_shape = f" on {shape}" if shape else ""
    return f"{bottleneck.op}{of_shape} takes {numbers.milliseconds(bottleneck.latency_ms)}{share}{place}{source}."


def advice(report: Report) -> str | None:
    """What to do when nothing is faster; None when something is."""
    if is_faster(report):
        return None
    kept = f"Nothing was installed: {report.comparison.baseline} stays in place."
    if verdict(report) == "no_change":
        return f"{kept} Larger inputs or another workload may leave more to gain."
    return f"{kept} If an earlier patch of this model is active, result.rollback() restores the original."


def banner(report: Report) -> str | None:
    """The line about a fallback that every surface shows; None without one."""
    if report.notes.banner:
        return report.notes.banner
    return report.proposal.fallback.banner if report.proposal.fallback else None


def json_artifacts(report: Report) -> tuple[tuple[str, str, str], ...]:
    """(title, file name, JSON text) of every artifact that can be copied."""
    parts: list[tuple[str, str, Contract | None]] = [
        ("Report", "report.json", report),
        ("Telemetry", "telemetry.json", report.telemetry),
        ("Usage event", "usage_event.json", report.usage),
        ("Suggestions", "suggestions.json", report.proposal),
        ("Patch log", "patch_log.json", report.patch),
    ]
    return tuple((title, name, part.to_json()) for title, name, part in parts if part is not None)


def _candidate_row(candidate: CandidateResult) -> tuple[str, ...]:
    comparison = candidate.comparison
    if comparison is None:
        return candidate.name, candidate.status, "", "", "", candidate.reason
    check = comparison.equivalence
    speedup = comparison.speedup
    return (
        candidate.name,
        "kept" if candidate.status == "kept" else VERDICT_WORDS[comparison.verdict].lower(),
        numbers.milliseconds(comparison.candidate_latency.latency_ms_p50),
        f"{numbers.times(speedup.median)} {numbers.interval(speedup.low, speedup.high)}",
        f"{'yes' if check.is_equivalent else 'no'}, {numbers.exact_share(check.match_share)}"
        + (" vs fp64" if is_judged_by_oracle(check) else ""),
        candidate.reason,
    )
