import gzip
import json
import os
from collections import Counter, defaultdict

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.errors import RunStoreError, UsageError
from agnitra_lab.profiler import trace as writer
from agnitra_lab.profiler.trace import write_trace

FIELDS = ("name", "kind", "thread", "start_ns", "duration_ns", "correlation", "linked", "sequence")
HOST = os.getpid()

LAUNCH = [
    ("aten::addmm", "op", 1, 0, 9_000, 5, 0, 7),
    ("cudaLaunchKernel", "runtime", 1, 1_500, 2_001, 40, 5, -1),
    ("gemm", "kernel", 7, 12_345, 800, 40, 5, -1),
]


def events(*rows, **columns):
    frame = pd.DataFrame([(*row, *(0, 0, -1)[len(row) - 5 :]) for row in rows], columns=list(FIELDS))
    return frame.astype({"name": "category", "kind": "category"}).assign(**columns)


def written(frame, folder, **options):
    return json.loads(write_trace(frame, folder / "trace.json", **options).read_text())


def phases(trace, phase):
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def slices(trace):
    return {event["name"]: event for event in phases(trace, "X")}


def arrows(trace, category):
    """(name of the slice it leaves, name of the slice it reaches) of every flow of a category."""
    ends = defaultdict(dict)
    for event in trace["traceEvents"]:
        if event["ph"] in "sf" and event["cat"] == category:
            assert event["ph"] not in ends[event["id"]], "one id, one arrow"
            ends[event["id"]][event["ph"]] = event
    at = {(event["pid"], event["tid"], event["ts"]): event["name"] for event in phases(trace, "X")}
    return [tuple(at[end[key]["pid"], end[key]["tid"], end[key]["ts"]] for key in "sf") for end in ends.values()]


def test_op_launch_and_kernel_carry_times_ids_and_places(tmp_path):
    frame = events(*LAUNCH, node=pd.Categorical(["linear", None, "linear"]), module_path="mlp.up", owner="fx_node")
    trace = written(frame, tmp_path, device_name="NVIDIA H200")
    assert slices(trace)["aten::addmm"] == {
        "ph": "X", "cat": "cpu_op", "name": "aten::addmm", "pid": HOST, "tid": 1, "ts": 0.0, "dur": 9.0,
        "args": {"External id": 5, "Ev Idx": 0, "Sequence number": 7, "node": "linear", "module": "mlp.up",
                 "owner": "fx_node"},
    }  # fmt: skip
    assert slices(trace)["cudaLaunchKernel"]["args"] == {
        "External id": 5, "correlation": 40, "module": "mlp.up", "owner": "fx_node",
    }  # fmt: skip
    kernel = slices(trace)["gemm"]
    assert [kernel[key] for key in ("cat", "pid", "tid", "ts", "dur")] == ["kernel", 0, 7, 12.345, 0.8]
    assert kernel["args"] | {"device": 0, "stream": 7, "correlation": 40, "External id": 5} == kernel["args"]
    assert trace["deviceProperties"] == [{"id": 0, "name": "NVIDIA H200"}]
    assert trace["distributedInfo"] == {"rank": 0, "world_size": 1, "backend": "none"}


def test_every_track_has_a_name_and_every_process_a_label(tmp_path):
    trace = written(events(*LAUNCH), tmp_path, process_name="run 7", device_name="NVIDIA H200")
    named = defaultdict(dict)
    for event in phases(trace, "M"):
        named[event["name"]][event["pid"], event["tid"]] = next(iter(event["args"].values()))
    assert named["process_name"] == {(HOST, 0): "run 7", (0, 0): "GPU 0: NVIDIA H200"}
    assert named["process_labels"] == {(HOST, 0): "CPU", (0, 0): "GPU 0"}
    assert named["thread_name"] == {(HOST, 1): "thread 1", (0, 7): "stream 7"}


def test_activities_have_torch_s_categories(tmp_path):
    names = {
        "cuLaunchKernelEx": ("runtime", "cuda_driver"), "cudaMemcpyAsync": ("runtime", "cuda_runtime"),
        "Activity Buffer Request": ("runtime", "overhead"), "Memcpy HtoD (Pinned -> Device)": ("kernel", "gpu_memcpy"),
        "Memset (Device)": ("kernel", "gpu_memset"), "ProfilerStep#2": ("annotation", "user_annotation"),
    }  # fmt: skip
    frame = events(*((name, kind, 1, 100 * at, 50) for at, (name, (kind, _)) in enumerate(names.items())))
    found = slices(written(frame, tmp_path))
    assert {name: event["cat"] for name, event in found.items()} == {name: cat for name, (_, cat) in names.items()}
    assert found["Activity Buffer Request"]["tid"] != 1


