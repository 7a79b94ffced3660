"""Where kernel configs are tried: a worker process of the loop's own, and others that compile ahead of it.

All are started beside the profile, and share the cache that this process's Inductor uses, so that a kernel which the
lab has compiled is not compiled again where it is put into the model.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agnitra_lab.benchmark.worker import Outcome, Worker
from agnitra_lab.contracts.kernel import Launch, Site
from agnitra_lab.contracts.search import KernelConfig, Measurement
from agnitra_lab.device.exclusive import exclusive
from agnitra_lab.errors import SearchError
from agnitra_lab.loop.compilers import Compilers
from agnitra_lab.refine.bound import NO_BOUND, Bound
from agnitra_lab.refine.landscape_task import Target
from agnitra_lab.refine.measuring import Measure
from agnitra_lab.refine.search import Ahead
from agnitra_lab.refine.study import as_measurement

_JOBS = "agnitra_lab.loop.kernel_jobs"
_DEADLINE_S = 20.0
"""Of a measurement: past it a kernel hangs."""
_START_DEADLINE_S, _COMPILE_DEADLINE_S = 180.0, 60.0
"""Of what hangs hardly ever, and takes several times as long where the host has more to do than cores: a dozen loops
beside each other on 32 cores had kernels refused as hanging that were still being compiled."""
MAX_COMPILERS, MAX_AHEAD = 8, 4
"""Of one site. What a site's search asks for knows nothing of those ahead of it: by replay on 26 recorded landscapes
the best of 24 is 1.2% from the optimum with 4 ahead and 1.1% with none; of 40 it is 0.5% and 0.6%."""
_CORES_LEFT = 2
"""For this process and the one that measures."""


class KernelLab:
    """Measures kernel configs where they can do no harm.

    Args:
        device: where to measure.
        num_compilers: processes that compile ahead; by default the cores that are left, `MAX_COMPILERS` at most.

    Attributes:
        casualties: what ended a process, or hung: these configs never run in the parent.
    """

    def __init__(self, device: torch.device, num_compilers: int | None = None) -> None:
        self._device = str(device)
        self.casualties: list[Outcome] = []
        env = {"TRITON_CACHE_DIR": _cache_folder(device)} if device.type == "cuda" else {}
        self._worker = Worker(env=env)
        if num_compilers is None:
            num_compilers = max(min(_num_cores() - _CORES_LEFT, MAX_COMPILERS), 0) if device.type == "cuda" else 0
        self._compilers = Compilers(num_compilers, env) if num_compilers else None
        self._num_ahead = max(min(num_compilers, MAX_AHEAD), 1)
        self._ahead: dict[str, Future[Outcome]] = {}
        self._target: Target | None = None
        # Loading torch and starting the device takes some 6 s, in which the loop has other things to do.
        self._warming = threading.Thread(target=self._warm, daemon=True)
        self._warming.start()

    def prepare(self, site: Site, configs: Sequence[KernelConfig]) -> None:
        """Let configs be compiled that will be measured soon, in this order; one that fails to compile is told then."""
        if self._compilers is None:
            return
        self._warming.join()
        if self._target is None:
            return
        for config in configs:
            key = _key(site, config)
            if key not in self._ahead:
                self._ahead[key] = self._compilers.submit(site, config.params, self._target)

    def prepare_launches(self, launches: Sequence[Launch], tuned: Mapping[Site, KernelConfig]) -> None:
        """Let the chosen kernels be compiled as a graph calls them: with the norm, residual and layouts of its nodes.

        Args:
            launches: how they are called.
            tuned: site -> its config; others are compiled where they run.
        """
        if self._compilers is None or self._target is None:
            return
        for launch in launches:
            config = tuned.get(launch.site)
            if config is not None:
                self._compilers.submit(launch.site, config.params, self._target, launch)

    def ahead(self, site: Site) -> Ahead:
        """Return how a search at a site has its configs compiled before their turn."""
        return Ahead(partial(self.prepare, site), self._num_ahead)

    def measure(self, site: Site) -> Measure:
        """Return `config -> Measurement` at a site; it raises `SearchError` for whatever goes wrong.

        What is known of the best config goes along as `bound`: of one that is slower beyond doubt few samples are
        taken. In 312 searches of 24 configs on 26 recorded landscapes (`tests/benchmarks/early_end.py`) that is half of
        the configs, none of them within 2% of the search's best, and spares 41% of the samples.
        """

        def measured(config: KernelConfig, *, bound: Bound = NO_BOUND) -> Measurement:
            """Time a config, once it is compiled where somebody has begun to."""
            asked = self._ahead.get(_key(site, config))
            # What nobody has begun to compile is compiled where it is measured; what somebody has, not twice at once.
            if asked is not None and not asked.cancel():
                wait([asked], timeout=_COMPILE_DEADLINE_S)
            is_compiled = asked is not None and asked.done() and not asked.cancelled()
            deadline_s = _DEADLINE_S if is_compiled else _DEADLINE_S + _COMPILE_DEADLINE_S
            outcome = self._run("measure", (site, config, self._device, bound), config.key(), deadline_s)
            if outcome.status == "ok":
                return as_measurement(outcome.value)
            if outcome.status != "error":
                self.casualties.append(outcome)
            raise SearchError(f"{outcome.status}: {outcome.message}")

        return measured

    def library_ms(self, site: Site) -> float | None:
        """Return what the library takes for what the site's kernel computes; None where it could not be measured."""
        outcome = self._run("measure_library", (site, self._device), f"{site.key()} by the library", _DEADLINE_S)
        return as_measurement(outcome.value).latency_ms if outcome.status == "ok" else None

    def close(self) -> None:
        """End the processes."""
        if self._compilers is not None:
            self._compilers.stop()
        self._warming.join()
        self._worker.close()

    def _run(self, job: str, args: tuple[Any, ...], name: str, deadline_s: float) -> Outcome:
        self._warming.join()
        if self._worker.pid is None:
            # What ended the process before is not this job's fault, nor is the time to start another.
            self._warm()
        # Where processes take turns at the device, this one waits: the deadline is for the work.
        with exclusive():
            return self._worker.run(f"{_JOBS}:{job}", args, name=name, deadline_s=deadline_s)

    def _warm(self) -> None:
        outcome = self._worker.run(f"{_JOBS}:warm", (self._device,), name="start", deadline_s=_START_DEADLINE_S)
        self._target = outcome.value or self._target


def _key(site: Site, config: KernelConfig) -> str:
    return f"{site.key()} {config.key()}"


def _cache_folder(device: torch.device) -> str:
    """Where Inductor will have this process's kernels compiled from its first one on.

    Its own rule, read from its file alone: to import the package takes 2.1 s (one core of a Xeon), in which the
    processes would not have been started yet.
    """
    path = Path(torch.__file__).parent / "_inductor" / "runtime" / "cache_dir_utils.py"
    spec = importlib.util.spec_from_file_location("agnitra_lab_cache_dir_of_inductor", path)
    assert spec is not None and spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    return str(rule.triton_cache_dir(device.index or 0))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
