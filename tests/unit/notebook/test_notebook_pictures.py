from __future__ import annotations

import base64
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_samples import PEAKS, decode_record, training_record

from agnitra_lab.contracts.device import DevicePeaks
from agnitra_lab.contracts.telemetry import Behavior, GpuTelemetry, KernelEvent, OpEvent, TelemetryRecord, Timeline
from agnitra_lab.notebook import profile_icicle as icicles
from agnitra_lab.notebook import profile_pictures as pictures
from agnitra_lab.notebook import profile_roofline as rooflines
from agnitra_lab.notebook.profile_card import profile_card_html
from agnitra_lab.notebook.profile_rows import owner_rows, timeline_sentence
from agnitra_lab.report import palette

SVG = "{http://www.w3.org/2000/svg}"
KEY = "sk-" + "a1B2c3D4" * 5


def parsed(svg):
    return ElementTree.fromstring(svg)


def pictures_of(record, peaks=None):
    sources = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', profile_card_html(record, peaks=peaks))
    return [base64.b64decode(source).decode() for source in sources]


def number(value):
    return float(value.removesuffix("%"))


def blocks_of(root):
    """(left, right, top) of every block of an icicle, in percent and pixels."""
    return [
        (number(block.get("x")), number(block.get("x")) + number(block.get("width")), number(block.get("y")))
        for block in (*root.findall(f"{SVG}svg"), *root.findall(f"{SVG}rect"))
    ]


def op_event(op="aten::mm", ms=1.0, module="a", **changes):
    return OpEvent(op=op, latency_ms=ms, cpu_ms=ms, device_ms=ms, num_calls=1, share=0.1, module_path=module, **changes)


def record_of(events, kernels=(), total_ms=None):
    return TelemetryRecord(
        bottleneck=None, events=tuple(events), kernels=tuple(kernels), total_self_ms=total_ms, gpu=GpuTelemetry(),
        behavior=Behavior(),
    )  # fmt: skip


names = st.sampled_from(["", "a", "layers.0.mlp", "layers.1.mlp", "layers.2.mlp", "x<y>&\"'", "é.ü"])
times = st.integers(0, 10**9).map(lambda time_ns: time_ns / 1e6)
events = st.builds(op_event, op=st.sampled_from(["aten::mm", "aten::add", "k<1>"]), ms=times, module=names)
kernels = st.builds(
    KernelEvent, kernel=st.sampled_from(["k<1>", "j"]), device_ms=times, num_launches=st.just(1),
    op=st.sampled_from([None, "aten::mm", "aten::add"]), module_path=names, method=st.just("order"),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=30), st.lists(kernels, max_size=30), st.none() | times)
def test_the_blocks_of_an_icicle_fill_it_and_lie_inside_those_above_them(rows, kernel_rows, total_ms):
    icicle = icicles.build_icicle(record_of(rows, kernel_rows, total_ms))
    if icicle is None:
        assert sum(row.latency_ms for row in rows) + sum(row.device_ms for row in kernel_rows) + (total_ms or 0) == 0
        return
    assert math.isclose(sum(block.time_ms for block in icicle.modules), icicle.total_ms, rel_tol=1e-5)
    for module in icicle.modules:
        for block in (module, *module.children):
            assert sum(child.time_ms for child in block.children) <= block.time_ms * (1 + 1e-9)
    blocks = blocks_of(parsed(icicles.icicle_picture(icicle)))
    for left, right, top in blocks:
        assert left >= 7.99
        assert right <= 100.5
        if top:
            above = [(low, high) for low, high, height in blocks if height == top - 42]
            assert any(low - 0.05 <= left and right <= high + 0.05 for low, high in above)


def test_what_is_not_in_the_record_is_a_block_of_its_own():
    icicle = icicles.build_icicle(record_of([op_event(ms=3.0)], total_ms=10.0))
    assert [(block.label, block.time_ms) for block in icicle.modules] == [("a", 3.0), ("rest", 7.0)]
    (first, rest) = [block for block in blocks_of(parsed(icicles.icicle_picture(icicle))) if block[2] == 0]
    assert (rest[1] - rest[0]) / (first[1] - first[0]) == pytest.approx(7 / 3, rel=0.01)


