from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.contracts.run import RUN_ID_PATTERN, Category
from agnitra_lab.runs import layout

hostile_text = st.one_of(
    st.text(),
    st.text(alphabet="./\\:%-_ \0aZ9\u2024\uff0f~$"),
    st.sampled_from(["..", "../..", "/etc/passwd", "C:\\x", "%2e%2e/%2e%2e", "con", "a/../../b", "\u202e", "-", "_"]),
)


@given(hostile_text)
def test_a_topic_never_leads_out_of_its_category(topic):
    folder = Path("root/reports") / layout.safe_topic(topic)
    assert folder.parts[:2] == ("root", "reports")
    assert len(folder.parts) > 2
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", part) for part in folder.parts[2:])


@given(hostile_text)
def test_sanitising_a_topic_twice_changes_nothing(topic):
    assert layout.safe_topic(layout.safe_topic(topic)) == layout.safe_topic(topic)


@given(hostile_text)
def test_a_topic_folder_is_never_taken_for_a_run(topic):
    assert not any(layout.is_run_id(part) for part in layout.safe_topic(topic).split("/"))


@given(hostile_text)
def test_a_run_id_fits_the_contract_whatever_the_tag(tag):
    run_id = layout.run_id(tag)
    assert re.search(RUN_ID_PATTERN, run_id)
    assert layout.is_run_id(run_id)
    assert re.fullmatch(r"\d{8}_\d{6}_[A-Za-z0-9.-]{1,40}_[0-9a-f]{4}", run_id)


@pytest.mark.parametrize(
    ("topic", "folder"),
    [
        ("flex_attention", "flex_attention"),
        ("demo:llama-decode", "demo-llama-decode"),
        ("demos/tropical", "demos/tropical"),
        ("../../etc", "etc"),
        ("20251217_221844", "topic-20251217_221844"),
        ("aux", "topic-aux"),
        ("", "untitled"),
    ],
)
def test_known_topics_have_the_folders_that_the_layout_shows(topic, folder):
    assert layout.safe_topic(topic) == folder


def test_the_layout_is_category_topic_run_id():
    directory = layout.run_directory(Path("artifacts"), "bench", "demo:llama", "20260114_093012_t_3fa9")
    assert directory.as_posix() == "artifacts/bench/demo-llama/20260114_093012_t_3fa9"


def test_a_run_directory_refuses_what_is_not_a_run_id():
    with pytest.raises(ValueError, match="not a run id"):
        layout.run_directory(Path("artifacts"), "bench", "x", "../../x")


def test_every_category_has_a_kind():
    assert set(layout.KINDS) == set(get_args(Category)) == set(layout.CATEGORIES)
