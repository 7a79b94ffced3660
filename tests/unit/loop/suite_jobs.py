"""What a process of the suite does in these tests, in place of a measurement. Loads no torch."""

import os
import signal
import time
from pathlib import Path

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.suite import SuiteAssignment, SuiteResult

DEVICE = DeviceInfo(type="cuda", name="Fake H200")


def _done(given: SuiteAssignment) -> SuiteResult:
    return SuiteResult(
        workload=given.name, family="language", scale=given.scale, status="done", device=DEVICE,
        is_cache_warm=given.is_cache_warm, num_jobs=given.num_jobs, wall_s=0.1, command=given.command,
    )  # fmt: skip


def always(given: SuiteAssignment) -> SuiteResult:
    """Be done."""
    return _done(given)


def by_name(given: SuiteAssignment) -> SuiteResult:
    """Fail in the way that the name stands for; every other workload is done."""
    if given.name == "lstm":
        os.kill(os.getpid(), signal.SIGSEGV)
    if given.name == "gru":
        raise ValueError("no such weights")
    if given.name == "cumsum":
        os.kill(os.getpid(), signal.SIGTERM)  # as the process does to itself once its time is up
    return _done(given)


def sleeps(given: SuiteAssignment) -> SuiteResult:
    """Take far longer than anybody waits, except for one."""
    if given.name != "pooling":
        time.sleep(300)
    return _done(given)


def caches(given: SuiteAssignment) -> SuiteResult:
    """Tell where compiled code would go."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    Path(os.environ["SUITE_TEST_FILE"]).write_text("\n".join(os.environ[name] for name in names))
    return _done(given)


def meets(given: SuiteAssignment) -> SuiteResult:
    """Be done only when another process is at work at the same time."""
    folder = Path(os.environ["SUITE_TEST_FILE"])
    folder.mkdir(exist_ok=True)
    (folder / given.name).write_text(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {given.turns_file.name}")
    deadline_s = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > deadline_s:
            raise TimeoutError("nobody else came")
        time.sleep(0.02)
    return _done(given)
