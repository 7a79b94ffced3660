from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from profile_samples import PEAKS, decode_record, training_record

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.patch import RollbackProof
from agnitra_lab.contracts.telemetry import (
    Behavior,
    Bottleneck,
    GpmMetrics,
    GpuTelemetry,
    MemoryTelemetry,
    NodeEvent,
    OpEvent,
    Overhead,
    TelemetryRecord,
)
from agnitra_lab.notebook.profile_card import profile_card_html, profile_card_text
from agnitra_lab.notebook.profile_names import node_name, short_op
from agnitra_lab.notebook.profile_sentences import bottleneck_sentence, gpu_sentence, overhead_sentence
from agnitra_lab.notebook.rollback_card import rollback_card_html, rollback_card_text
from agnitra_lab.profiler.capture import capture_block
from agnitra_lab.report import palette

# What JupyterLab keeps of an untrusted output, of the elements that a card may want.
KEPT = {
    "div", "p", "h1", "h2", "strong", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "br", "wbr",
    "img", "details", "summary",
}  # fmt: skip
VOID = {"br", "wbr", "img"}
KEY = "sk-" + "a1B2c3D4" * 5
MAX_BYTES = 60_000


class _Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.names, self.attributes, self.texts, self.open, self.alts = set(), set(), [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.alts += [value for name, value in attrs if name == "alt"]

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
    """A record as schema v1 wrote it: nothing of the nodes, owners, phases, timeline and overhead."""
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
        "total_self_ms": 55.0,
        "attributed_share": 0.75,
    }
    return TelemetryRecord(**{**given, **changes})


def both(record, filed=None, peaks=None):
    return (
        "".join(_Elements(profile_card_html(record, filed, peaks)).texts),
        profile_card_text(record, filed, peaks),
    )


@pytest.mark.parametrize("name", ["measured", "decode", "training"])
def test_a_card_is_what_an_untrusted_notebook_keeps(name, measured):
    record = {"measured": measured, "decode": decode_record(), "training": training_record()}[name]
    elements = _Elements(profile_card_html(record, "Telemetry: artifacts/x", PEAKS))
    assert elements.names <= KEPT
    assert elements.attributes <= {"style", "scope", "src", "alt"}
    assert elements.open == []


def test_no_style_of_a_card_is_one_that_the_sanitizer_drops():
    html = profile_card_html(decode_record(), peaks=PEAKS)
    styles = ";".join(re.findall(r'style="([^"]*)"', html))
    assert not re.search(r"(^|;)(position|gap|flex|float|inset|transform|grid)[^;]*:", styles)
    assert "display:flex" not in styles


def _with_names_of(record, name):
    """The record with every name that a program chooses replaced, each by a different one."""

    def renamed(rows, *fields):
        return tuple(
            row.model_copy(update={field: f"{name}{number}" for field in fields}) for number, row in enumerate(rows)
        )

    return record.model_copy(
        update={
            "nodes": renamed(record.nodes, "node", "op", "module_path", "source"),
            "events": renamed(record.events, "node", "op", "module_path"),
            "kernels": renamed(record.kernels, "node", "op", "module_path", "kernel"),
        }
    )


@pytest.mark.parametrize("name", ["", "layer.stack_of.decoder_block." * 12, "a_" * 200, "block.<lambda>." * 20])
def test_a_card_of_fifty_rows_is_small_whatever_its_names(name):
    record = decode_record()
    assert len(record.nodes) == len(record.events) == len(record.kernels) == 50
    record = _with_names_of(record, name) if name else record
    assert len(profile_card_html(record, "Telemetry: artifacts/x", PEAKS).encode()) <= MAX_BYTES


def test_every_surface_of_a_card_is_painted():
    html = profile_card_html(decode_record(), peaks=PEAKS)
    assert html.startswith(f'<div style="background:{palette.SURFACE};color:{palette.TEXT}')
    rows = re.findall(r"<(?:table|tr)[^>]*>", html)
    assert rows
    for row in rows:
        assert f"background:{palette.PANEL}" in row


