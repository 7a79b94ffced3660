"""The ledger holds each event once, and loses nothing to a crash."""

from __future__ import annotations

import errno
import multiprocessing
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.contracts.usage import UsageEvent
from agnitra_lab.errors import RunStoreError, UsageError
from agnitra_lab.metering import ledger
from agnitra_lab.metering.usage import usage_event


def _event(tokens: int = 1000, note: str = "first") -> UsageEvent:
    return usage_event(
        project_id="proj-demo",
        model_name="tinyllama",
        tokens_processed=tokens,
        baseline_tokens_per_sec=100,
        optimized_tokens_per_sec=125,
        baseline_latency_ms=10,
        optimized_latency_ms=8,
        price_per_gpu_hour=Decimal("2.50"),
        success_fee_rate=Decimal("0.20"),
        metadata={"note": note},
    )


def _ids(path: Path) -> list[str]:
    return [record["event_id"] for record in ledger.read(path)]


def test_an_absent_ledger_is_empty(tmp_path: Path) -> None:
    assert ledger.read(tmp_path / "usage.jsonl") == []


def test_a_second_append_of_one_id_changes_no_byte(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "usage.jsonl"
    assert ledger.append(path, _event(), event_id="a").is_new
    content = path.read_bytes()
    assert not ledger.append(path, _event(), event_id="a").is_new
    assert path.read_bytes() == content


def test_an_event_comes_back_as_it_was_filed(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    ledger.append(path, _event(), event_id="a")
    assert ledger.read(path)[0]["event"] == _event().model_dump(mode="json")


def test_other_content_under_a_known_id_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    ledger.append(path, _event(1000), event_id="a")
    with pytest.raises(UsageError, match="other content"):
        ledger.append(path, _event(2000), event_id="a")
    assert len(ledger.read(path)) == 1


@given(cut=st.integers(min_value=1, max_value=10_000))
def test_a_line_cut_anywhere_is_kept_aside_and_the_retry_files_it_once(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "usage.jsonl"
    ledger.append(path, _event(), event_id="a")
    first = path.read_bytes()
    ledger.append(path, _event(2000), event_id="b")
    second = path.read_bytes()[len(first) :]
    kept = second[: 1 + cut % (len(second) - 1)]
    path.write_bytes(first + kept)
    result = ledger.append(path, _event(2000), event_id="b")
    torn = path.with_name("usage.jsonl.torn")
    assert _ids(path) == ["a", "b"]
    assert path.read_bytes() == first + second
    if kept == second[:-1]:
        assert (result.is_new, result.num_set_aside, torn.exists()) == (False, 0, False)
    else:
        assert (result.is_new, result.num_set_aside) == (True, 1)
        assert torn.read_bytes() == kept + b"\n"


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "usage.jsonl"
    ledger.append(path, _event(), event_id="a")
    content = path.read_bytes()
    real_write = os.write
    calls = iter([True, False])

    def half_then_full(descriptor: int, data: bytes) -> int:
        if next(calls):
            return real_write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(RunStoreError, match="No space left"):
        ledger.append(path, _event(2000), event_id="b")
    assert path.read_bytes() == content


def test_a_folder_in_the_ledgers_place_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunStoreError, match="cannot be written"):
        ledger.append(tmp_path, _event(), event_id="a")


def test_an_empty_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="event_id"):
        ledger.append(tmp_path / "usage.jsonl", _event(), event_id="")


def test_a_secret_in_the_metadata_does_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    ledger.append(path, _event(note="key sk-abcdefghijklmnopqrstuvwx"), event_id="a")
    assert b"sk-abc" not in path.read_bytes()


def _append_all(path: Path, ids: list[str]) -> None:
    for event_id in ids:
        ledger.append(path, _event(), event_id=event_id)


def test_processes_that_file_the_same_events_at_once_file_each_once(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    ids = [f"event-{number}" for number in range(20)]
    context: Any = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_all, args=(path, ids)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(worker.exitcode == 0 for worker in workers)
    assert sorted(_ids(path)) == sorted(ids)
