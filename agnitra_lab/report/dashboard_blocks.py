"""What is seen of the dashboard, section by section. Tables stand without scripts; the rest waits for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from agnitra_lab.report import dashboard_charts as charts
from agnitra_lab.report import dashboard_sections as sections
from agnitra_lab.report import numbers
from agnitra_lab.report.dashboard_record import Dashboard, LayerProfile, PairRow, RunRow, SearchCurve, SuiteGroup
from agnitra_lab.report.html import Child, Html, escape, join, tag

MAX_LISTED_RUNS = 500
_SECTIONS = (
    ("runs", "Runs"), ("layers", "Where the time goes"), ("compare", "Compare two runs"),
    ("regressions", "Regressions"), ("suite", "Suite"), ("searches", "Kernel searches"),
)  # fmt: skip
_COMMANDS = ("runs", "suite table", "regressions", "dashboard --json")


def dashboard_body(record: Dashboard, profiles: Sequence[LayerProfile]) -> Html:
    """Render what is seen, without its style, data and script.

    Args:
        record: what is under the artifacts folder.
        profiles: those that can be drilled into.
    """
    links = (tag("a", title, href=f"#agn-{name}") for name, title in _SECTIONS)
    surface = tag("button", "Light surface", type="button", data_act="surface", hidden=True)
    made = record.generated_at.replace("T", " ").replace("Z", " UTC")
    header = tag(
        "header",
        tag(
            "div",
            tag("p", tag("strong", "Agnitra Lab"), f" · {record.artifacts} · {made}", class_="brand"),
            tag("h1", "What has been run, and what it came to"),
        ),
        tag("div", surface, class_="tools"),
        class_="head",
    )
    page = tag(
        "div",
        header,
        tag("ul", *(_tile(tile) for tile in sections.tiles(record)), class_="kpis"),
        tag("nav", *links, aria_label="Sections"),
        _runs(record),
        _layers(record, profiles),
        _compare(record),
        _regressions(record),
        _suite(record),
        _searches(record.searches),
        _warnings(record),
        tag(
            "p",
            "Made by Agnitra Lab. The same numbers in the shell: ",
            join(_separated(tag("code", f"agnitra {command}") for command in _COMMANDS)),
            ".",
            class_="foot",
        ),
        class_="page",
    )
    skip = tag("a", "Skip to the runs", href="#agn-runs", class_="skip")
    return tag("div", skip, page, class_="agn")


def comparable(runs: Iterable[RunRow]) -> list[RunRow]:
    """Complete runs with at least one figure that is a number."""
    return [row for row in runs if row.status == "complete" and numbers_of(row)]


def about(profile: LayerProfile) -> str:
    """What a profile's times are of, and what they are from."""
    wall = f"{numbers.milliseconds(profile.wall_ms)} a call, " if profile.wall_ms is not None else ""
    sources = {
        "events": "from every event of the profile",
        "hotspots": "from sums over numbered layers: its events are not there",
        "rows": "from its largest rows: its events are not there",
    }
    total = numbers.milliseconds(profile.total_self_ms)
    return f"{profile.run_id}: {wall}{total} of it self time, {sources[profile.source]}."


