"""The shell's own behaviour: exit codes, one-line errors, and documentation of every command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MLP = ROOT / "fixtures" / "models" / "mlp.py"


def agnitra(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from agnitra_lab.cli import main; main()", *arguments],
        capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("optimize", "missing.py:build"), 2, "No such file: missing.py"),
        (("optimize", f"{MLP}:build_raises"), 2, "ValueError: the weights file is missing"),
        (("profile", "demo:gpt-5"), 2, "Known demos: llama-decode"),
        (("profile", f"{MLP}:build_wrong_inputs"), 2, "63"),
        (("optimize", f"{MLP}:build_wrong_inputs"), 2, "63"),
        (("benchmark", f"{MLP}:build", "--candidate", "magic"), 2, "No candidate 'magic'"),
        (("optimize", f"{MLP}:build", "--price", "cheap"), 2, "price_per_gpu_hour is 'cheap'"),
        (("suggest", f"{MLP}:build", "--llm-max-usd", "0.05"), 2, "never guessed"),
        (("no-such-command",), 2, "no-such-command"),
        (("optimize",), 2, "Missing argument"),
        (("generate", "conv9d"), 1, "rms_norm"),
        (("generate", "rms_norm", "--shape", "wide"), 2, "ROWSxCOLUMNS"),
        (("refine", "conv9d"), 2, "No recorded landscape"),
        (("schemas", "invoice"), 2, "Known: telemetry"),
        (("report",), 2, "agnitra demo"),
        (("regressions", "-b", "nowhere", "-c", "nowhere"), 2, "nowhere"),
    ],
)
def test_a_wrong_argument_is_one_line_with_what_to_do(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    done = agnitra(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("manifest.json"))


def test_an_artifacts_folder_that_is_a_file_is_known_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    done = agnitra("optimize", "demo:bert@tiny", "--artifacts", "taken", cwd=tmp_path)
    assert done.returncode == 2
    assert "taken" in done.stderr
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_missing_compiler_is_exit_code_3(tmp_path: Path) -> None:
    done = agnitra("optimize", f"{MLP}:build", cwd=tmp_path, PATH="/nonexistent", CXX="no-such-compiler")
    assert done.returncode == 3, done.stderr
    assert "C++ compiler" in done.stderr


@pytest.mark.parametrize("arguments", [("profile", "demo:bert@tiny"), ("demo",), ("generate", "rms_norm")])
def test_a_missing_torch_is_exit_code_3_and_says_how_to_install_it(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from agnitra_lab.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 3, done.stderr
    assert "pip install torch" in done.stderr
    assert not list(tmp_path.rglob("manifest.json"))


def test_every_schema_is_written_to_the_folder(tmp_path: Path) -> None:
    done = agnitra("schemas", "--out", "schemas", cwd=tmp_path)
    assert done.returncode == 0
    usage = json.loads((tmp_path / "schemas" / "usage.schema.json").read_text())
    assert "gpu_hours_saved" in usage["properties"]


def test_every_command_is_in_the_readme_and_has_help() -> None:
    from agnitra_lab.cli import app

    readme = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert re.search(rf"`agnitra {name}\b", readme), f"agnitra {name} is not in the README"
        assert command.callback.__doc__
