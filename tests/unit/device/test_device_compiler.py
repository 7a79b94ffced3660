"""The compiler is found, or its absence is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from agnitra_lab.device.compiler import require_cpp_compiler
from agnitra_lab.errors import MissingError


def _script(folder: Path, name: str, exit_code: int) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    path.chmod(0o755)
    return path


def test_cxx_names_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = _script(tmp_path, "my-c++", 0)
    monkeypatch.setenv("CXX", str(compiler))
    assert require_cpp_compiler() == str(compiler)


def test_a_machine_without_a_compiler_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match=r"no C\+\+ compiler.*apt-get install g\+\+.*CXX"):
        require_cpp_compiler()


def test_a_wrong_cxx_is_named_even_though_another_compiler_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingError, match="CXX=no-such-compiler"):
        require_cpp_compiler()


def test_a_compiler_that_does_not_run_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(_script(tmp_path, "broken-c++", 3)))
    with pytest.raises(MissingError, match="does not run"):
        require_cpp_compiler()
