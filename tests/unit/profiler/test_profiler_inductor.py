import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from agnitra_lab.profiler.inductor import (
    Launch,
    Program,
    best_program,
    loaded_programs,
    match_kernels,
    match_ops,
    read_program,
)

TRACES = Path(__file__).parents[3] / "fixtures" / "traces"


def recording(name):
    columns = json.loads(gzip.decompress((TRACES / f"{name}.json.gz").read_bytes()))
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return sorted(rows, key=lambda row: row["start_ns"])


@pytest.fixture(scope="module")
def programs():
    sources = json.loads(gzip.decompress((TRACES / "gpt_programs.json.gz").read_bytes()))
    return {name: read_program(source, name) for name, source in sources.items()}


def compiled_calls(rows):
    """The ops straight under each call of a compiled graph, each with the time of the kernels it launched."""
    ops = [row for row in rows if row["device_type"] == "CPU" and row["linked_correlation_id"] == 0]
    kernels = [row for row in rows if row["device_type"] == "CUDA"]
    for call in (row for row in ops if row["name"].startswith("## Call CompiledFxGraph")):
        inside = [row for row in ops if row is not call and contains(call, row) and "Activity" not in row["name"]]
        children = [row for row in inside if not any(other is not row and contains(other, row) for other in inside)]
        owner = {id_of(row): child for child in children for row in inside if row is child or contains(child, row)}
        times = [
            sum(k["duration_ns"] for k in kernels if owner.get(k["linked_correlation_id"]) is child)
            for child in children
        ]
        yield [child["name"] for child in children], times


def id_of(row):
    return row["correlation_id"]


def contains(outer, inner):
    same_thread = outer["start_thread_id"] == inner["start_thread_id"]
    end = outer["start_ns"] + outer["duration_ns"]
    return same_thread and outer["start_ns"] <= inner["start_ns"] and inner["start_ns"] + inner["duration_ns"] <= end


def replays(rows):
    launches = [row["correlation_id"] for row in rows if row["name"] == "cudaGraphLaunch"]
    return [[r for r in rows if r["device_type"] == "CUDA" and r["correlation_id"] == each] for each in launches]


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ("gpt_compiled", ["inference", "inference"]),
        ("gpt_train_compiled", ["training_forward", "training_backward"]),
    ],
)
def test_the_ops_of_a_compiled_call_are_tied_to_their_launches(programs, trace, expected):
    calls = list(compiled_calls(recording(trace)))
    assert len(calls) == len(expected)
    for (names, times), program_name in zip(calls, expected, strict=True):
        program, share = best_program(names, programs.values(), is_replay=False)
        # The two inference programs launch the same; what differs is who calls them.
        assert program.launches == programs[program_name].launches
        assert share == 1.0
        matches = match_ops(names, program)
        tied_time = sum(time for time, match in zip(times, matches, strict=True) if match is not None)
        assert tied_time / sum(times) >= 0.98
        assert [match for match in matches if match is not None] == list(range(len(program.launches)))
        assert all(
            programs[program_name].launches[m].name == n for n, m in zip(names, matches, strict=True) if m is not None
        )


def test_the_kernels_of_a_replay_are_tied_to_their_launches(programs):
    for kernels in replays(recording("gpt_cuda_graph")):
        names = [kernel["name"] for kernel in kernels]
        program, share = best_program(names, programs.values(), is_replay=True)
        assert (program.path_name, share) == ("inference_cuda_graph", 1.0)
        matches = match_kernels(names, program)
        exact = sum(kernel["duration_ns"] for kernel, match in zip(kernels, matches, strict=True) if len(match) == 1)
        assert exact / sum(kernel["duration_ns"] for kernel in kernels) >= 0.98
        attention = [
            names[place] for place, (index,) in enumerate(matches) if "attention" in program.launches[index].name
        ]
        assert [name[:6] for name in attention] == ["Memset", "cudnn_"] * 2


def test_a_module_partitioned_for_cuda_graphs_reads_as_the_plain_one(programs):
    assert programs["inference_cuda_graph"].launches == programs["inference"].launches


def test_forward_and_backward_are_told_apart(programs):
    assert [name for name, program in programs.items() if program.is_backward] == ["training_backward"]


def test_a_launch_names_its_nodes_and_which_of_them_it_computes(programs):
    attention = programs["inference"].launches[2]
    assert attention.name == "aten::_scaled_dot_product_cudnn_attention"
    assert attention.source_nodes == ("linear", "chunk", "view", "q_1", "view_1", "k_1", "view_2", "v_1", "y")
    assert attention.computed_nodes == ("y",)


