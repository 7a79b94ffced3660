"""`agnitra landscape pack`, `show` and `export`, as the shell sees them."""

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agnitra_lab.cli.app import app
from agnitra_lab.errors import UsageError
from agnitra_lab.refine import replay

sys.path.insert(0, str(Path(__file__).parents[1] / "refine"))

from landscape_samples import LINES, recording


def agnitra(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["landscape", *arguments], standalone_mode=False)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.return_value, done.output


def test_pack_makes_a_landscape_of_each_finished_recording_of_a_folder(tmp_path: Path) -> None:
    recording(tmp_path / "a.jsonl")
    recording(tmp_path / "b.jsonl", LINES[:-1], shape=[8, 8])
    code, output = agnitra("pack", str(tmp_path), "--out", str(tmp_path / "out"))
    assert code == 1 and "not finished, left out" in output
    (path,) = (tmp_path / "out").iterdir()
    assert replay.load(path).measure(replay.load(path).optimum) > 0


def test_pack_does_not_replace_another_landscape_unasked(tmp_path: Path) -> None:
    given = [str(recording(tmp_path / "a.jsonl")), "--out", str(tmp_path / "out")]
    assert agnitra("pack", *given)[0] == 0
    assert agnitra("pack", *given)[0] == 0
    (path,) = (tmp_path / "out").iterdir()
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="another landscape"):
        agnitra("pack", *given)
    assert path.read_bytes() == b"mine"
    assert agnitra("pack", *given, "--replace")[0] == 0
    assert replay.load(path).template == "rms_norm"


def test_pack_says_when_there_is_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No recording"):
        agnitra("pack", str(tmp_path))


def test_show_lists_what_is_recorded_and_says_where() -> None:
    code, output = agnitra("show")
    assert code == 0
    assert "recorded on NVIDIA H200" in output
    assert all("/".join(path.stem.split("__")[:3]) in output for path in replay.every())


def test_show_prints_one_landscape_with_its_figures() -> None:
    code, output = agnitra("show", "rms_norm/4096x8192")
    assert code == 0
    for text in ("recorded on NVIDIA H200", "optimum", "quantiles", "importance", "failures", "eager", "copy"):
        assert text in output


def test_show_gives_json() -> None:
    _, output = agnitra("show", "softmax", "--json")
    rows = json.loads(output)
    assert len(rows) == 3
    assert all(row["measured_on"] == "recorded on NVIDIA H200" and row["worst_over_best"] > 1 for row in rows)


def test_export_writes_a_file_or_prints(tmp_path: Path) -> None:
    name, path = "rms_norm/4096x8192/bfloat16", tmp_path / "cache.json"
    assert agnitra("export", name, "--format", "kernel_tuner", "--out", str(path))[0] == 0
    assert json.loads(path.read_text())["kernel_name"] == "rms_norm"
    assert json.loads(agnitra("export", name)[1])["schema_version"] == "1.0.0"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("show", "conv9d"), "No recorded landscape 'conv9d'.*rms_norm/4096x8192"),
        (("show", "none.npz"), "cannot be read"),
        (("export", "softmax"), "3 landscapes match"),
    ],
)
def test_a_wrong_name_is_an_error_that_says_what_there_is(arguments: tuple[str, ...], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        agnitra(*arguments)
    assert re.search(problem, str(caught.value))