def numbers_of(row: RunRow) -> dict[str, float]:
    """A run's figures that are numbers."""
    return {
        name: value
        for name, value in row.figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _tile(tile: sections.Tile) -> Html:
    return tag(
        "li",
        tag("p", tile.label, class_="label"),
        tag("p", tile.value, class_="value"),
        tag("p", tile.note, class_="note"),
        class_=tile.state,
    )


def _runs(record: Dashboard) -> Html:
    groups = sections.run_groups(record.runs)
    shown = groups[:MAX_LISTED_RUNS]
    more = (
        f" The {len(groups) - len(shown)} oldest are left out here; agnitra runs lists them."
        if len(shown) < len(groups)
        else ""
    )
    key = "dot: CUDA device, square: CPU or none, cross: not complete. A line joins the directories of one run."
    rows = [
        [
            join([tag("strong", group.lead.topic), tag("span", group.run_id, class_="mono")]),
            tag("span", sections.short_time(group.lead)),
            join(tag("span", row.category, class_="chip") for row in group.rows),
            _status(group),
            group.lead.device or "",
            group.figure,
            tag("code", _commit(group.lead)),
        ]
        for group in shown
    ]
    columns = ("Run", "Made (UTC)", "Files in", "Status", "Device", "Key figure", "Commit")
    return _panel(
        "runs",
        f"Newest first; {key}{more}",
        _chart("Timeline of the runs", charts.timeline(groups)) if groups else None,
        _table("Runs, newest first", columns, rows, nowrap={1}, is_tall=True)
        if rows
        else tag("p", "No runs yet.", class_="note"),
    )


def _status(group: sections.RunGroup) -> Html:
    reasons = dict.fromkeys(f"{row.category}: {row.reason}" for row in group.rows if row.reason)
    chip = tag("span", group.status, class_="chip good" if group.status == "complete" else "chip bad")
    return join([chip, *(tag("span", reason, class_="note") for reason in reasons)])


def _commit(row: RunRow) -> str:
    return f"{row.commit[:7]}{'+' if row.is_dirty else ''}" if row.commit else ""


def _layers(record: Dashboard, profiles: Sequence[LayerProfile]) -> Html:
    lead = (
        "Self time of one call, from module to op to kernel: the rows below a row add up to it. Click a block or open "
        "a row; in the table, arrow keys move and open."
    )
    left_out = len(record.layers) - len(profiles)
    note = f"{left_out} older profiles are left out of this file, to keep it small." if left_out else None
    if not profiles:
        return _panel("layers", "No profile yet. Make one: agnitra profile TARGET")
    options = (tag("option", _title(profile), value=str(place)) for place, profile in enumerate(profiles))
    columns = ("Place", "A call", "Share", "Calls", "")
    head = (tag("th", name, scope="col", class_="n" if 0 < place < 4 else None) for place, name in enumerate(columns))
    legend = join(join([tag("i", class_=level), level]) for level in ("module", "op", "kernel"))
    live = tag(
        "div",
        tag(
            "div",
            tag("label", "Profile", tag("select", *options)),
            tag("label", tag("input", type="checkbox", checked=True), "Put numbered layers together", class_="check"),
            class_="controls",
        ),
        tag("p", class_="note about"),
        tag("p", legend, class_="legend", aria_hidden="true"),
        tag("div", class_="icicle", aria_hidden="true"),
        tag(
            "div",
            tag("table", tag("thead", tag("tr", *head)), tag("tbody"), role="treegrid", aria_label="Time by place",
                class_="tree"),
            class_="scroll tall",
        ),
        class_="live",
        hidden=True,
    )  # fmt: skip
    rows: list[list[Child]] = [
        [_title(profile), "" if profile.wall_ms is None else numbers.milliseconds(profile.wall_ms),
         numbers.milliseconds(profile.total_self_ms), _largest(profile)]
        for profile in profiles
    ]  # fmt: skip
    every = tag(
        "details",
        tag("summary", "All profiles as a table"),
        _table("Profiles", ("Profile", "Wall time", "Self time", "Largest module and op"), rows, numeric={1, 2}),
    )
    return _panel("layers", lead, live, every, tag("p", note, class_="note") if note else None)


def _title(profile: LayerProfile) -> str:
    return (
        f"{profile.topic} · {profile.run_id[:4]}-{profile.run_id[4:6]}-{profile.run_id[6:8]} · {profile.device or ''}"
    )


def _largest(profile: LayerProfile) -> str:
    module, op, _, time_ms, _ = profile.rows[0]
    share = numbers.share(time_ms / profile.total_self_ms)
    return f"{profile.modules[module]}: {profile.ops[op]}, {numbers.milliseconds(time_ms)} ({share})"


def _compare(record: Dashboard) -> Html:
    runs = comparable(record.runs)
    lead = "Figures are recognised by their unit and compared as agnitra regressions does, with its default tolerances."
    if len(runs) < 2:
        return _panel("compare", "Two complete runs with figures are needed.")
    baseline, candidate = _first_pair(record, runs)
    live = tag(
        "div",
        tag(
            "div",
            tag("label", "Baseline", _run_select(runs, baseline)),
            tag("label", "Candidate", _run_select(runs, candidate)),
            tag("div", tag("button", "Swap the two", type="button", data_act="swap")),
            class_="controls",
        ),
        tag("output", aria_live="polite"),
        class_="live",
        hidden=True,
    )
    return _panel("compare", lead, live)


def _first_pair(record: Dashboard, runs: Sequence[RunRow]) -> tuple[int, int]:
    places = {row.path: place for place, row in enumerate(runs)}
    for pair in record.pairs:
        if pair.baseline_path in places and pair.candidate_path in places:
            return places[pair.baseline_path], places[pair.candidate_path]
    return 1, 0


def _run_select(runs: Sequence[RunRow], chosen: int) -> Html:
    return tag(
        "select",
        *(
            tag("option", f"{row.category} · {row.topic} · {sections.short_time(row)} · {row.device or 'no device'}",
                value=str(place), selected=place == chosen)
            for place, row in enumerate(runs)
        ),
    )  # fmt: skip


def _regressions(record: Dashboard) -> Html:
    lead = "The newest run of each topic against the one before it, on the same device with the same workload."
    if not record.pairs:
        return _panel("regressions", f"{lead} No topic has two such runs yet.")
    rows = [row for pair in record.pairs for row in _pair_rows(pair)]
    columns = ("Figure", "Baseline", "Candidate", "Change", "Verdict", "Runs")
    return _panel("regressions", lead, _table("Figures of both runs", columns, rows, numeric={1, 2, 3}))


def _pair_rows(pair: PairRow) -> list[list[Child]]:
    return [
        [
            join([f"{pair.topic}: {change.metric}", tag("span", f"{pair.category}, {pair.device}", class_="note")]),
            sections.general(change.baseline),
            sections.general(change.candidate),
            "-" if change.relative_change is None else f"{change.relative_change:+.1%}",
            join([_verdict(change.verdict), tag("span", change.reason, class_="note")]),
            join([tag("span", run_id, class_="mono")
                  for run_id in (pair.found.baseline_run_id, pair.found.candidate_run_id)]),
        ]
        for change in pair.found.metrics
    ]  # fmt: skip


def _verdict(verdict: str) -> Html:
    return tag("span", verdict.replace("_", " "), class_="chip bad" if verdict == "regressed" else "chip")


def _suite(record: Dashboard) -> Html:
    lead = (
        "Each workload against eager and torch.compile's modes, raw and in one loop; the bar is the speed-up over the "
        "best of them, with its interval."
    )
    if not record.suite:
        return _panel("suite", f"{lead} None has been run yet: agnitra suite run")
    return _panel("suite", lead, *(part for group in record.suite for part in _suite_group(group)))


def _suite_group(group: SuiteGroup) -> list[Html]:
    known = ("eager", "default", "reduce-overhead", "max-autotune")
    keys = [f"{name.replace('-', '_')}_latency_ms_p50" for name in known]
    sides = [(name, key) for name, key in zip(known, keys, strict=True) if any(key in row for row in group.workloads)]
    rows = [_suite_row(row, [key for _, key in sides]) for row in group.workloads]
    columns = ("Workload", *(name for name, _ in sides), "agnitra", "Over eager", "Over best", "Interval", "Winner")
    numeric = set(range(1, len(sides) + 4))
    return [
        tag("h3", f"{group.device}, scale {group.scale}"),
        tag("p", sections.suite_sentences(group), class_="lead"),
        _chart("Speed-ups of the suite", charts.suite_chart(group)),
        tag("details", tag("summary", "The suite's table, ms a call"),
            _table(f"Milliseconds a call on {group.device}", columns, rows, numeric=numeric, nowrap={len(sides) + 4}),
            open=True),
    ]  # fmt: skip


def _suite_row(row: dict[str, Any], keys: Sequence[str]) -> list[Child]:
    speedup = row.get("speedup_vs_best")
    interval = f"{row['speedup_vs_best_low']:.3f} to {row['speedup_vs_best_high']:.3f}" if speedup is not None else "-"
    winner = str(row.get("winner") or row["status"])
    doubts = row["status"] == "done" and not row.get("is_equivalent")
    problem = tag("span", str(row["error"])[:300], class_="note") if row.get("error") else None
    return [
        str(row["workload"]),
        *(_ms(row.get(key)) for key in (*keys, "agnitra_latency_ms_p50")),
        _ratio(row.get("speedup_vs_eager")),
        _ratio(speedup),
        interval,
        join([winner, tag("span", "NOT EQUIVALENT", class_="chip bad") if doubts else None, problem]),
    ]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}x"


