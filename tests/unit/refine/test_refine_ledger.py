"""A ledger survives a kill at any byte, and refuses everything that is not its own."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agnitra_lab.contracts.search import ForeignResult, KernelConfig, Measurement, SearchSpace
from agnitra_lab.errors import LedgerError
from agnitra_lab.refine import ledger as ledgers
from agnitra_lab.refine.bound import Bound
from agnitra_lab.refine.foreign import results_in_ledger
from agnitra_lab.refine.search import search
from agnitra_lab.refine.study import Knowledge, LedgerKey, Study

POINTS = [{"BLOCK": block, "warps": warps} for block, warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8))]
SPACE = SearchSpace(
    template="any", shape=(8, 8), dtype="float32", params={"BLOCK": (1, 2, 4, 8, 16), "warps": (1, 2, 4, 8)},
    configs=tuple(KernelConfig(template="any", params=point) for point in POINTS),
)  # fmt: skip
KEY = LedgerKey(device="NVIDIA H200", kernel_sha256="ab" * 32, versions={"triton": "3.6.0", "driver": "570"})


def bowl(config: KernelConfig) -> float:
    return 1.0 + abs(config.params["BLOCK"] - 4) + abs(config.params["warps"] - 2)


def measured(config: KernelConfig) -> Measurement | float | None:
    if config.params["warps"] == 4:
        return Measurement(latency_ms=bowl(config), samples_ms=(bowl(config),) * 3, is_aborted=True)
    return None if config.params["warps"] == 8 else bowl(config)


def begin(path: Path, **given) -> Study:
    return Study(SPACE, ledger=path, **{"ledger_key": KEY, "sampler": "rl", "seed": 3, **given})


def keys(study: Study) -> list[str]:
    return [trial.config.key() for trial in study.trials]


def sequential(study: Study, num_trials: int) -> list[str]:
    while len(study.trials) < num_trials:
        (config,) = study.ask()
        study.tell(config, measured(config))
    return keys(study)


@pytest.mark.parametrize("sampler", ["rl", "random", "reinforce", "coordinate"])
def test_a_search_that_is_cut_at_any_byte_asks_the_same_questions_as_one_that_was_not(
    tmp_path: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    whole = tmp_path / "whole.jsonl"
    study = begin(whole, sampler=sampler)
    study.attach([ForeignResult(config=SPACE.configs[0], latency_ms=5.0)], provenance="preset")
    expected = sequential(study, 9)
    study.close()
    content = whole.read_bytes()
    # Every byte of the lines' ends and of the header's first ones, and some of the others: all are alike.
    ends = [index for index, byte in enumerate(content) if byte == 10]
    cuts = {cut + offset for cut in [0, *ends] for offset in (0, 1, 2)} | set(range(7, len(content), 211))
    for cut in sorted(cut for cut in cuts if 0 <= cut <= len(content)):
        path = tmp_path / f"cut_{cut}.jsonl"
        path.write_bytes(content[:cut])
        num_told = content[:cut].count(b'"event":"tell"') - (
            1 if b'"event":"tell"' in content[:cut].rpartition(b"\n")[2] else 0
        )
        resumed = begin(path, sampler=sampler)
        assert len(resumed.trials) == num_told, cut
        resumed.attach([ForeignResult(config=SPACE.configs[0], latency_ms=5.0)], provenance="preset")
        assert sequential(resumed, 9) == expected, cut
        resumed.close()
        path.unlink()


def test_every_single_byte_of_a_short_ledger_can_be_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # thousands of them would test the disk
    whole = tmp_path / "whole.jsonl"
    study = begin(whole, sampler="random")
    expected = sequential(study, 2)
    study.close()
    content = whole.read_bytes()
    path = tmp_path / "cut.jsonl"
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        resumed = begin(path, sampler="random")
        assert sequential(resumed, 2) == expected, cut
        resumed.close()
        assert keys_in(path) == expected


def keys_in(path: Path) -> list[str]:
    return [event.trial.config.key() for event in ledgers.read(path)[1] if isinstance(event, ledgers.Told)]


def test_a_resumed_batch_in_flight_is_asked_for_again_first(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    study = begin(path)
    asked = study.ask(3)
    study.tell(asked[1], 2.0)
    study.close()
    resumed = begin(path)
    assert resumed.pending == (asked[0], asked[2])
    assert resumed.ask(2) == [asked[0], asked[2]]
    resumed.close()


def test_a_resumed_search_holds_configs_against_the_same_best_and_others_learn_what_ended_early(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    study = begin(path)
    first, second = study.ask(2)
    study.tell(first, Measurement(latency_ms=2.0, samples_ms=(1.9, 2.0, 2.1)))
    study.tell(second, Measurement(latency_ms=1.5, samples_ms=(1.4, 1.5, 9.0), is_aborted=True))
    bound = study.bound
    study.close()
    resumed = begin(path)
    assert resumed.bound == bound == Bound((1.9, 2.0, 2.1))
    resumed.close()
    other = Study(SPACE)
    other.attach(results_in_ledger(path))
    assert other.bound == bound and [trial.is_aborted for trial in other.attached] == [False, True]


def test_a_torn_tail_is_kept_aside_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    study = begin(path)
    sequential(study, 2)
    study.close()
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    begin(path).close()
    torn = path.with_name(path.name + ".torn").read_bytes()
    assert torn == content[:-9].rpartition(b"\n")[2] + b"\n"
    assert content.startswith(path.read_bytes())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": 4}, "seed is 3 there and 4 here"),
        ({"sampler": "random"}, "sampler is 'rl' there"),
        ({"ledger_key": LedgerKey(device="NVIDIA A100", kernel_sha256="ab" * 32, versions=KEY.versions)}, "device is"),
        ({"ledger_key": LedgerKey(device="NVIDIA H200", kernel_sha256="cd" * 32, versions=KEY.versions)}, "kernel_sha"),
        ({"ledger_key": LedgerKey(device="NVIDIA H200", kernel_sha256="ab" * 32)}, "versions is"),
        ({"knowledge": Knowledge(seeds=SPACE.configs[:1])}, "context_sha256"),
        ({"knowledge": Knowledge(hints=SPACE.configs[:1])}, "context_sha256"),
    ],
)
def test_a_ledger_of_another_search_is_refused_and_left_as_it_is(tmp_path: Path, given: dict, said: str) -> None:
    path = tmp_path / "ledger.jsonl"
    study = begin(path)
    sequential(study, 2)
    study.close()
    content = path.read_bytes()
    with pytest.raises(LedgerError, match=said):
        begin(path, **given)
    assert path.read_bytes() == content


def test_a_ledger_of_another_space_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    begin(path).close()
    smaller = SPACE.model_copy(update={"configs": SPACE.configs[1:]})
    with pytest.raises(LedgerError, match="space_sha256"):
        Study(smaller, ledger=path, ledger_key=KEY, seed=3)


@pytest.mark.parametrize(
    "content",
    [b"a,b,c\n1,2,3\n", b"my notes", b"\x00\xff\xfe\n", b"{}\n", b"<html></html>\n", b"[1]\n", b'{"event":"header"}\n'],
)
def test_a_file_that_is_no_ledger_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="belongs to another search"):
        begin(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("bad", [b"{", b'{"event":"tell"}', b"\xff", b'{"event":"dance"}', b"", b"NaN"])
def test_a_corrupt_line_in_the_middle_is_refused_by_its_number(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    study = begin(path)
    sequential(study, 2)
    study.close()
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], bad, *lines[2:]]))
    content = path.read_bytes()
    with pytest.raises(LedgerError, match="corrupt at line 3"):
        begin(path)
    assert path.read_bytes() == content


def test_two_searches_on_one_ledger_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    study = begin(path)
    sequential(study, 1)
    content = path.read_bytes()
    with pytest.raises(LedgerError, match="Another search is writing"):
        begin(path)
    assert path.read_bytes() == content
    study.close()
    begin(path).close()


def test_a_ledger_where_none_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file" / "ledger.jsonl"):
        with pytest.raises(LedgerError, match="cannot be opened"):
            begin(path)


def test_every_line_of_a_ledger_is_json_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    search(SPACE, bowl, ledger=path, max_trials=4)
    events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert events[:5] == ["header", "ask", "tell", "ask", "tell"]
    assert events[-1] == "final"


def test_a_finished_search_is_told_again_from_its_ledger_without_a_measurement(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = search(SPACE, bowl, ledger=path, max_trials=8)

    def refuse(config: KernelConfig) -> float:
        raise AssertionError("measured again")

    second = search(SPACE, refuse, ledger=path, max_trials=8)
    assert [trial.config for trial in second.trials] == [trial.config for trial in first.trials]
    assert first.best is not None and second.best is not None
    assert second.best.config == first.best.config


def test_a_search_goes_on_with_a_larger_budget(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    search(SPACE, bowl, ledger=path, max_trials=5, sampler="random")
    longer = search(SPACE, bowl, ledger=path, max_trials=9, sampler="random")
    assert len(longer.trials) == 9
    times = [trial.elapsed_s for trial in longer.trials]
    assert times == sorted(times)


KILLED = """
import sys, time
sys.path.insert(0, {folder!r})
from test_refine_ledger import SPACE, bowl
from agnitra_lab.refine.search import search
def measure(config):
    time.sleep(0.02)
    return bowl(config)