def test_launches_that_share_a_kernel_compute_their_own_nodes(programs):
    launches = [each for each in programs["inference"].launches if each.name == "triton_poi_fused_gelu_view_2"]
    assert [launch.source_nodes for launch in launches] == [("linear_2", "gelu"), ("linear_6", "gelu_1")]
    assert [launch.computed_nodes for launch in launches] == [("gelu",), ("gelu_1",)]


def test_an_op_made_of_several_nodes_computes_all_of_them():
    program = read_program(
        "def call(args):\n"
        "    # Topologically Sorted Source Nodes: [matmul, add], Original ATen: [aten.mm, aten.add]\n"
        "    extern_kernels.addmm(arg0_1, arg1_1, arg2_1, out=buf0)\n"
    )
    assert program.launches == (
        Launch("aten::addmm", False, ("matmul", "add"), ("aten.mm", "aten.add"), ("matmul", "add")),
    )


def test_every_form_of_a_launch_is_read():
    program = read_program(
        "scale_0 = async_compile.triton('scale', '''\n"
        "def scale(in_ptr0):\n"
        "    other.run(in_ptr0)\n"
        "''', device_str='cuda')\n"
        "cpp_fused_add_0 = async_compile.cpp_pybinding(['float*'], r'''\n"
        "    cpp_fused_add_0(buf0)\n"
        "''')\n"
        "def subgraph_0(args):\n"
        "    buf0 = torch.ops.mylib.twice.default(arg0_1)\n"
        "    return (buf0, )\n"
        "class Runner:\n"
        "    def call(self, args):\n"
        "        assert_size_stride(buf5, (2, 4), (4, 1), 'torch.ops.aten.mm.default')\n"
        "        # extern_kernels.bmm(buf5, buf6)\n"
        "        # Topologically Sorted Source Nodes: [scaled], Original ATen: []\n"
        "        workspace_0.zero_()\n"
        "        scale_0.run(arg0_1, stream=stream0)\n"
        "        if buf1_undefined:\n"
        "            (buf0,) = subgraph_0([arg0_1])\n"
        "        cpp_fused_add_0(buf0)\n"
        "        buf7 = extern_kernels.convolution(arg0_1, arg1_1)\n"
        "        aten.randint.low_out(0, 9, [1], out=buf1)\n"
        "        buf8 = inductor_ops.seeds(buf1)\n"
        "        arg0_1.copy_(buf0, False)\n"
        "def get_args():\n"
        "    extern_kernels.mm(arg0_1, arg1_1)\n"
    )
    assert [(launch.name, launch.is_triton, launch.source_nodes) for launch in program.launches] == [
        ("aten::zero_", False, ("scaled",)),
        ("scale_0", True, ("scaled",)),
        ("mylib::twice", False, ()),
        ("cpp_fused_add_0", False, ()),
        ("aten::convolution", False, ()),
        ("aten::randint", False, ()),
        ("inductor::seeds", False, ()),
        ("aten::copy_", False, ()),
    ]
    assert program.launches[1].kernel_name == "scale"


def test_text_without_launches_is_an_empty_program():
    assert read_program("").launches == ()
    assert read_program("def call(args):\n    return ()\n", "a.py") == Program("a.py", (), False)


def launch(name):
    is_triton = name.startswith("triton_")
    return Launch(name, is_triton, kernel_name=name if is_triton else "")


def program_of(*names):
    return Program("", tuple(launch(name) for name in names), False)


def test_ops_that_are_no_launch_stay_untied_and_missing_ones_are_passed_over():
    program = program_of("cpp_fused_add_0", "aten::mm", "triton_a", "aten::mm", "aten::addmm")
    names = ["aten::empty", "aten::mm", "aten::_foreach_copy_", "triton_a", "aten::addmm"]
    assert match_ops(names, program) == [None, 1, None, 2, 4]
    assert match_ops(["graph_3_cpp_fused_add_0"], program) == [0]


def test_the_two_kernels_of_a_split_product_go_together():
    program = program_of("triton_a", "aten::mm", "aten::mm", "triton_b")
    names = ["triton_a", "nvjet_1", "cublasLt::splitKreduce_kernel", "nvjet_2", "triton_b"]
    assert match_kernels(names, program) == [(0,), (1,), (1,), (2,), (3,)]


