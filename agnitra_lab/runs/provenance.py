"""Who, what and where: `meta` of summary.json, without secrets and without paths of the machine."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath
from typing import Any

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.run import DeviceName, GitState, Kind, Meta, PythonState
from agnitra_lab.redact import redact, redact_text

GIT_TIMEOUT_S = 10.0
_RECORDED_NAMES = re.compile(
    r"CUDA_VISIBLE_DEVICES|(OMP|MKL|OPENBLAS)_NUM_THREADS|(PY)?TORCH[A-Z]*(_[A-Z0-9_]+)?|TRITON_[A-Z0-9_]+"
)
_SECRET_WORDS = re.compile(r"KEY|TOKEN|SECRET|PASS|AUTH|CREDENTIAL")


def meta(
    run_id: str,
    kind: Kind,
    topic: str,
    *,
    command: str | None,
    argv: Sequence[str],
    seed: int | Mapping[str, int],
    device: DeviceInfo | None,
    versions: Mapping[str, str | None] | None = None,
    config: Mapping[str, Any] | None = None,
    links: Mapping[str, str] | None = None,
) -> Meta:
    """Build the provenance of one run directory.

    Args:
        run_id: the run's id.
        kind: what the category's kind is (`layout.KINDS`).
        topic: what was run, as the user named it.
        command: the line that runs it again; None takes it from `argv`.
        argv: what the process was started with.
        seed: one seed, or several by name.
        device: where it ran; None when nothing was run.
        versions: package -> version, beside what `device` already says.
        config: the resolved settings, JSON-like.
        links: category -> relative path of the run's other directories.
    """
    return Meta(
        run_id=run_id,
        generated_at=utc_now(),
        kind=kind,
        topic=redact_text(topic),
        git=git_state(),
        python=PythonState(executable=Path(sys.executable).name or "python", version=platform.python_version()),
        command=redact_text(command) if command else shlex.join(recorded_argv(argv)),
        argv=recorded_argv(argv),
        seed=seed if isinstance(seed, int) else None,
        seeds=None if isinstance(seed, int) else dict(seed),
        device=DeviceName(type=device.type, name=device.name) if device else "none",
        versions={**_device_versions(device), **{name: text for name, text in (versions or {}).items() if text}},
        environment=recorded_environment(os.environ),
        config=redact(dict(config or {})),
        links=dict(links or {}),
    )


def utc_now() -> str:
    """The time as every artifact writes it: UTC, ISO 8601, to the second, ends in Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def git_state(folder: Path | None = None) -> GitState:
    """The commit of the checkout around `folder` (the working folder); all null outside one, or without git.

    Untracked files do not make a checkout dirty: every run adds some under artifacts/.
    """
    # One question answers all three: starting git takes 45 ms where the disk is slow.
    answer = _git(folder, "status", "--porcelain=v2", "--branch", "--no-ahead-behind", "--untracked-files=no")
    if answer is None:
        return _git_state_by_parts(folder)
    lines = answer.splitlines()
    said = dict(line.removeprefix("# branch.").partition(" ")[::2] for line in lines if line.startswith("# branch."))
    commit, branch = said.get("oid"), said.get("head")
    if not commit or commit == "(initial)":
        return GitState(commit_full=None, branch=None, dirty=None)
    return GitState(
        commit_full=commit,
        branch=redact_text(branch) if branch and branch != "(detached)" else None,
        dirty=any(not line.startswith("# ") for line in lines),
    )


def _git_state_by_parts(folder: Path | None) -> GitState:
    """The same outside a checkout, in one without a work tree, which has a commit all the same, and from an old git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return GitState(commit_full=None, branch=None, dirty=None)
    branch = _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return GitState(
        commit_full=commit,
        branch=redact_text(branch) if branch and branch != "HEAD" else None,
        dirty=None if changes is None else bool(changes),
    )


def recorded_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """The argument list without secrets; the program as a bare name."""
    if not argv:
        return ()
    program = PureWindowsPath(argv[0]).name or argv[0]
    return tuple(str(word) for word in redact([program, *argv[1:]]))


def recorded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what torch and triton do: a closed list, no secret names, no machine paths."""
    return {
        name: "[path]" if re.search(r"(^|[=:;,])(/|[A-Za-z]:\\)", value) else redact_text(value)
        for name, value in sorted(environment.items())
        if _RECORDED_NAMES.fullmatch(name) and not _SECRET_WORDS.search(name)
    }


def _device_versions(device: DeviceInfo | None) -> dict[str, str]:
    if device is None:
        return {}
    named = {
        "torch": device.torch_version,
        "triton": device.triton_version,
        "cuda": device.cuda_version,
        "driver": device.driver_version,
    }
    return {name: version for name, version in named.items() if version}


def _git(folder: Path | None, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
