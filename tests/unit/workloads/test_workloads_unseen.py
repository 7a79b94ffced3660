"""The workloads that the optimiser was not made for (`tests/benchmarks/unseen`) run at the size of a CPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from agnitra_lab.errors import MissingError
from agnitra_lab.graph.tree import tensors
from agnitra_lab.workloads.target import resolve

UNSEEN = Path(__file__).parents[2] / "benchmarks" / "unseen"


def _listing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("targets_of_unseen_workloads", UNSEEN / "targets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LISTING = _listing()
PACKAGES = {"hf": "transformers", "timm": "timm"}


@pytest.fixture(autouse=True)
def _tiny_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", [f"{part}:{name}" for part in LISTING.PARTS for name in LISTING.functions(part)])
def test_an_unseen_workload_gives_finite_outputs_that_are_spread(name: str) -> None:
    part, _, function = name.partition(":")
    if part == "published":
        pytest.importorskip(PACKAGES[function.partition("_")[0]], exc_type=ImportError)
    workload = resolve(f"{UNSEEN / part}.py:{function}")
    assert workload.settings["scale"] == "tiny"
    with torch.no_grad():
        outputs = [output for _, output in tensors(workload())]
    assert outputs
    for output in outputs:
        assert torch.isfinite(output).all()
        assert output.double().std() > 1e-4 if output.numel() > 1 else output != 0


def test_a_published_model_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingError, match="transformers is needed") as raised:
        resolve(f"{UNSEEN / 'published'}.py:hf_llama")
    assert raised.value.hint is not None and "pip install transformers" in raised.value.hint


def test_the_listing_names_the_workloads_of_a_part_as_the_shell_takes_them() -> None:
    command = [sys.executable, "targets.py", "latent", "windows"]
    listed = subprocess.run(command, cwd=UNSEEN, capture_output=True, text=True, check=True).stdout.split()
    assert listed == ["latent.py:deepseek_mla", "windows.py:swin"]


def test_an_unknown_part_is_answered_with_the_known_ones() -> None:
    command = [sys.executable, "targets.py", "langauge"]
    answer = subprocess.run(command, cwd=UNSEEN, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "no such part: langauge" in answer.stderr
    assert all(part in answer.stderr for part in LISTING.PARTS)


def test_every_module_of_workloads_is_a_part() -> None:
    shared = {"__init__", "sizes", "targets"}
    assert {path.stem for path in UNSEEN.glob("*.py")} - shared == set(LISTING.PARTS)
