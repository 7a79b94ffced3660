import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from agnitra_lab.contracts import MemoryShare
from agnitra_lab.profiler.memory import (
    MEMORY_COLUMNS,
    memory_frame,
    memory_scope,
    peak_bytes,
    peak_shares,
    read_allocations,
)


def record(body, scope=memory_scope):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, scope():
        value = body()
    return profiler.profiler.kineto_results, value


def op_names(result):
    """A place_of that puts the memory at the top-level op and the innermost one, by name."""
    (scope,) = result.experimental_event_tree()
    places, stack = {}, [(event, None) for event in scope.children]
    while stack:
        event, top = stack.pop()
        if event.name != "[memory]":
            places[event.correlation_id] = (top or event.name, event.name)
            stack += [(child, top or event.name) for child in event.children]
    return places.__getitem__


def raw_memory_events(result):
    found, stack = [], list(result.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack += event.children
        if event.name == "[memory]":
            found.append(event)
    return sorted(found, key=lambda event: event.start_time_ns)


@torch.no_grad()
def test_the_peak_of_a_chain_of_layers_is_the_two_activations_that_meet_in_the_relu():
    model, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)), torch.randn(16, 64)
    result, _ = record(lambda: model(x))
    allocations = read_allocations(result)
    assert allocations.num_bytes.tolist() == [8192, 8192, -8192, 2048, -8192]
    assert allocations.total_bytes.tolist() == [8192, 16384, 8192, 10240, 2048]
    assert allocations.alive_at_peak.tolist() == [True, True, False, False, False]
    assert (peak_bytes(allocations), allocations.base_bytes) == (16384, (None,))
    assert [(share.node, share.num_bytes) for share in peak_shares(allocations, op_names(result))] == [
        ("aten::linear", 8192),
        ("aten::relu", 8192),
    ]


@torch.no_grad()
def test_what_a_place_leaks_is_the_sum_over_its_rows():
    layer, kept = nn.Linear(64, 128), []
    x = torch.randn(16, 64)
    result, _ = record(lambda: [kept.append(layer(x)) or torch.relu(kept[-1]) for _ in range(5)] and None)
    frame = memory_frame(read_allocations(result), op_names(result))
    held = frame.groupby("node", observed=True).num_bytes.sum()
    assert held.to_dict() == {"aten::linear": 5 * 8192, "aten::relu": 0}
    assert frame.allocated_bytes.iloc[-1] == 5 * 8192


@torch.no_grad()
def test_an_operation_in_place_allocates_nothing():
    x = torch.randn(16, 64)
    in_place, _ = record(lambda: x.mul(x).relu_().add_(x))
    out_of_place, _ = record(lambda: x.mul(x).relu().add(x))
    assert peak_bytes(read_allocations(in_place)) == x.nbytes
    assert peak_bytes(read_allocations(out_of_place)) == 2 * x.nbytes


def test_the_gradients_are_alive_at_the_peak_of_a_training_step():
    model, x = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(3)]), torch.randn(1, 256)
    result, _ = record(lambda: model(x).sum().backward())
    allocations = read_allocations(result)
    by_op = {share.module_path: share.num_bytes for share in peak_shares(allocations, op_names(result))}
    gradients = sum(weight.grad.nbytes for weight in model.parameters())
    activation = x.nbytes
    assert gradients <= by_op["aten::mm"] <= gradients + 6 * activation
    assert allocations.total_bytes[-1] == gradients


