import json
from pathlib import Path

import pytest

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError, UsageError
from agnitra_lab.refine import replay
from agnitra_lab.refine.search import search


def recorded(shape: tuple[int, ...] = (4, 8)) -> replay.LandscapeFile:
    return replay.LandscapeFile(
        template="rms_norm",
        shape=shape,
        dtype="bfloat16",
        device=DeviceInfo(type="cuda", name="NVIDIA H200"),
        versions={"triton": "3.6.0"},
        command="a test",
        timing="made up for a test",
        params={"BLOCK_N": (8, 16), "num_warps": (1, 2)},
        rows=(
            replay.LandscapeRow(params={"BLOCK_N": 8, "num_warps": 1}, latency_us_p50=4.0, samples_us=(4.0, 4.0)),
            replay.LandscapeRow(params={"BLOCK_N": 16, "num_warps": 1}, latency_us_p50=3.0, samples_us=(3.0,)),
        ),
        failures=(replay.LandscapeFailure(params={"BLOCK_N": 16, "num_warps": 2}, detail="out of shared memory"),),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    landscape = recorded()
    path = tmp_path / landscape.file_name()
    path.write_text(landscape.to_json(), encoding="utf-8")
    return path


def test_a_recording_survives_the_disk(path: Path) -> None:
    landscape = replay.load(path)
    assert landscape.recorded == recorded()
    assert path.name == "rms_norm__4x8__bfloat16__nvidia-h200.json"
    assert (landscape.template, landscape.shape, landscape.dtype) == ("rms_norm", (4, 8), "bfloat16")
    assert landscape.measured_on == "recorded: NVIDIA H200"


def test_a_replayed_latency_is_the_recorded_median_in_milliseconds(path: Path) -> None:
    landscape = replay.load(path)
    assert landscape.measure(landscape.space.configs[0]) == 0.004
    assert landscape.best_latency_ms == 0.003


def test_a_recorded_failure_fails_again_with_its_reason(path: Path) -> None:
    landscape = replay.load(path)
    with pytest.raises(TemplateError, match="out of shared memory"):
        landscape.measure(KernelConfig(template="rms_norm", params={"BLOCK_N": 16, "num_warps": 2}))


@pytest.mark.parametrize(
    "config",
    [
        KernelConfig(template="rms_norm", params={"BLOCK_N": 8, "num_warps": 2}),
        KernelConfig(template="swiglu", params={"BLOCK_N": 8, "num_warps": 1}),
    ],
)
def test_a_config_that_was_not_recorded_is_refused(path: Path, config: KernelConfig) -> None:
    with pytest.raises(TemplateError, match="was not recorded at 4x8 bfloat16 on NVIDIA H200"):
        replay.load(path).measure(config)


def test_a_search_runs_on_a_recording(path: Path) -> None:
    landscape = replay.load(path)
    result = search(landscape.space, landscape.measure, measured_on=landscape.measured_on)
    assert result.best is not None and result.best.latency_ms == 0.003
    assert [trial.status for trial in result.trials].count("failed") == 1


def changed(**fields: object) -> str:
    return json.dumps(json.loads(recorded().to_json()) | fields)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        recorded().to_json()[:300],
        changed(schema_version="another.tool.v2"),
        changed(extra=1),
        changed(rows=[]),
        changed(rows=[{"params": {"BLOCK_N": 8, "num_warps": 1}, "latency_us_p50": 0.0, "samples_us": []}]),
        changed(rows=[{"params": {"BLOCK_N": 9, "num_warps": 1}, "latency_us_p50": 1.0, "samples_us": []}]),
        changed(rows=[{"params": {"BLOCK_N": 16, "num_warps": 2}, "latency_us_p50": 1.0, "samples_us": []}]),
    ],
)
def test_a_corrupt_or_foreign_file_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "landscape.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"landscape\.json is no recorded landscape"):
        replay.load(path)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "landscape.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="no recorded landscape"):
        replay.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        replay.load(tmp_path / "none.json")


def test_find_takes_the_asked_shape_or_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((4, 8), (4096, 8), (99, 8)):
        (tmp_path / recorded(shape).file_name()).touch()
    (tmp_path / "notes.json").touch()
    monkeypatch.setattr(replay, "_recordings", lambda: sorted(tmp_path.glob("*.json")))
    assert replay.find("rms_norm", (4, 8)) == tmp_path / recorded((4, 8)).file_name()
    assert replay.find("rms_norm") == tmp_path / recorded((4096, 8)).file_name()
    assert replay.find("rms_norm", (5, 8)) is None
    assert replay.find("swiglu") is None


def test_every_committed_recording_can_be_loaded_and_found() -> None:
    for path in replay._recordings():
        landscape = replay.load(path)
        assert path.name == landscape.recorded.file_name()
        assert replay.find(landscape.template, landscape.shape) is not None
