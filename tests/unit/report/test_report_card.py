from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from report_factory import make_report

from agnitra_lab.contracts.report import STAGES
from agnitra_lab.report.card import card_html, card_text
from agnitra_lab.report.metrics import metric_cards

# What JupyterLab's sanitizer keeps in an untrusted notebook (its sanitizer.ts, 4.x): the parts that the card uses.
KEPT_TAGS = {
    "div", "p", "strong", "span", "h1", "h2", "img", "table", "caption", "thead", "tbody", "tr", "th", "td", "details",
    "summary", "pre", "wbr",
}  # fmt: skip
KEPT_ATTRIBUTES = {"style", "src", "alt", "scope"}
KEPT_STYLES = {
    "background", "border", "border-collapse", "border-left", "border-radius", "border-top", "box-sizing",
    "caption-side", "color", "cursor", "display", "font-family", "font-size", "font-weight", "line-height", "margin",
    "max-height", "max-width", "min-height", "min-width", "overflow", "overflow-wrap", "overflow-x", "padding",
    "text-align", "vertical-align", "white-space", "width",
}  # fmt: skip
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x' &lt; \u202e\x1b[31m"


class Reader(HTMLParser):
    """Collects what a document is made of, and refuses elements that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.styles, self.sources, self.open = set(), set(), [], [], []
        self.text, self.json_text, self.alternatives, self.scopes = "", "", [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.attributes |= set(values)
        self.styles.append(values.get("style", ""))
        if tag == "img":
            self.sources.append(values["src"])
            self.alternatives.append(values["alt"])
        elif tag != "wbr":
            self.open.append(tag)
        if tag == "th":
            self.scopes.append(values["scope"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.json_text += data
        else:
            self.text += f" {data} "


def numbers_in(value):
    """Every number in a JSON value, those inside its strings included."""
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, str):
        yield from (float(text) for text in re.findall(r"\d+(?:\.\d+)?", value))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def is_a_rounding_of(shown, value):
    decimals = len(shown.partition(".")[2])
    return any(abs(float(shown) - scaled) <= 0.5000001 * 10**-decimals for scaled in (value, 100 * value))


def test_the_card_uses_only_what_the_sanitizer_keeps(any_report):
    reader = Reader(card_html(any_report))
    assert reader.tags <= KEPT_TAGS
    assert reader.attributes <= KEPT_ATTRIBUTES
    used = {part.partition(":")[0] for style in reader.styles for part in style.split(";") if part}
    assert used <= KEPT_STYLES


def test_the_card_makes_no_request(any_report):
    html = card_html(any_report)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in Reader(html).sources)
    assert "url(" not in html
    assert "http" not in re.sub(r"<pre.*?</pre>", "", html, flags=re.DOTALL)


def test_the_charts_are_valid_svg_without_scripts_and_have_alternatives(any_report):
    reader = Reader(card_html(any_report))
    assert len(reader.sources) == 2
    for source in reader.sources:
        picture = base64.b64decode(source.partition(",")[2]).decode()
        assert ElementTree.fromstring(picture).tag.endswith("svg")
        assert "script" not in picture
    assert all("ms" in text for text in reader.alternatives)


def test_the_card_without_its_json_is_at_most_forty_kilobytes(any_report):
    html = card_html(any_report)
    assert len(html[: html.index("<details")].encode()) <= 40_000


def test_every_number_on_the_card_is_in_the_json(any_report):
    values = list(numbers_in(json.loads(any_report.to_json())))
    text = re.sub(r"p50|p20|p80|fp64|A/A|Top-1", "", Reader(card_html(any_report)).text)
    shown = re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?", text)
    assert len(shown) > 60
    unknown = [
        number
        for number in shown
        if "e" not in number
        and not any(is_a_rounding_of(number.replace(",", "").rstrip("."), value) for value in values)
    ]
    assert unknown == []


def test_the_card_carries_the_usage_event_and_names_the_other_files(any_report):
    files = [("report.json", "artifacts/reports/x/report.json", 94_321, "ab12" * 16)]
    reader = Reader(card_html(any_report, files))
    assert json.loads(reader.json_text) == json.loads(any_report.usage.to_json())
    for shown in ("artifacts/reports/x/report.json", "94,321", "ab12" * 3):
        assert shown in " ".join(reader.text.split()).replace("/ ", "/")
    assert "artifacts/reports/x/report.json, 94,321 bytes" in card_text(any_report, files)


def test_a_card_without_its_files_says_where_they_lie():
    assert f"folder of run {make_report().run_id} under artifacts/reports" in card_html(make_report())


def test_a_card_leaves_room_for_its_chart_in_sixty_kilobytes(any_report):
    assert len(card_html(any_report).encode()) <= 36_000


def test_every_table_has_headings_with_a_scope():
    reader = Reader(card_html(make_report()))
    assert set(reader.scopes) == {"col", "row"}


@pytest.mark.parametrize("render", [card_html, card_text])
def test_the_card_says_what_steered_the_run_and_how_it_went(any_report, render):
    text = render(any_report)
    text = Reader(text).text if render is card_html else text
    for part in ("RL refinement", "Suggestion source", any_report.notes.suggestion_source, *STAGES):
        assert part in text
    assert all(card.value in text for card in metric_cards(any_report))


def test_a_fallback_shows_its_banner_and_no_other_run_does():
    banner = "Suggestions come from heuristic presets: no answer within 8 s"
    for render in (card_html, card_text):
        assert banner in render(make_report(has_fallback=True)).partition("<details")[0]
        assert "heuristic presets" not in render(make_report()).partition("<details")[0]


@pytest.mark.parametrize("verdict", ["slower", "not_equivalent"])
def test_a_regression_gives_rollback_guidance(verdict):
    assert "result.rollback()" in card_html(make_report("cuda", verdict))


def test_text_of_a_language_model_stays_text():
    report = make_report(rationale=HOSTILE, title=HOSTILE, workload=HOSTILE, headline=HOSTILE)
    html = card_html(report)
    reader = Reader(html)
    assert reader.tags <= KEPT_TAGS
    assert reader.attributes <= KEPT_ATTRIBUTES
    assert "\x1b" not in html
    assert "<script" not in html


def test_secrets_are_redacted_before_anything_is_shown():
    secret = "sk-" + "a1B2" * 6
    report = make_report(rationale=f"use {secret}")
    assert secret not in card_html(report)
    assert secret not in card_text(report)


def test_the_text_card_is_plain_lines():
    text = card_text(make_report(rationale=HOSTILE, headline=HOSTILE))
    assert all(line.isprintable() for line in text.splitlines())
