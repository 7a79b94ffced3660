"""Inductor's C++ compiler, made ready while something else runs.

The first compilation of a machine asks which vector instructions a compiled program may use: it compiles a probe, loads
it in a process of its own, and remembers the answer. That takes 4 to 6 s of one core (two cores, GCC 12), in which the
loop has other work to do.
"""

from __future__ import annotations

import threading
from typing import Any


def warm_up(device_type: str) -> threading.Thread | None:
    """Find out in a thread which vector instructions there are; whoever compiles meanwhile waits for the same answer.

    Args:
        device_type: of the model; only programs for the CPU need it.

    Returns:
        The thread; None where there is nothing to do.
    """
    if device_type != "cpu":
        return None
    thread = threading.Thread(target=_ask, name="agnitra-toolchain", daemon=True)
    thread.start()
    return thread


def _ask() -> None:
    try:
        from torch._inductor import cpu_vec_isa

        if not cpu_vec_isa.pick_vec_isa():
            _forget(cpu_vec_isa)
    except Exception:
        # Inductor asks again when it compiles, and its error says what is wrong.
        return


def _forget(module: Any) -> None:
    """Drop the answer "none": it is also that of a probe whose compiler was ended, as by a Cancel, and would stay."""
    module.valid_vec_isa_list.cache_clear()
    for kind in (module.VecISA, *map(type, module.supported_vec_isa_list)):
        for kept in vars(kind).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()
