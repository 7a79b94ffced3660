"""Times by part of the model, before and after: nothing is lost, and each limit is the work's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from agnitra_lab.contracts.device import DevicePeaks
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.contracts.report import Region
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.loop.regions import regions
from agnitra_lab.profiler import capture
from agnitra_lab.profiler.telemetry import Telemetry

PEAKS = DevicePeaks(copy_bandwidth_gb_per_s=1.0, gemm_tflop_per_s=1e6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.up(self.norm(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(Block(), Block(), Block()), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


WORKLOAD = Workload("stack", Stack().eval(), (torch.randn(64, 32),))


def _change(action: str, module_path: str, kind: Any = "rewrite") -> PatchDescriptor:
    return PatchDescriptor(
        name=action, action=action, kind=kind, node="n", module_path=module_path, source=None, replaced=(),
        replacement="", config={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def profiles() -> tuple[Telemetry, Telemetry]:
    return capture.profile(WORKLOAD), capture.profile(WORKLOAD)


@pytest.fixture(scope="module")
def found(profiles: tuple[Telemetry, Telemetry]) -> dict[str, Region]:
    changes = [_change("fuse", "layers.1"), _change("options", "layers.0.up", kind="options")]
    return {region.place: region for region in regions(WORKLOAD, *profiles, changes, PEAKS)}


def test_equal_parts_of_numbered_layers_are_one_region(found: dict[str, Region]) -> None:
    assert {"layers.*.norm", "layers.*.up", "head"} <= set(found)
    assert not any("0" in place or "1" in place for place in found)


def test_the_times_of_all_regions_add_up_to_the_two_profiles(
    found: dict[str, Region], profiles: tuple[Telemetry, Telemetry]
) -> None:
    before, after = profiles
    assert sum(region.baseline_ms for region in found.values()) == pytest.approx(before.nodes["latency_ms"].sum())
    assert sum(region.candidate_ms for region in found.values()) == pytest.approx(after.nodes["latency_ms"].sum())


def test_the_limit_of_a_region_is_one_read_of_the_weights_of_all_its_layers(found: dict[str, Region]) -> None:
    num_bytes = 3 * (32 * 32 + 32) * 4
    assert found["layers.*.up"].limit_ms == pytest.approx(num_bytes / 1e6)


def test_a_change_shows_at_its_place_and_below_but_options_of_the_whole_graph_do_not(found: dict[str, Region]) -> None:
    assert found["layers.*.up"].changes == ("fuse",)
    assert found["head"].changes == ()


def test_without_measured_ceilings_there_is_no_limit(profiles: tuple[Telemetry, Telemetry]) -> None:
    assert {region.limit_ms for region in regions(WORKLOAD, *profiles, (), None)} == {None}
