from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.contracts.suite import SuiteFigures
from agnitra_lab.report import dashboard, palette
from agnitra_lab.report.dashboard_palette import LEVELS, SURFACES, TEXT_ROLES, tint
from agnitra_lab.report.dashboard_record import Dashboard, LayerProfile, RunRow, SearchCurve, SuiteGroup
from agnitra_lab.report.dashboard_sections import best_so_far, key_figure, run_groups, short_time, tiles

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._in_script = [], [], False
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self._in_script = name == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, name):
        self._in_script = False

    def handle_data(self, text):
        if self._in_script:
            self.scripts[-1] += text

    def all(self, name):
        return [attributes for found, attributes in self.elements if found == name]


def make_run(number=0, category="reports", status="complete", topic="llama", **figures):
    return RunRow(
        run_id=f"20261122_04370{number}_t_{number:04d}", category=category, topic=topic, status=status,
        path=f"artifacts/{category}/{number}", generated_at="2026-11-22T04:40:00Z", device="NVIDIA H200",
        figures=figures, reason=None if status == "complete" else "no manifest",
    )  # fmt: skip


def make_profile(number=0, topic="llama", modules=("layers.0.mlp", "layers.1.mlp", "lm_head")):
    return LayerProfile(
        run_id=f"20261122_04370{number}_p_0000", topic=topic, device="NVIDIA H200", wall_ms=3.0, total_self_ms=2.0,
        source="events", modules=modules, ops=("aten::mm",), kernels=("gemm",),
        rows=((0, 0, 0, 0.75, 1.0), (1, 0, 0, 0.75, 1.0), (2, 0, 0, 0.5, 1.0)),
    )  # fmt: skip


def make_search(topic="llama", latencies=(0.004, None, 0.003, 0.005)):
    return SearchCurve(
        run_id="20261122_043700_s_0000", topic=topic, template="rms_norm", shape=(1, 2048), dtype="bfloat16",
        sampler="rl", measured_on="recorded: NVIDIA H200", num_configs=17, stopped_because="budget",
        latencies_ms=latencies, best_latency_ms=0.003, best_config="rms_norm/BLOCK_N=2048",
    )  # fmt: skip


def make_record(text="llama", runs=None, **changes):
    runs = runs if runs is not None else (make_run(1, topic=text, latency_ms_p50=1.0), make_run(0, topic=text))
    parts = {"layers": (make_profile(topic=text, modules=(text, "b", "c")),), "searches": (make_search(text),)}
    return Dashboard(artifacts=text, generated_at="2026-11-26T00:00:00Z", runs=runs, pairs=(), rules=(),
                     warnings=(text,), **{"suite": (), **parts, **changes})  # fmt: skip


@pytest.mark.parametrize("surface", SURFACES)
def test_text_and_data_colours_are_readable_on_both_surfaces(surface):
    colours = SURFACES[surface]
    for under in ("surface", "panel"):
        assert all(palette.contrast(colours[role], colours[under]) >= 7 for role in TEXT_ROLES)
        assert palette.contrast(colours["edge"], colours[under]) >= 3
    for role in LEVELS.values():
        assert palette.contrast(colours["text"], tint(colours[role], colours["panel"])) >= 7


def test_the_style_uses_only_colours_of_the_palette():
    css = dashboard.dashboard_style()
    known = {colour for colours in SURFACES.values() for colour in colours.values()}
    known |= {tint(colours[role], colours["panel"]) for colours in SURFACES.values() for role in LEVELS.values()}
    assert set(re.findall(r"#[0-9A-Fa-f]{6}\b", css)) <= known
    assert "url(" not in css
    assert "@import" not in css


def test_the_page_fetches_nothing_and_runs_its_own_script_alone():
    text = dashboard.dashboard_page(make_record())
    parsed = Parsed(text)
    assert not parsed.all("link")
    assert not any("src" in values for _, values in parsed.elements)
    assert not re.search(r"https?://", text)
    policy = next(v["content"] for v in parsed.all("meta") if v.get("http-equiv") == "Content-Security-Policy")
    runnable = [
        script for script, values in zip(parsed.scripts, parsed.all("script"), strict=True) if "type" not in values
    ]
    digest = base64.b64encode(hashlib.sha256(runnable[0].encode()).digest()).decode()
    assert len(runnable) == 1
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )


def test_hostile_text_adds_no_element():
    plain, hostile = (Parsed(dashboard.dashboard_page(make_record(text))) for text in ("harmless", HOSTILE))
    assert [name for name, _ in hostile.elements] == [name for name, _ in plain.elements]
    assert [set(values) for _, values in hostile.elements] == [set(values) for _, values in plain.elements]


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=40))
def test_the_data_of_a_profile_come_back_from_the_page_whatever_its_names(text):
    profile = make_profile(modules=(text, "b", "c"))
    parsed = Parsed(dashboard.dashboard_page(make_record(layers=(profile,))))
    data = [
        script for script, v in zip(parsed.scripts, parsed.all("script"), strict=True) if v.get("id") == "agn-layers-0"
    ]
    assert json.loads(data[0]) == dashboard.layer_values(profile)


