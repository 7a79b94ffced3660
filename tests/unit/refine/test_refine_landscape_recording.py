"""A recording as it grows line by line, and what is packed of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from landscape_samples import LINES, ready, recording

from agnitra_lab.errors import UsageError
from agnitra_lab.refine.landscape_pack import pack
from agnitra_lab.refine.landscape_recording import Lines, read
from agnitra_lab.refine.replay import Landscape


def test_a_recording_is_what_its_lines_say(tmp_path: Path) -> None:
    found = read(recording(tmp_path / "a.jsonl"))
    assert found.is_done and found.num_unreadable == 0 and found.begun is None
    assert sorted(found.ready) == [0, 1, 3] and found.failures == {2: ("oom", "out of resource: shared memory")}
    assert found.params_of(3) == {"BLOCK_N": 8, "num_warps": 2}
    assert found.median_us(0) == 3.1
    assert found.samples[3] == {0: (1, [3.0, 3.1]), 1: (2, [3.2])}
    assert found.wall_s[0] == pytest.approx(0.03)


def test_a_kernel_that_configs_share_costs_each_of_them_what_it_cost_the_first(tmp_path: Path) -> None:
    found = read(recording(tmp_path / "a.jsonl"))
    assert found.compile_s_of(1) == pytest.approx(0.5)
    assert found.compile_s_of(3) == pytest.approx(0.5)
    assert found.compile_s_of(2) is None  # in the cache from before


def test_a_torn_last_line_waits_for_its_rest(tmp_path: Path) -> None:
    path = recording(tmp_path / "a.jsonl", [])
    found = read(path)
    line = json.dumps(ready(0, [3.0])).encode() + b"\n"
    with path.open("ab") as file:
        file.write(line[:20])
    found.refresh()
    assert not found.ready and found.num_unreadable == 0
    with path.open("ab") as file:
        file.write(line[20:])
    found.refresh()
    assert found.ready.keys() == {0}


def test_the_config_that_ended_the_process_is_the_one_that_began_without_an_answer(tmp_path: Path) -> None:
    path = recording(tmp_path / "a.jsonl", [{"kind": "begin", "i": 1}])
    assert read(path).begun == 1


def test_lines_that_are_none_are_counted_and_lose_nothing(tmp_path: Path) -> None:
    path = recording(tmp_path / "a.jsonl")
    before = read(path)
    with path.open("a", encoding="utf-8") as file:
        file.write('not json\n[]\n{"kind":"ready"}\n{"kind":"surprise","i":0}\n')
    after = read(path)
    assert after.num_unreadable == 4
    assert after.samples == before.samples


def test_a_missing_or_foreign_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text('{"kind":"header","schema":"another.v1"}\n')
    with pytest.raises(UsageError, match="no recording of a landscape"):
        read(tmp_path / "other.jsonl")


def test_each_line_is_one_write_and_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    lines.add("begin", i=3)
    with pytest.raises(ValueError, match="JSON"):
        lines.add("again", i=3, us=[float("nan")])
    lines.close()
    assert (tmp_path / "a.jsonl").read_text() == '{"kind":"begin","i":3}\n'


def test_a_finished_recording_is_packed_in_the_grids_order_with_all_that_it_knows(tmp_path: Path) -> None:
    found = pack(read(recording(tmp_path / "a.jsonl")))
    assert [found.params_of(index) for index in range(4)] == [
        {"BLOCK_N": 8, "num_warps": 1}, {"BLOCK_N": 8, "num_warps": 2},
        {"BLOCK_N": 16, "num_warps": 1}, {"BLOCK_N": 16, "num_warps": 2},
    ]  # fmt: skip
    assert found.samples_us(1).tolist() == [3.0, 3.1, 3.2]
    assert found.again_us(2).tolist() == [3.2, 3.0]
    assert found.arrays["sample_rounds"].tolist() == [0, 0, 0, 0, 1, 0, 0, 1]
    assert found.arrays["sample_batches"].tolist() == [0, 0, 1, 1, 2, 0, 0, 2]
    assert found.arrays["sm_clock_mhz"].tolist() == [1980, -1, 1980]
    assert found.arrays["is_early_cut"].tolist() == [True, False, False, False]
    assert found.failure_of(3) == ("oom", "out of resource: shared memory")
    assert [found.known("compile_s", index) for index in range(4)] == pytest.approx([0.5, 0.5, 0.7, None])
    assert found.known("max_error", 0) is None and found.known("max_error", 1) == 0.03
    assert found.about.baselines_us == {"eager": (9.0, 9.2, 9.1)}
    assert found.versions["triton"] == "3.6.0"
    assert Landscape(found).optimum.params == {"BLOCK_N": 16, "num_warps": 1}


def test_no_folder_of_the_recording_machine_is_kept(tmp_path: Path) -> None:
    command = pack(read(recording(tmp_path / "a.jsonl"))).about.command
    assert command == "agnitra landscape record rms_norm --out out --cache cache"


def test_a_config_that_ran_and_failed_later_is_a_failure_without_samples(tmp_path: Path) -> None:
    lines = [*LINES[:-1], {"kind": "failed", "i": 3, "failure": "timeout", "detail": "hangs"}, LINES[-1]]
    found = pack(read(recording(tmp_path / "a.jsonl", lines)))
    assert found.failure_of(1) == ("timeout", "hangs")
    assert len(found.samples_us(1)) == 0 and len(found.again_us(1)) == 0


def test_what_is_packed_is_small(tmp_path: Path) -> None:
    configs = [[block, warps] for block in range(64) for warps in range(20)]
    rng = np.random.default_rng(0)
    lines = []
    for config in range(len(configs)):
        us = (100 + rng.normal(size=27) * 2).round(3).tolist()
        lines += [{"kind": "compiled", "i": config, "kernels": [["kernel", f"{config}", 0.3, 128]]}, ready(config, us)]
    params = {"BLOCK_N": list(range(64)), "num_warps": list(range(20))}
    path = recording(tmp_path / "a.jsonl", [*lines, {"kind": "done"}], configs=configs, params=params)
    assert len(pack(read(path)).to_bytes()) < 150_000


@pytest.mark.parametrize(
    ("lines", "header", "problem"),
    [
        (LINES[:-1], {}, "not finished"),
        ([*LINES, {"kind": "surprise"}], {}, "1 lines that cannot be read"),
        ([{"kind": "done"}], {}, "no config ran"),
        (LINES, {"configs": [[16, 1], [8, 1], [16, 2], [99, 2]]}, "does not hold together"),
        (LINES, {"configs": [[16, 1], [8, 1], [16, 2], [16, 1]]}, "occurs twice"),
        (LINES, {"device": {"type": "toaster"}}, "header"),
    ],
)
def test_a_recording_that_cannot_be_packed_says_why(
    tmp_path: Path, lines: list[dict[str, object]], header: dict[str, object], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        pack(read(recording(tmp_path / "a.jsonl", lines, **header)))
