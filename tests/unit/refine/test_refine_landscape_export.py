"""Landscapes for other tuners: T4 by its schema's facts, and a cache that Kernel Tuner's simulation mode reads."""

import json
from typing import Any

import pytest
from landscape_samples import older, small

from agnitra_lab.refine import replay
from agnitra_lab.refine.landscape_export import FORMATS, kernel_tuner, t4
from agnitra_lab.refine.landscape_file import LandscapeFile
from agnitra_lab.refine.replay import Landscape

# Of schema/T4/1.0.0/results-schema.json in kernel_tuner 1.5.0.
REQUIRED = {"configuration", "times", "invalidity", "correctness"}
INVALIDITY = {"timeout", "compile", "runtime", "correctness", "constraints", "correct"}
# Strings in a cache that kernel_tuner.util.read_cache takes for failures.
ERRORS = {"InvalidConfig", "CompilationFailedConfig", "RuntimeFailedConfig"}


def check_t4(document: dict[str, Any]) -> None:
    """Hold a document against what the schema says."""
    assert document["schema_version"] == "1.0.0" and document["metadata"]["timeunit"] == "milliseconds"
    for result in document["results"]:
        assert result.keys() >= REQUIRED
        assert isinstance(result["configuration"], dict) and isinstance(result["objectives"], list)
        assert result["invalidity"] in INVALIDITY and isinstance(result["correctness"], float)
        times = result["times"]
        assert isinstance(times["runtimes"], list)
        for name in ("compilation_time", "framework", "search_algorithm", "validation"):
            assert isinstance(times[name], float)
        for measured in result["measurements"]:
            assert isinstance(measured["name"], str) and isinstance(measured["value"], int | float)
            assert isinstance(measured["unit"], str)
        assert (result["invalidity"] == "correct") == ("time" in {m["name"] for m in result["measurements"]})


@pytest.mark.parametrize("landscape", [small(), older()], ids=["whole", "older"])
def test_t4_holds_its_schema_with_each_config_once(landscape: LandscapeFile) -> None:
    document = json.loads(t4(Landscape(landscape)))
    check_t4(document)
    assert len({json.dumps(result["configuration"]) for result in document["results"]}) == len(landscape) == 4
    assert [result["invalidity"] for result in document["results"]] == ["correct"] * 3 + ["runtime"]


def test_t4_gives_milliseconds_samples_and_what_the_compiler_says() -> None:
    result = json.loads(t4(Landscape(small())))["results"][1]
    assert result["configuration"] == {"BLOCK_N": 8, "num_warps": 2}
    assert result["times"]["runtimes"] == pytest.approx([0.003, 0.0031, 0.0032])
    assert result["times"]["compilation_time"] == result["times"]["compilation"] == pytest.approx(300)
    measured = {row["name"]: (row["value"], row["unit"]) for row in result["measurements"]}
    assert measured["time"] == (pytest.approx(0.0031), "ms")
    assert measured["n_spills"] == (8, "") and measured["shared_bytes"] == (256, "byte")


def check_cache(text: str, num_configs: int) -> dict[str, Any]:
    """Hold a cache against what Kernel Tuner asks of one, and return its entries."""
    assert text.endswith("}}}")  # else it takes the file for a torn one
    document = json.loads(text)
    assert {"device_name", "kernel_name", "problem_size", "tune_params_keys", "tune_params", "cache"} <= set(document)
    names = document["tune_params_keys"]
    assert names == list(document["tune_params"])
    assert len(document["cache"]) == num_configs
    for key, entry in document["cache"].items():
        assert key == ",".join(str(entry[name]) for name in names)
        assert all(entry[name] in document["tune_params"][name] for name in names)
        assert entry["time"] in ERRORS if isinstance(entry["time"], str) else entry["time"] > 0
        # A search with a limit in seconds needs all three.
        assert all(isinstance(entry[name], float) for name in ("compile_time", "verification_time", "benchmark_time"))
    entries: dict[str, Any] = document["cache"]
    return entries


def test_the_cache_has_each_config_under_its_key_with_its_costs() -> None:
    entries = check_cache(kernel_tuner(Landscape(small())), 4)
    assert entries["8,2"]["time"] == pytest.approx(0.0031)
    assert entries["8,2"]["compile_time"] == pytest.approx(300)
    assert entries["8,2"]["benchmark_time"] == pytest.approx(20)
    assert entries["16,2"]["time"] == "RuntimeFailedConfig" and "times" not in entries["16,2"]


@pytest.mark.parametrize(
    ("failure", "error"), [("compile", "CompilationFailedConfig"), ("constraint", "InvalidConfig")]
)
def test_a_failure_has_kernel_tuners_name(failure: str, error: str) -> None:
    changed = small()
    code = 1 + changed.about.failure_classes.index(failure)
    landscape = Landscape(small(failures=changed.arrays["failures"] // changed.arrays["failures"].max() * code))
    assert json.loads(kernel_tuner(landscape))["cache"]["16,2"]["time"] == error


@pytest.mark.parametrize("path", replay.every()[::4], ids=lambda path: path.stem)
def test_committed_landscapes_can_be_exported(path: Any) -> None:
    landscape = replay.load(path)
    assert set(FORMATS) == {"t4", "kernel_tuner"}
    check_t4(json.loads(t4(landscape)))
    entries = check_cache(kernel_tuner(landscape), len(landscape.space.configs))
    times = [entry["time"] for entry in entries.values() if not isinstance(entry["time"], str)]
    assert landscape.best_latency_ms in times
