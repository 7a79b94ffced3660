"""Counters that are cleared once: launches that may run at the same time share none, those of a stream share theirs."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.generate.templates import counters as module
from agnitra_lab.generate.templates.counters import CounterMemory, counters

CPU = torch.device("cpu")


def places(piece: torch.Tensor) -> range:
    """The bytes of whole lines that a piece lies in; all pieces begin at the start of one."""
    return range(piece.data_ptr(), piece.data_ptr() - (-4 * piece.numel() // 128) * 128)


def test_launches_of_one_stream_count_in_the_same_place() -> None:
    memory = CounterMemory(CPU)
    first = memory.of_stream(7, 4)
    assert first.tolist() == [0] * 4 and (memory.of_stream(8, 4).data_ptr() - first.data_ptr()) % 128 == 0
    assert memory.of_stream(7, 4).data_ptr() == first.data_ptr() == memory.of_stream(7, 2).data_ptr()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, 0, 1, 2]), st.integers(1, 40_000)), min_size=1, max_size=30))
def test_no_two_graphs_or_streams_share_a_line_of_the_cache(requests: list[tuple[int | None, int]]) -> None:
    memory = CounterMemory(CPU)
    owners: dict[object, list[torch.Tensor]] = {}
    for index, (stream, number) in enumerate(requests):
        piece = memory.of_graph(number) if stream is None else memory.of_stream(stream, number)
        if piece is not None:
            assert piece.numel() == number and piece.dtype == torch.int32 and not piece.any()
            owners.setdefault(("graph", index) if stream is None else stream, []).append(piece)
    spans = [(owner, places(piece)) for owner, pieces in owners.items() for piece in pieces]
    for owner, span in spans:
        assert all(mine == owner or span.stop <= other.start or other.stop <= span.start for mine, other in spans)


def test_a_plain_call_leaves_room_for_the_launches_of_a_capture(monkeypatch) -> None:
    monkeypatch.setattr(module, "_CLEARED", 1024)
    memory = CounterMemory(CPU)
    assert memory.of_graph(1) is None
    for _ in range(5):
        memory.of_stream(0, 4)
        pieces = [memory.of_graph(4) for _ in range(16)]
        assert all(piece is not None for piece in pieces)


def test_counters_made_in_inference_mode_can_be_written_outside_it() -> None:
    with torch.inference_mode():
        piece = CounterMemory(CPU).of_stream(0, 4)
    assert not piece.is_inference()


def test_on_a_cpu_each_launch_has_new_counters() -> None:
    assert counters(3, CPU).tolist() == [0, 0, 0]
