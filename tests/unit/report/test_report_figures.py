from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from plotly.graph_objects import Figure
from report_factory import make_report

from agnitra_lab.report import figures, svg


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {number for item in value for number in numbers_in(item)}
    return {float(value)} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()


def drawn_values(figure):
    return {
        value for trace in figure["data"] for axis in "xy" for value in trace[axis] if isinstance(value, (int, float))
    }


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_drawn_value_is_in_the_json(any_report, name):
    values = drawn_values(figures.FIGURES[name][0](any_report))
    assert values
    assert values <= numbers_in(json.loads(any_report.to_json()))


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_has_a_static_twin(any_report, name):
    picture = figures.FIGURES[name][1](any_report)
    assert ElementTree.fromstring(picture).find("{http://www.w3.org/2000/svg}title").text


def test_the_two_sides_differ_by_more_than_colour():
    figure = figures.latency_figure(make_report())
    names = figure["layout"]["yaxis"]["ticktext"]
    markers = {names[int(t["y"][0][-1])]: t["marker"] for t in figure["data"] if t["type"] == "bar"}
    assert markers["eager"]["pattern"]["shape"] == "|"
    assert sum("pattern" in marker for marker in markers.values()) == 1


def test_the_chart_of_a_notebook_is_small_and_says_its_numbers_where_nothing_draws():
    bundle = figures.small_latency_bundle(make_report())
    assert set(bundle) == {figures.PLOTLY_MIME, "image/svg+xml", "text/plain"}
    assert len(json.dumps(bundle[figures.PLOTLY_MIME], indent=1)) < 3_000
    striped, solid = (bundle[figures.PLOTLY_MIME]["data"][index]["marker"] for index in (1, 0))
    assert striped["pattern"]["shape"] == "|" and "pattern" not in solid
    latency = make_report().comparison.baseline_latency.latency_ms_p50
    assert f"{latency:.2f} ms" in bundle["text/plain"]


def test_ops_of_one_name_keep_bars_of_their_own():
    report = make_report()
    telemetry = report.telemetry.model_copy(update={"events": report.telemetry.events[:1] * 3})
    figure = figures.ops_figure(report.model_copy(update={"telemetry": telemetry}))
    assert len({bar["y"][0] for bar in figure["data"]}) == 3
    assert len(set(figure["layout"]["yaxis"]["ticktext"])) == 1


def test_the_best_so_far_never_gets_worse():
    line = figures.search_figure(make_report())["data"][0]
    assert line["y"] == sorted(line["y"], reverse=True)
    assert len(line["x"]) == len(line["y"]) == 9


def test_a_bundle_has_a_live_a_static_and_a_text_form(any_report):
    bundles = figures.report_bundles(any_report)
    assert set(bundles) == {"latency", "candidates", "ops", "search"}
    for bundle in bundles.values():
        assert set(bundle) == {"application/vnd.plotly.v1+json", "image/svg+xml", "text/plain"}
        assert json.loads(json.dumps(bundle)) == bundle
        assert bundle["application/vnd.plotly.v1+json"]["config"]["displayModeBar"] is False


def test_a_run_without_searches_has_no_search_figure():
    assert "search" not in figures.report_bundles(make_report(searches=()))


def test_names_are_shown_as_text_in_plotly_labels():
    figure = figures.latency_figure(
        make_report().model_copy(
            update={"comparison": make_report().comparison.model_copy(update={"candidate": "<a href='x'>y</a>"})}
        )
    )
    assert "<a" not in json.dumps(figure)


@pytest.mark.parametrize("has_measured", [True, False])
@pytest.mark.parametrize("name", figures.FIGURES)
def test_plotly_takes_every_figure_and_changes_nothing_in_it(name, has_measured):
    report = make_report()
    if not has_measured:
        failed = [each.model_copy(update={"comparison": None, "status": "failed"}) for each in report.candidates]
        report = report.model_copy(update={"candidates": tuple(failed), "searches": ()})
    drawn = figures.FIGURES[name][0](report)
    taken = Figure(drawn, skip_invalid=False).to_plotly_json()
    assert json.loads(json.dumps(taken, default=list)) == drawn


def test_a_figure_has_plotlys_own_template_with_ours_laid_over_it():
    figure = Figure(layout={"template": "plotly"})
    figure.update_layout(template=figures.agnitra_template())
    expected = json.loads(json.dumps(figure.layout.template.to_plotly_json(), default=list))
    template = figures.latency_figure(make_report())["layout"]["template"]
    assert template == expected
    template.clear()
    assert figures.ops_figure(make_report())["layout"]["template"] == expected


def test_the_users_own_figures_keep_their_look_and_no_renderer_is_loaded():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from report_factory import make_report; from agnitra_lab.report import figures;"
        "assert 'plotly' not in sys.modules and 'pandas' not in sys.modules;"
        "figures.report_bundles(make_report());"
        "assert 'plotly.io._renderers' not in sys.modules and 'nbformat' not in sys.modules;"
        "from plotly.io import templates;"
        "assert templates.default == 'plotly' and 'agnitra' not in list(templates)"
    )
    folder = __file__.rpartition("/")[0]
    assert subprocess.run([sys.executable, "-c", script, folder], timeout=120).returncode == 0


def test_importing_the_report_loads_neither_plotly_nor_torch():
    script = (
        "import sys, agnitra_lab.report.card, agnitra_lab.report.page, agnitra_lab.report.markdown;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'plotly', 'pandas', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_bars_are_in_proportion_to_their_values():
    picture = ElementTree.fromstring(
        svg.bar_chart("t", [svg.Bar("a", 4.0, "4", "#FFFFFF"), svg.Bar("b", 1.0, "1", "#FFFFFF")])
    )
    widths = [float(rect.get("width")) for rect in picture.iter() if rect.get("fill") == "#FFFFFF"]
    assert widths[0] == pytest.approx(4 * widths[1])


def test_a_chart_of_nothing_is_still_a_picture():
    assert ElementTree.fromstring(svg.bar_chart("empty", [])).tag.endswith("svg")


def test_hostile_labels_cannot_leave_their_text_element():
    picture = svg.bar_chart("<script>", [svg.Bar("</text><script>x</script>", 1.0, "1", "#FFFFFF")])
    assert not any(item.tag.endswith("script") for item in ElementTree.fromstring(picture).iter())