def test_html_and_text_tell_the_same_facts_of_an_old_record():
    facts = ["aten::mm takes 2.50 ms, 50.0% of the self time, at module layers.0.mlp", "7.25 ms", "55.00 ms"]
    facts += ["75.0% tied to graph nodes", "aten::op0", "aten::op7"]
    for shown in both(make_record()):
        assert [fact for fact in facts if fact not in shown] == []


def test_html_and_text_tell_the_same_facts_of_a_full_record():
    facts = [
        "linear_head", "lm_head", "decoder.py:140", "0.0334 ms", "95%", "op order",
        "97.0%", "(95.6% exact)", "0.6%", "99.4% attributed",
        "layers.*.mlp.down_proj ×8", "15.3%",
        "4,120 GB/s", "712 TFLOP/s", "3.92 TFLOP/s", "3,925 GB/s",
        "Host busy 75.6% and device busy 24.3%",
        "126.5 ms", "144,124", "2,048",
        "linear_head · lm_head", "250 MiB", "13.7%",
        "GPU: busy 21.4% of the wall time", "GPU idle: 1.55 ms in 89 gaps", "Energy: 271 J", "power cap by software",
        "Counters: SMs 19.0%", "97 markers at 1.1 us", "1,204 of 49,316 events",
    ]  # fmt: skip
    for shown in both(decode_record(), peaks=PEAKS):
        assert [fact for fact in facts if fact not in shown] == []


def test_an_old_record_has_no_empty_panel():
    for shown in both(make_record()):
        for absent in ("Who spends", "Roofline", "Over the capture", "Prefill", "Alive", "Evidence:", "Overhead"):
            assert absent not in shown


def test_every_picture_has_a_text_alternative_with_a_number():
    alts = _Elements(profile_card_html(decode_record(), peaks=PEAKS)).alts
    assert len(alts) == 4
    for alt in alts:
        assert re.search(r"\d", alt)


def test_a_residual_of_nothing_is_shown_all_the_same():
    record = decode_record()
    record = record.model_copy(update={"owners": record.owners.model_copy(update={"residual": 0.0})})
    html, text = both(record)
    assert "Residual 0.0%" in html
    assert "Residual: 0.0%." in text


def test_owners_that_are_nearly_all_or_nearly_nothing_are_not_rounded_away():
    record = decode_record()
    owners = record.owners.model_copy(update={"fx_node": 0.9999, "residual": 0.0001})
    html, _ = both(record.model_copy(update={"owners": owners}))
    assert "Graph nodes >99.9%" in html
    assert "Residual <0.1%" in html


def test_the_host_leads_the_sentence_where_the_gpu_mostly_waits_for_it():
    record = decode_record()
    sentence = bottleneck_sentence(record, PEAKS)
    assert sentence.startswith("The GPU waits for the host 76% of the time (launch-bound); the largest op, aten::mm,")
    assert sentence.endswith(
        "node linear_head of module lm_head (decoder.py:140), and runs at 95% of what its bytes allow."
    )
    idle = record.gpu.idle.model_copy(update={"launch_bound_share": 0.5})
    busy = record.model_copy(update={"gpu": record.gpu.model_copy(update={"idle": idle})})
    assert bottleneck_sentence(busy).startswith("aten::mm takes")


def test_an_optimiser_is_not_called_a_node():
    top = Bottleneck(op="aten::div", latency_ms=1.0, shape=(), node="optimizer:AdamW.step")
    assert bottleneck_sentence(make_record(bottleneck=top)) == "aten::div takes 1.00 ms, at optimiser AdamW.step."


def test_without_ceilings_the_sentence_does_not_say_what_limits_a_node():
    assert bottleneck_sentence(decode_record()).endswith("and runs at 95% of what the roofline allows.")


def test_without_ceilings_there_is_no_roofline_and_a_note_says_how_to_get_it():
    html, text = both(decode_record())
    assert len(_Elements(profile_card_html(decode_record())).alts) == 3
    for shown in (html, text):
        assert "Measured ceilings" not in shown
        assert "Roofline: the picture takes measured ceilings; agnitra_lab.device.peaks.measure_peaks" in shown


def test_without_flops_a_note_says_so():
    for shown in both(training_record(), peaks=PEAKS):
        assert "Roofline: FLOPs and bytes of the nodes are not known" in shown


