"""Jobs that a kernel config may turn out to be: one that hangs, one that dies, one that works."""

import os
import time


def warm(device):
    return device


def measure(site, config, device, turns_file=None):
    if config.params["BLOCK_N"] == 1:
        time.sleep(60)
    if config.params["BLOCK_N"] == 2:
        os.abort()
    if config.params["BLOCK_N"] == 4:
        raise ValueError("gives another result than the reference")
    return 0.25
