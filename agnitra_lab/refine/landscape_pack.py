"""From a finished recording to the small file that is kept: a landscape of 1,500 configs takes some 150 KB."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from agnitra_lab.contracts.base import first_problem
from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.errors import UsageError
from agnitra_lab.refine.landscape_file import About, LandscapeFile
from agnitra_lab.refine.landscape_recording import FAILURE_CLASSES, FIRST_ROUND, Recording


def pack(recording: Recording) -> LandscapeFile:
    """Turn a recording into arrays, its configs in the grid's order.

    Raises:
        UsageError: for a recording that is not finished, in which nothing ran, or with lines that cannot be read.
    """
    path = recording.path
    if not recording.is_done:
        raise UsageError(
            f"The recording {path} is not finished.", hint="Go on with `agnitra landscape record --resume`."
        )
    if recording.num_unreadable:
        raise UsageError(
            f"The recording {path} has {recording.num_unreadable} lines that cannot be read.",
            hint="A killed recording may end in one: delete that line. Others mean that the file was changed.",
        )
    try:
        codes = _codes(recording)
        order = sorted(range(len(codes)), key=codes.__getitem__)
        order = [config for config in order if config in recording.ready or config in recording.failures]
        about = _about(recording)
        grid = np.array([codes[config] for config in order], dtype=np.uint8).reshape(len(order), len(about.params))
        arrays = {"codes": grid}
        arrays |= _failures(recording, order, about) | _samples(recording, order) | _facts(recording, order)
    except (KeyError, ValueError, OverflowError, TypeError, AttributeError) as error:
        raise UsageError(f"The recording {path} does not hold together: {error}.") from error
    return LandscapeFile(about, arrays | _batches(recording))


def _codes(recording: Recording) -> list[tuple[int, ...]]:
    place = [{value: code for code, value in enumerate(values)} for values in recording.header["params"].values()]
    return [
        tuple(codes[value] for codes, value in zip(place, config, strict=True))
        for config in recording.header["configs"]
    ]


def _about(recording: Recording) -> About:
    header = recording.header
    try:
        device = DeviceInfo.model_validate(header["device"])
        return About(
            template=header["template"],
            shape=tuple(header["shape"]),
            dtype=header["dtype"],
            device=device,
            versions=_versions(device),
            # Where the folders of that machine lay is nobody's business elsewhere.
            command=re.sub(r"(?<=\s)/\S*/", "", header["command"]),
            timing=header["timing"],
            params={name: tuple(values) for name, values in header["params"].items()},
            failure_classes=FAILURE_CLASSES,
            failure_details=tuple(sorted({detail for _, detail in recording.failures.values()})),
            baselines_us={name: tuple(samples) for name, samples in recording.baselines.items()},
            recorded_at=header.get("recorded_at"),
        )
    except ValidationError as error:
        raise UsageError(f"{recording.path} has a header that is none: {first_problem(error)}.") from error


def _versions(device: DeviceInfo) -> dict[str, str]:
    found = {
        "torch": device.torch_version, "triton": device.triton_version, "cuda": device.cuda_version,
        "driver": device.driver_version, "python": device.python_version,
    }  # fmt: skip
    return {name: version for name, version in found.items() if version is not None}


def _failures(recording: Recording, order: Sequence[int], about: About) -> dict[str, NDArray[Any]]:
    classes = {name: code for code, name in enumerate(about.failure_classes, start=1)}
    details = {text: code for code, text in enumerate(about.failure_details)}
    failed = [recording.failures.get(config) for config in order]
    return {
        "failures": np.array([classes[given[0]] if given else 0 for given in failed], dtype=np.uint8),
        "details": np.array([details[given[1]] if given else 0 for given in failed], dtype=np.uint16),
    }


def _samples(recording: Recording, order: Sequence[int]) -> dict[str, NDArray[Any]]:
    # A config that ran and failed later has samples of the time before; what fails is worth none.
    taken = [sorted(recording.samples.get(c, {}).items()) if c in recording.ready else [] for c in order]
    flat = [(us, number, batch) for rounds in taken for number, (batch, samples) in rounds for us in samples]
    again = [recording.again.get(config, []) if config in recording.ready else [] for config in order]
    return {
        "num_samples": np.array([sum(len(us) for _, (_, us) in rounds) for rounds in taken], dtype=np.uint16),
        "samples_us": np.array([us for us, _, _ in flat], dtype=np.float32),
        "sample_rounds": np.array([number for _, number, _ in flat], dtype=np.uint8),
        "sample_batches": np.array([batch for _, _, batch in flat], dtype=np.uint16),
        "num_again": np.array([len(us) for us in again], dtype=np.uint16),
        "again_us": np.array([value for us in again for value in us], dtype=np.float32),
        "is_early_cut": np.array([[number for number, _ in rounds] == [FIRST_ROUND] for rounds in taken]),
    }


def _facts(recording: Recording, order: Sequence[int]) -> dict[str, NDArray[Any]]:
    ready = [recording.ready.get(config) for config in order]
    compile_s = [recording.compile_s_of(config) for config in order]
    return {
        "compile_s": np.array([-1 if value is None else value for value in compile_s], dtype=np.float32),
        "wall_s": np.array([recording.wall_s.get(config, -1) for config in order], dtype=np.float32),
        "n_regs": np.array([one.n_regs if one else -1 for one in ready], dtype=np.int32),
        "n_spills": np.array([one.n_spills if one else -1 for one in ready], dtype=np.int32),
        "shared_bytes": np.array([one.shared_bytes if one else -1 for one in ready], dtype=np.int32),
        "max_error": np.array(
            [-1 if one is None or one.max_error is None else one.max_error for one in ready], dtype=np.float32
        ),
        "wrong_share": np.array([one.wrong_share if one else -1 for one in ready], dtype=np.float32),
    }


def _batches(recording: Recording) -> dict[str, NDArray[Any]]:
    batches = recording.batches
    columns = {
        "sm_clock_mhz": [batch.sm_clock_mhz for batch in batches],
        "temperature_c": [batch.temperature_c for batch in batches],
        "power_w": [batch.power_w for batch in batches],
    }
    read = {
        name: np.array([-1 if value is None else value for value in values], dtype=np.float32)
        for name, values in columns.items()
    }
    return {"batch_time_s": np.array([batch.time_s for batch in batches], dtype=np.float64), **read}