def test_a_cpu_has_no_kernel_level():
    assert icicles.build_icicle(training_record()).num_levels == 2
    assert icicles.build_icicle(decode_record()).num_levels == 3


def test_a_kernel_stands_under_the_op_that_launched_it():
    kernel = KernelEvent(kernel="k", device_ms=2.0, num_launches=1, op="aten::mm", module_path="a", method="order")
    (module,) = icicles.build_icicle(record_of([op_event(ms=2.0)], [kernel])).modules
    assert [child.label for child in module.children[0].children] == ["k"]


def test_a_kernel_of_schema_v1_is_found_by_its_node_or_left_out():
    rows = [op_event(ms=2.0, module="a", node="linear")]
    known = KernelEvent(kernel="k", device_ms=2.0, num_launches=1, op="aten::mm", node="linear")
    lost = KernelEvent(kernel="j", device_ms=9.0, num_launches=1, op="aten::add")
    (module,) = icicles.build_icicle(record_of(rows, [known, lost])).modules
    assert module.time_ms == 2.0
    assert module.children[0].children[0].label == "k"


def test_equal_modules_of_many_layers_stand_together_and_of_few_do_not():
    few = icicles.build_icicle(record_of([op_event(module=f"layers.{i}.mlp") for i in range(3)]))
    many = icicles.build_icicle(record_of([op_event(module=f"layers.{i}.mlp") for i in range(30)]))
    assert {block.label for block in few.modules} == {f"layers.{i}.mlp" for i in range(3)}
    assert [block.label for block in many.modules] == ["layers.*.mlp ×30"]


def test_blocks_too_narrow_to_see_stand_together():
    icicle = icicles.build_icicle(record_of([op_event(ms=1000.0), *(op_event(module=f"m{i}x") for i in range(5))]))
    assert [block.label for block in icicle.modules] == ["a", "5 more"]


def test_a_name_is_never_longer_than_its_block():
    root = parsed(icicles.icicle_picture(icicles.build_icicle(decode_record())))
    widths = {"w": 790, "v": 640, "n": 500}
    seen = 0
    for block in root.findall(f"{SVG}svg"):
        share = number(block.get("width")) / (100 - pictures.GUTTER)
        for line in block.findall(f"{SVG}text"):
            tiers = (line.get("class") or "w v n").split()
            seen += 1
            assert len(line.text) * 6.2 <= min(widths[tier] for tier in tiers) * share
    assert seen > 20


def test_the_owners_fill_their_bar_in_proportion():
    owners = owner_rows(training_record())
    root = parsed(pictures.owners_bar([(owner.share, owner.colour) for owner in owners]))
    widths = [number(rect.get("width")) for rect in root.findall(f"{SVG}rect")]
    assert sum(widths) == pytest.approx(100, abs=0.1)
    assert widths == pytest.approx([100 * owner.share for owner in owners], abs=0.01)
    assert root.findall(f"{SVG}rect")[-1].get("fill") == "url(#h)"


def _roofline_with(tflop_per_s, intensity):
    node = decode_record().nodes[0]
    node = node.model_copy(update={"tflop_per_s": tflop_per_s, "intensity_flop_per_byte": intensity})
    return rooflines.build_roofline(decode_record(nodes=(node,)), PEAKS)


@pytest.mark.parametrize("intensity", [0.5, 10.0, 100.0, 500.0])
def test_a_node_at_its_ceiling_lies_on_the_line_and_a_slower_one_below_it(intensity):
    ceiling = min(4.12 * intensity, 712.0)
    for rate, is_on in ((ceiling, True), (ceiling / 10, False)):
        root = parsed(rooflines.roofline_picture(_roofline_with(rate, intensity)))
        circle = root.find(f"{SVG}circle")
        x, y = number(circle.get("cx")), number(circle.get("cy"))
        line_y = next(
            _height_at(line, x)
            for line in root.findall(f"{SVG}line")
            if line.get("class") == "c" and number(line.get("x1")) <= x <= number(line.get("x2"))
        )
        assert (abs(y - line_y) <= 1.0) == is_on
        assert y >= line_y - 1.0


