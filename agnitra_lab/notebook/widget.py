"""The controls as one small widget: it holds what to show, and hands on what the user does. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

Message = dict[str, Any]
_SCRIPT = Path(__file__).with_name("widget.js").read_text(encoding="utf-8")


class Controls(anywidget.AnyWidget):
    """Buttons, options and a progress bar.

    Attributes:
        state: what changes when a step begins or ends.
        tick: what changes while one runs: the bar's value and the line beside it.
    """

    _esm = _SCRIPT
    state = traitlets.Dict().tag(sync=True)
    tick = traitlets.Dict().tag(sync=True)

    def on_message(self, act: Callable[[Message], None]) -> None:
        """Call `act` with each message of the user's: in whichever thread the kernel chooses, so it must be quick."""
        self.on_msg(lambda _, content, buffers: act(content))

    def mime_bundle(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget's view as a bundle, and its metadata."""
        made = self._repr_mimebundle_()
        return made if made is not None else ({}, {})
