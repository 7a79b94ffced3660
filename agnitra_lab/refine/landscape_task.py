"""What crosses between the processes of a recording. It loads no torch, so that whoever passes it on need not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agnitra_lab.contracts.kernel import Site

Target = tuple[str, int, int]
"""Triton's name of the backend, the architecture and the warp size, such as ("cuda", 90, 32)."""


@dataclass(frozen=True)
class Task:
    """Which landscape is measured.

    Attributes:
        site: template, shape and dtype.
        device: where, as torch names it.
        path: the recording, which the results are appended to.
    """

    site: Site
    device: str
    path: Path


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel of a config.

    Attributes:
        name: of the function.
        hash: its name in Triton's cache.
        compile_s: what compiling took, in s; None where the cache had it.
        shared_bytes: shared memory of a program.
    """

    name: str
    hash: str
    compile_s: float | None
    shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A config's kernels, or what the compiler said instead."""

    kernels: tuple[CompiledKernel, ...]
    detail: str = ""