search(SPACE, measure, ledger={path!r}, max_trials=20, sampler="rl", seed=1)
"""


def test_a_process_killed_in_the_middle_loses_one_measurement_at_most(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = KILLED.format(folder=str(Path(__file__).parent), path=str(path))
    child = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b'"event":"tell"') >= 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    num_told = path.read_bytes().count(b'"event":"tell"')
    calls = []

    def measure(config: KernelConfig) -> float:
        calls.append(config.key())
        return bowl(config)

    resumed = search(SPACE, measure, ledger=path, max_trials=20, sampler="rl", seed=1)
    whole = search(SPACE, bowl, max_trials=20, sampler="rl", seed=1)
    assert [trial.config for trial in resumed.trials] == [trial.config for trial in whole.trials]
    assert len(calls) - len(resumed.finals) <= 20 - num_told + 1


def test_a_sibling_that_was_measured_at_another_shape_makes_another_search(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    rows = [ForeignResult(config=config, latency_ms=bowl(config)) for config in SPACE.configs]
    begin(path, knowledge=Knowledge(siblings={"there": rows}, shapes={"there": (2,)})).close()
    with pytest.raises(LedgerError, match="context_sha256"):
        begin(path, knowledge=Knowledge(siblings={"there": rows}, shapes={"there": (4,)}))
    begin(path, knowledge=Knowledge(siblings={"there": rows}, shapes={"there": (2,)})).close()
