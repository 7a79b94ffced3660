"""The devices that the suite is spread over."""

import pytest
import torch

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.errors import UsageError
from agnitra_lab.loop import suite_devices


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Four devices by the numbers that torch gives them; a test changes what they are."""
    names = {f"cuda:{index}": "Fake H200" for index in range(4)}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(
        suite_devices, "_facts", lambda devices: [DeviceInfo(type="cuda", name=names[device]) for device in devices]
    )
    return names


def test_a_process_at_a_seat_sees_one_device(four: dict[str, str]) -> None:
    facts, seats = suite_devices.describe("cuda", 2)
    assert facts.name == "Fake H200"
    assert [seat.environment for seat in seats] == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert len({seat.turns_file for seat in seats}) == 2


def test_seats_are_named_as_the_driver_names_their_devices(
    four: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1")
    _, seats = suite_devices.describe("cuda", 2)
    assert [seat.environment["CUDA_VISIBLE_DEVICES"] for seat in seats] == ["3", "1"]


def test_devices_of_several_kinds_are_refused(four: dict[str, str]) -> None:
    four["cuda:1"] = "Fake H100"
    with pytest.raises(UsageError, match="Fake H200, Fake H100"):
        suite_devices.describe("cuda", 2)


@pytest.mark.parametrize(("device", "num_devices"), [("cuda", 5), ("cuda:1", 2)])
def test_more_devices_than_there_are_are_refused(four: dict[str, str], device: str, num_devices: int) -> None:
    with pytest.raises(UsageError, match=f"{num_devices} devices asked for"):
        suite_devices.describe(device, num_devices)
