"""Processes without a GPU that compile kernel configs ahead of whoever runs them, into Triton's disk cache.

A config costs 0.1 to 2 s to compile, most of what a measurement of it takes, and only one process measures.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future

from agnitra_lab.benchmark.worker import Outcome, Worker
from agnitra_lab.contracts.kernel import Launch, Site
from agnitra_lab.errors import AgnitraError
from agnitra_lab.refine.landscape_task import Target

_JOBS = "agnitra_lab.loop.compile_jobs"
_DEADLINE_S = 60.0

_Task = tuple[Site, dict[str, int], Target, Launch | None, Future[Outcome]]


class Compilers:
    """Compiles in the order of asking, several configs at once.

    Args:
        num_processes: how many.
        env: variables of the processes, the folder of Triton's cache among them.
    """

    def __init__(self, num_processes: int, env: Mapping[str, str]) -> None:
        self._env = {**env, "CUDA_VISIBLE_DEVICES": ""}
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(num_processes)]
        for thread in self._threads:
            thread.start()

    def submit(
        self, site: Site, params: dict[str, int], target: Target, called: Launch | None = None
    ) -> Future[Outcome]:
        """Queue one config.

        Args:
            site: template, shape and dtype.
            params: the config.
            target: what to compile for.
            called: how a graph calls it; as the lab does by default.

        Returns:
            Its outcome, the value a `Compiled`: what a compiler raises is such a value. Cancelled where it was not
            begun before `stop`.
        """
        future: Future[Outcome] = Future()
        self._tasks.put((site, params, target, called, future))
        return future

    def stop(self) -> None:
        """Begin nothing more; each process ends with what it is at."""
        with contextlib.suppress(queue.Empty):
            while True:
                task = self._tasks.get_nowait()
                if task is not None:
                    task[-1].cancel()
        for _ in self._threads:
            self._tasks.put(None)

    def join(self) -> None:
        """Wait, after `stop`, until the processes have ended."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        with Worker(env=self._env) as worker:
            # Loading torch and Triton takes seconds: before the first config is asked for, not after.
            self._run(worker, "load", ())
            while (task := self._tasks.get()) is not None:
                if task[-1].set_running_or_notify_cancel():
                    task[-1].set_result(self._run(worker, "compile_config", task[:-1]))

    def _run(self, worker: Worker, job: str, args: tuple[object, ...]) -> Outcome:
        try:
            return worker.run(f"{_JOBS}:{job}", args, name=job, deadline_s=_DEADLINE_S)
        except AgnitraError as error:  # no process can be started: whoever asked finds out what to do without
            return Outcome(job, "error", None, error.message, None, 0.0, 0.0, "")
