from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.patch import RollbackProof
from agnitra_lab.contracts.telemetry import (
    Behavior,
    Bottleneck,
    GpuTelemetry,
    MemoryTelemetry,
    OpEvent,
    TelemetryRecord,
)
from agnitra_lab.notebook import cards
from agnitra_lab.profiler.capture import capture_block
from agnitra_lab.report import palette

# What JupyterLab keeps of an untrusted output, of the elements that a card may want.
KEPT = {"div", "p", "h1", "strong", "table", "caption", "thead", "tbody", "tr", "th", "td", "span"}
KEY = "sk-" + "a1B2c3D4" * 5


class _Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.names, self.attributes, self.texts, self.open = set(), set(), [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.open.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def measured():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval()
    with capture_block(name="measured") as block:
        model(torch.ones(2, 8))
    return block.telemetry.record


def make_record(**changes):
    ops = tuple(
        OpEvent(op=f"aten::op{i}", latency_ms=10.0 - i, cpu_ms=10.0 - i, device_ms=None, num_calls=i + 1, share=0.1)
        for i in range(10)
    )
    given = {
        "bottleneck": Bottleneck(op="aten::mm", latency_ms=2.5, shape=(4, 8), share=0.5, module_path="layers.0.mlp"),
        "events": ops,
        "gpu": GpuTelemetry(reason="no CUDA device: GPU metrics are not available on this machine"),
        "behavior": Behavior(),
        "name": "step",
        "wall_ms": 7.25,
        "profiled_ms": 7.25,
        "total_self_ms": 5.0,
        "attributed_share": 0.75,
    }
    return TelemetryRecord(**{**given, **changes})


def both(record, filed=None):
    return (
        " ".join(_Elements(cards.profile_card_html(record, filed)).texts),
        cards.profile_card_text(record, filed),
    )


def test_a_card_of_a_real_profile_is_what_an_untrusted_notebook_keeps(measured):
    elements = _Elements(cards.profile_card_html(measured, "Telemetry: artifacts/x"))
    assert elements.names <= KEPT
    assert elements.attributes <= {"style", "scope"}
    assert elements.open == []


def test_a_card_is_small(measured):
    assert len(cards.profile_card_html(measured).encode()) <= 16_000


def test_every_surface_of_a_card_is_painted(measured):
    html = cards.profile_card_html(measured)
    assert html.startswith(f'<div style="background:{palette.SURFACE};color:{palette.TEXT}')
    for cell in re.findall(r"<t[hd] [^>]*>", html):
        assert f"background:{palette.PANEL}" in cell


def test_html_and_text_tell_the_same_facts():
    facts = ["aten::mm takes 2.50 ms, 50.0% of the self time, at module layers.0.mlp", "7.25 ms", "5.00 ms"]
    facts += ["75.0% tied to graph nodes", "aten::op0", "aten::op7"]
    for shown in both(make_record()):
        assert [fact for fact in facts if fact not in shown] == []


def test_missing_gpu_metrics_are_said_in_plain_words_and_never_zero():
    for shown in both(make_record()):
        assert "GPU: no CUDA device: GPU metrics are not available on this machine." in shown
        assert " 0.0%" not in shown
        assert "not measured" in shown


def test_gpu_metrics_are_shown_where_there_are_some():
    record = make_record(
        gpu=GpuTelemetry(gpu_utilisation=0.832, busy_ms=6.03),
        device=DeviceInfo(type="cuda", name="NVIDIA H200"),
        memory=MemoryTelemetry(peak_memory_bytes=3 * 2**30),
    )
    for shown in both(record):
        assert "GPU: busy 83.2% of the wall time, 6.03 ms of kernels." in shown
        assert "3,072 MiB" in shown
    assert "NVIDIA H200" in both(record)[0]


def test_notes_and_the_graph_note_are_shown():
    for shown in both(make_record(notes=("The code ran unprofiled: busy.",), graph_note="no module was called")):
        assert "The code ran unprofiled: busy." in shown
        assert "Graph: no module was called." in shown


def test_a_cell_in_which_no_op_ran_has_a_card():
    record = make_record(bottleneck=None, events=(), total_self_ms=0.0, attributed_share=None)
    for shown in both(record):
        assert "No op ran in this cell" in shown
        assert "Top ops" not in shown


def test_one_token_is_one_token():
    record = make_record(items_per_call=1, item_unit="tokens", tokens_per_second=137.9)
    for shown in both(record):
        assert "1 token a run" in shown


def test_names_are_escaped():
    html = cards.profile_card_html(make_record(name="<img src=x onerror=alert(1)>"))
    assert "<img" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html


def test_credentials_are_redacted():
    record = make_record(name=f"api_key={KEY}", notes=(f"Authorization: Bearer {KEY}",))
    for shown in both(record):
        assert KEY not in shown


def test_a_rollback_that_failed_is_not_dressed_up():
    proof = RollbackProof(
        is_restored=False, attributes_equal=True, hooks_equal=False, parameters_equal=True, outputs_equal=True,
        num_parameters=4, state_sha256="0" * 64, detail="a hook is left",
    )  # fmt: skip
    for shown in (cards.rollback_card_html(proof), cards.rollback_card_text(proof)):
        assert "The original was NOT restored: a hook is left." in shown
        assert "DIFFERENT" in shown
    assert _Elements(cards.rollback_card_html(proof)).names <= KEPT


def test_a_name_that_would_run_over_its_neighbour_is_cut_in_html_and_whole_in_text():
    long = "aten::_scaled_dot_product_flash_attention_for_cpu"
    op = OpEvent(op=long, latency_ms=1.0, cpu_ms=1.0, device_ms=None, num_calls=1, share=1.0)
    html, text = both(make_record(events=(op,)))
    assert long not in html
    assert "aten::_scaled_dot_pr…" in html
    assert long in text
