"""Schematics: drawn as written, readable, and described in words."""

import itertools

import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from rlhf_helpers.lab import schematics
from rlhf_helpers.lab.plots import FIGURE_WIDTH

TOKENS = ["Paris", ".", "<end>"]
PICTURES = {
    name: getattr(schematics, name)
    for name in (
        "pipeline",
        "reward_position",
        "broadcast_grid",
        "four_models",
        "ppo_against_dpo",
        "critique_revise",
        "guard_and_fallback",
    )
}
PICTURES["token_timeline"] = lambda: schematics.token_timeline(TOKENS, [0, 0, 1], [0.5, 0.7, 0.8], [0.3] * 3)


def boxes_of(figure):
    return [patch for axis in figure.axes for patch in axis.patches if isinstance(patch, FancyBboxPatch)]


@pytest.mark.parametrize("name", PICTURES)
def test_every_schematic_is_readable(name):
    figure, alt = PICTURES[name]()
    figure.draw_without_rendering()
    assert figure.get_suptitle()
    assert len(alt) >= 100
    assert figure.get_figwidth() == FIGURE_WIDTH
    texts = [figure._suptitle, *(text for axis in figure.axes for text in axis.texts)]
    assert min(text.get_fontsize() for text in texts) >= 9
    areas = [text.get_window_extent() for text in texts]
    assert not [pair for pair in itertools.combinations(areas, 2) if pair[0].overlaps(pair[1])]
    assert all(area.x0 >= 0 and area.x1 <= figure.bbox.x1 for area in areas)
    for box, text in zip(boxes_of(figure), figure.axes[0].texts, strict=False):
        frame, area = box.get_window_extent(), text.get_window_extent()
        assert frame.x0 < area.x0 < area.x1 < frame.x1, text.get_text()
        assert frame.y0 < area.y0 < area.y1 < frame.y1, text.get_text()


def test_boxes_and_arrows_stand_where_the_text_puts_them():
    figure, alt = schematics.draw_boxes(
        "One message",
        """
        start | [model]
              | (judge)
        """,
        "Green: trained",
        arrows="start -> model -> judge",
    )
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["start", "model", "judge", "Green: trained"]
    assert [text.get_position() for text in axis.texts[:3]] == [(1.75, 0.5), (5.25, 0.5), (5.25, 1.5)]
    green, gray = schematics.SHADES["["], schematics.SHADES["("]
    assert [box.get_facecolor() for box in boxes_of(figure)] == [
        to_rgba(color) for color in ("white", green, gray)
    ]
    arrows = [patch for patch in axis.patches if isinstance(patch, FancyArrowPatch)]
    assert [arrow._posA_posB for arrow in arrows] == [
        [(1.75, 0.5), (5.25, 0.5)],
        [(5.25, 0.5), (5.25, 1.5)],
    ]
    assert alt == (
        "Boxes, row by row: start, green model; gray judge. Green: trained. "
        "Arrows: start, then model, then judge."
    )


def test_the_diagonal_of_the_grid_is_what_people_compared():
    figure, alt = schematics.broadcast_grid()
    green = to_rgba(schematics.SHADES["["])
    texts = figure.axes[0].texts
    right = [
        text.get_text()
        for box, text in zip(boxes_of(figure), texts, strict=False)
        if box.get_facecolor() == green
    ]
    assert right == ["c1 - r1", "c2 - r2", "c3 - r3", "c4 - r4"]
    assert alt.count("orange c") == 12


def test_the_timeline_draws_the_numbers_it_is_given():
    figure, alt = PICTURES["token_timeline"]()
    heights = [[bar.get_height() for bar in axis.patches] for axis in figure.axes]
    assert heights == [[0, 0, 1], [0.5, 0.7, 0.8], [0.3, 0.3, 0.3]]
    assert "value [0.5, 0.7, 0.8]" in alt
