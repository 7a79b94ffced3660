"""A small landscape and a small recording, made up for tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.refine.landscape_file import About, LandscapeFile
from agnitra_lab.refine.landscape_recording import FAILURE_CLASSES, SCHEMA

H200 = DeviceInfo(
    type="cuda",
    name="NVIDIA H200",
    arch="sm90",
    torch_version="2.11.0",
    triton_version="3.6.0",
    python_version="3.12.3",
)
PARAMS = {"BLOCK_N": (8, 16), "num_warps": (1, 2)}
# BLOCK_N, num_warps -> its samples in us; the fourth one failed.
SAMPLES = {(8, 1): [4.0, 4.2, 3.8], (8, 2): [3.0, 3.1, 3.2], (16, 1): [3.3, 3.0, 3.1]}


def about(shape: tuple[int, ...] = (4, 8), **more: Any) -> About:
    return About(
        template="rms_norm", shape=shape, dtype="bfloat16", device=H200, versions={"triton": "3.6.0"},
        command="a test", timing="made up for a test", params=PARAMS, failure_classes=FAILURE_CLASSES,
        failure_details=("out of resource: shared memory",),
    ).model_copy(update=more)  # fmt: skip


def arrays(**more: Any) -> dict[str, Any]:
    found = {
        "codes": np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.uint8),
        "failures": np.array([0, 0, 0, 1 + FAILURE_CLASSES.index("oom")], dtype=np.uint8),
        "details": np.zeros(4, dtype=np.uint16),
        "num_samples": np.array([3, 3, 3, 0], dtype=np.uint16),
        "samples_us": np.array([us for taken in SAMPLES.values() for us in taken], dtype=np.float32),
        "num_again": np.array([0, 2, 2, 0], dtype=np.uint16),
        "again_us": np.array([3.3, 3.5, 3.2, 3.0], dtype=np.float32),
        "is_early_cut": np.array([True, False, False, False]),
        "compile_s": np.array([0.5, 0.3, 0.7, 0.2], dtype=np.float32),
        "wall_s": np.array([0.01, 0.02, 0.03, -1], dtype=np.float32),
        "n_regs": np.array([32, 64, 40, -1], dtype=np.int32),
        "n_spills": np.array([0, 8, 0, -1], dtype=np.int32),
        "shared_bytes": np.array([128, 256, 0, -1], dtype=np.int32),
    }
    return {name: value for name, value in (found | more).items() if value is not None}


def small(shape: tuple[int, ...] = (4, 8), **more: Any) -> LandscapeFile:
    return LandscapeFile(about(shape), arrays(**more))


def older(shape: tuple[int, ...] = (4, 8)) -> LandscapeFile:
    """As the older recorder left it: samples and nothing else."""
    needed = ("codes", "failures", "details", "num_samples", "samples_us")
    return LandscapeFile(about(shape), {name: value for name, value in arrays().items() if name in needed})


HEADER = {
    "kind": "header", "schema": SCHEMA, "template": "rms_norm", "shape": [4, 8], "dtype": "bfloat16",
    "device": H200.model_dump(mode="json"), "params": {name: list(values) for name, values in PARAMS.items()},
    "configs": [[16, 1], [8, 1], [16, 2], [8, 2]], "timing": "made up for a test",
    "command": "agnitra landscape record rms_norm --out /home/me/out --cache /tmp/cache",
    "recorded_at": "2026-11-26T19:22:13Z",
}  # fmt: skip


def ready(config: int, us: list[float], **more: Any) -> dict[str, Any]:
    facts = {
        "n_regs": 32, "n_spills": 0, "shared_bytes": 128, "max_error": 0.03, "wrong_share": 0.0, "wall_s": 0.01,
        "num_recompiled": 0,
    }  # fmt: skip
    return {"kind": "ready", "i": config, **facts, "b": 0, "us": us} | more


LINES: list[dict[str, Any]] = [
    {"kind": "compiled", "i": 0, "kernels": [["kernel", "aa", 0.7, 128]]},
    {"kind": "compiled", "i": 1, "kernels": [["kernel", "bb", 0.3, 128], ["combine", "cc", 0.2, 64]]},
    {"kind": "compiled", "i": 2, "kernels": [["kernel", "dd", None, 128]]},
    {"kind": "compiled", "i": 3, "kernels": [["kernel", "ee", 0.3, 256], ["combine", "cc", None, 64]]},
    {"kind": "begin", "i": 0},
    ready(0, [3.3, 3.0]),
    {"kind": "begin", "i": 1},
    ready(1, [4.0, 4.2], max_error=None),
    {"kind": "clocks", "t": 100.0, "mhz": 1980.0, "c": 40.0, "w": 120.0},
    {"kind": "failed", "i": 2, "failure": "oom", "detail": "out of resource: shared memory"},
    ready(3, [3.0, 3.1], n_regs=64),
    {"kind": "clocks", "t": 101.0, "mhz": None, "c": 41.0, "w": 121.0},
    {"kind": "samples", "i": 0, "round": 1, "b": 0, "us": [3.1], "s": 0.02},
    {"kind": "samples", "i": 3, "round": 1, "b": 0, "us": [3.2], "s": 0.02},
    {"kind": "clocks", "t": 102.0, "mhz": 1980.0, "c": 41.0, "w": 121.0},
    {"kind": "again", "i": 0, "us": [3.2, 3.0]},
    {"kind": "again", "i": 3, "us": [3.3, 3.5]},
    {"kind": "baseline", "name": "eager", "us": [9.0, 9.2, 9.1]},
    {"kind": "done"},
]


def recording(path: Path, lines: list[dict[str, Any]] | None = None, **header: Any) -> Path:
    """Write a recording and return its path."""
    rows = [HEADER | header, *(LINES if lines is None else lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
