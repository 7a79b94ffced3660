"""The dashboard as markup: one file that opens offline, or one block for a notebook. Tables stand without scripts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from agnitra_lab.report.dashboard_blocks import about, comparable, dashboard_body, numbers_of
from agnitra_lab.report.dashboard_palette import DARK, LIGHT, css_variables
from agnitra_lab.report.dashboard_record import Dashboard, LayerProfile
from agnitra_lab.report.html import Html, tag

MAX_LAYER_BYTES = 1_200_000
"""Of profiles in one file: the newest are in it, the others are counted."""
_SIGNIFICANT = 7


def dashboard_page(record: Dashboard, *, max_layer_bytes: int = MAX_LAYER_BYTES) -> str:
    """Render the dashboard as a self-contained HTML document.

    Args:
        record: what is under the artifacts folder.
        max_layer_bytes: how much of the document profiles may take.
    """
    profiles = fitting_profiles(record, max_layer_bytes)
    blocks = [_block("agn-index", dashboard_index(record, profiles))]
    blocks += [_block(f"agn-layers-{place}", layer_values(profile)) for place, profile in enumerate(profiles)]
    script = f"{dashboard_script()}\nagnitra.mountFile();\n"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="dark light"),
        tag("title", f"Agnitra Lab dashboard: {record.artifacts}"),
        tag("style", Html(f"html, body {{ margin: 0; }}\n.agn {{ min-height: 100vh; }}\n{dashboard_style()}")),
    )
    body = tag("body", dashboard_body(record, profiles), *blocks, tag("script", Html(script)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def dashboard_index(record: Dashboard, profiles: Sequence[LayerProfile]) -> dict[str, Any]:
    """What the script reads first: runs that can be compared, the rules, and the profiles' titles."""
    return {
        "rules": [rule.model_dump(mode="json") for rule in record.rules],
        "runs": [
            {"run_id": row.run_id, "path": row.path, "device": row.device, "figures": numbers_of(row)}
            for row in comparable(record.runs)
        ],
        "profiles": [{"about": about(profile)} for profile in profiles],
    }


def layer_values(profile: LayerProfile) -> dict[str, Any]:
    """One profile as the script reads it; times to seven digits, which no table shows more of."""
    value = profile.model_dump(mode="json", include={"modules", "ops", "kernels", "total_self_ms"})
    rows = ((*names, _rounded(time_ms), _rounded(calls)) for *names, time_ms, calls in profile.rows)
    return {**value, "rows": [list(row) for row in rows]}


def fitting_profiles(record: Dashboard, max_bytes: int) -> list[LayerProfile]:
    """The newest profiles that take at most `max_bytes` together."""
    kept: list[LayerProfile] = []
    for profile in record.layers:
        max_bytes -= len(_json(layer_values(profile)))
        if max_bytes < 0:
            break
        kept.append(profile)
    return kept


@cache
def dashboard_style() -> str:
    """The style sheet: both surfaces, the dark one unless the reader prefers light or chooses."""
    dark, light = css_variables(DARK), css_variables(LIGHT)
    return (
        f".agn {{ color-scheme: dark; {dark} }}\n"
        f"@media (prefers-color-scheme: light) {{ .agn {{ color-scheme: light; {light} }} }}\n"
        f".agn[data-surface=dark] {{ color-scheme: dark; {dark} }}\n"
        f".agn[data-surface=light] {{ color-scheme: light; {light} }}\n"
        f"{_file('dashboard.css')}"
    )


@cache
def dashboard_script() -> str:
    """The script, which defines `agnitra` and runs nothing."""
    return _file("dashboard.js")


def _file(name: str) -> str:
    return resources.files("agnitra_lab.report").joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Allow this script and nothing else: no request, no script that came in with a name."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )


def _block(name: str, value: Any) -> Html:
    return tag("script", Html(_json(value)), type="application/json", id=name)


def _json(value: Any) -> str:
    # Inside a script element only "<" can end the element; in JSON it may be written as an escape.
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _rounded(value: float) -> float:
    rounded = float(f"{value:.{_SIGNIFICANT}g}")
    return int(rounded) if rounded.is_integer() else rounded
