from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_factory import make_report

from agnitra_lab.redact import redact_text
from agnitra_lab.report import figures
from agnitra_lab.report.html import escape
from agnitra_lab.report.markdown import to_markdown
from agnitra_lab.report.page import page_html

HOSTILE = "</script></pre><script>alert(1)</script><img src=x onerror=alert(2)><!-- \" onload='x'"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], {}
        self.scripts = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.elements.append((tag, values))
        if tag not in ("meta", "img"):
            self.open.append(values.get("id") or tag)
        if tag == "script" and "type" not in values:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data
            if self.open[-1] == "script":
                self.scripts[-1] += data

    def all(self, tag):
        return [values for name, values in self.elements if name == tag]


@pytest.fixture(scope="module")
def live_page():
    return page_html(make_report("cuda"))


@pytest.fixture(scope="module")
def parsed_live_page(live_page):
    return Page(live_page)


@pytest.fixture
def static_page(any_report):
    return page_html(any_report, has_live_charts=False)


def test_plotly_is_inlined_exactly_once(live_page, parsed_live_page):
    assert [script.count("* plotly.js v") for script in parsed_live_page.scripts] == [0, 1, 0]
    assert len(live_page) < 8_000_000


def test_nothing_on_the_page_is_fetched(parsed_live_page):
    page = parsed_live_page
    assert not page.all("link")
    assert not any("src" in values for values in page.all("script"))
    assert all(values["src"].startswith("data:") for values in page.all("img"))
    policy = next(v["content"] for v in page.all("meta") if v.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_only_the_pages_own_scripts_may_run(parsed_live_page):
    page = parsed_live_page
    policy = next(v["content"] for v in page.all("meta") if v.get("http-equiv") == "Content-Security-Policy")
    for script in page.scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "unsafe" not in policy.partition("script-src")[2]


def test_writing_the_page_through_the_redactor_leaves_its_scripts_alone(live_page):
    assert redact_text(live_page) == live_page


def test_live_charts_show_the_figures_of_the_report(parsed_live_page):
    shown = json.loads(parsed_live_page.texts["figures"])
    assert set(shown) == set(figures.figure_names(make_report("cuda")))
    assert shown["latency"]["data"] == figures.latency_figure(make_report("cuda"))["data"]


def test_every_chart_has_a_static_picture_that_needs_no_script(static_page, any_report):
    images = Page(static_page).all("img")
    assert len(images) == len(figures.figure_names(any_report))
    assert all(values["alt"] for values in images)


def test_every_artifact_can_be_copied_downloaded_and_read(static_page, any_report):
    page = Page(static_page)
    expected = {
        "json-report": any_report,
        "json-telemetry": any_report.telemetry,
        "json-usage_event": any_report.usage,
        "json-suggestions": any_report.proposal,
        "json-patch_log": any_report.patch,
    }
    for act in ("copy", "download"):
        sources = {values["data-source"] for values in page.all("button") if values["data-act"] == act}
        assert sources == set(expected)
    for name, contract in expected.items():
        assert json.loads(page.texts[name]) == json.loads(contract.to_json())


def test_ids_are_unique_and_every_button_has_a_name(static_page):
    page = Page(static_page)
    ids = [values["id"] for _, values in page.elements if "id" in values]
    assert len(ids) == len(set(ids))
    assert all(values["type"] == "button" and values["aria-label"] for values in page.all("button"))


def test_the_page_says_its_language_and_title(static_page, any_report):
    page = Page(static_page)
    assert page.all("html") == [{"lang": "en"}]
    assert any_report.headline in page.texts["title"]
    assert static_page.startswith("<!doctype html>")


def test_hostile_text_adds_no_element():
    plain, hostile = (
        Page(page_html(make_report(rationale=text, title=text, headline=text))) for text in ("harmless words", HOSTILE)
    )
    assert [name for name, _ in hostile.elements] == [name for name, _ in plain.elements]
    assert [set(values) for _, values in hostile.elements] == [set(values) for _, values in plain.elements]


@given(st.text(st.one_of(st.characters(), st.sampled_from("<>&\"'\n\t\r\0\x1b\xa0\u202e\u2028")), max_size=40))
def test_escaping_keeps_what_is_printable_character_by_character(text):
    visible = "".join(c for c in text if c in "\n\t" or c.isprintable())
    assert escape(text) == html.escape(visible, quote=True)


def test_hostile_text_in_markdown_is_escaped():
    text = to_markdown(make_report(rationale="<b>x</b> | [a](javascript:x) `c`\n# h", headline="*a* <script>"))
    assert not re.search(r"(?<!\\)<", text)
    assert not re.search(r"(?<!\\)\[", text)
    assert "\n# h" not in text


def test_markdown_has_the_same_sections_and_aligned_tables(any_report):
    text = to_markdown(any_report)
    for heading in ("## Candidates", "## What backs this verdict", "## Bottleneck", "## Checkpoints", "## Agent notes"):
        assert heading in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
