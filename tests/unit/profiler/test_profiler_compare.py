import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.errors import UsageError
from agnitra_lab.profiler.compare import COMPARE_COLUMNS, compare_nodes, comparison_text

FIELDS = ("node", "op", "module_path", "owner", "latency_ms", "device_ms", "num_calls")


def nodes(*rows):
    return pd.DataFrame([row if len(row) == len(FIELDS) else row_of(*row) for row in rows], columns=list(FIELDS))


def row_of(node, ms, module_path="", owner="fx_node", num_calls=10):
    return (node, "aten.op", module_path, owner, 2 * ms, ms, num_calls)


def by_node(frame):
    return {row["node"]: row for row in frame.to_dict("records")}


def test_a_fused_set_is_one_row_with_the_sum_of_its_members():
    eager = nodes(("linear", 1.0, "mlp.up"), ("gelu", 0.5, "mlp.act"), ("view", 0.0, "mlp"), ("add", 0.25))
    compiled = nodes(("gelu + linear", 0.5, "mlp", "fx_node", 4), ("add", 0.25))
    rows = by_node(compare_nodes(eager, compiled))
    fused = rows["linear + gelu"]
    assert (fused["status"], fused["module_path"], fused["baseline_ms"], fused["candidate_ms"]) == (
        "fused", "mlp", 1.5, 0.5,
    )  # fmt: skip
    assert (fused["delta_ms"], fused["speedup"]) == (-1.0, 3.0)
    assert (fused["baseline_calls"], fused["candidate_calls"]) == (20, 4)
    assert rows["view"]["status"] == "removed"
    assert rows["add"]["status"] == "both"
    assert by_node(compare_nodes(compiled, eager))["gelu + linear"]["status"] == "split"