def test_our_markers_are_left_out_on_the_host_and_the_gpu(tmp_path):
    frame = events(("agn::m3", "marker", 1, 0, 99), ("agn::m3", "annotation", 1, 50, 9), ("aten::mm", "op", 1, 1, 5))
    assert list(slices(written(frame, tmp_path))) == ["aten::mm"]


def test_the_gpu_s_copy_of_an_annotation_stands_on_its_stream(tmp_path):
    frame = events(
        ("step", "annotation", 1, 0, 9_000, 3), *LAUNCH[1:], ("step", "annotation", 1, 12_345, 5_000, 3),
        ("later", "kernel", 7, 16_000, 1_345, 41),
    )  # fmt: skip
    host, gpu = sorted((e for e in phases(written(frame, tmp_path), "X") if e["name"] == "step"), key=lambda e: e["ts"])
    assert (host["cat"], host["pid"], host["tid"]) == ("user_annotation", HOST, 1)
    assert (gpu["cat"], gpu["pid"], gpu["tid"], gpu["dur"]) == ("gpu_user_annotation", 0, 7, 5.0)


def test_a_graph_launch_has_an_arrow_to_each_of_its_kernels(tmp_path):
    frame = events(
        ("cudaGraphLaunch", "runtime", 1, 0, 500, 40),
        *((f"k{at}", "kernel", 7, 1_000 * at + 1_000, 100, 40) for at in range(3)),
        ("unknown launch", "kernel", 7, 9_000, 100, 77),
    )
    assert arrows(written(frame, tmp_path), "ac2g") == [("cudaGraphLaunch", f"k{at}") for at in range(3)]


def test_a_kernel_that_begins_before_its_launch_has_no_arrow(tmp_path):
    frame = events(("cudaLaunchKernel", "runtime", 1, 600, 500, 40), ("early", "kernel", 7, 500, 100, 40))
    trace = written(frame, tmp_path)
    assert arrows(trace, "ac2g") == []
    assert "early" in slices(trace)


def test_backward_ops_are_reached_from_the_last_forward_op_of_their_number(tmp_path):
    engine = "autograd::engine::evaluate_function: "
    frame = events(
        ("aten::linear", "op", 1, 0, 900, 1, 0, 7), ("aten::addmm", "op", 1, 100, 700, 2, 0, 7),
        ("aten::sum", "op", 1, 1_000, 100, 3, 0, 8), (f"{engine}AddmmBackward0", "op", 2, 2_000, 500, 4, 0, 7),
        ("AddmmBackward0", "op", 2, 2_010, 400, 5, 0, 7), ("aten::mm", "op", 2, 2_020, 300, 6, 0, -1),
        (f"{engine}SumBackward0", "op", 2, 3_000, 500, 7, 0, 9), ("SumBackward0", "op", 2, 3_010, 400, 8, 0, 9),
    )  # fmt: skip
    assert arrows(written(frame, tmp_path), "fwdbwd") == [("aten::addmm", "AddmmBackward0")]


def test_allocations_are_instants_with_their_bytes(tmp_path):
    frame = events(("aten::empty", "op", 1, 0, 50), ("[memory]", "memory", 1, 20, 0), num_bytes=[0, -512])
    trace = written(frame, tmp_path)
    (instant,) = phases(trace, "i")
    assert (instant["ts"], instant["args"]["Bytes"], instant["cat"]) == (0.02, -512, "cpu_instant_event")
    assert list(slices(trace)) == ["aten::empty"]


SPANS = st.lists(
    st.tuples(st.sampled_from(["op", "runtime", "kernel"]), st.integers(1, 2), st.integers(0, 60), st.integers(0, 20)),
    max_size=30,
)


@given(SPANS)
def test_slices_nest_on_every_track_and_none_is_lost_or_moved(tmp_path_factory, spans):
    frame = events(*((f"e{at}", *span) for at, span in enumerate(spans)))
    trace = written(frame, tmp_path_factory.getbasetemp())
    found = phases(trace, "X")
    assert Counter((e["name"], round(1_000 * e["ts"]), round(1_000 * e["dur"])) for e in found) == Counter(
        (f"e{at}", start, duration) for at, (_, _, start, duration) in enumerate(spans)
    )
    streams = {f"e{at}": thread for at, (kind, thread, _, _) in enumerate(spans) if kind == "kernel"}
    assert {e["name"]: e["args"]["stream"] for e in found if "stream" in e["args"]} == streams
    is_named = {(e["pid"], e["tid"]) for e in phases(trace, "M") if e["name"] == "thread_name"}
    open_ends = defaultdict(list)
    for event in found:
        start, end = round(1_000 * event["ts"]), round(1_000 * (event["ts"] + event["dur"]))
        stack = open_ends[event["pid"], event["tid"]]
        while stack and stack[-1] <= start:
            stack.pop()
        assert not stack or end <= stack[-1]
        stack.append(end)
    assert open_ends.keys() <= is_named