def test_profiles_beyond_the_budget_are_left_out_oldest_first_and_counted():
    profiles = tuple(make_profile(number) for number in (3, 2, 1))
    record = make_record(layers=profiles)
    size = len(json.dumps(dashboard.layer_values(profiles[0]), separators=(",", ":")))
    text = dashboard.dashboard_page(record, max_layer_bytes=2 * size + 1)
    assert "1 older profiles are left out" in text
    assert 'id="agn-layers-1"' in text
    assert 'id="agn-layers-2"' not in text


def test_whatever_scrolls_can_be_reached_by_keyboard_and_has_a_name():
    parsed = Parsed(dashboard.dashboard_page(make_record()))
    for _, values in parsed.elements:
        classes = (values.get("class") or "").split()
        if ("scroll" in classes and "role" in values) or "chart" in classes:
            assert values["tabindex"] == "0"
            assert values["aria-label"]


def test_ids_are_unique_and_every_picture_has_words():
    parsed = Parsed(dashboard.dashboard_page(make_record()))
    ids = [values["id"] for _, values in parsed.elements if "id" in values]
    assert len(ids) == len(set(ids))
    assert all(values["aria-label"] for values in parsed.all("svg"))


def test_a_run_with_directories_in_several_categories_is_one_row_with_its_worst_status():
    rows = (make_run(0, "certs"), make_run(0, "bench", status="incomplete"), make_run(0, "reports", speedup=1.0))
    (group,) = run_groups(rows)
    assert [row.category for row in group.rows] == ["reports", "bench", "certs"]
    assert group.status == "incomplete"


def test_an_honest_null_is_no_change_and_saves_nothing():
    figures = {"winner": "eager", "baseline": "eager", "speedup": 1.01, "cost_savings": 0.0, "gpu_hours_saved": 0.0,
               "currency": "USD"}  # fmt: skip
    shown = {tile.label: tile for tile in tiles(make_record(runs=(make_run(0, **figures),)))}
    assert shown["Latest optimisation"].value == "No change"
    assert shown["Saved"].value == "0.0000 USD"
    assert shown["Saved"].state == "unchanged"


def test_savings_count_each_workload_once_by_its_newest_receipt():
    figures = {"gpu_hours_saved": 1.0, "currency": "USD"}
    runs = (make_run(2, cost_savings=2.0, **figures), make_run(1, cost_savings=9.0, **figures))
    shown = {tile.label: tile.value for tile in tiles(make_record(runs=runs))}
    assert shown["Saved"] == "2.0000 USD"


def test_the_key_figure_names_its_baseline_and_verdict():
    figures = {"speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6, "baseline": "eager", "verdict": "faster"}
    assert key_figure(figures) == "1.50× [1.40, 1.60] over eager, faster"
    assert key_figure({"latency_ms": 2.0}) == "2.00 ms a call"
    assert key_figure({}) == ""


def test_a_workload_that_failed_was_not_checked_and_is_in_no_mean():
    figures = SuiteFigures(
        num_workloads=3, num_done=2, num_failed=1, num_not_equivalent=1, num_failed_baselines=0, num_below_0_98=0,
        num_surely_below_0_98=0, num_at_least_1_15=1, speedup_vs_best_geomean=1.2, speedup_vs_best_worst=1.2,
        worst_workload="a",
    )  # fmt: skip
    rows = (
        {"workload": "a", "status": "done", "is_equivalent": True},
        {"workload": "b", "status": "done", "is_equivalent": False},
        {"workload": "c", "status": "failed", "is_equivalent": False, "error": "timeout"},
    )
    group = SuiteGroup(device="NVIDIA H200", scale="full", figures=figures, workloads=rows)
    shown = {tile.label: tile for tile in tiles(make_record(suite=(group,)))}
    assert shown["Outputs equivalent"].value == "1 of 2"
    assert shown["Suite, over the best baseline"].note.startswith("geometric mean of 1 workloads")
    assert key_figure(figures.model_dump()) == "1.20× over the best baseline, geometric mean of 1"
    text = dashboard.dashboard_page(make_record(suite=(group,)))
    assert "timeout" in text
    assert "NOT EQUIVALENT" in text


def test_a_run_without_a_summary_is_dated_by_its_name():
    row = make_run(5).model_copy(update={"generated_at": None})
    assert short_time(row) == "2026-11-22 04:37"


@given(st.lists(st.none() | st.floats(min_value=1e-6, max_value=1e3), max_size=30))
def test_the_fastest_so_far_never_gets_slower_and_ends_at_the_best(latencies):
    best = best_so_far(make_search(latencies=tuple(latencies)))
    known = [value for value in best if value is not None]
    assert known == sorted(known, reverse=True)
    measured = [value for value in latencies if value is not None]
    assert (best[-1] if best else None) == (min(measured) if measured else None)
