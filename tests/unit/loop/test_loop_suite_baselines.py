"""The raw baselines: what compiling them measures, what a failure leaves, and the turns of Inductor's tuning."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from agnitra_lab.benchmark.state import ModuleState
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.device.exclusive import DeviceTurn, take_turns
from agnitra_lab.loop import suite_baselines as baselines
from agnitra_lab.loop.suite_baselines import Contestant

CPU = torch.device("cpu")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class Counter(nn.Module):
    """Counts its calls in a buffer, as a cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * 2 + self.calls


@pytest.fixture
def counted() -> tuple[Workload, ModuleState]:
    model = Counter().eval()
    return Workload("counter", model, (torch.ones(8),)), ModuleState(model)


def test_eager_is_the_model_itself(counted: tuple[Workload, ModuleState]) -> None:
    workload, state = counted
    side = baselines.compile_baseline(workload, "eager", state, CPU)
    assert side.call is workload.model
    assert side.compile_s is None


def test_a_mode_is_compiled_with_caches_of_its_own_and_the_model_is_as_it_was(
    counted: tuple[Workload, ModuleState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, state = counted
    seen: list[str] = []

    def compile_model(model: nn.Module, *, mode: str) -> nn.Module:
        seen.extend([mode, *(os.environ[name] for name in CACHES)])
        return model

    before = {name: str(tmp_path / name) for name in CACHES}
    for name, folder in before.items():
        monkeypatch.setenv(name, folder)
    monkeypatch.setattr(torch, "compile", compile_model)
    with baselines.cold_caches(tmp_path / "default"):
        side = baselines.compile_baseline(workload, "default", state, CPU)
        side = baselines.settle(workload, side, state, CPU)
    assert side.error is None
    assert side.compile_s is not None
    assert side.compile_s > 0
    assert float(workload.model.calls) == 0.0
    assert seen[0] == "default"
    assert all(Path(folder).is_relative_to(tmp_path / "default") for folder in seen[1:])
    assert {name: os.environ.get(name) for name in before} == before


def test_what_does_not_compile_says_why_and_has_no_call(counted: tuple[Workload, ModuleState]) -> None:
    workload, state = counted
    side = baselines.compile_baseline(workload, "fastest", state, CPU)
    assert side.call is None
    assert "fastest" in (side.error or "")


def test_a_contestant_that_breaks_at_its_second_call_is_out(counted: tuple[Workload, ModuleState]) -> None:
    workload, state = counted
    calls: list[int] = []

    def breaks(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("graph is gone")
        return x

    side = baselines.settle(workload, Contestant("default", breaks, 1.5), state, CPU)
    assert side.call is None
    assert side.error == "RuntimeError: graph is gone"
    assert side.compile_s == 1.5


def test_inductors_measurements_wait_for_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.benchmarking import benchmarker

    names = [name for name in dir(type(benchmarker)) if name.startswith("benchmark")]
    assert "benchmark_gpu" in names
    seen: list[bool] = []

    def measure(*args: object, **kwargs: object) -> float:
        import fcntl

        descriptor = os.open(tmp_path / "turns", os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen.append(False)
        except BlockingIOError:
            seen.append(True)
        finally:
            os.close(descriptor)
        return 1.0

    for name in names:
        monkeypatch.setattr(benchmarker, name, measure)
    baselines.autotune_in_turns()
    take_turns(tmp_path / "turns")
    try:
        assert benchmarker.benchmark_gpu(lambda: None) == 1.0
        assert benchmarker.benchmark(lambda: None, (), {}) == 1.0
    finally:
        take_turns(None)
    assert seen == [True, True]
    with DeviceTurn(tmp_path / "turns").hold():
        pass
