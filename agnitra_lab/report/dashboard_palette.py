"""The dashboard's two surfaces: the product's navy, and the same roles on white. Every ratio is computed in a test."""

from __future__ import annotations

from agnitra_lab.report import palette

DARK = {
    "surface": palette.SURFACE,
    "panel": palette.PANEL,
    "text": palette.TEXT,
    "muted": palette.MUTED,
    "accent": palette.ACCENT,
    "baseline": palette.BASELINE,
    "secondary": palette.SECONDARY,
    "warning": palette.WARNING,
    "edge": palette.EDGE,
    "grid": palette.GRID,
}
LIGHT = {
    "surface": "#F3F6FA",
    "panel": "#FFFFFF",
    "text": "#0B1220",
    "muted": "#3F4D5F",
    "accent": "#00504A",
    "baseline": "#6B4300",
    "secondary": "#0A4A75",
    "warning": "#6A3D00",
    "edge": "#6C7F98",
    "grid": "#D5DEE9",
}
SURFACES = {"dark": DARK, "light": LIGHT}
TEXT_ROLES = ("text", "muted", "accent", "baseline", "secondary", "warning")
LEVELS = {"module": "secondary", "op": "accent", "kernel": "baseline"}
"""The role that tints the blocks of each level of the drill-down."""
_TINT = 0.24


def css_variables(colours: dict[str, str]) -> str:
    """A surface's roles as CSS custom properties, with the tints of the drill-down's levels."""
    tints = {f"tint-{level}": tint(colours[role], colours["panel"]) for level, role in LEVELS.items()}
    return "; ".join(f"--{name}: {colour}" for name, colour in {**colours, **tints}.items()) + ";"


def tint(colour: str, under: str) -> str:
    """A colour laid thinly over another: "#RRGGBB"."""
    mixed = (
        round(_TINT * int(colour[start : start + 2], 16) + (1 - _TINT) * int(under[start : start + 2], 16))
        for start in (1, 3, 5)
    )
    return "#" + "".join(f"{channel:02X}" for channel in mixed)
