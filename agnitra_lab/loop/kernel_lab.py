"""Where kernel configs are tried: a worker process of the loop's own, started beside the profile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from agnitra_lab.benchmark.worker import Outcome, Worker
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.device.exclusive import shared_file
from agnitra_lab.errors import SearchError

_JOBS = "agnitra_lab.loop.kernel_jobs"
_FIRST_DEADLINE_S, _DEADLINE_S = 60.0, 20.0


class KernelLab:
    """Measures kernel configs where they can do no harm.

    Attributes:
        casualties: what ended a process, or hung: these configs never run in the parent.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = str(device)
        self._worker = Worker()
        self.casualties: list[Outcome] = []
        # Loading torch and starting the device takes some 6 s, in which the loop has other things to do.
        self._warming = threading.Thread(target=self._warm, daemon=True)
        self._warming.start()

    def measure(self, site: Site) -> Callable[[KernelConfig], float]:
        """Return `config -> latency_ms` at a site; it raises `SearchError` for whatever goes wrong."""

        def measured(config: KernelConfig) -> float:
            outcome = self._worker.run(
                f"{_JOBS}:measure",
                (site, config, self._device, shared_file()),
                name=config.key(),
                deadline_s=_DEADLINE_S,
            )
            if outcome.status == "ok":
                return float(outcome.value)
            if outcome.status != "error":
                self.casualties.append(outcome)
            raise SearchError(f"{outcome.status}: {outcome.message}")

        return measured

    def close(self) -> None:
        """End the process."""
        self._warming.join()
        self._worker.close()

    def _warm(self) -> None:
        self._worker.run(f"{_JOBS}:warm", (self._device,), name="start", deadline_s=_FIRST_DEADLINE_S)
