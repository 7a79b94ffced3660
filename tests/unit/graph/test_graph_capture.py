import pytest
import torch
from torch import nn

from agnitra_lab.errors import CaptureError
from agnitra_lab.graph.capture import capture


def by_name(handoff):
    return {node.name: node for node in handoff.graph.nodes}


def test_nodes_carry_the_profilers_op_names_module_paths_and_source_lines(prefill):
    first = prefill.graph.nodes[0]
    head = prefill.graph.nodes[-1]
    assert (first.op, first.module_path, first.shape) == ("aten::embedding", "embedding", (1, 6, 32))
    assert (head.op, head.module_path, head.shape, head.dtype) == ("aten::linear", "lm_head", (1, 6, 160), "float32")
    assert head.source.startswith("conftest.py:")


def test_inputs_name_earlier_nodes_or_model_inputs(prefill):
    seen = set()
    for node in prefill.graph.nodes:
        for source in node.inputs:
            assert source in seen or source.startswith(("p_", "b_", "c_")) or source in {"ids", "position"}
        seen.add(node.name)


def test_the_frontier_is_what_the_model_returns(prefill):
    assert prefill.materialization_frontier == (prefill.graph.nodes[-1].name,)


def test_two_captures_give_the_same_graph(decoder, prefill):
    assert capture(decoder, (torch.arange(6)[None],)) == prefill


def test_a_cache_that_forward_writes_is_left_as_it_was(cached_decoder, decode):
    assert cached_decoder.keys.abs().sum() == 0
    assert sum(node.op == "aten::index_copy_" for node in decode.graph.nodes) == 2
    inputs = (torch.tensor([[3]]), torch.tensor([5]))
    before = cached_decoder(*inputs)
    kept = {name: value.clone() for name, value in cached_decoder.state_dict().items()}
    capture(cached_decoder, inputs)
    assert all(torch.equal(kept[name], value) for name, value in cached_decoder.state_dict().items())
    assert torch.equal(before, cached_decoder(*inputs))


def test_a_batch_norm_in_training_keeps_its_statistics():
    norm = nn.BatchNorm1d(4).train()
    kept = norm.running_mean.clone()
    capture(norm, (torch.randn(8, 4) + 5,))
    assert torch.equal(norm.running_mean, kept)
    assert norm.training


def test_capture_consumes_no_random_numbers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    capture(model, (torch.zeros(2, 4),))
    assert torch.equal(torch.rand(3), expected)


def test_a_region_under_autocast_is_opened_up():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.inner(x)
            return y.float() + 1

    handoff = capture(Mixed(), (torch.zeros(2, 8),))
    inner = next(node for node in handoff.graph.nodes if node.op == "aten::linear")
    cast = next(node for node in handoff.graph.nodes if node.op == "aten::to")
    assert (inner.module_path, inner.dtype, cast.inputs) == ("inner", "bfloat16", (inner.name,))


def test_a_module_that_is_called_twice_keeps_one_path():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    nodes = capture(Twice(), (torch.zeros(1, 4),)).graph.nodes
    assert [node.module_path for node in nodes] == ["layer", "layer"]


def test_keyword_inputs_and_a_compiled_wrapper_are_traced():
    model = torch.compile(nn.Linear(4, 2), backend="eager")
    handoff = capture(model, (), {"input": torch.zeros(3, 4)})
    assert handoff.graph.nodes[-1].shape == (3, 2)


def test_a_model_whose_control_flow_reads_values_is_refused_with_a_hint():
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum().item() > 0 else x - 1

    with pytest.raises(CaptureError, match="Branching cannot be traced") as caught:
        capture(Branching(), (torch.zeros(3),))
    assert "item()" in caught.value.hint


def test_a_plain_function_is_refused():
    with pytest.raises(CaptureError, match="got function"):
        capture(lambda x: x, (torch.zeros(1),))