def training_step():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3, 8, 8)).logsumexp(-1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def attention():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    return layer(torch.randn(2, 7, 32)).sort().indices


@pytest.mark.parametrize("body", [training_step, attention])
def test_real_passes_agree_with_the_allocator_row_by_row_and_sum_to_their_peak(body):
    result, kept = record(body)
    allocations, events = read_allocations(result), raw_memory_events(result)
    assert allocations.num_bytes.tolist() == [event.extra_fields.alloc_size for event in events]
    reported = np.array([event.extra_fields.total_allocated for event in events])
    before = reported[0] - allocations.num_bytes[0]
    assert np.array_equal(allocations.total_bytes, reported - before)
    assert allocations.num_bytes[allocations.alive_at_peak].sum() == peak_bytes(allocations) > 0
    shares = peak_shares(allocations, op_names(result))
    assert sum(share.num_bytes for share in shares) == peak_bytes(allocations)
    assert allocations.notes == ()
    del kept


def test_parents_in_the_event_tree_are_the_innermost_ops_by_time():
    result, _ = record(training_step)
    by_tree = read_allocations(result)
    by_time = read_allocations(SimpleNamespace(events=result.events))
    made = by_tree.num_bytes > 0
    assert made.sum() > 50
    assert np.array_equal(by_tree.op_correlation[made], by_time.op_correlation[made])


def test_without_addresses_it_is_unknown_what_was_alive_and_the_reason_says_so():
    result, _ = record(attention)
    allocations = read_allocations(SimpleNamespace(events=result.events))
    assert allocations.alive_at_peak is None
    assert "address" in allocations.reason
    assert peak_shares(allocations, op_names(result)) == ()
    frame = memory_frame(allocations, op_names(result))
    assert frame.is_alive_at_peak.isna().all()
    assert frame.allocated_bytes.max() == peak_bytes(read_allocations(result)) == peak_bytes(allocations)


def test_only_the_profiled_thread_is_counted():
    def body():
        seen = torch.empty(100)
        thread = threading.Thread(target=lambda: torch.empty(5000).zero_().sum())
        thread.start()
        thread.join()
        return seen

    result, value = record(body)
    assert peak_bytes(read_allocations(result)) == value.nbytes


def test_memory_of_an_earlier_pass_leaves_no_trace_in_a_later_one():
    _, kept = record(lambda: [torch.empty(1000), torch.empty(1000)])
    kept.pop()

    def body():
        kept.clear()
        return torch.empty(10)

    result, value = record(body)
    assert -4000 in [event.extra_fields.alloc_size for event in raw_memory_events(result)]
    allocations = read_allocations(result)
    assert allocations.num_bytes.tolist() == allocations.total_bytes.tolist() == [value.nbytes]


def test_a_pass_that_allocates_nothing_has_no_peak_and_the_same_columns():
    result, _ = record(lambda: None)
    allocations = read_allocations(result)
    assert peak_bytes(allocations) is None
    assert peak_shares(allocations, op_names(result)) == ()
    full_result, _ = record(attention)
    full = memory_frame(read_allocations(full_result), op_names(full_result))
    empty = memory_frame(allocations, op_names(result))
    assert tuple(empty.columns) == tuple(full.columns) == MEMORY_COLUMNS
    assert [type(kind) for kind in empty.dtypes] == [type(kind) for kind in full.dtypes]
    assert [kind.kind for kind in empty.dtypes] == [kind.kind for kind in full.dtypes]


@torch.no_grad()
def test_places_beyond_the_limit_share_the_last_row_with_what_has_no_place():
    x = torch.randn(16, 64)
    result, _ = record(lambda: (x + x, x.exp(), x.exp(), torch.cat([x, x, x]), *(x.cos() for _ in range(4))))
    name_of = op_names(result)

    def place_of(correlation):
        return (None, None) if name_of(correlation)[0] == "aten::cos" else name_of(correlation)

    shares = peak_shares(read_allocations(result), place_of, limit=2)
    assert [(share.node, share.num_bytes // x.nbytes) for share in shares[:2]] == [("aten::cat", 3), ("aten::exp", 2)]
    assert shares[2:] == (MemoryShare(node=None, module_path=None, num_bytes=5 * x.nbytes),)


def recorded(events, base, device="cuda:0", outside=()):
    """A profiler result as a GPU's looks: each event below an op of its own, or `outside` of the tree."""
    total, roots, raw = base, [], []
    for place, (size, pointer) in enumerate(events):
        total += size
        fields = SimpleNamespace(alloc_size=size, ptr=pointer, total_allocated=total, device=torch.device(device))
        tag = _EventType.Allocation
        leaf = SimpleNamespace(name="[memory]", children=[], tag=tag, start_time_ns=place, extra_fields=fields)
        op = SimpleNamespace(name="op", children=[leaf], tag=_EventType.TorchOp, correlation_id=place + 1)
        values = {"name": "[memory]", "start_ns": place, "nbytes": size, "start_thread_id": 1, "device_index": 0}
        values["device_type"] = SimpleNamespace(name=device.partition(":")[0].upper())
        raw.append(SimpleNamespace(**{name: lambda value=value: value for name, value in values.items()}))
        roots += [op] if place not in outside else []
    return SimpleNamespace(experimental_event_tree=lambda: roots, events=lambda: raw)


@st.composite
def programs(draw):
    """Events of a pass, with addresses that are used again, and the frees among them of memory from before it."""
    events, held, free_addresses, before = [], {}, list(range(100, 140)), {}
    for number in range(draw(st.integers(1, 30))):
        action = draw(st.sampled_from(["allocate", "allocate", "free", "free_old"]))
        if action == "allocate":
            held[pointer := free_addresses.pop(draw(st.integers(0, 3)))] = size = 512 * draw(st.integers(1, 9))
            events.append((size, pointer))
        elif action == "free_old":
            before[number] = size = 512 * draw(st.integers(1, 9))
            events.append((-size, number))
        elif held:
            pointer = draw(st.sampled_from(sorted(held)))
            events.append((-held.pop(pointer), pointer))
            free_addresses.insert(0, pointer)
    return events, sum(before.values()) + draw(st.integers(0, 2)) * 512, set(before)


@settings(deadline=None, max_examples=150)
@given(programs())
def test_on_a_gpu_totals_are_the_allocators_and_what_is_alive_sums_to_the_peak_less_the_base(program):
    events, base, before = program
    allocations = read_allocations(recorded(events, base))
    if not events:
        assert len(allocations) == 0
        return
    totals = base + np.cumsum([size for size, _ in events])
    assert np.array_equal(allocations.total_bytes, totals)
    assert (allocations.base_bytes, allocations.notes) == ((base,), ())
    peak = max(base, totals.max())
    assert peak_bytes(allocations) == peak
    until = events[: int(np.argmax(totals)) + 1] if totals.max() > base else []
    still_there = base + sum(size for size, pointer in until if pointer in before)
    assert allocations.num_bytes[allocations.alive_at_peak].sum() == peak - still_there
    alive = {pointer: size for size, pointer in until}
    assert allocations.alive_at_peak.sum() == sum(size > 0 for size in alive.values())
    owners = {pointer: place + 1 for place, (size, pointer) in enumerate(until) if size > 0}
    assert set(allocations.op_correlation[allocations.alive_at_peak]) == {
        owners[pointer] for pointer, size in alive.items() if size > 0
    }


@pytest.mark.parametrize("again", [2000, 4000])
def test_memory_that_an_unseen_thread_frees_ends_where_its_address_is_used_again(again):
    # So recorded on a CPU, when a thread of the caller's drops the last reference.
    result = recorded([(2000, 7), (100, 8), (again, 7), (-again, 7)], base=0, device="cpu")
    allocations = read_allocations(result)
    assert allocations.num_bytes.tolist() == [2000, 100, -2000, again, -again]
    assert allocations.op_correlation.tolist() == [1, 2, 1, 3, 3]
    assert peak_bytes(allocations) == 100 + again
    assert "see: 1;" in allocations.notes[0]


def test_a_free_of_another_size_is_of_memory_that_the_pass_did_not_allocate():
    allocations = read_allocations(recorded([(512, 7), (1024, 9), (-1024, 7)], base=4096))
    assert allocations.num_bytes.tolist() == [512, 1024, -512, -1024]
    assert allocations.op_correlation.tolist() == [1, 2, 1, 0]


@settings(deadline=None, max_examples=50)
@given(programs(), st.data())
def test_events_outside_of_the_tree_leave_totals_exact_and_what_was_alive_unknown(program, data):
    events, base, _ = program
    places = st.lists(st.sampled_from(range(len(events))), unique=True, min_size=1, max_size=len(events) - 1)
    if len(events) < 2:
        return
    outside = data.draw(places)
    allocations = read_allocations(recorded(events, base, outside=outside))
    assert np.array_equal(allocations.total_bytes, base + np.cumsum([size for size, _ in events]))
    assert peak_bytes(allocations) == max(base, allocations.total_bytes.max())
    assert allocations.alive_at_peak is None
    assert allocations.reason.startswith(f"{len(outside)} of {len(events)} allocations and frees")


def test_the_scope_itself_is_no_place_and_changes_no_allocation():
    def body():
        return torch.randn(8) + 1

    plain, _ = record(body, scope=contextlib.nullcontext)
    scoped, _ = record(body)
    without, within = read_allocations(plain), read_allocations(scoped)
    assert without.num_bytes.tolist() == within.num_bytes.tolist()
    assert (without.op_correlation == 0).tolist() == (within.op_correlation == 0).tolist()
    assert (within.op_correlation == 0).any()


def test_the_scope_runs_backward_in_the_thread_of_its_caller_and_gives_the_setting_back():
    # A GPU's backward runs in a thread of its own, whose frees between two nodes are in no range.
    with memory_scope():
        assert not torch._C._is_multithreading_enabled()
    assert torch._C._is_multithreading_enabled()


def test_events_of_the_same_nanosecond_keep_their_order():
    result = recorded([(512, 1), (-512, 1), (1024, 1)], base=0)
    first, *others = result.experimental_event_tree()
    first.children += [other.children[0] for other in others]
    del result.experimental_event_tree()[1:]
    for leaf in first.children:
        leaf.start_time_ns = 5
    assert read_allocations(result).num_bytes.tolist() == [512, -512, 1024]


def test_memory_that_no_op_allocates_belongs_to_the_marker_around_it():
    x = torch.randn(8)

    def body():
        with torch._C._profiler._RecordFunctionFast("agn::7"):
            return x + 1

    result, _ = record(body)
    frame = memory_frame(read_allocations(result), op_names(result))
    scalar = frame[frame.num_bytes == 8].iloc[0]
    assert (scalar.node, scalar.module_path) == ("agn::7", "agn::7")
    assert frame.time_ms.is_monotonic_increasing
    assert 0 < frame.time_ms.iloc[0] < 60_000


def test_bytes_that_move_outside_of_the_profile_are_said():
    result = recorded([(1024, 1), (512, 2)], base=4096)
    result.experimental_event_tree()[1].children[0].extra_fields.total_allocated += 2048
    (note,) = read_allocations(result).notes
    assert "2048 bytes on cuda:0" in note


def test_the_accelerator_is_the_device_of_interest_however_little_it_holds():
    result = recorded([(1 << 20, 1), (512, 2)], base=0)
    result.experimental_event_tree()[0].children[0].extra_fields.device = torch.device("cpu")
    result.experimental_event_tree()[1].children[0].extra_fields.total_allocated = 2560
    allocations = read_allocations(result)
    assert allocations.base_bytes == (None, 2048)
    assert (peak_bytes(allocations), peak_bytes(allocations, "cpu")) == (2560, 1 << 20)
    assert [share.num_bytes for share in peak_shares(allocations, lambda op: (str(op), ""))] == [512]
