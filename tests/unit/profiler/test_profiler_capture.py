import gc
import json
import warnings
import weakref

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

from agnitra_lab.contracts import TelemetryRecord, Workload
from agnitra_lab.errors import CaptureError, RunStoreError, UsageError
from agnitra_lab.profiler import frames
from agnitra_lab.profiler.capture import capture_block, profile
from agnitra_lab.profiler.session import is_profiler_active


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class SmallDecoder(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, 64)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


IDS = torch.arange(8)[None]


def hooks():
    return [len(table) for name, table in vars(nn_module).items() if name.startswith("_global_forward")]


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return SmallDecoder().eval()


@pytest.fixture(scope="module")
def telemetry(decoder):
    return profile(Workload("small", decoder, (IDS,), items_per_call=8, item_unit="tokens", phase="prefill"))


def test_nine_tenths_of_a_decoders_self_time_are_tied_to_graph_nodes(telemetry):
    assert telemetry.record.attributed_share >= 0.9
    assert telemetry.bottleneck.node in set(telemetry.nodes.node)
    assert telemetry.bottleneck.source.startswith("test_profiler_capture.py:")


def test_nested_ops_have_the_node_and_module_of_their_top_level_op(telemetry):
    row = telemetry.ops[(telemetry.ops.op == "aten::addmm") & (telemetry.ops.module_path == "lm_head")].iloc[0]
    assert (row.owner, row.method, row.confidence, row.num_calls) == ("fx_node", "order", 1.0, 1)
    assert telemetry.nodes.set_index("node").op[row.node] == "aten::linear"


def test_rows_sum_to_the_total_and_shares_to_one(telemetry):
    assert telemetry.ops.latency_ms.sum() == pytest.approx(telemetry.record.total_self_ms)
    assert telemetry.ops.share.sum() == pytest.approx(1.0)
    assert telemetry.modules.latency_ms.sum() == pytest.approx(telemetry.record.total_self_ms)


def test_a_workloads_rows_carry_recorded_input_shapes(telemetry):
    row = telemetry.ops[(telemetry.ops.op == "aten::linear") & (telemetry.ops.module_path == "lm_head")].iloc[0]
    assert row["shape"] == (1, 8, 32)


def test_tokens_per_second_follow_from_the_wall_time(telemetry):
    record = telemetry.record
    assert record.tokens_per_second == pytest.approx(8 / (record.wall_ms / 1e3))
    assert (record.num_repeats, record.phase, record.workload) == (3, "prefill", "small")


def test_every_frame_has_its_documented_columns(telemetry):
    assert tuple(telemetry.ops) == frames.OP_COLUMNS
    assert tuple(telemetry.kernels) == frames.KERNEL_COLUMNS
    assert tuple(telemetry.nodes) == frames.NODE_COLUMNS
    assert tuple(telemetry.modules) == frames.MODULE_COLUMNS
    assert tuple(telemetry.memory) == frames.MEMORY_COLUMNS
    assert tuple(telemetry.gpu) == frames.GPU_COLUMNS
    assert tuple(telemetry.events) == frames.EVENT_COLUMNS


def test_parameters_are_counted_in_bytes(telemetry, decoder):
    expected = 4 * sum(parameter.numel() for parameter in decoder.parameters())
    assert telemetry.record.memory.parameter_bytes == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_its_values_are_null_with_a_reason(telemetry):
    record = telemetry.record
    assert record.gpu.gpu_utilisation is None
    assert "no CUDA device" in record.gpu.reason
    assert record.behavior.gpu_util_mean is None
    assert record.events[0].device_ms is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_on_a_cpu_the_memory_pass_knows_the_peak_and_what_was_alive(telemetry):
    memory = telemetry.record.memory
    assert memory.peak_memory_bytes > 0
    assert sum(share.num_bytes for share in memory.peak_nodes) == memory.peak_memory_bytes
    assert len(telemetry.memory) > 0


def test_saved_files_read_back(telemetry, tmp_path):
    json_path, parquet_path = telemetry.save(tmp_path / "deep" / "folder")
    record = TelemetryRecord.from_json(json_path.read_text())
    assert record.parquet == parquet_path.name
    assert record.bottleneck == telemetry.bottleneck
    events = pd.read_parquet(parquet_path)
    assert len(events) == telemetry.record.num_events
    assert sorted(path.name for path in json_path.parent.iterdir()) == ["events.parquet", "telemetry.json"]
    seed_keys = {"bottleneck", "events", "gpu", "behavior"}
    assert seed_keys <= set(json.loads(telemetry.to_json()))