def test_kinds_of_kernel_tell_ops_apart_where_their_numbers_do_not():
    program = program_of("triton_a", "aten::mm", "aten::_scaled_dot_product_cudnn_attention", "aten::addmm")
    reduction = "void cudnn::fusion::lean_reduction_kernel<false, float>"
    names = ["triton_a", "nvjet_1", "Memset (Device)", "cudnn_generated_native_sdpa", reduction, "sm90_xmma_gemm"]
    assert match_kernels(names, program) == [(0,), (1,), (2,), (2,), (2,), (3,)]


def test_kernels_that_cannot_be_told_apart_belong_to_the_whole_set():
    program = program_of("triton_a", "aten::sort", "aten::topk", "triton_b")
    names = ["triton_a", "radix_1", "radix_2", "gather", "triton_b"]
    assert match_kernels(names, program) == [(0,), (1, 2), (1, 2), (1, 2), (3,)]


def test_extra_kernels_belong_to_no_launch():
    program = program_of("triton_a", "triton_b", "aten::mm")
    names = ["triton_a", "elementwise", "triton_b", "nvjet_1", "triton_of_another_program"]
    assert match_kernels(names, program) == [(0,), (), (1,), (2,), ()]


names_of_launches = st.lists(st.sampled_from(["aten::mm", "aten::addmm", "triton"]), min_size=1, max_size=12)


@given(names_of_launches, st.data())
def test_any_part_of_a_program_is_found_again(kinds, data):
    names = [f"triton_{place}" if kind == "triton" else kind for place, kind in enumerate(kinds)]
    first = data.draw(st.integers(0, len(names) - 1))
    last = data.draw(st.integers(first, len(names) - 1))
    kernels = [name if name.startswith("triton_") else "nvjet" for name in names[first : last + 1]]
    matches = match_kernels(kernels, program_of(*names))
    has_anchor = any(name.startswith("triton_") for name in kernels)
    for place, match in enumerate(matches):
        assert first + place in match or not has_anchor


def test_the_program_with_the_most_names_in_order_is_chosen():
    short, whole = program_of("triton_a", "aten::mm"), program_of("triton_a", "aten::mm", "triton_b")
    assert best_program(["triton_a", "aten::mm", "triton_b"], [whole, short], is_replay=False) == (whole, 1.0)
    assert best_program(["triton_a", "nvjet_1"], [whole, short], is_replay=True) == (short, 1.0)


def test_names_of_no_program_find_none(programs):
    assert best_program(["triton_x", "aten::mm", "aten::bmm"], [program_of("aten::mm")], is_replay=False) is None
    assert best_program(["nvjet_1", "nvjet_2"], programs.values(), is_replay=True) is None
    assert best_program([], programs.values(), is_replay=False) is None
    assert best_program(["aten::mm"], [], is_replay=False) is None


def test_a_replay_is_never_a_program_without_triton_kernels():
    assert best_program(["triton_a"], [program_of("aten::mm")], is_replay=True) is None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    cache = tmp_path_factory.mktemp("inductor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        # Products alone: a pointwise kernel would be built by g++, which takes ten seconds more.
        model = torch.compile(nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3, bias=False)))
        inputs = torch.randn(5, 6)
        with torch.no_grad():
            model(inputs)
            yield model, inputs


def test_what_this_process_compiled_is_found_and_tied(compiled):
    model, inputs = compiled
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(inputs)
    names = [event.name for event in profile.events() if event.name.startswith("aten::")]
    program, share = best_program([name for name in names if "mm" in name], loaded_programs(), is_replay=False)
    assert (share, program.is_backward) == (1.0, False)
    assert [program.launches[match].computed_nodes for match in match_ops(names, program) if match is not None] == [
        ("input_1",),
        ("input_2",),
    ]


def test_a_file_is_read_once_and_a_lost_one_is_passed_over(compiled, monkeypatch):
    programs = loaded_programs()
    assert all(again is first for again, first in zip(loaded_programs(), programs, strict=True))
    from torch._inductor.codecache import PyCodeCache

    lost = type(sys)("lost")
    lost.__file__ = "/nowhere/lost.py"
    monkeypatch.setattr(PyCodeCache, "modules", [*PyCodeCache.modules, lost, type(sys)("without_file")])
    assert loaded_programs() == programs


def test_without_inductor_there_are_no_programs(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._inductor.codecache", raising=False)
    assert loaded_programs() == []
