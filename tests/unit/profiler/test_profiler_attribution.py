"""Attribution on event tables written by hand: the GPU path needs no GPU here."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.contracts import ComputationGraph, GraphHandoff, GraphNode
from agnitra_lab.profiler.alignment import NodeAligner
from agnitra_lab.profiler.attribution import attribute
from agnitra_lab.profiler.event_table import Kind, read_events
from agnitra_lab.profiler.rows import sum_rows
from agnitra_lab.profiler.sweep import busy_ns, sweep


@dataclass
class RawEvent:
    """A kineto event as torch 2.11 gives it: no activity_type, no is_hidden_event."""

    event_name: str
    start: int
    duration: int
    correlation: int = 0
    linked: int = 0
    device: str = "CPU"
    thread: int = 1
    sequence: int = -1
    is_annotation: bool = False
    input_shapes: tuple = ()

    def name(self):
        return self.event_name

    def start_ns(self):
        return self.start

    def duration_ns(self):
        return self.duration

    def correlation_id(self):
        return self.correlation

    def linked_correlation_id(self):
        return self.linked

    def device_type(self):
        return SimpleNamespace(name=self.device)

    def device_resource_id(self):
        return 7

    def start_thread_id(self):
        return self.thread

    def sequence_nr(self):
        return self.sequence

    def is_user_annotation(self):
        return self.is_annotation

    def shapes(self):
        return self.input_shapes


def node(name, op, path):
    return GraphNode(name=name, op=op, module_path=path, shape=(2, 3))


def handoff(*nodes):
    return GraphHandoff(graph=ComputationGraph(nodes=nodes))


GPU_EVENTS = [
    RawEvent("agn::0", 0, 1000, correlation=1),
    RawEvent("agn::1", 10, 300, correlation=2),
    RawEvent("aten::linear", 20, 200, correlation=3),
    RawEvent("aten::addmm", 40, 150, correlation=4),
    RawEvent("cudaLaunchKernel", 60, 20, correlation=4001, linked=4),
    # Its own id is 3, as a CPU op's is: a join over all events would take it for the launcher.
    RawEvent("Activity Buffer Request", 500, 5, correlation=3),
    RawEvent("gemm_kernel", 400, 500, linked=4, device="CUDA"),
    RawEvent("bias_kernel", 850, 100, linked=3, device="CUDA"),
    RawEvent("triton_kernel", 1200, 50, linked=1, device="CUDA"),
    RawEvent("Memcpy HtoD", 2000, 25, linked=0, device="CUDA"),
    RawEvent("agn::0", 0, 1000, linked=1, device="CUDA", is_annotation=True),
    RawEvent("[memory]", 5, 0),
]
PATHS = {0: (0, ""), 1: (0, "fc")}
GRAPHS = {0: handoff(node("linear", "aten::linear", "fc"))}


@pytest.fixture
def gpu():
    return attribute(read_events(GPU_EVENTS), PATHS, GRAPHS)


def test_kinds_are_told_apart_without_activity_types(gpu):
    kinds = [Kind(kind).name for kind in gpu.table.kind]
    assert kinds == ["MARKER", "MARKER", "OP", "OP", "RUNTIME", "RUNTIME", *["KERNEL"] * 4, "ANNOTATION"]


def test_a_kernel_belongs_to_the_node_of_the_op_that_launched_it(gpu):
    tables = sum_rows(gpu, has_device=True, num_calls=1)
    kernels = {row.kernel: (row.op, row.node) for row in tables.kernels}
    assert kernels["gemm_kernel"] == ("aten::addmm", "linear")
    assert kernels["bias_kernel"] == ("aten::linear", "linear")


def test_a_kernel_straight_under_a_marker_belongs_to_the_module(gpu):
    rows = {row.op: row for row in sum_rows(gpu, has_device=True, num_calls=1).ops}
    assert (rows["triton_kernel"].method, rows["triton_kernel"].module_path) == ("module", "")
    assert (rows["Memcpy HtoD"].method, rows["Memcpy HtoD"].module_path) == ("outside_graph", None)


def test_latency_on_a_gpu_is_kernel_time_and_the_rest_is_shown(gpu):
    tables = sum_rows(gpu, has_device=True, num_calls=1)
    assert tables.bottleneck.op == "aten::addmm"
    assert tables.bottleneck.node == "linear"
    assert tables.bottleneck.confidence == 1.0
    assert tables.total_self_ms == pytest.approx((500 + 100 + 50 + 25) / 1e6)
    assert tables.attributed_share == pytest.approx(600 / 675)


def test_busy_time_is_the_union_of_the_kernels(gpu):
    assert busy_ns(gpu.table) == 550 + 50 + 25


def test_times_and_counts_are_per_call():
    twice = [*GPU_EVENTS[:4], *[RawEvent(e.event_name, e.start + 5000, e.duration) for e in GPU_EVENTS[:4]]]
    tables = sum_rows(attribute(read_events(twice), PATHS, GRAPHS), has_device=False, num_calls=2)
    assert {row.op: (row.num_calls, row.cpu_ms) for row in tables.ops} == {
        "aten::addmm": (1, 150 / 1e6),
        "aten::linear": (1, 50 / 1e6),
    }


def test_a_backward_op_goes_to_the_module_of_its_forward_op():
    events = [
        RawEvent("agn::0", 0, 100, correlation=1),
        RawEvent("aten::mm", 10, 50, correlation=2, sequence=9),
        RawEvent("autograd::engine::evaluate_function: MmBackward0", 200, 80, correlation=3, sequence=9, thread=2),
        RawEvent("aten::mm", 210, 60, correlation=4, sequence=-1, thread=2),
    ]
    found = attribute(read_events(events), {0: (0, "proj")}, {})
    assert [place.module_path for place in found.places] == ["proj"] * 4
    assert found.places[3].method == "module"


def test_ops_without_modules_stay_outside():
    tables = sum_rows(attribute(read_events([RawEvent("aten::add", 0, 10)]), {}, {}), has_device=False, num_calls=1)
    assert (tables.ops[0].method, tables.attributed_share) == ("outside_graph", 0.0)


def test_nothing_ran_gives_no_bottleneck():
    tables = sum_rows(attribute(read_events([]), {}, {}), has_device=False, num_calls=1)
    assert (tables.ops, tables.bottleneck, tables.attributed_share) == ((), None, None)


def test_a_missing_op_costs_confidence_and_not_its_neighbours():
    aligner = NodeAligner([node("a", "aten::mul", "m"), node("b", "aten::add", "m"), node("c", "aten::relu", "m")])
    found = aligner.align_call([("m", "aten::mul"), ("m", "aten::detach"), ("m", "aten::relu"), ("x", "aten::mul")])
    assert [match and match.node.name for match in found] == ["a", None, "c", None]
    assert found[0].confidence == pytest.approx(2 * 2 / 6)


@st.composite
def nested_calls(draw, start=0, depth=3):
    """Events of one thread that nest properly, as (name, start, duration)."""
    events, clock = [], start
    for _ in range(draw(st.integers(0, 3))):
        opened = clock + draw(st.integers(0, 3))
        inner = draw(nested_calls(start=opened + draw(st.integers(0, 2)), depth=depth - 1)) if depth else []
        inner_end = max((begin + length for _, begin, length in inner), default=opened)
        clock = inner_end + draw(st.integers(1, 5))
        events += [(draw(st.sampled_from(["aten::a", "aten::b", "agn::0"])), opened, clock - opened), *inner]
    return events


@settings(max_examples=60, deadline=None)
@given(nested_calls(), nested_calls())
def test_self_times_sum_to_the_time_that_the_outermost_events_cover(first, second):
    events = [RawEvent(*event, thread=1) for event in first] + [RawEvent(*event, thread=2) for event in second]
    table = read_events(events)
    nesting = sweep(table)
    covered = 0
    for mine in (first, second):
        covered += len({tick for _, start, length in mine for tick in range(start, start + length)})
    assert nesting.self_ns.sum() == covered
    assert (nesting.self_ns >= 0).all()


@settings(max_examples=60, deadline=None)
@given(nested_calls())
def test_rows_sum_to_the_total(calls):
    attribution = attribute(read_events([RawEvent(*event) for event in calls]), {0: (0, "m")}, {})
    tables = sum_rows(attribution, has_device=False, num_calls=1)
    assert sum(row.latency_ms for row in tables.ops) == pytest.approx(tables.total_self_ms)
    ops = attribution.table.kind == Kind.OP
    assert tables.total_self_ms == pytest.approx(attribution.nesting.self_ns[np.flatnonzero(ops)].sum() / 1e6)
    assert sum(row.share for row in tables.ops) == pytest.approx(1.0 if tables.total_self_ms else 0.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12))
def test_busy_time_counts_every_nanosecond_once(kernels):
    table = read_events([RawEvent("k", start, length, device="CUDA") for start, length in kernels])
    assert busy_ns(table) == len({tick for start, length in kernels for tick in range(start, start + length)})
