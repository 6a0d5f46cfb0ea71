"""The panel of a run: pictures pixel for pixel, captions that stay in their column."""

import numpy as np
import pytest
from PIL import ImageFont

from train.evaluate.report import CELL, GAP, LINE, draw_panel, fitted, trivial_psnr
from train.evaluate.scores import Score

LONG = "a_scene_with_a_long_name/another_folder/photograph_000123.png#12"


def rows(size: int, key: str, number: int = 2) -> list[tuple]:
    score = Score(key, "severe", 123.4, {"psnr": 21.5}, {"psnr": 22.25})
    random = np.random.default_rng(0)
    return [
        (score, *(random.integers(0, 256, (size, size, 3), np.uint8) for _ in range(3))) for _ in range(number)
    ]  # fmt: skip


@pytest.mark.parametrize("size", [64, 128, 256, 400])
def test_captions_stay_in_their_column_and_pictures_are_whole(size):
    pictures = rows(size, LONG)
    panel = draw_panel(pictures)
    column, row_height = max(size, CELL) + GAP, 2 * LINE + size + 2 * GAP
    assert panel.shape == (2 * row_height + GAP, 3 * column + GAP, 3)
    ground = panel[0, 0]
    for row, (_, *images) in enumerate(pictures):
        top = GAP + row * row_height
        for place, image in enumerate(images):
            left = GAP + place * column
            area = panel[top + 2 * LINE : top + 2 * LINE + size, left : left + size]
            np.testing.assert_array_equal(area, image)
            assert (panel[top : top + 2 * LINE, left : left + column - GAP] != ground).any()
            assert (panel[top : top + row_height, left + column - GAP : left + column] == ground).all()
        assert (panel[top + 2 * LINE + size : top + row_height] == ground).all()


@pytest.mark.parametrize("room", [30, 60, 120, 240, 1000])
def test_a_text_gives_up_its_middle(room):
    font = ImageFont.load_default(size=13)
    shown = fitted(LONG, font, room)
    assert font.getlength(shown) <= room
    head, _, tail = shown.partition("…")
    assert LONG.startswith(head)
    assert LONG.endswith(tail)
    assert (shown == LONG) == (room == 1000)
    longer = f"{LONG[: len(head) + 1]}…{tail}"
    assert shown == LONG or font.getlength(longer) > room or len(head) > len(tail)


def test_a_pair_stands_beside_the_best_that_needs_no_model():
    others = {"gaussian": {"psnr": 21.9}, "unsharp": {"psnr": 21.6}, "wiener": {"psnr": 30.0}}
    assert trivial_psnr(Score("a", "severe", 1.0, {"psnr": 21.5}, {"psnr": 22.0}, others)) == 21.9
    assert trivial_psnr(Score("a", "severe", 1.0, {"psnr": 22.5}, {"psnr": 22.0}, others)) == 22.5
    assert trivial_psnr(Score("a", "severe", 1.0, {"psnr": 21.5}, {"psnr": 22.0})) == 21.5


def test_no_pictures_are_told():
    with pytest.raises(ValueError, match="at least one pair"):
        draw_panel([])
