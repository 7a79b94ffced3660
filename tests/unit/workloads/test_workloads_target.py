"""TARGET strings: what each form gives, and what a wrong one says."""

from pathlib import Path

import pytest
import torch

from agnitra_lab.contracts import Workload
from agnitra_lab.errors import TargetError, UsageError
from agnitra_lab.workloads.adopt import as_workload
from agnitra_lab.workloads.target import resolve

MLP = Path(__file__).parents[3] / "fixtures" / "models" / "mlp.py"


def test_a_file_target_gives_the_model_with_its_inputs() -> None:
    workload = resolve(f"{MLP}:build")
    assert workload.name == "mlp"
    assert workload().shape == (8, 64)


def test_a_module_target_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models_for_target.py").write_text(MLP.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("my_models_for_target:build")().shape == (8, 64)


def test_an_export_archive_runs_with_its_example_inputs(tmp_path: Path) -> None:
    model, args = torch.nn.Linear(4, 3).eval(), (torch.randn(2, 4),)
    archive = tmp_path / "linear.pt2"
    torch.export.save(torch.export.export(model, args), archive)
    workload = resolve(str(archive))
    assert workload.name == "linear"
    assert torch.equal(workload(), model(*args))


def test_a_demo_target_takes_a_scale() -> None:
    assert resolve("demo:dlrm@tiny").settings["scale"] == "tiny"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_file.py:build", "No such file"),
        ("no_such_module_at_all:build", "No module named"),
        (f"{MLP}:biuld", r"has no function 'biuld'.*build"),
        (f"{MLP}:build_raises", r"ValueError: the weights file is missing.*line \d+ of mlp.py"),
        (f"{MLP}:build_wrong_type", "returned int"),
        ("mlp.py", "Not a target"),
        ("missing.pt2", "No such archive"),
        ("demo:gpt-5", "Known demos"),
        ("demo:bert@huge", "Known scales"),
    ],
)
def test_a_wrong_target_says_what_was_expected(target: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve(target)


def test_a_file_with_a_syntax_error_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\ndef build(:\n")
    with pytest.raises(TargetError, match=r"SyntaxError.*line 2 of broken.py"):
        resolve(f"{tmp_path / 'broken.py'}:build")


def test_a_damaged_archive_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"not a zip")
    with pytest.raises(TargetError, match=r"not a torch\.export archive"):
        resolve(str(tmp_path / "bad.pt2"))


def test_inputs_may_be_a_tensor_a_sequence_or_a_mapping() -> None:
    x = torch.randn(2, 4)
    model = torch.nn.Linear(4, 3)
    assert as_workload(model, x).args == (x,)
    assert as_workload(model, [x]).args == (x,)
    assert as_workload(model, {"input": x})().shape == (2, 3)


def test_a_workload_with_inputs_beside_it_is_refused() -> None:
    with pytest.raises(UsageError, match="carries its own inputs"):
        as_workload(Workload("w", print), (1,))


def test_something_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(UsageError, match="must be callable, got int"):
        as_workload(3)
