import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.utils.checkpoint import checkpoint

from agnitra_lab.contracts import GraphHandoff
from agnitra_lab.errors import CaptureError
from agnitra_lab.graph.capture import capture
from agnitra_lab.graph.compiled import CompiledGraph, capture_compiled, node_set_cost
from agnitra_lab.graph.dynamo_nodes import module_path
from agnitra_lab.profiler.inductor import loaded_programs, read_program

TRACES = Path(__file__).parents[3] / "fixtures" / "traces"


class Attention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.num_heads = num_heads

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.view(B, T, self.num_heads, D // self.num_heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.out = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.out(self.act(self.fc(x)))


class Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """The model of fixtures/traces, narrower: names depend on the code alone."""

    def __init__(self, num_layers=2, width=16, num_heads=2, num_tokens=50, length=8):
        super().__init__()
        self.emb = nn.Embedding(num_tokens, width)
        self.pos = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_tokens, bias=False)

    def forward(self, ids):
        x = self.emb(ids) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


IDS = torch.arange(16).reshape(2, 8)


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    return GPT()


@pytest.fixture(scope="module")
def graph(gpt):
    return capture_compiled(gpt, (IDS,))


@pytest.fixture(scope="module")
def training(gpt):
    return capture_compiled(gpt, (IDS,), has_grad=True)


@pytest.fixture(scope="module")
def recorded():
    sources = json.loads(gzip.decompress((TRACES / "gpt_programs.json.gz").read_bytes()))
    return {name: read_program(source, name) for name, source in sources.items()}


def share_resolved(graph, program):
    names = {name for launch in program.launches for name in launch.source_nodes}
    return sum(bool(graph.resolve([name], is_backward=program.is_backward)) for name in names) / len(names)


@pytest.mark.parametrize("name", ["inference", "inference_cuda_graph", "training_forward"])
def test_the_nodes_that_an_h200s_kernels_name_are_found_again(graph, recorded, name):
    assert share_resolved(graph, recorded[name]) == 1.0
    nodes = {node.name: node for node in graph.handoff.graph.nodes}
    attention = [launch for launch in recorded[name].launches if "attention" in launch.name]
    tied = [graph.resolve(launch.computed_nodes, is_backward=False) for launch in attention]
    assert [[nodes[name].module_path for name in names] for names in tied] == [["blocks.0.attn"], ["blocks.1.attn"]]


def test_nodes_are_those_of_an_exported_graph_with_the_same_costs(gpt, graph):
    def facts(node):
        return (node.op, node.module_path, node.shape, node.dtype, node.source, node.flops, node.bytes_moved)

    exported = capture(gpt, (IDS,))
    assert [facts(node) for node in graph.handoff.graph.nodes] == [facts(node) for node in exported.graph.nodes]
    assert graph.handoff.materialization_frontier == (graph.handoff.graph.nodes[-1].name,)
    assert graph.note is None


@pytest.fixture(scope="module")
def trained(gpt, tmp_path_factory):
    """The programs of a real training step, all but what g++ would take twenty seconds for: its C++ kernels."""
    from torch._inductor import cpu_vec_isa
    from torch._inductor.async_compile import AsyncCompile

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
        patch.setattr(cpu_vec_isa, "valid_vec_isa_list", list)
        known = loaded_programs()
        torch.compile(gpt)(IDS).sum().backward()
        yield {program.is_backward: program for program in loaded_programs() if program not in known}
    gpt.zero_grad()


@pytest.mark.parametrize("is_backward", [False, True])
def test_the_nodes_that_a_training_step_names_are_found_again(training, trained, is_backward):
    assert len(trained[is_backward].launches) > 10
    assert share_resolved(training, trained[is_backward]) >= 0.98
    assert training.note is None


def test_each_linear_gets_the_two_products_of_its_gradients(training, trained):
    nodes = {node.name: node for node in training.handoff.graph.nodes}
    products = [launch for launch in trained[True].launches if launch.name == "aten::mm"]
    tied = [training.resolve(launch.computed_nodes, is_backward=True) for launch in products]
    linears = [name for name, node in nodes.items() if node.op == "aten::linear"]
    assert sorted(name for names in tied for name in names) == sorted(2 * linears)