def test_missing_gpu_metrics_are_said_in_plain_words_and_never_zero():
    for shown in both(make_record()):
        assert "GPU: no CUDA device: GPU metrics are not available on this machine." in shown
        assert "the same cell on a machine with an NVIDIA GPU" in shown
        assert " 0.0%" not in shown
        assert "not measured" in shown


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("No GPU samples: the Python package nvidia-ml-py is not installed.", "pip install nvidia-ml-py"),
        ("this account may not read the NVIDIA driver's counters", "NVreg_RestrictProfilingToAdminUsers=0"),
    ],
)
def test_a_reason_is_followed_by_what_to_do_once(reason, remedy):
    sentence = gpu_sentence(GpuTelemetry(reason=reason))
    assert sentence.count(remedy) == 1
    assert gpu_sentence(GpuTelemetry(reason=sentence)).count(remedy) == 1


def test_counters_that_the_driver_refuses_say_how_to_get_them():
    gpu = GpuTelemetry(gpu_utilisation=0.5, gpm=GpmMetrics(reason="insufficient privilege"))
    for shown in both(make_record(gpu=gpu)):
        assert "Counters: not measured: insufficient privilege. To get it: run as root" in shown


def test_energy_without_a_counter_says_why():
    gpu = GpuTelemetry(gpu_utilisation=0.5, energy_reason="the driver of this GPU counts no energy")
    for shown in both(make_record(gpu=gpu)):
        assert "Energy: not measured: the driver of this GPU counts no energy." in shown


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


@pytest.mark.parametrize(
    ("overhead", "sentence"),
    [
        (
            Overhead(marker_us=1.1, num_markers=37, share=0.04),
            "Overhead: profiling cost about 4% of this run: 37 markers at 1.1 us.",
        ),
        (Overhead(share=0.0001), "Overhead: profiling cost less than 0.1% of this run."),
        (Overhead(num_markers=1), "Overhead: 1 marker."),
        (Overhead(), None),
    ],
)
def test_what_profiling_cost_is_one_sentence(overhead, sentence):
    assert overhead_sentence(overhead) == sentence


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


@pytest.mark.parametrize(
    ("node", "op", "name"),
    [
        ("linear_3", "aten::addmm", "linear_3"),
        ("gelu + view + add + mul + sub", None, "gelu + view +3"),
        ("gelu + view", None, "gelu + view"),
        ("param_grad:blocks.0.fc.weight", None, "gradient of blocks.0.fc.weight"),
        ("optimizer:AdamW", None, "optimiser AdamW"),
        (None, "aten::addmm", "addmm"),
        (None, None, "no node"),
    ],
)
def test_a_node_has_a_short_name(node, op, name):
    assert node_name(node, op) == name


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("aten::mm", "mm"),
        ("triton_poi_fused_gelu_view_2", "triton_poi_fused_gelu_view_2"),
        (
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(int, float*)",
            "vectorized_layer_norm_kernel",
        ),
        ("Memset (Device)", "Memset"),
        ("<lambda>", "<lambda>"),
    ],
)
def test_a_kernel_is_named_without_its_template(op, name):
    assert short_op(op) == name


def test_names_are_escaped():
    html = profile_card_html(make_record(name="<img src=x onerror=alert(1)>"))
    assert "<img src=x" not in html
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
    for shown in (rollback_card_html(proof), rollback_card_text(proof)):
        assert "The original was NOT restored: a hook is left." in shown
        assert "DIFFERENT" in shown
    assert _Elements(rollback_card_html(proof)).names <= KEPT


def test_a_name_that_would_run_over_its_neighbour_is_cut_in_html_and_whole_in_text():
    name = "scaled_dot_product_attention_of_the_seventh_decoder_block_of_the_model"
    node = NodeEvent(
        node=name, op="aten::mm", latency_ms=1.0, cpu_ms=1.0, device_ms=None, share=1.0, num_calls=1, method="order"
    )
    html, text = both(make_record(nodes=(node,)))
    assert name not in html
    assert re.search(r"scaled_dot_product_\w*…\w*_model", html)
    assert name in text
