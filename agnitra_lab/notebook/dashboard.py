"""The dashboard in a notebook: a card of plain HTML, and live through one small widget while there is a kernel.

The widget holds what is seen; a profile's rows travel when they are asked for. The notebook saves the card alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agnitra_lab.errors import AgnitraError, UsageError
from agnitra_lab.notebook.show import beside_buttons
from agnitra_lab.redact import redact_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agnitra_lab.report.dashboard_record import Dashboard, LayerProfile

_NO_KERNEL = {
    "text/html": "<p>The live dashboard needs a running kernel: run this cell again.</p>",
    "text/plain": "The live dashboard needs a front end with widgets; the card above has the same figures.",
}
_LIVE_ALONE = {
    "text/html": "<p>Live dashboard: it needs its kernel. Where nothing stands below, run this cell again.</p>",
    "text/plain": "Live dashboard: it needs its kernel.",
}
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
_VIEW_SCRIPT = """
export default {
  render({ model, el }) {
    const root = el.attachShadow({ mode: "open" });
    // JupyterLab takes arrow keys for itself before they get here, unless the element that has focus says otherwise.
    const suppress = "data-lm-suppress-shortcuts";
    root.addEventListener("focusin", (event) =>
      el.toggleAttribute(suppress, Boolean(event.target.closest(".tree, select, .scroll, .chart"))));
    root.addEventListener("focusout", () => el.removeAttribute(suppress));
    const waiting = new Map();
    const load = (place) => new Promise((resolve) => {
      waiting.set(place, resolve);
      model.send({ act: "load", place });
    });
    model.on("msg:custom", (message) => {
      const resolve = waiting.get(message.place);
      if (resolve) { waiting.delete(message.place); resolve(message.profile); }
    });
    const draw = () => {
      const chosen = root.querySelector(".agn")?.dataset.surface;
      root.innerHTML = `<style>${model.get("css")}</style>${model.get("markup")}`;
      if (chosen) root.querySelector(".agn").dataset.surface = chosen;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "Read again";
      button.addEventListener("click", () => model.send({ act: "refresh" }));
      root.querySelector(".tools").prepend(button);
      const problem = document.createElement("p");
      problem.className = "problem worse";
      problem.setAttribute("role", "status");
      root.querySelector(".head").append(problem);
      agnitra.mount(root, JSON.parse(model.get("index")), load);
    };
    const complain = () => {
      const place = root.querySelector(".problem");
      place.textContent = model.get("problem");
      place.hidden = !model.get("problem");
    };
    model.on("change:markup", draw);
    model.on("change:problem", complain);
    draw();
  },
};
"""


def show_dashboard(options: Any) -> None:
    """What `%agnitra_dashboard` does: write the file where one is asked for, and show the dashboard.

    Args:
        options: the magic's: `artifacts`, `out`, `static`, `live`.

    Raises:
        UsageError: both of `static` and `live`; there is no such folder, or `out` is no HTML file.
        RunStoreError: the file cannot be written.
    """
    if options.static and options.live:
        raise UsageError("%agnitra_dashboard takes --static or --live, got both.", hint="Leave both out to show both.")
    from IPython.display import display

    from agnitra_lab.loop.dashboard import collect_dashboard, write_dashboard

    record = collect_dashboard(options.artifacts)
    path = write_dashboard(record, options.out) if options.out else None
    card = dashboard_bundle(record, path)
    # Two outputs: a notebook that is opened again without its kernel has the first alone.
    display(card if options.static else beside_buttons(_LIVE_ALONE if options.live else card), raw=True)
    if not options.static:
        display(live_bundle(options.artifacts, record, card if options.live else _NO_KERNEL), raw=True)


def dashboard_bundle(record: Dashboard, path: Path | None = None) -> dict[str, Any]:
    """The dashboard's card as one mime bundle: tiles, the newest runs, what got worse; readable with no kernel.

    Args:
        record: what is under the artifacts folder.
        path: the HTML file that was written, to be named.
    """
    from agnitra_lab.notebook.dashboard_card import dashboard_card_html, dashboard_card_text

    return {"text/html": dashboard_card_html(record, path), "text/plain": dashboard_card_text(record, path)}


def live_bundle(artifacts: Path | str, record: Dashboard, fallback: Mapping[str, str]) -> dict[str, Any]:
    """The live dashboard as one mime bundle.

    Args:
        artifacts: folder that it reads again when asked.
        record: what it shows first.
        fallback: what front ends without widgets show.
    """
    return {WIDGET_MIME: _view(Path(artifacts), record), **fallback}


def _view(artifacts: Path, record: Dashboard) -> dict[str, Any]:
    made = _widget(artifacts, record)
    bundle = made._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    view: dict[str, Any] = data[WIDGET_MIME]
    return view


def _widget(artifacts: Path, record: Dashboard) -> Any:
    """Build the widget. Its class is made here, so that importing this module loads no widget library."""
    import anywidget
    import traitlets

    from agnitra_lab.report.dashboard import dashboard_script, dashboard_style

    class DashboardView(anywidget.AnyWidget):
        """The live dashboard."""

        _esm = f"{dashboard_script()}\n{_VIEW_SCRIPT}"
        # Not `style`: a DOM widget has a trait of that name, and the front end would look for a widget in it.
        css = traitlets.Unicode(dashboard_style()).tag(sync=True)
        markup = traitlets.Unicode().tag(sync=True)
        index = traitlets.Unicode().tag(sync=True)
        problem = traitlets.Unicode().tag(sync=True)

    made = DashboardView(**_traits(record))
    shown: list[Sequence[LayerProfile]] = [record.layers]

    def answer(_: Any, message: Any, __: Any) -> None:
        # A message is data from the browser: two words are known, everything else is dropped.
        if not isinstance(message, dict):
            return
        if message.get("act") == "refresh":
            _read_again(made, artifacts, shown)
        elif message.get("act") == "load":
            _send_profile(made, message.get("place"), shown[0])

    made.on_msg(answer)
    return made


def _read_again(made: Any, artifacts: Path, shown: list[Sequence[LayerProfile]]) -> None:
    """Show what is there now; what cannot be read leaves the view as it was, and says why."""
    from agnitra_lab.loop.dashboard import collect_dashboard

    try:
        found = collect_dashboard(artifacts)
    except AgnitraError as error:
        made.set_trait("problem", redact_text(str(error)))
        return
    shown[0] = found.layers
    made.set_trait("problem", "")
    for name, value in _traits(found).items():
        made.set_trait(name, value)


def _send_profile(made: Any, place: Any, profiles: Sequence[LayerProfile]) -> None:
    from agnitra_lab.report.dashboard import layer_values

    if isinstance(place, int) and 0 <= place < len(profiles):
        made.send({"place": place, "profile": layer_values(profiles[place])})


def _traits(record: Dashboard) -> dict[str, str]:
    from agnitra_lab.report.dashboard import dashboard_body, dashboard_index

    return {
        # The view is drawn when the markup changes: the index must be there by then.
        "index": json.dumps(dashboard_index(record, record.layers)),
        "markup": str(dashboard_body(record, record.layers)),
    }
