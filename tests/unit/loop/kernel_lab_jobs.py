"""Jobs that a kernel config may turn out to be: one that hangs, one that dies, one that compiles long, one that works.

Where a file "slow" lies in the working folder a process takes long to start.
"""

import os
import time
from pathlib import Path

from agnitra_lab.contracts.search import Measurement
from agnitra_lab.refine.bound import NO_BOUND
from agnitra_lab.refine.landscape_task import Compiled

_is_warm = False


def warm(device):
    """Start, which whoever measures without takes the time for."""
    global _is_warm
    time.sleep(3.5 if Path("slow").exists() else 0)
    _is_warm = True
    return ("cuda", 90, 32)


def load():
    """Need nothing."""


def compile_config(site, params, target, called=None):
    """Take as long as a small kernel, and note when it was over."""
    time.sleep(0.2)
    with Path("compiled").open("a") as file:
        file.write(f"{params['BLOCK_N']} {time.monotonic()}\n")
    return Compiled((), f"for {target[1]}")


def measure(site, config, device, bound=NO_BOUND):
    if not _is_warm:
        warm(device)
    if config.params["BLOCK_N"] == 1:
        time.sleep(60)
    if config.params["BLOCK_N"] == 3:
        time.sleep(1.5)
    if config.params["BLOCK_N"] == 2:
        os.abort()
    if config.params["BLOCK_N"] == 4:
        raise ValueError("gives another result than the reference")
    ms = config.params["BLOCK_N"] / 32
    is_cut = bound.is_hopeless((ms,) * 3)
    return Measurement(latency_ms=ms, samples_ms=(ms,) * (3 if is_cut else 20), is_aborted=is_cut)
