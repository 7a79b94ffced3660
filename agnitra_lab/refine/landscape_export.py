"""Landscapes in the words of other tuners: results in the T4 format, and the cache file of Kernel Tuner.

T4 is what tuners exchange (schema 1.0.0, milliseconds); Kernel Tuner writes it and reads it nowhere. What its
simulation mode loads is a cache file, which must answer for every config of the space that it is given.

Source: github.com/KernelTuner/kernel_tuner, schema/T4/1.0.0/results-schema.json and doc/source/cache_files.rst.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.refine.replay import Landscape

T4_SCHEMA_VERSION = "1.0.0"
_NEVER = "1970-01-01T00:00:00Z"
_INVALIDITY: Mapping[str, str] = {
    "compile": "compile", "launch": "runtime", "oom": "runtime", "timeout": "timeout", "wrong": "correctness",
    "constraint": "constraints",
}  # fmt: skip
# Kernel Tuner knows no timeouts nor wrong values: for its searches they are configs that do not run.
_ERRORS: Mapping[str, str] = {"compile": "CompilationFailedConfig", "constraint": "InvalidConfig"}
_ERROR = "RuntimeFailedConfig"


def t4(landscape: Landscape) -> str:
    """Return the results of a landscape as T4 JSON; a config's objective is the measurement named "time"."""
    about = landscape.recorded.about
    metadata = {
        "timeunit": "milliseconds",
        "hardware": {"hardware_description": [about.device.model_dump(mode="json")]},
        "environment": {"requirements": [f"{name}=={version}" for name, version in about.versions.items()]},
        "kernel": about.template,
        "problem_size": list(about.shape),
        "dtype": about.dtype,
        "timing": about.timing,
        "command": about.command,
    }
    results = [_t4_result(landscape, config) for config in landscape.space.configs]
    return json.dumps({"schema_version": T4_SCHEMA_VERSION, "metadata": metadata, "results": results}, allow_nan=False)


def _t4_result(landscape: Landscape, config: KernelConfig) -> dict[str, Any]:
    failure = landscape.failure_of(config)
    compile_ms, wall_ms = _costs_ms(landscape, config)
    measured = [] if failure else [("time", landscape.measure(config), "ms")]
    features = landscape.features.get(config.key(), {})
    measured += [(name, value, "byte" if name.endswith("bytes") else "") for name, value in features.items()]
    return {
        "timestamp": landscape.recorded.about.recorded_at or _NEVER,
        "configuration": dict(config.params),
        "objectives": ["time"],
        "times": {
            "compilation_time": compile_ms,
            # The files that are shared so far say "compilation", the schema the name above.
            "compilation": compile_ms,
            "runtimes": [] if failure else list(landscape.samples_ms(config)),
            "benchmark": wall_ms,
            "framework": 0.0,
            "search_algorithm": 0.0,
            "validation": 0.0,
        },
        "invalidity": _INVALIDITY.get(failure[0], "runtime") if failure else "correct",
        "correctness": 0.0 if failure is not None and failure[0] == "wrong" else 1.0,
        "measurements": [{"name": name, "value": value, "unit": unit} for name, value, unit in measured],
    }


def kernel_tuner(landscape: Landscape) -> str:
    """Return a cache file for `tune_kernel(..., cache=file, simulation_mode=True)`.

    Its `problem_size` is the shape, its `kernel_name` the template; the valid configs are the keys of `cache`, so the
    restriction is a function of a dict `p` that says whether `",".join(map(str, p.values()))` is one of the keys.
    """
    about = landscape.recorded.about
    cache = {}
    for config in landscape.space.configs:
        ordered = [config.params[name] for name in about.params]
        cache[",".join(map(str, ordered))] = _cached(landscape, config)
    return json.dumps(
        {
            "device_name": about.device.name,
            "kernel_name": about.template,
            "problem_size": list(about.shape),
            "tune_params_keys": list(about.params),
            "tune_params": {name: list(values) for name, values in about.params.items()},
            "objective": "time",
            # Last, because Kernel Tuner takes a file that does not end in three braces for a torn one.
            "cache": cache,
        },
        separators=(",", ":"),
        allow_nan=False,
    )


def _cached(landscape: Landscape, config: KernelConfig) -> dict[str, Any]:
    failure = landscape.failure_of(config)
    compile_ms, wall_ms = _costs_ms(landscape, config)
    timed: dict[str, Any] = (
        {"time": _ERRORS.get(failure[0], _ERROR)}
        if failure
        else {"time": landscape.measure(config), "times": list(landscape.samples_ms(config))}
    )
    return {
        **{name: config.params[name] for name in landscape.recorded.about.params},
        **timed,
        "compile_time": compile_ms,
        # Checking the values is a part of what measuring took.
        "verification_time": 0.0,
        "benchmark_time": wall_ms,
        "strategy_time": 0.0,
        "framework_time": 0.0,
        "timestamp": landscape.recorded.about.recorded_at or _NEVER,
    }


def _costs_ms(landscape: Landscape, config: KernelConfig) -> tuple[float, float]:
    """Return milliseconds of compiling and of measuring; without a record, the sum of the samples and no compiling."""
    compile_s, all_s = landscape.compile_s(config), landscape.cost_s(config)
    if all_s is None:
        return 0.0, float(sum(landscape.samples_ms(config)))
    return 1000 * (compile_s or 0.0), 1000 * (all_s - (compile_s or 0.0))


FORMATS: Mapping[str, Callable[[Landscape], str]] = {"t4": t4, "kernel_tuner": kernel_tuner}
