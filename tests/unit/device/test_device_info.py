"""Device facts and the choice of a device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from agnitra_lab.device import cpu
from agnitra_lab.device.info import default_device, describe, device_of
from agnitra_lab.errors import MissingError, UsageError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def test_the_default_device_is_one_that_describe_knows() -> None:
    assert describe().type == default_device()


def test_a_cpu_is_described_with_its_name_and_the_versions_that_run() -> None:
    info = describe("cpu")
    assert info.type == "cpu"
    assert info.name
    assert info.num_threads == torch.get_num_threads()
    assert info.torch_version == str(torch.__version__)
    assert info.num_multiprocessors is None


@no_cuda
def test_asking_for_an_absent_gpu_names_what_is_missing() -> None:
    with pytest.raises(MissingError, match="no CUDA device"):
        describe("cuda")


@pytest.mark.parametrize("name", ["abacus", "meta"])
def test_an_unknown_device_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        describe(name)


def test_the_device_of_nested_arguments_is_that_of_the_accelerator_tensor_among_them() -> None:
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    on_meta = torch.empty(2, device="meta")
    assert device_of(torch.zeros(1), {"a": [Output(on_meta)]}).type == "meta"


def test_the_device_of_a_module_is_that_of_its_parameters() -> None:
    assert device_of(torch.nn.Linear(2, 2, device="meta")).type == "meta"


def test_objects_without_tensors_are_on_the_cpu() -> None:
    assert device_of("text", 3, None, lambda: None) == torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"), [("107520K\n", 107520 * 1024), ("2M", 2 * 2**20), ("64", 64), ("many", None), ("-1K", None)]
)
def test_cache_sizes_are_read_in_the_kernels_notation(text: str, size: int | None) -> None:
    assert cpu.parse_size(text) == size
