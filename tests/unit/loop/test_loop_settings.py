"""What steers a run: wrong values are named before anything runs, and a folder may be a string."""

from __future__ import annotations

from pathlib import Path

import pytest

from agnitra_lab.errors import UsageError
from agnitra_lab.loop.settings import Settings


@pytest.mark.parametrize("name", ["budget_s", "timing_s", "llm_deadline_s", "llm_rounds", "max_trials"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), "20", None, True])
def test_a_number_that_no_run_could_use_is_refused_by_its_name(name, value):
    with pytest.raises(UsageError, match=f"{name} is {value!r}"):
        Settings.of(**{name: value})


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="Unknown settings: speed") as caught:
        Settings.of(speed=11)
    assert "budget_s" in caught.value.hint


@pytest.mark.parametrize("folder", ["kept", Path("kept")])
def test_the_folder_of_what_was_found_is_a_path_or_a_string(folder):
    assert Settings(tuned_folder=folder).memory == Path("kept")


def test_what_was_found_is_in_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("AGNITRA_CACHE_DIR", str(tmp_path))
    assert tmp_path in (Settings().memory, *Settings().memory.parents)
