from __future__ import annotations

import subprocess
import sys

import pytest

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.runs import provenance


def make_meta(**changes):
    values = {
        "command": "agnitra optimize demo:x --api-key=sk-verysecretvalue",
        "argv": ["/some/where/bin/agnitra", "optimize", "--api-key", "sk-secret", "https://me:pw@host/x"],
        "seed": 3,
        "device": DeviceInfo(type="cpu", name="AMD EPYC", torch_version="2.13.0"),
        **changes,
    }
    return provenance.meta("20260114_093012_t_3fa9", "bench", "demo:x", **values)


def test_secrets_are_taken_out_of_argv_and_command():
    text = make_meta().to_json()
    assert "sk-verysecretvalue" not in text
    assert "sk-secret" not in text
    assert "me:pw" not in text


def test_the_program_and_the_interpreter_are_bare_names():
    meta = make_meta()
    assert meta.argv[0] == "agnitra"
    assert "/" not in meta.python.executable


def test_settings_are_redacted_by_their_names():
    meta = make_meta(config={"llm": {"api_key": "plain", "num_tokens": 5, "model": "m"}})
    assert meta.config == {"llm": {"api_key": "[redacted]", "num_tokens": 5, "model": "m"}}


def test_several_seeds_are_kept_by_name():
    assert make_meta(seed={"inputs": 0, "search": 7}).seeds == {"inputs": 0, "search": 7}


def test_versions_of_the_device_are_recorded():
    assert make_meta(versions={"agnitra-lab": "0.1.0", "triton": None}).versions == {
        "torch": "2.13.0",
        "agnitra-lab": "0.1.0",
    }


def test_only_listed_variables_are_recorded():
    recorded = provenance.recorded_environment(
        {
            "CUDA_VISIBLE_DEVICES": "0",
            "OMP_NUM_THREADS": "2",
            "TORCH_LOGS": "dynamo",
            "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "TRITON_INTERPRET": "1",
            "TRITON_CACHE_DIR": "/home/someone/.triton",
            "TORCH_HUB_TOKEN": "abc",
            "TRITON_API_KEY": "abc",
            "PATH": "/usr/bin",
            "OPENAI_API_KEY": "abc",
        }
    )
    assert recorded == {
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "2",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
        "TORCH_LOGS": "dynamo",
        "TRITON_CACHE_DIR": "[path]",
        "TRITON_INTERPRET": "1",
    }


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip


def test_outside_a_checkout_the_git_state_is_null(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    state = provenance.git_state(tmp_path)
    assert (state.commit_full, state.branch, state.dirty) == (None, None, None)


def test_without_git_the_git_state_is_null(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(tmp_path).commit_full is None


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "-b", "trunk")
    (tmp_path / "a.txt").write_text("1")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_a_clean_checkout_is_recorded(checkout):
    (checkout / "artifacts.txt").write_text("untracked")
    state = provenance.git_state(checkout)
    assert (len(state.commit_full), state.branch, state.dirty) == (40, "trunk", False)


def test_a_changed_file_makes_the_checkout_dirty(checkout):
    (checkout / "a.txt").write_text("2")
    assert provenance.git_state(checkout).dirty is True


@pytest.mark.parametrize("how", ["clean", "changed", "detached", "unborn", "bare", "stashed"])
def test_one_question_to_git_answers_as_three_do(checkout, tmp_path_factory, how):
    if how == "changed":
        (checkout / "a name.txt").write_text("2")
        git(checkout, "add", "a name.txt")
    if how == "detached":
        git(checkout, "checkout", "--detach")
    if how == "stashed":
        git(checkout, "config", "status.showStash", "true")
        (checkout / "a.txt").write_text("2")
        git(checkout, "stash")
    if how == "unborn":
        checkout = tmp_path_factory.mktemp(how)
        git(checkout, "init")
    if how == "bare":
        git(checkout, "clone", "--bare", ".", str(checkout / "bare.git"))
        checkout = checkout / "bare.git"
    state = provenance.git_state(checkout)
    assert state == provenance._git_state_by_parts(checkout)
    assert (state.commit_full is None) == (how == "unborn")
    assert state.dirty == (None if how in ("unborn", "bare") else how == "changed")


def test_importing_runs_loads_no_torch():
    script = (
        "import sys, agnitra_lab.runs.store, agnitra_lab.runs.read, agnitra_lab.runs.summary,"
        " agnitra_lab.runs.regressions, agnitra_lab.runs.provenance;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'plotly', 'pandas', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