def test_the_trace_leaves_nothing_behind(gpt):
    from torch._dynamo import config, eval_frame
    from torch._dynamo.utils import counters
    from torch._inductor.codecache import PyCodeCache

    def state():
        return (
            {key: dict(counter) for key, counter in counters.items()},
            {name: dict(parameter.__dict__) for name, parameter in gpt.named_parameters()},
            {name: set(module.__dict__) for name, module in gpt.named_modules()},
            config.get_config_copy(),
            list(eval_frame.cached_backends),
            [module.__file__ for module in PyCodeCache.modules],
            torch.is_grad_enabled(),
            torch.get_rng_state().tolist(),
            [parameter.grad for parameter in gpt.parameters()],
        )

    fresh = GPT(num_layers=1)
    before = state()
    for has_grad in (False, True):
        capture_compiled(gpt, (IDS,), has_grad=has_grad)
        capture_compiled(fresh, (IDS,), has_grad=has_grad)
    assert state() == before
    assert all("_dynamo_static_input_type" not in parameter.__dict__ for parameter in fresh.parameters())


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.after = nn.Linear(4, 4)
        self.register_buffer("num_calls", torch.zeros(()))
        self.calls = []

    def forward(self, x):
        self.num_calls += 1
        x = self.before(x).relu()
        self.calls.append(1)
        torch._dynamo.graph_break()
        return self.after(x)


def test_of_a_broken_graph_the_first_part_is_known_and_nothing_runs_or_compiles():
    graphs = []

    def backend(graph_module, _inputs):
        graphs.append(graph_module)
        return graph_module.forward

    model = Counting()
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        compiled(torch.ones(2, 4))
    kept = (model.num_calls.item(), len(model.calls), len(graphs))
    num_entries = len(_debug_get_cache_entry_list(Counting.forward.__code__))
    graph = capture_compiled(compiled, (torch.ones(2, 4),))
    assert [(node.op, node.module_path) for node in graph.handoff.graph.nodes] == [
        ("aten::add_", ""),
        ("aten::linear", "before"),
        ("aten::relu", ""),
    ]
    assert "only the first part is known" in graph.note
    assert (model.num_calls.item(), len(model.calls), len(graphs)) == kept
    assert len(_debug_get_cache_entry_list(Counting.forward.__code__)) == num_entries > 0


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append(1)
        torch._dynamo.graph_break()
        return x + 1


class Looping(Opaque):
    """A break inside of a loop makes Dynamo give the whole frame up."""

    def forward(self, x):
        self.calls.append(1)
        for _ in range(2):
            x = x + 1
            torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize("kind", [Opaque, Looping])
def test_a_model_without_a_graph_is_refused_before_it_runs(kind):
    model = kind()
    with pytest.raises(CaptureError, match=kind.__name__):
        capture_compiled(model, (torch.ones(2),))
    assert model.calls == []
    assert sys.getprofile() is None


def test_nothing_runs_while_torch_compile_is_switched_off():
    model = Opaque()
    with torch.compiler.set_stance("force_eager"), pytest.raises(CaptureError, match="switched off"):
        capture_compiled(model, (torch.ones(2),))
    assert model.calls == []


def test_what_is_not_callable_is_refused():
    with pytest.raises(CaptureError, match="got int"):
        capture_compiled(3, ())


class Forms(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.zeros(8, 4))
        self.register_buffer("cache", torch.zeros(8, 4))

    def forward(self, x, *, scale):
        self.cache[0:2] = x
        self.cache.index_copy_(0, torch.arange(2), x)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.linear(x)
        y = F.relu(y, inplace=True)
        y += 1
        first, _ = y.float().split(2, -1)
        return first * scale + self.table[torch.tensor([1, 2])][:, 0:2] - self.table[3, 0]


def test_python_calls_carry_the_names_that_the_profiler_prints():
    graph = capture_compiled(Forms(), (torch.ones(2, 4),), {"scale": 2.0})
    assert [node.op for node in graph.handoff.graph.nodes if node.op not in ("aten::arange", "aten::tensor")] == [
        "aten::copy_", "aten::index_copy_", "aten::linear", "aten::relu_", "aten::add_", "aten::to", "aten::split",
        "aten::mul", "aten::index", "aten::slice", "aten::add", "aten::select", "aten::sub",
    ]  # fmt: skip
    moved = {node.op: node.bytes_moved for node in graph.handoff.graph.nodes}
    assert moved["aten::split"] == moved["aten::slice"] == moved["aten::select"] == 0
    assert moved["aten::to"] == 8 * (2 + 4)
    assert graph.resolve(["first"], is_backward=False) == ("split",)