def test_a_trace_written_in_many_blocks_is_the_same(tmp_path, monkeypatch):
    rows = [(*row[:3], row[3] + 20_000 * at, *row[4:]) for at in range(3) for row in LAUNCH]
    whole = written(events(*rows), tmp_path)
    monkeypatch.setattr(writer, "_BLOCK", 2)
    assert written(events(*rows), tmp_path) == whole
    assert len(phases(whole, "s")) == len(phases(whole, "f")) == 3


def test_compressed_traces_are_the_same_bytes_for_the_same_events(tmp_path):
    first = write_trace(events(*LAUNCH), tmp_path / "new" / "trace.json.gz").read_bytes()
    again = write_trace(events(*LAUNCH), tmp_path / "new" / "trace.json.gz").read_bytes()
    assert first == again
    assert slices(json.loads(gzip.decompress(first))).keys() == {"aten::addmm", "cudaLaunchKernel", "gemm"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["trace.json.gz"]


def test_a_frame_with_only_the_five_columns_or_no_rows_is_a_trace(tmp_path):
    assert list(slices(written(events(*LAUNCH)[list(FIELDS[:5])], tmp_path))) == [row[0] for row in LAUNCH]
    assert slices(written(events(), tmp_path)) == {}


def test_names_leave_without_credentials(tmp_path):
    frame = events(("load sk-abcdefghijklmnop1234", "annotation", 1, 0, 5), node="hf_abcdefghijklmnopqrstuvwx")
    path = write_trace(frame, tmp_path / "trace.json", metadata={"api_key": "0123456789", "note": 'a "quoted" name'})
    assert "abcdefghijkl" not in path.read_text()
    assert "0123456789" not in path.read_text()
    assert json.loads(path.read_text())["note"] == 'a "quoted" name'


@pytest.mark.parametrize("metadata", [{"share": float("nan")}, {"shape": {1, 2}}, {"traceEvents": []}])
def test_metadata_that_would_break_the_file_is_refused(tmp_path, metadata):
    with pytest.raises(UsageError, match="metadata of a trace"):
        write_trace(events(*LAUNCH), tmp_path / "trace.json", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused_with_what_was_expected(tmp_path):
    with pytest.raises(UsageError, match=r"'trace\.perfetto' ends in neither"):
        write_trace(events(*LAUNCH), tmp_path / "trace.perfetto")
    with pytest.raises(UsageError, match="lacks thread, duration_ns"):
        write_trace(events(*LAUNCH).drop(columns=["thread", "duration_ns"]), tmp_path / "trace.json")
    with pytest.raises(UsageError, match="has 'span'"):
        write_trace(events(("a", "span", 1, 0, 5)), tmp_path / "trace.json")


def test_a_place_that_cannot_be_written_is_a_run_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunStoreError, match="cannot be written"):
        write_trace(events(*LAUNCH), tmp_path / "file" / "trace.json")
    (tmp_path / "trace.json").mkdir()
    with pytest.raises(RunStoreError, match="cannot be written"):
        write_trace(events(*LAUNCH), tmp_path / "trace.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "trace.json"]


def test_torch_s_validator_passes_the_trace(tmp_path):
    validator = pytest.importorskip("torch.profiler._trace_validator", reason="torch before 2.13 has no validator")
    good = write_trace(events(*LAUNCH), tmp_path / "good.json.gz")
    assert validator.validate_trace(str(good)) == (True, [])
    # The validator reads our ids: a kernel ahead of its launch is what it is there to find.
    early = write_trace(events(*LAUNCH[:2], ("gemm", "kernel", 7, 100, 800, 40, 5)), tmp_path / "early.json")
    assert validator.validate_trace(str(early))[0] is False


def test_holistic_trace_analysis_reads_the_kernel_times(tmp_path, monkeypatch):
    analysis = pytest.importorskip("hta.trace_analysis", reason="HolisticTraceAnalysis is not installed")
    monkeypatch.setenv("HTA_DISABLE_NS_ROUNDING", "1")
    path = write_trace(events(*LAUNCH, ("late", "kernel", 7, 20_000, 1_200, 41, 5)), tmp_path / "trace.json.gz")
    read = analysis.TraceAnalysis(trace_files={0: str(path)}, trace_dir=str(tmp_path))
    assert read.get_temporal_breakdown(visualize=False)["compute_time(us)"][0] == pytest.approx(2.0)
    assert len(read.get_gpu_kernel_breakdown(visualize=False)[0])
    assert read.get_idle_time_breakdown(visualize=False)[0]["idle_time"].sum() == pytest.approx(6.855, abs=0.01)
