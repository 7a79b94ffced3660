"""The answer to Copy and Download: the bytes of a run's file, as they lie on disk, with their sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agnitra_lab.errors import AgnitraError
from agnitra_lab.notebook.artifact_files import RunFiles
from agnitra_lab.redact import redact_text

if TYPE_CHECKING:
    from agnitra_lab.notebook.widget import Controls, Message


def file_rows(files: RunFiles | None) -> list[dict[str, Any]]:
    """The files as the widget lists them."""
    return [{"name": file.name} for file in files.all()] if files is not None else []


def answer(controls: Controls, message: Message, act: Callable[[], None]) -> None:
    """Do what a message asks, and tell the page that it was heard, or why it was not done."""
    reply = {"id": message.get("id"), "page": message.get("page")}
    try:
        act()
    except AgnitraError as error:
        controls.send({"kind": "refused", "text": redact_text(str(error)), **reply})
    except Exception as error:
        # A callback that raises is printed under some cell, if at all.
        controls.send({"kind": "refused", "text": redact_text(f"{type(error).__name__}: {error}"), **reply})
    else:
        controls.send({"kind": "ack", **reply})


def send_file(controls: Controls, message: Message, files: RunFiles | None) -> None:
    """Send the file that a message names.

    Raises:
        AgnitraError: there is no such file, or no longer.
    """
    name = str(message.get("name"))
    if files is None:
        raise AgnitraError("There is no run yet, so there are no files.", hint="Run a step.")
    content = files.read(name)
    path = next((file.path for file in files.all() if file.name == name), None)
    controls.send(
        {
            "kind": "file", "id": message.get("id"), "page": message.get("page"), "name": name,
            "path": redact_text(str(path)), "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        },
        buffers=[content],
    )  # fmt: skip


def controls_of_run(files: RunFiles, title: str) -> Controls:
    """Copy and download for a finished run, without a workbench."""
    from agnitra_lab.notebook.widget import Controls

    controls = Controls(state={"title": title, "files": file_rows(files)}, tick={})

    def act(message: Message) -> None:
        if message.get("do") == "file":
            answer(controls, message, lambda: send_file(controls, message, files))
        else:
            answer(controls, message, lambda: None)

    controls.on_message(act)
    return controls
