"""The refine step's panel: curves against the optimum, configs as lines, what decides the time, all in numbers."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import KernelConfig, Trial
from agnitra_lab.errors import UsageError
from agnitra_lab.loop.settings import Settings
from agnitra_lab.notebook import search_pictures
from agnitra_lab.notebook.findings import Findings
from agnitra_lab.notebook.search_facts import Searched, recorded_optimum_ms, searches_of
from agnitra_lab.notebook.search_panel import search_card_html, search_card_text, search_panel
from agnitra_lab.refine import replay
from agnitra_lab.refine.search import search
from agnitra_lab.workloads.demos import demo

RECORDED = ("decode_attention", (1, 8, 4, 8192, 128))


class Known(Findings):
    """Findings whose refine step has ended with some searches, or runs with some trials."""

    is_patched = False

    def __init__(self, found=(), live=()):
        super().__init__(demo("llama-decode", scale="tiny"), Settings.of())
        self._found = tuple(found)
        self._trials = list(live)
        self.is_ended = bool(found)

    @property
    def searches(self):
        return self._found

    @property
    def is_replayed(self):
        return True

    @property
    def steps(self):
        return {"refine": _Step(self.is_ended), "patch": _Step(self.is_patched)}

    @steps.setter
    def steps(self, _):
        pass


class _Step:
    status, headline = "done", ""

    def __init__(self, has_ended):
        self.has_ended = has_ended


@pytest.fixture(scope="module")
def landscape():
    return replay.load(replay.find(*RECORDED))


@pytest.fixture(scope="module")
def found(landscape):
    return search(
        landscape.space, landscape.measure, sampler="random", max_trials=40, seed=1, measured_on=landscape.measured_on
    )


def pictures(html):
    return [base64.b64decode(text).decode() for text in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)]


def texts(picture):
    return [node.text for node in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]


def test_the_optimum_is_that_of_the_recording_and_the_gap_is_in_the_table(landscape, found):
    assert recorded_optimum_ms(*RECORDED, landscape.dtype) == landscape.best_latency_ms
    (shown,) = searches_of(Known([found]))
    assert shown.optimum_ms == landscape.best_latency_ms
    html = search_panel(Known([found]))
    gap = max(0.0, found.best.latency_ms / landscape.best_latency_ms - 1)
    assert f"{landscape.best_latency_ms * 1e3:.2f} us, +{gap:.1%}" in html
    assert f"{found.best.latency_ms * 1e3:.2f} us" in html


def test_a_search_while_it_runs_has_its_optimum_too(landscape, found):
    site = Site(landscape.template, landscape.shape, landscape.dtype)
    (shown,) = searches_of(Known(live=[(site, trial) for trial in found.trials[:5]]))
    assert (len(shown.trials), shown.optimum_ms) == (5, landscape.best_latency_ms)
    html = search_panel(Known(live=[(site, trial) for trial in found.trials[:5]]))
    assert len(pictures(html)) == 1 and "not known" not in html


def test_where_nobody_measured_the_whole_space_no_optimum_is_claimed(found):
    here = found.model_copy(update={"measured_on": "NVIDIA H200"})
    (shown,) = searches_of(Known([here]))
    assert shown.optimum_ms is None
    assert "not known" in search_panel(Known([here]))
    whole = here.model_copy(update={"stopped_because": "exhausted"})
    assert searches_of(Known([whole]))[0].optimum_ms == min(trial.latency_ms for trial in found.trials)


def test_every_chart_has_its_numbers_as_text_and_a_sentence(found):
    html = search_panel(Known([found]))
    assert len(pictures(html)) == 2
    assert len(re.findall(r'alt="[^"]{40,}"', html)) == 2
    for trial in found.trials:
        assert f"{trial.latency_ms * 1e3:.2f} us" in html
        for name, value in trial.config.params.items():
            assert f"{name}={value}" in html
    assert "What decides the time of decode_attention" in html and "SPLIT" in html


def test_parallel_coordinates_name_each_parameter_and_end_at_the_time(found):
    names = sorted(found.trials[0].config.params)
    seen = texts(search_pictures.parallel_picture(found.trials, names))
    assert [name for name in seen if name in names] == names
    assert "time" in seen and f"{found.best.latency_ms * 1e3:.2f} us" in seen


def test_too_few_trials_draw_no_configs_and_claim_no_importance(found):
    few = found.model_copy(update={"trials": found.trials[:3]})
    assert len(pictures(search_panel(Known([few])))) == 1
    some = found.model_copy(update={"trials": found.trials[:6]})
    assert "cannot be said" in search_panel(Known([some]))


def test_beside_later_steps_a_line_has_to_do_and_the_search_has_a_card_of_its_own(found):
    known = Known([found])
    long = search_panel(known)
    known.is_patched = True
    short = search_panel(known)
    assert len(short) < 10_000 < len(long)
    assert "What decides the time of decode_attention" in short and "SPLIT" in short
    alone = search_card_html(known, 1)
    assert len(alone) < 25_000 and len(pictures(alone)) == 2
    text = search_card_text(known, 1)
    assert text.count("\n") == len(found.trials) + 1
    for number in (0, 2):
        with pytest.raises(UsageError, match=f"no search {number}"):
            search_card_html(known, number)


@settings(max_examples=40, deadline=None)
@given(
    times=st.lists(st.one_of(st.none(), st.floats(1e-4, 1e4)), max_size=30),
    optimum=st.one_of(st.none(), st.floats(1e-4, 1e4)),
)
def test_any_times_give_a_picture_that_stays_within_itself(times, optimum):
    trials = tuple(
        Trial(
            index=at, config=KernelConfig(template="t", params={"A": at % 3, "B": at}), latency_ms=time,
            status="ok" if time else "failed",
        )
        for at, time in enumerate(times)
    )  # fmt: skip
    for drawn in (
        search_pictures.search_picture([Searched("t", "", trials, optimum), Searched("u", "", trials)]),
        search_pictures.parallel_picture(trials, ["A", "B"]),
    ):
        ElementTree.fromstring(drawn)
        numbers = [
            float(number) for path in re.findall(r' d="([^"]*)"', drawn) for number in re.findall(r"-?[\d.]+", path)
        ]
        assert all(0 <= number <= 240 for number in numbers)
        assert "nan" not in drawn and "inf" not in drawn
