"""What the processes of a recording do in these tests: times by formula, failures by config. Loads no torch."""

import os
import signal
from collections.abc import Sequence
from typing import Any

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.refine.landscape_recording import Lines
from agnitra_lab.refine.landscape_task import Compiled, CompiledKernel, Target

DEVICE = DeviceInfo(type="cuda", name="Fake H200", torch_version="2.11.0", triton_version="3.6.0")


def us_of(params: dict[str, int]) -> float:
    """A hundred microseconds at the best, far worse with one warp."""
    return 100.0 + params["num_stages"] + 5 * params["ROWS_PER_PROGRAM"] + (900 if params["num_warps"] == 1 else 0)


def warm(device: str) -> tuple[dict[str, Any], Target]:
    """Be an H200."""
    return DEVICE.model_dump(mode="json"), ("cuda", 90, 32)


def load() -> None:
    """Need nothing."""


def compile_config(site: Any, params: dict[str, int], target: Target, called: Any = None) -> Compiled:
    """Compile, but for what has 32 rows."""
    if params["ROWS_PER_PROGRAM"] == 32:
        return Compiled((), "CompilationError: too many rows")
    name = "_".join(map(str, params.values()))
    return Compiled((CompiledKernel("kernel", name, 0.25, 128),))


def fail_around(site: Any, params: dict[str, int], target: Target, called: Any = None) -> Compiled:
    """Find no compiler."""
    raise ImportError("no compiler here")


def screen(task: Any, items: Sequence[tuple[int, dict[str, int]]], num_samples: int) -> None:
    """Answer for each config; 16 rows are wrong, and one config of 8 rows ends the process."""
    lines = Lines(task.path)
    facts = {
        "n_regs": 32, "n_spills": 0, "shared_bytes": 128, "max_error": 0.0, "wrong_share": 0.0, "wall_s": 0.01,
        "num_recompiled": 0, "b": 0,
    }  # fmt: skip
    for config, params in items:
        lines.add("begin", i=config)
        if params["ROWS_PER_PROGRAM"] == 16:
            lines.add("failed", i=config, failure="wrong", detail="all elements differ")
            continue
        if (params["ROWS_PER_PROGRAM"], params["num_warps"], params["num_stages"]) == (8, 2, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        lines.add("ready", i=config, **facts, us=[us_of(params)] * num_samples)
    lines.add("clocks", t=1.0, mhz=1980.0, c=40.0, w=100.0)


def sweep(
    task: Any, items: Sequence[tuple[int, dict[str, int]]], number: int, num_samples: int, is_careful: bool
) -> None:
    """Take a round."""
    lines = Lines(task.path)
    for config, params in items:
        lines.add("samples", i=config, round=number, b=0, us=[us_of(params)] * num_samples, s=0.001)
    lines.add("clocks", t=2.0, mhz=1980.0, c=40.0, w=100.0)


def finals(task: Any, items: Sequence[tuple[int, dict[str, int]]], num_rounds: int, num_samples: int) -> None:
    """Measure the best again."""
    lines = Lines(task.path)
    for config, params in items:
        lines.add("again", i=config, us=[us_of(params)] * num_rounds * num_samples)


def baselines(task: Any) -> None:
    """Sample what it is compared with."""
    Lines(task.path).add("baseline", name="eager", us=[500.0] * 5)