def _height_at(line, x):
    x1, x2, y1, y2 = (number(line.get(name)) for name in ("x1", "x2", "y1", "y2"))
    return y1 + (y2 - y1) * (x - x1) / (x2 - x1)


def test_the_axes_of_a_roofline_have_units_and_its_ceilings_names():
    svg = rooflines.roofline_picture(rooflines.build_roofline(decode_record(), PEAKS))
    for text in ("FLOP per byte", "TFLOP/s", "copy, 4,120 GB/s", "matrix product, 712 TFLOP/s"):
        assert f">{text}</text>" in svg


def test_the_names_in_a_roofline_are_of_different_dots():
    svg = rooflines.roofline_picture(rooflines.build_roofline(decode_record(), PEAKS))
    named = re.findall(r'class="h(?: e)?">([^<]*)<', svg)
    assert "linear_head" in named
    assert len([name for name in named if name.startswith("sdpa")]) == 1


def test_a_roofline_takes_a_bandwidth_and_can_do_without_the_matrix_product():
    only_copy = DevicePeaks(copy_bandwidth_gb_per_s=4120.0)
    roofline = rooflines.build_roofline(decode_record(), only_copy)
    assert len(re.findall('class="c"', rooflines.roofline_picture(roofline))) == 1
    assert rooflines.build_roofline(decode_record(), DevicePeaks(gemm_tflop_per_s=712.0)) is None
    assert rooflines.build_roofline(decode_record(), None) is None
    assert rooflines.build_roofline(training_record(), PEAKS) is None


def test_a_lane_of_the_timeline_is_as_high_as_its_bins_are_busy():
    svg = pictures.timeline_picture(Timeline(bin_ms=1.0, host_busy=(1.0, 0.25, 0.0)))
    assert 'd="M0 100V0h1V75h1V100h1V100Z"' in svg


def test_a_capture_without_a_gpu_has_one_lane():
    with_gpu, without = decode_record().timeline, training_record().timeline
    assert pictures.timeline_height(with_gpu) > pictures.timeline_height(without)
    assert "device" in timeline_sentence(with_gpu)
    assert "device" not in timeline_sentence(without)
    assert ">device<" not in pictures.timeline_picture(without)


def test_a_long_timeline_keeps_its_mean_in_fewer_bins():
    svg = pictures.timeline_picture(Timeline(bin_ms=0.1, host_busy=tuple(float(i % 2) for i in range(10_000))))
    (path,) = parsed(svg).iter(f"{SVG}path")
    num_bins = sum(int(run) for run in re.findall(r"h(\d+)", path.get("d")))
    assert 100 <= num_bins <= 240
    assert set(re.findall(r"V(\d+)", path.get("d"))) == {"50", "100"}


def test_a_timeline_without_bins_is_left_out():
    assert timeline_sentence(Timeline(bin_ms=1.0)) is None
    assert "Over the capture" not in profile_card_html(decode_record(timeline=Timeline(bin_ms=1.0), phases=()))


def test_every_picture_of_a_card_is_well_formed_and_asks_for_nothing():
    made = pictures_of(decode_record(), PEAKS)
    assert len(made) == 4
    for svg in made:
        parsed(svg)
        assert not re.search(r"href|@import|url\((?!#)|<script|foreignObject", svg)


def test_names_in_pictures_are_escaped_and_redacted():
    bad = f"<script>alert(1)</script>&\x00{KEY}"
    rows = [op_event(op=bad, module=bad, ms=5.0)]
    (svg,) = pictures_of(record_of(rows))
    assert "<script" not in svg
    assert KEY not in svg
    parsed(svg)


def test_text_in_pictures_is_easy_to_read():
    for colour in (palette.ACCENT, palette.SECONDARY, palette.BASELINE):
        assert palette.contrast(palette.TEXT, icicles.tint(colour)) >= 7
    for colour in (palette.TEXT, palette.MUTED):
        assert palette.contrast(colour, palette.PANEL) >= 7
