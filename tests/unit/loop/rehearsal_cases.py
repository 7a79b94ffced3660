"""Jobs that a candidate may turn out to be: one that hangs, one that dies, one that works."""

import os
import time

from agnitra_lab.contracts.measurement import CandidateResult
from agnitra_lab.loop.rehearsal import Rehearsed


def rehearse(part):
    name = part.candidate.name
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        os.abort()
    return Rehearsed(CandidateResult(name=name, status="rejected", reason="slower"), is_whole=False)
