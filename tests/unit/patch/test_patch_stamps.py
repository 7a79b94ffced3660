"""Tensors that moved or were written to are seen, by the loop of C as by Python."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.patch import stamps


@pytest.fixture(params=["c", "python"])
def _read_by(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(stamps, "_native", lambda: None)
    elif stamps._native() is None:
        pytest.skip("no compiler of C")


def weights(number: int) -> list[torch.Tensor]:
    return [torch.nn.Parameter(torch.zeros(index % 3, 2), requires_grad=False) for index in range(number)]


def move(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone() if tensor.numel() else torch.zeros(0, 2)


def write(tensor: torch.Tensor) -> None:
    tensor.add_(1.0)


def both(tensors: list[torch.Tensor]) -> tuple[stamps.Check, stamps.Check]:
    addresses = stamps.same_addresses(tensors, [tensor.data_ptr() for tensor in tensors])
    return addresses, stamps.same_versions(tensors, [tensor._version for tensor in tensors])


@pytest.mark.usefixtures("_read_by")
@pytest.mark.parametrize("number", [0, 1, 300])
def test_tensors_left_alone_are_as_they_were(number: int) -> None:
    addresses, versions = both(weights(number))
    for _ in range(3):
        assert addresses() is True and versions() is True


@pytest.mark.usefixtures("_read_by")
@pytest.mark.parametrize("index", [1, 5, 29])
def test_one_tensor_among_many_is_enough(index: int) -> None:
    tensors = weights(30)
    kept = [tensor.data for tensor in tensors]
    addresses, versions = both(tensors)
    move(tensors[index])
    assert addresses() is False and versions() is True
    tensors[index].data = kept[index]
    assert addresses() is True
    write(tensors[index])
    assert addresses() is True and versions() is False


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([move, write])), max_size=12))
def test_c_says_what_python_says(changes) -> None:
    tensors = weights(8)
    places, counts = [tensor.data_ptr() for tensor in tensors], [tensor._version for tensor in tensors]
    checks = both(tensors)
    for index, change in changes:
        change(tensors[index])
        assert checks[0]() is ([tensor.data_ptr() for tensor in tensors] == places)
        assert checks[1]() is ([tensor._version for tensor in tensors] == counts)


def test_a_write_through_a_view_counts() -> None:
    tensor = torch.zeros(4)
    _, versions = both([tensor])
    tensor[1:].zero_()
    assert not versions()


def test_what_is_no_tensor_never_reaches_c() -> None:
    native = stamps._native()
    if native is None:
        pytest.skip("no compiler of C")
    for arguments in ((), ((), b"1"), ([], b""), ((torch.zeros(1),), struct.pack("=2Q", 0, 0))):
        for function in (native.are_at, native.have_versions):
            with pytest.raises(TypeError, match="eight bytes"):
                function(*arguments)
    with pytest.raises(ValueError, match="no address"):
        native.connect(0, torch._C.TensorBase._version)
    with pytest.raises(TypeError):
        native.connect(1, torch.Tensor.data_ptr)


def test_without_a_compiler_python_reads_them(monkeypatch) -> None:
    build = pytest.importorskip("triton.runtime.build")

    def compile_module_from_src(**given):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(build, "compile_module_from_src", compile_module_from_src)
    assert stamps._native.__wrapped__() is None


def test_a_torch_whose_function_gives_something_else_is_noticed() -> None:
    class Wrong:
        def are_at(self, tensors, known):
            return True

        def have_versions(self, tensors, known):
            return True

    assert not stamps._agrees(Wrong())