def test_a_folder_that_cannot_be_made_is_reported(telemetry, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunStoreError, match="cannot be written"):
        telemetry.save(tmp_path / "file" / "below")


def test_the_record_keeps_the_largest_rows_only(telemetry):
    assert len(telemetry.record.events) <= 50 < len(telemetry.all_ops)
    assert telemetry.record.events == telemetry.all_ops[:50]


def test_a_conv_net_is_profiled_by_module():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()).eval()
    found = profile(Workload("conv", net, (torch.randn(1, 3, 16, 16),), items_per_call=1, item_unit="images"), repeat=1)
    assert found.record.attributed_share >= 0.9
    assert set(found.modules.module_path.dropna()) >= {"0", "1"}
    assert found.record.tokens_per_second is None


def test_a_callable_runs_exactly_once_and_its_value_is_kept(decoder):
    calls = []

    def cell():
        calls.append(1)
        return decoder(IDS).argmax(-1)

    found = profile(cell, name="cell")
    assert calls == [1]
    assert found.value.shape == (1, 8)
    assert found.record.name == "cell"
    assert found.record.wall_ms == found.record.profiled_ms
    assert {"fx_node", "outside_graph"} <= set(found.ops.owner)


def test_a_callable_can_be_repeated_when_asked():
    calls = []
    found = profile(lambda: calls.append(1) or torch.ones(4) + 1, repeat=2, num_warmup=1)
    assert len(calls) == 1 + 2 + 2
    assert found.ops.set_index("op").num_calls["aten::add"] == 1
    assert torch.equal(found.value, torch.full((4,), 2.0))


def test_a_callable_without_modules_says_why_it_has_no_graph():
    found = profile(lambda: torch.ones(64, 64) @ torch.ones(64, 64))
    assert found.bottleneck.node is None
    assert "no torch.nn.Module was called" in found.record.graph_note


def test_a_callable_that_runs_no_op_has_no_bottleneck():
    found = profile(lambda: 7)
    assert (found.value, found.bottleneck, len(found.ops)) == (7, None, 0)
    assert "no op ran" in repr(found)


def test_two_root_modules_have_prefixed_node_names():
    first, second = nn.Linear(8, 8), nn.Linear(8, 4)
    found = profile(lambda: second(first(torch.ones(2, 8))))
    assert set(found.nodes.node.dropna()) == {"Linear:linear", "Linear_2:linear"}
    assert found.graph is not None


def test_a_root_that_is_called_with_keywords_is_traced():
    layer = nn.Linear(8, 8)
    assert profile(lambda: layer(input=torch.ones(2, 8))).record.num_graph_nodes == 1


def test_a_model_that_cannot_be_traced_still_has_module_rows():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum().item() > 0 else x

    found = profile(Workload("branching", Branching().eval(), (torch.ones(2, 4),)), repeat=1)
    assert "cannot be traced" in found.record.graph_note
    assert found.ops.set_index("op").module_path["aten::linear"] == "layer"
    assert found.record.attributed_share == 0.0


def test_the_bodys_exception_passes_unchanged_and_what_ran_is_kept(decoder):
    error = ValueError("from the body")
    with pytest.raises(ValueError) as caught, capture_block() as block:
        decoder(IDS)
        raise error
    assert caught.value is error
    assert not getattr(error, "__notes__", None)
    assert block.telemetry.bottleneck is not None
    assert "ValueError" in block.telemetry.record.notes[0]
    assert not is_profiler_active()
    assert hooks() == [0, 0, 0, 0]


def test_an_exception_inside_forward_does_not_shift_later_calls(decoder):
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("inside")

    broken = nn.Sequential(nn.Linear(4, 4), Failing())

    def cell():
        with pytest.raises(RuntimeError, match="inside"):
            broken(torch.ones(1, 4))
        return decoder(IDS)

    found = profile(cell)
    rows = found.ops[found.ops.op == "aten::embedding"]
    assert rows.module_path.tolist() == ["embedding"]
    assert rows.method.tolist() == ["order"]


def test_after_an_interrupt_what_ran_is_kept(decoder):
    with pytest.raises(KeyboardInterrupt), capture_block() as block:
        decoder(IDS)
        raise KeyboardInterrupt
    assert block.telemetry.bottleneck is not None
    assert "interrupted" in block.telemetry.record.notes[0]
    assert not is_profiler_active()


def test_no_hook_is_left_behind(decoder):
    before = hooks()
    profile(lambda: decoder(IDS))
    assert hooks() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())


