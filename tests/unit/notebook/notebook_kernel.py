"""A real kernel over the Jupyter protocol: what a front end sees of a cell."""

from __future__ import annotations

import queue
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

TIMEOUT_S = 120.0


@dataclass
class Reply:
    """One executed cell as the messages told it."""

    status: str
    outputs: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [content for name, content in self.outputs if name == kind]

    @property
    def values(self) -> list[str]:
        return [content["data"]["text/plain"] for content in self.of("execute_result")]

    @property
    def cards(self) -> list[dict[str, str]]:
        return [content["data"] for content in self.of("display_data") if "text/html" in content["data"]]

    @property
    def stdout(self) -> str:
        return "".join(content["text"] for content in self.of("stream") if content["name"] == "stdout")

    @property
    def traceback(self) -> str:
        lines = [line for content in self.of("error") for line in content["traceback"]]
        return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines))


class KernelSession:
    """A kernel of this interpreter in its own folder, shut down at the end."""

    def __init__(self, folder):
        self._manager = KernelManager(kernel_name="python3")
        # This very interpreter, whatever kernels are registered on the machine.
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        self._manager._kernel_spec = KernelSpec(argv=argv, language="python", display_name="under test")
        self._folder = folder

    def __enter__(self):
        self._manager.start_kernel(cwd=str(self._folder))
        self.client = self._manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=TIMEOUT_S)
        return self

    def __exit__(self, *_):
        self.client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    def run(self, code: str, *, interrupt_on: str | None = None) -> Reply:
        """Execute a cell; with `interrupt_on`, interrupt the kernel as soon as that text is printed."""
        request = self.client.execute(code)
        outputs: list[tuple[str, dict[str, Any]]] = []
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty as error:
                raise TimeoutError(f"the kernel gave no idle status in {TIMEOUT_S:.0f} s for: {code}") from error
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                break
            outputs.append((kind, content))
            if interrupt_on and interrupt_on in content.get("text", ""):
                self._manager.interrupt_kernel()
        return Reply(self._shell_reply(request)["status"], outputs)

    def complete(self, code: str) -> list[str]:
        request = self.client.complete(code, len(code))
        return list(self._shell_reply(request)["matches"])

    def _shell_reply(self, request: str) -> dict[str, Any]:
        while True:
            reply = self.client.get_shell_msg(timeout=TIMEOUT_S)
            if reply["parent_header"].get("msg_id") == request:
                return dict(reply["content"])
