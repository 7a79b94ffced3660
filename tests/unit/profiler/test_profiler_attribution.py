"""Attribution on event tables written by hand and recorded on an H200: the GPU path needs no GPU here."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import DeviceType

from agnitra_lab.contracts import GraphNode
from agnitra_lab.profiler.alignment import NodeAligner
from agnitra_lab.profiler.attribution import Context, attribute
from agnitra_lab.profiler.event_table import Kind, concatenate, read_events
from agnitra_lab.profiler.inductor import read_program
from agnitra_lab.profiler.places import RootGraph
from agnitra_lab.profiler.rows import sum_rows
from agnitra_lab.profiler.sweep import sweep

TRACES = Path(__file__).parents[3] / "fixtures" / "traces"


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
        return getattr(DeviceType, self.device)

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
CONTEXT = Context(paths={0: {0: "", 1: "fc"}}, graphs={0: RootGraph((node("linear", "aten::linear", "fc"),))})


@pytest.fixture
def gpu():
    return attribute(read_events(GPU_EVENTS), CONTEXT)


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
    assert (rows["Memcpy HtoD"].owner, rows["Memcpy HtoD"].module_path) == (None, None)


def test_latency_on_a_gpu_is_kernel_time_and_the_rest_is_shown(gpu):
    tables = sum_rows(gpu, has_device=True, num_calls=1)
    assert tables.bottleneck.op == "aten::addmm"
    assert tables.bottleneck.node == "linear"
    assert tables.bottleneck.confidence == 1.0
    assert tables.total_self_ms == pytest.approx((500 + 100 + 50 + 25) / 1e6)
    assert tables.owners.exact_node == pytest.approx(600 / 675)


def test_the_shares_of_the_owners_sum_to_one(gpu):
    owners = sum_rows(gpu, has_device=True, num_calls=1).owners
    assert owners.fx_node == pytest.approx(650 / 675)
    assert owners.residual == pytest.approx(25 / 675)
    assert owners.fx_node + owners.param_grad + owners.optimizer + owners.outside_graph + owners.residual == 1.0


def test_times_and_counts_are_per_call():
    twice = [*GPU_EVENTS[:4], *[RawEvent(e.event_name, e.start + 5000, e.duration) for e in GPU_EVENTS[:4]]]
    tables = sum_rows(attribute(read_events(twice), CONTEXT), has_device=False, num_calls=2)
    assert {row.op: (row.num_calls, row.cpu_ms) for row in tables.ops} == {
        "aten::addmm": (1, 150 / 1e6),
        "aten::linear": (1, 50 / 1e6),
    }


def placed(attribution, row):
    places = attribution.places
    return places.owner_name(row), places.method_name(row), places.module_path(row), places.node_name(row)


BACKWARD = [
    RawEvent("agn::0", 0, 100, correlation=1),
    # It makes no autograd node: it peeks at the number that the product takes.
    RawEvent("aten::detach", 2, 5, correlation=9, sequence=9),
    RawEvent("aten::mm", 10, 50, correlation=2, sequence=9),
    RawEvent("autograd::engine::evaluate_function: MmBackward0", 200, 80, correlation=3, sequence=9, thread=2),
    RawEvent("aten::mm", 210, 60, correlation=4, sequence=-1, thread=2),
    RawEvent("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 300, 40, correlation=5, thread=2),
    RawEvent("agn::grad::0", 301, 2, correlation=6, thread=2),
    RawEvent("aten::add_", 310, 20, correlation=7, thread=2),
    RawEvent("autograd::engine::evaluate_function: AddBackward0", 400, 9, correlation=8, sequence=3, thread=2),
    RawEvent("Optimizer.step#SGD.step", 500, 90, is_annotation=True),
    RawEvent("aten::_foreach_add_", 510, 20, correlation=10),
]


@pytest.fixture
def backward():
    graph = RootGraph((node("detach", "aten::detach", "proj"), node("mm", "aten::mm", "proj")))
    context = Context(paths={0: {0: "proj"}}, graphs={0: graph}, gradients=[(0, "proj.weight")])
    return attribute(read_events(BACKWARD), context)


def test_a_backward_op_goes_to_the_node_of_its_forward_op(backward):
    assert placed(backward, 3) == ("fx_node", "sequence_number", "proj", "mm")
    assert placed(backward, 4) == placed(backward, 3)


def test_the_accumulation_of_a_gradient_goes_to_its_parameter(backward):
    expected = ("param_grad", "hook", "proj", "param_grad:proj.weight")
    assert [placed(backward, row) for row in (5, 7)] == [expected] * 2


def test_a_backward_op_without_a_forward_op_is_the_residual(backward):
    assert placed(backward, 8) == (None, None, None, None)


def test_ops_in_an_optimisers_range_belong_to_the_optimiser(backward):
    assert placed(backward, 10) == ("optimizer", "range", None, "optimizer:SGD.step")


def test_ops_without_modules_stay_outside():
    tables = sum_rows(attribute(read_events([RawEvent("aten::add", 0, 10)]), Context()), has_device=False, num_calls=1)
    assert (tables.ops[0].owner, tables.owners.outside_graph) == ("outside_graph", 1.0)


def test_nothing_ran_gives_no_bottleneck():
    tables = sum_rows(attribute(read_events([]), Context()), has_device=False, num_calls=1)
    assert (tables.ops, tables.bottleneck, tables.owners) == ((), None, None)


def test_the_profilers_own_work_is_in_no_table():
    events = [RawEvent("agn::own", 0, 100, correlation=1), RawEvent("aten::view_as", 10, 50, correlation=2)]
    assert sum_rows(attribute(read_events(events), Context()), has_device=False, num_calls=1).ops == ()


def test_a_missing_op_costs_confidence_and_not_its_neighbours():
    aligner = NodeAligner([node("a", "aten::mul", "m"), node("b", "aten::add", "m"), node("c", "aten::relu", "m")])
    found = aligner.align_call([("m", "aten::mul"), ("m", "aten::detach"), ("m", "aten::relu"), ("x", "aten::mul")])
    assert [match and match.index for match in found] == [0, None, 2, None]
    assert found[0].confidence == pytest.approx(2 * 2 / 6)


class Recorded:
    """A raw event of a recording."""

    def __init__(self, columns, row):
        self.columns, self.row = columns, row

    def __getattr__(self, name):
        if name not in self.columns:
            raise AttributeError(name)
        return lambda: self.columns[name][self.row]

    def name(self):
        return self.columns["name"][self.row]

    def start_ns(self):
        return self.columns["start_ns"][self.row]

    def duration_ns(self):
        return self.columns["duration_ns"][self.row]

    def correlation_id(self):
        return self.columns["correlation_id"][self.row]

    def linked_correlation_id(self):
        return self.columns["linked_correlation_id"][self.row]

    def start_thread_id(self):
        return self.columns["start_thread_id"][self.row]

    def device_resource_id(self):
        return self.columns["device_resource_id"][self.row]

    def sequence_nr(self):
        return self.columns["sequence_nr"][self.row]

    def is_user_annotation(self):
        return self.columns["is_user_annotation"][self.row]

    def device_type(self):
        return getattr(DeviceType, self.columns["device_type"][self.row])


def recording(name):
    columns = json.loads(gzip.decompress((TRACES / f"{name}.json.gz").read_bytes()))
    return read_events([Recorded(columns, row) for row in range(len(columns["name"]))])


@pytest.fixture(scope="module")
def programs():
    sources = json.loads(gzip.decompress((TRACES / "gpt_programs.json.gz").read_bytes()))
    return [read_program(source, name) for name, source in sources.items()]


@pytest.mark.parametrize(
    ("name", "share", "method"),
    [("gpt_compiled", 0.98, "provenance"), ("gpt_cuda_graph", 0.95, "replay")],
)
def test_the_kernels_of_a_compiled_model_go_to_sets_of_nodes(programs, name, share, method):
    tables = sum_rows(attribute(recording(name), Context(programs=programs)), has_device=True, num_calls=1)
    assert tables.owners.exact_node >= share
    assert method in {row.method for row in tables.kernels}


def test_a_compiled_training_step_is_shared_out_among_its_owners(programs):
    attribution = attribute(recording("gpt_train_compiled"), Context(programs=programs))
    tables = sum_rows(attribution, has_device=True, num_calls=1)
    assert tables.owners.residual <= 0.01
    assert min(tables.owners.fx_node, tables.owners.optimizer, tables.owners.outside_graph) > 0.0
    total_ms = sum(row.device_ms for row in tables.kernels)
    assert total_ms == pytest.approx(tables.total_self_ms)


def test_a_replay_that_nothing_explains_is_the_residual():
    tables = sum_rows(attribute(recording("gpt_cuda_graph"), Context()), has_device=True, num_calls=1)
    replayed = [row for row in tables.kernels if row.kernel.startswith("triton_")]
    assert replayed
    assert {row.owner for row in replayed} == {None}


def test_a_reference_explains_a_replay_of_the_same_kernels(programs):
    reference = attribute(recording("gpt_compiled"), Context(programs=programs))
    found = attribute(recording("gpt_cuda_graph"), Context(reference=reference))
    owners = sum_rows(found, has_device=True, num_calls=1).owners
    assert owners.exact_node >= 0.9


def test_pieces_of_a_capture_join_to_one_table():
    first = read_events([RawEvent("aten::add", 0, 10), RawEvent("aten::mul", 20, 5)])
    second = read_events([RawEvent("aten::mul", 40, 5), RawEvent("aten::sub", 50, 5)])
    joined = concatenate([first, second])
    assert [joined.name_of(row) for row in range(4)] == ["aten::add", "aten::mul", "aten::mul", "aten::sub"]
    assert joined.start_ns.tolist() == [0, 20, 40, 50]


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
    attribution = attribute(read_events([RawEvent(*event) for event in calls]), Context(paths={0: {0: "m"}}))
    tables = sum_rows(attribution, has_device=False, num_calls=1)
    assert sum(row.latency_ms for row in tables.ops) == pytest.approx(tables.total_self_ms)
    ops = attribution.table.kind == Kind.OP
    assert tables.total_self_ms == pytest.approx(attribution.nesting.self_ns[np.flatnonzero(ops)].sum() / 1e6)
    assert sum(row.share for row in tables.ops) == pytest.approx(1.0 if tables.total_self_ms else 0.0)