def _searches(searches: Sequence[SearchCurve]) -> Html:
    lead = "Circles are measurements, crosses failed configs, the line is the fastest so far, in microseconds."
    if not searches:
        return _panel("searches", "No kernel search yet.")
    cards = (
        tag(
            "li",
            tag("h3", f"{search.template} {_shape(search)}"),
            tag("p", f"{search.topic}, {search.sampler}, {search.measured_on}", class_="note"),
            charts.search_chart(search),
        )
        for search in searches
    )
    rows: list[list[Child]] = [
        [
            join([f"{search.template} {_shape(search)}", tag("span", search.run_id, class_="mono")]),
            search.dtype,
            search.sampler,
            search.measured_on,
            f"{len(search.latencies_ms)} of {search.num_configs}",
            str(sum(latency is None for latency in search.latencies_ms)),
            sections.microseconds(search.best_latency_ms),
            join([tag("code", (search.best_config or "").partition("/")[2])]),
        ]
        for search in searches
    ]
    columns = ("Search", "dtype", "Sampler", "Measured on", "Configs", "Failed", "Best", "Best config")
    return _panel(
        "searches",
        lead,
        tag("ul", *cards, class_="cards"),
        tag("details", tag("summary", "The searches as a table"),
            _table("Kernel searches", columns, rows, numeric={4, 5, 6}), _measurements(searches)),
    )  # fmt: skip


