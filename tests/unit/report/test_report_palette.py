from __future__ import annotations

import pytest

from agnitra_lab.report import palette


def test_black_on_white_has_the_largest_contrast():
    assert palette.contrast("#000000", "#FFFFFF") == pytest.approx(21.0)
    assert palette.contrast("#777777", "#777777") == pytest.approx(1.0)


def test_contrast_does_not_depend_on_the_order():
    assert palette.contrast(palette.ACCENT, palette.PANEL) == palette.contrast(palette.PANEL, palette.ACCENT)


@pytest.mark.parametrize("surface", palette.SURFACES)
@pytest.mark.parametrize("role", palette.TEXT_ROLES | palette.DATA_ROLES)
def test_text_and_data_colours_reach_seven_to_one(role, surface):
    colour = (palette.TEXT_ROLES | palette.DATA_ROLES)[role]
    assert palette.contrast(colour, palette.SURFACES[surface]) >= 7.0


@pytest.mark.parametrize("surface", palette.SURFACES.values())
def test_edges_of_controls_reach_three_to_one(surface):
    assert palette.contrast(palette.EDGE, surface) >= 3.0
