"""A real kernel over the Jupyter protocol: what a front end sees of a cell."""

from __future__ import annotations

import queue
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

TIMEOUT_S = 120.0


@dataclass
class Reply:
    """One executed cell as the messages told it.

    Attributes:
        status: of the kernel's reply.
        outputs: (message type, content) of the cell's own messages, in order.
        elsewhere: those that arrived meanwhile and answer to another cell, or to none.
    """

    status: str
    outputs: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    elsewhere: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [content for name, content in self.outputs if name == kind]

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.outputs if kind not in ("status", "execute_input")]

    @property
    def execution_count(self) -> int:
        return int(self.of("execute_input")[0]["execution_count"])

    @property
    def values(self) -> list[str]:
        return [content["data"]["text/plain"] for content in self.of("execute_result")]

    @property
    def cards(self) -> list[dict[str, str]]:
        return [content["data"] for content in self.of("display_data") if "text/html" in content["data"]]

    @property
    def errors(self) -> list[tuple[str, str]]:
        return [(content["ename"], content["evalue"]) for content in self.of("error")]

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

    def run(self, code: str, *, when: str | None = None, then: Callable[[], Any] | None = None) -> Reply:
        """Execute a cell; as soon as the text `when` is printed or displayed, call `then` once."""
        request = self.client.execute(code)
        reply = Reply(status="")
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty as error:
                raise TimeoutError(f"the kernel gave no idle status in {TIMEOUT_S:.0f} s for: {code}") from error
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != request:
                reply.elsewhere.append((kind, content))
                continue
            if kind == "status" and content["execution_state"] == "idle":
                break
            reply.outputs.append((kind, content))
            if when and then and when in _text(content):
                then()
                then = None
        reply.status = self._shell_reply(request)["status"]
        return reply

    def interrupt(self) -> None:
        self._manager.interrupt_kernel()

    def execute_beside(self, code: str) -> None:
        """Execute a cell in a subshell, without waiting for it: it runs while the main shell is busy."""
        session = self.client.session
        made = session.msg("create_subshell_request")
        self.client.control_channel.send(made)
        subshell = self.client.get_control_msg(timeout=TIMEOUT_S)["content"]["subshell_id"]
        request = session.msg("execute_request", {"code": code, "silent": False, "allow_stdin": False})
        request["header"]["subshell_id"] = subshell
        self.client.shell_channel.send(request)

    @property
    def has_subshells(self) -> bool:
        return "kernel subshells" in self._shell_reply(self.client.kernel_info()).get("supported_features", ())

    def complete(self, code: str) -> list[str]:
        request = self.client.complete(code, len(code))
        return list(self._shell_reply(request)["matches"])

    def _shell_reply(self, request: str) -> dict[str, Any]:
        while True:
            reply = self.client.get_shell_msg(timeout=TIMEOUT_S)
            if reply["parent_header"].get("msg_id") == request:
                return dict(reply["content"])


def _text(content: dict[str, Any]) -> str:
    return f"{content.get('text', '')}{content.get('data', {}).get('text/plain', '')}"