def test_below_another_profiler_a_workload_is_refused_before_it_runs(decoder):
    calls = []
    workload = Workload("counted", lambda: calls.append(1))
    with torch.profiler.profile(), pytest.raises(CaptureError, match="already running"):
        profile(workload)
    assert calls == []


def test_below_another_profiler_a_cell_runs_once_unprofiled():
    calls = []
    with torch.profiler.profile():
        found = profile(lambda: calls.append(1) or "value")
    assert (calls, found.value) == ([1], "value")
    assert "unprofiled" in found.record.notes[0]
    assert found.bottleneck is None
    assert tuple(found.events) == frames.EVENT_COLUMNS


def test_a_block_within_a_block_leaves_the_outer_one_working(decoder):
    with capture_block() as outer, capture_block() as inner:
        decoder(IDS)
    assert "unprofiled" in inner.telemetry.record.notes[0]
    assert outer.telemetry.record.attributed_share > 0.5


def test_a_model_that_does_not_take_its_inputs_raises_its_own_error(decoder):
    with pytest.raises(TypeError):
        profile(Workload("wrong", decoder, (IDS, IDS, IDS)))
    assert not is_profiler_active()


@pytest.mark.parametrize("target", [nn.Linear(2, 2), "text", None])
def test_what_cannot_be_profiled_is_refused(target):
    with pytest.raises(UsageError):
        profile(target)


def test_the_model_is_not_kept_alive():
    model = SmallDecoder().eval()
    watch = weakref.ref(model)
    found = profile(Workload("short", model, (IDS,)), repeat=1, should_time=False)
    del model
    gc.collect()
    assert watch() is None
    assert found.record.wall_ms is None
    assert len(found.nodes) > 0