def test_sets_that_share_a_node_become_one_row():
    eager = nodes(("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0))
    compiled = nodes(("a + b", 1.0), ("b + c", 1.0), ("d", 0.5))
    frame = compare_nodes(eager, compiled)
    assert list(frame["node"]) == ["a + b + c", "d"]
    assert list(frame["baseline_ms"]) == [3.0, 1.0]


def test_a_set_that_both_captures_have_stays_apart_from_a_changed_neighbour():
    before = nodes(("embed + x", 1.0), ("x + norm", 1.0), ("norm_1", 0.5), ("act", 0.5))
    after = nodes(("x + embed", 0.5), ("norm + x", 1.0), ("norm_1 + act", 0.5))
    rows = by_node(compare_nodes(before, after))
    assert {name: row["status"] for name, row in rows.items()} == {
        "embed + x": "both", "x + norm": "both", "norm_1 + act": "fused",
    }  # fmt: skip
    assert rows["embed + x"]["speedup"] == 2.0


def test_nodes_of_other_names_match_on_the_same_line_of_the_same_module():
    eager = nodes(("sdpa", 1.0, "attn"), ("split", 0.5, "attn"), ("add", 0.25))
    compiled = nodes(("y", 0.5, "attn"), ("compiled region 0/0", 0.125))
    frame = compare_nodes(
        eager.assign(source=["gpt.py:11", "gpt.py:9", "gpt.py:26"], num_nodes=1),
        compiled.assign(source=["gpt.py:11", "gpt.py:26"], num_nodes=[1, 61]),
    )
    statuses = {name: row["status"] for name, row in by_node(frame).items()}
    assert statuses.pop("compiled region 0/0") == "added", "its line is that of its first node only"
    assert statuses == {"sdpa + y": "both", "split": "removed", "add": "removed"}


def test_rows_without_a_node_match_by_owner_and_module():
    before = nodes((None, 1.0, "block", "fx_node"), (None, 0.5, None, "outside_graph"), (None, 0.25, None, None))
    after = nodes((None, 0.5, "block", "fx_node"), (None, 0.5, None, "outside_graph"), (None, 0.125, "block", None))
    frame = compare_nodes(before, after)
    assert [(row["owner"] if isinstance(row["owner"], str) else None, row["status"]) for row in records(frame)] == [
        ("fx_node", "both"), (None, "removed"), (None, "added"), ("outside_graph", "both"),
    ]  # fmt: skip
    assert "no single node in block: 1.000 -> 0.500 ms 2.00x" in comparison_text(frame)


def records(frame):
    return frame.to_dict("records")


def test_the_side_that_lacks_a_node_is_null_and_its_change_is_whole():
    row = records(compare_nodes(nodes(("a", 1.0)), nodes(("a", 1.0), ("b", 0.25))))[0]
    assert (row["node"], row["status"], row["candidate_ms"], row["delta_ms"]) == ("b", "added", 0.25, 0.25)
    assert pd.isna(row["baseline_ms"])
    assert pd.isna(row["baseline_calls"])
    assert pd.isna(row["speedup"])


def test_device_time_counts_only_where_both_captures_have_it():
    gpu, cpu = nodes(("a", 1.0)), nodes(("a", 1.0)).assign(device_ms=None)
    both, mixed = compare_nodes(gpu, gpu), compare_nodes(gpu, cpu)
    assert (both.attrs["time"], both["baseline_ms"][0]) == ("device_ms", 1.0)
    assert (mixed.attrs["time"], mixed["baseline_ms"][0]) == ("latency_ms", 2.0)
    assert comparison_text(both).startswith("Device time 1.000 -> 1.000 ms")


def test_the_text_names_the_largest_changes_and_sums_the_others():
    before = nodes(*((f"n{index}", float(index)) for index in range(1, 6)))
    after = nodes(*((f"n{index}", float(index) / 2) for index in range(1, 6)))
    head, first, second, rest = comparison_text(compare_nodes(before, after), limit=2).splitlines()
    assert head == "Device time 15.000 -> 7.500 ms, 2.00x (-7.500 ms): 5 in both."
    assert first.strip() == "-2.500 ms  n5: 5.000 -> 2.500 ms 2.00x"
    assert "n4" in second
    assert rest.strip() == "-3.000 ms  in 3 more"


def test_empty_captures_compare_to_an_empty_frame():
    frame = compare_nodes(nodes(), nodes())
    assert list(frame.columns) == list(COMPARE_COLUMNS)
    assert comparison_text(frame) == "Neither capture has a node."


def test_a_frame_without_the_columns_is_refused_by_name():
    with pytest.raises(UsageError, match=r"candidate's node frame lacks owner, num_calls.*telemetry\.nodes"):
        compare_nodes(nodes(("a", 1.0)), nodes(("a", 1.0)).drop(columns=["num_calls", "owner"]))
    with pytest.raises(UsageError, match="lacks module_path"):
        comparison_text(nodes(("a", 1.0)).drop(columns="module_path"))


NAMES = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True).map(" + ".join)
ROWS = st.lists(
    st.builds(
        row_of,
        st.one_of(NAMES, st.none()),
        st.integers(0, 64).map(lambda n: n / 16),
        st.sampled_from(["", "mlp", "mlp.up", None]),
        st.sampled_from(["fx_node", "optimizer", None]),
        st.integers(0, 9),
    ),
    max_size=8,
)


@given(ROWS, ROWS)
def test_every_column_sums_to_its_capture_and_no_set_stands_in_two_rows(before, after):
    baseline, candidate = nodes(*before), nodes(*after)
    frame = compare_nodes(baseline, candidate)
    time = frame.attrs["time"]
    assert frame["baseline_ms"].sum() == baseline[time].sum()
    assert frame["candidate_ms"].sum() == candidate[time].sum()
    assert frame["delta_ms"].sum() == candidate[time].sum() - baseline[time].sum()
    assert frame["baseline_calls"].sum() == baseline["num_calls"].sum()
    sets = [frozenset(node.split(" + ")) for node in frame["node"].dropna()]
    assert len(sets) == len(set(sets))
    assert list(frame["delta_ms"].abs()) == sorted(frame["delta_ms"].abs(), reverse=True)


@given(ROWS)
def test_a_capture_compared_with_itself_differs_nowhere(rows):
    frame = compare_nodes(nodes(*rows), nodes(*rows))
    assert set(frame["status"]) <= {"both"}
    assert (frame["delta_ms"] == 0).all()
