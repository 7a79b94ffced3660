"""The landscape's file: the same after the disk, and refused by its path when it is torn, foreign or inconsistent."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from landscape_samples import about, arrays, older, small

from agnitra_lab.errors import UsageError
from agnitra_lab.refine.landscape_file import LandscapeFile, read


def test_a_landscape_survives_the_disk(tmp_path: Path) -> None:
    landscape = small()
    path = tmp_path / landscape.file_name()
    path.write_bytes(landscape.to_bytes())
    found = read(path)
    assert path.name == "rms_norm__4x8__bfloat16__nvidia-h200.npz"
    assert found.about == landscape.about
    assert found.arrays.keys() == landscape.arrays.keys()
    assert all(np.array_equal(found.arrays[name], array) for name, array in landscape.arrays.items())
    assert found.to_bytes() == landscape.to_bytes()


def test_facts_that_were_not_recorded_are_absent() -> None:
    found = older()
    assert found.known("compile_s", 0) is None
    assert found.features_of(0) == {}
    assert found.finalists() == []
    assert len(found.again_us(0)) == 0
    assert small().known("n_regs", 3) is None


@given(st.lists(st.lists(st.integers(1, 10**9), min_size=1, max_size=9), min_size=1, max_size=4))
def test_samples_come_back_to_the_config_that_they_were_taken_of(taken_ns: list[list[int]]) -> None:
    # To seven digits, which is what float32 keeps.
    taken = [[float(f"{ns:.6e}") / 1000 for ns in samples] for samples in taken_ns]
    count = len(taken)
    landscape = LandscapeFile(
        about(),
        {
            "codes": arrays()["codes"][:count],
            "failures": np.zeros(count, dtype=np.uint8),
            "details": np.zeros(count, dtype=np.uint16),
            "num_samples": np.array([len(samples) for samples in taken], dtype=np.uint16),
            "samples_us": np.array([us for samples in taken for us in samples], dtype=np.float32),
        },
    )
    for index, samples in enumerate(taken):
        assert landscape.samples_us(index).tolist() == pytest.approx(samples, rel=1e-6, abs=5e-4)


def written(**more: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **more)
    return buffer.getvalue()


def text(**more: Any) -> Any:
    return np.frombuffer(about(**more).to_json().encode(), dtype=np.uint8)


class Bomb:
    """Says when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("something was unpickled",))


WHOLE = small().to_bytes()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "torn or no npz"),
        (b"\xff\xfe\x00\x01", "torn or no npz"),
        (b'{"schema_version": "agnitra.landscape.v1"}', "torn or no npz"),
        (WHOLE[:100], "torn or no npz"),
        (WHOLE[: len(WHOLE) // 2], "torn or no npz"),
        (WHOLE[:-30], "torn or no npz"),
        (written(**arrays()), "no metadata"),
        (written(about=np.frombuffer(b"{", dtype=np.uint8), **arrays()), "Not a valid About"),
        (written(about=text(schema_version="another.tool.v9"), **arrays()), "schema_version"),
        (written(about=text(), **arrays(codes=np.array([[Bomb(), 0]] * 4, dtype=object))), "pickled"),
        (written(about=text(), **arrays(samples_us=None)), "no array samples_us"),
        (written(about=text(), surprise=np.zeros(3), **arrays()), "surprise"),
        (written(about=text(), **arrays(samples_us=np.array([np.nan] * 9, dtype=np.float32))), "which is no time"),
        (written(about=text(), **arrays(samples_us=np.array([-1.0] * 9, dtype=np.float32))), "which is no time"),
        (written(about=text(), **arrays(again_us=np.array([np.inf] * 4, dtype=np.float32))), "which is no time"),
        (written(about=text(), **arrays(compile_s=np.array([np.nan] * 4))), "compile_s holds a value"),
        (written(about=text(), **arrays(samples_us=np.ones(8, dtype=np.float32))), r"samples_us has the shape \(8,\)"),
        (written(about=text(), **arrays(n_regs=np.ones(3, dtype=np.int32))), r"n_regs has the shape \(3,\)"),
        (written(about=text(), **arrays(codes=np.full((4, 2), 7, dtype=np.uint8))), "outside of the grid"),
        (written(about=text(), **arrays(codes=np.zeros((4, 2), dtype=np.uint8))), "occurs twice"),
        (written(about=text(), **arrays(codes=np.zeros((4, 2)))), "codes holds float64"),
        (written(about=text(), **arrays(failures=np.array([0, 0, 0, 77], dtype=np.uint8))), "metadata does not list"),
        (written(about=text(), **arrays(failures=np.zeros(4, dtype=np.uint8))), "has no samples"),
        (written(about=text(), **arrays(failures=np.full(4, 3, dtype=np.uint8))), "no config ran"),
    ],
)  # fmt: skip
def test_a_torn_foreign_or_inconsistent_file_is_refused_by_its_path_with_a_hint(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "landscape.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"landscape\.npz is no recorded landscape.*{problem}") as caught:
        read(path)
    assert "agnitra landscape" in (caught.value.hint or "")


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_file_with_one_wrong_byte_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "landscape.npz"
    path.write_bytes(WHOLE[:place] + bytes([WHOLE[place] ^ change]) + WHOLE[place + 1 :])
    try:
        found = read(path)
    except UsageError as error:
        assert "landscape.npz" in str(error)
    else:
        assert found.arrays


def test_a_file_that_unpacks_to_more_than_any_landscape_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agnitra_lab.refine.landscape_file._MOST_BYTES", 1000)
    path = tmp_path / "landscape.npz"
    path.write_bytes(WHOLE)
    with zipfile.ZipFile(path) as archive:
        assert sum(member.file_size for member in archive.infolist()) > 1000
    with pytest.raises(UsageError, match="unpacks to"):
        read(path)


@pytest.mark.parametrize("name", ["none.npz", ""])
def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / name)