@pytest.mark.slow
def test_a_compiled_model_is_neither_recompiled_nor_warned_about(decoder):
    counters = pytest.importorskip("torch._dynamo.utils").counters
    compiled = torch.compile(decoder, backend="eager")
    with torch.no_grad():
        compiled(IDS)
    before = counters["frames"]["ok"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        profile(lambda: compiled(IDS))
        compiled(IDS)
    assert counters["frames"]["ok"] == before


def test_a_model_compiled_inside_a_profile_is_not_compiled_again_after_it():
    counters = pytest.importorskip("torch._dynamo.utils").counters

    class Fresh(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            return self.layers(x) + 1

    compiled = torch.compile(Fresh().eval(), backend="eager", fullgraph=True)
    x = torch.ones(2, 4)
    with torch.no_grad():
        found = profile(lambda: compiled(x))
        before = counters["frames"]["ok"]
        compiled(x)
    assert counters["frames"]["ok"] == before
    assert "compiled during this capture" in found.record.notes[0]


def test_the_ops_of_a_compiled_region_go_to_dynamos_nodes(decoder):
    compiled = torch.compile(decoder, backend="eager")
    with torch.no_grad():
        compiled(IDS)
        found = profile(Workload("compiled", compiled, (IDS,)), repeat=1)
    rows = found.ops[found.ops.op == "aten::addmm"]
    assert set(rows.module_path) >= {"blocks.0.qkv", "lm_head"}
    assert set(rows.method) == {"order"}
    assert found.record.owners.residual == 0.0


def test_an_installed_drop_in_is_profiled_as_its_original():
    from agnitra_lab.patch.install import eager

    workload = Workload("small", SmallDecoder().eval(), (IDS,))
    found = profile(Workload("drop-in", eager(workload).model, (IDS,)), repeat=1)
    assert found.record.owners.exact_node >= 0.9
    assert "lm_head" in set(found.ops.module_path)


def test_a_training_step_is_shared_out_among_the_four_owners():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step():
        F.cross_entropy(net(torch.ones(32, 64)), torch.zeros(32, dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        net(torch.ones(32, 64)).sum().backward()

    found = profile(step)
    owners = found.record.owners
    assert owners.residual == 0.0
    assert min(owners.fx_node, owners.param_grad, owners.optimizer, owners.outside_graph) > 0.0
    backward = found.ops[found.ops.op == "AddmmBackward0"]
    assert set(backward.node) == {"linear", "linear_1"}
    assert set(backward.method) == {"sequence_number"}
    gradients = set(found.nodes.node[found.nodes.owner == "param_grad"])
    assert gradients == {f"param_grad:{name}" for name, _ in net.named_parameters()}
    assert set(found.nodes.node[found.nodes.owner == "optimizer"]) == {"optimizer:SGD.step", "optimizer:SGD.zero_grad"}
    assert found.nodes.latency_ms.sum() == pytest.approx(found.record.total_self_ms)


def test_what_checkpointing_runs_again_goes_to_its_node():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(checkpoint(self.first, x, use_reentrant=False))

    net = Checkpointed()
    found = profile(lambda: net(torch.ones(2, 8, requires_grad=True)).sum().backward())
    rows = found.ops[(found.ops.op == "aten::linear") & (found.ops.module_path == "first")]
    assert rows.num_calls.sum() == 2
    assert set(rows.node) == {"linear"}


def test_an_exported_program_keeps_the_names_of_its_nodes(decoder):
    program = torch.export.export(decoder, (IDS,))
    found = profile(Workload("exported", program.module(), (IDS,)), repeat=1)
    names = {node.name for node in program.graph.nodes}
    assert found.record.owners.exact_node >= 0.9
    assert set(found.nodes.node.dropna()) <= names


def test_backward_of_a_graph_made_before_the_profile_is_the_residual():
    layer = nn.Linear(8, 8)
    loss = layer(torch.ones(2, 8)).sum()
    found = profile(loss.backward)
    assert found.record.owners.residual > 0.0
    assert found.record.owners.param_grad > 0.0


def test_each_signature_of_a_root_has_its_own_graph_and_phase():
    from agnitra_lab.workloads.demos import demo

    prefill, decode = (demo(f"llama-{name}", scale="tiny") for name in ("prefill", "decode"))
    with torch.no_grad():
        found = profile(lambda: (prefill(), decode(), decode()))
    phases = {row.phase: row for row in found.record.phases}
    assert (phases["prefill"].num_calls, phases["decode"].num_calls) == (1, 2)
    assert phases["prefill"].tokens_per_second > 0


def test_events_past_the_budget_are_counted_and_the_first_are_kept(decoder):
    with capture_block(max_events=50) as block:
        decoder(IDS)
    record = block.telemetry.record
    assert (record.num_events, record.num_dropped_events) == (50, record.num_dropped_events)
    assert record.num_dropped_events > 0
    assert "the first 50 of" in record.notes[0]


def test_a_long_capture_is_read_in_pieces_that_join_to_the_same_rows(decoder, monkeypatch):
    whole = profile(lambda: [decoder(IDS) for _ in range(3)])
    monkeypatch.setattr("agnitra_lab.profiler.session._PIECE_S", 0.0)
    pieces = profile(lambda: [decoder(IDS) for _ in range(3)])
    counts = [found.ops.groupby("op").num_calls.sum().to_dict() for found in (whole, pieces)]
    assert counts[0] == counts[1]


def test_past_the_budget_the_rest_of_a_long_capture_runs_unprofiled(decoder, monkeypatch):
    monkeypatch.setattr("agnitra_lab.profiler.session._PIECE_S", 0.0)
    with capture_block(max_events=60) as block:
        values = [decoder(IDS) for _ in range(3)]
    assert len(values) == 3
    assert "ran unprofiled" in block.telemetry.record.notes[-1]


@pytest.mark.parametrize("max_events", [0, -1])
def test_a_budget_below_one_event_is_refused(max_events):
    with pytest.raises(UsageError, match="max_events"):
        capture_block(max_events=max_events)


def test_profiling_says_what_it_cost(telemetry):
    record, overhead = telemetry.record, telemetry.record.overhead
    assert overhead.num_markers > 0
    assert overhead.is_measured
    # On a busy machine the plain calls may be the slower ones: a cost below nothing is none.
    assert overhead.share == pytest.approx(max(0.0, 1 - record.wall_ms / record.profiled_ms))


def test_a_module_that_calls_itself_is_profiled():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, depth: int = 2):
            return self.layer(x) if depth == 0 else self(x, depth - 1)

    found = profile(lambda: Recursive().eval()(torch.ones(1, 4)))
    assert found.ops.set_index("op").module_path["aten::linear"] == "layer"


def test_inputs_that_hold_themselves_do_not_stop_the_call():
    class Taking(nn.Module):
        def forward(self, x, state):
            return x + len(state)

    state = [1]
    state.append(state)
    found = profile(lambda: Taking()(torch.ones(2), state))
    assert torch.equal(found.value, torch.full((2,), 3.0))


def test_a_lazy_module_is_profiled_at_its_first_call():
    found = profile(lambda: nn.LazyLinear(4)(torch.ones(2, 8)).sum().backward())
    assert "aten::linear" in set(found.ops.op)


def test_two_captures_compare_node_by_node(telemetry, decoder):
    other = profile(Workload("small", decoder, (IDS,)), repeat=1)
    frame = telemetry.compare(other)
    assert frame.baseline_ms.sum() == pytest.approx(telemetry.record.total_self_ms)
    assert set(frame.status) == {"both"}