def _measurements(searches: Sequence[SearchCurve]) -> Html:
    rows: list[list[Child]] = [
        [f"{search.template} {_shape(search)}", search.run_id,
         ", ".join("failed" if value is None else f"{value * 1e3:.2f}" for value in search.latencies_ms)]
        for search in searches
    ]  # fmt: skip
    return _table("Every measurement in its order, us", ("Search", "Run", "Microseconds"), rows)


def _shape(search: SearchCurve) -> str:
    return "×".join(map(str, search.shape))


def _warnings(record: Dashboard) -> Html | None:
    if not record.warnings:
        return None
    items = (tag("li", warning) for warning in record.warnings)
    return tag(
        "section", tag("h2", f"Left out: {len(record.warnings)}"), tag("ul", *items, class_="worse"), class_="panel"
    )


def _panel(name: str, lead: str, *children: Html | None) -> Html:
    title = dict(_SECTIONS)[name]
    return tag(
        "section",
        tag("h2", title, tabindex="-1"),
        tag("p", lead, class_="lead"),
        *children,
        class_="panel",
        id=f"agn-{name}",
        data_part=name,
    )


def _table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[Child]], *, numeric: set[int] | None = None,
    nowrap: set[int] | None = None, is_tall: bool = False,
) -> Html:  # fmt: skip
    def class_of(place: int) -> str | None:
        return "n" if place in (numeric or ()) else "w" if place in (nowrap or ()) else None

    head = tag("tr", *(tag("th", name, scope="col", class_=class_of(place)) for place, name in enumerate(columns)))
    body = (
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=class_of(place)) for place, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    )
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    # A region that scrolls must be reachable by keyboard.
    return tag(
        "div", table, class_="scroll tall" if is_tall else "scroll", tabindex="0", role="region", aria_label=caption
    )


def _chart(label: str, picture: Html) -> Html:
    return tag("div", picture, class_="chart", tabindex="0", role="region", aria_label=label)


def _separated(items: Iterable[Html]) -> Iterable[Html]:
    for place, item in enumerate(items):
        yield item if place == 0 else join([escape(", "), item])