def test_nodes_of_checkpointed_bodies_keep_apart():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    graph = capture_compiled(Checkpointed(), (torch.ones(2, 4),), has_grad=True)
    first, second = graph.handoff.graph.nodes
    assert (first.module_path, second.module_path) == ("layers.0", "layers.1")
    assert first.name != second.name
    assert first.name in second.inputs
    # Inductor names both of them alike: better no node than the wrong one.
    assert graph.resolve([first.name.rpartition(".")[2]], is_backward=False) == ()


def test_a_compiled_function_is_traced_too():
    @torch.compile
    def scores(a, b):
        return a @ b + 1

    nodes = capture_compiled(scores, (torch.ones(2, 3), torch.ones(3, 5))).handoff.graph.nodes
    assert [(node.op, node.shape, node.flops) for node in nodes] == [
        ("aten::matmul", (2, 5), 60.0),
        ("aten::add", (2, 5), None),
    ]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("L['self']", ""),
        ("L['target'].blocks.0.attn", "blocks.0.attn"),
        ("L['self']._modules['blocks']._modules['0'].attn", "blocks.0.attn"),
        ("L['model'].blocks[0].attn@1", "blocks.0.attn"),
        ("getattr(getattr(L['self'], 'blocks'), '0').attn", "blocks.0.attn"),
        ("L['self'].experts['gate-up']", "experts.gate-up"),
    ],
)
def test_module_paths_of_every_torch_become_the_modules_full_name(path, expected):
    assert module_path(path, is_module=True) == expected


def test_a_name_that_two_graphs_share_means_the_comments_own(graph):
    both = CompiledGraph(graph.handoff, {"linear": "gelu", "mm_1": "linear_1"}, None)
    assert both.resolve(["linear", "mm_1", "unknown", "mm_1"], is_backward=False) == ("linear", "linear_1")
    assert both.resolve(["linear", "mm_1"], is_backward=True) == ("gelu", "linear_1")


def test_a_fused_set_counts_what_crosses_its_border(graph):
    nodes = {node.name: node for node in graph.handoff.graph.nodes}
    num_flops, num_bytes = node_set_cost(graph.handoff, ["x_1", "layer_norm_1"])
    activation = 2 * 8 * 16 * 4
    # In come x and linear_1, weight and bias; x_1 is used again by the next residual, layer_norm_1 by linear_2.
    assert (num_flops, num_bytes) == (None, 4 * activation + 2 * 16 * 4)
    assert num_bytes < nodes["x_1"].bytes_moved + nodes["layer_norm_1"].bytes_moved


def test_a_set_reads_behind_its_views(graph):
    nodes = {node.name: node for node in graph.handoff.graph.nodes}
    views = ["chunk", "view", "q_1", "view_1", "k_1", "view_2", "v_1"]
    assert node_set_cost(graph.handoff, [*views, "y"]) == node_set_cost(graph.handoff, ["y"])
    num_flops, num_bytes = node_set_cost(graph.handoff, ["linear", *views, "y"])
    assert num_flops == nodes["linear"].flops + nodes["y"].flops
    assert num_bytes == nodes["linear"].bytes_moved + nodes["y"].bytes_moved - 2 * 3 * 2 * 8 * 16 * 4


def test_an_empty_set_costs_nothing_that_is_known():
    assert node_set_cost(GraphHandoff(graph={"nodes": ()}), ["linear"]) == (None, None)


def test_a_set_of_one_costs_what_the_node_costs(graph):
    for node in graph.handoff.graph.nodes:
        assert node_set_cost(graph.handoff, [node.name]) == (node.flops, node.bytes_moved)


@given(st.data())
def test_fusing_never_moves_more(graph, data):
    names = [node.name for node in graph.handoff.graph.nodes]
    left = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=8))
    right = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=8))
    _, apart_left = node_set_cost(graph.handoff, left)
    _, apart_right = node_set_cost(graph.handoff, right)
    _, together = node_set_cost(graph.handoff, [*left, *right])
    assert together <= apart_left + apart_right
