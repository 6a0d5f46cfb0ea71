"""One picture restored and measured: whole or in tiles, what is not finite, what is shown of it."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from data.errors import DataError
from model.deblurrer import Deblurred
from tests.train.evaluate.trees import picture
from train.evaluate.bins import BINS, bin_of
from train.evaluate.measure import Measuring
from train.evaluate.metrics import measured
from train.evaluate.offline import with_aligned
from train.evaluate.pairs import Pair
from train.evaluate.realblur import Aligned
from train.evaluate.showing import chosen_to_show, telling_place
from train.evaluate.yardsticks import Yardsticks


class Brighter(nn.Module):
    """A network that adds what it is told to."""

    multiple = 4

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, image):
        return Deblurred((image + self.by,), None)


def pair() -> Pair:
    sharp, blurry = (torch.from_numpy(picture(seed).transpose(2, 0, 1).copy()) for seed in (1, 2))
    return Pair(blurry, sharp, math.nan, None)


CPU = torch.device("cpu")


def test_a_picture_s_record_has_input_restored_and_yardsticks_by_every_metric():
    yardsticks = Yardsticks({"all": 2.0}, {"all": (1.0, 0.5)})
    how = {"names": ("psnr", "ssim"), "yardsticks": yardsticks}
    record, pictures = Measuring(Brighter(10 / 255), CPU, **how).picture(pair(), "", crop=False)
    blurry, sharp = (image[None] for image in pair()[:2])
    brighter = (blurry.int() + 10).clamp(max=255).to(torch.uint8)
    assert record["input"] == measured(blurry, sharp, ["psnr", "ssim"])[0]
    assert record["restored"] == measured(brighter, sharp, ["psnr", "ssim"])[0]
    assert record["yardsticks"].keys() == {"gaussian", "unsharp"}
    assert pictures.keys() == {"input", "restored", "gaussian", "unsharp"}
    assert (record["extent"], record["width"], record["height"], record["tiles"]) == (None, 66, 50, 1)
    crop, _ = Measuring(Brighter(10 / 255), CPU, **how).picture(pair(), "", crop=True)
    assert crop["restored"] == record["restored"]


def test_a_picture_without_a_tier_is_smoothed_by_the_bin_of_its_input():
    settings = dict.fromkeys(BINS, 0.0) | {"all": 2.0}
    before = measured(*(image[None] for image in pair()[:2]), ["psnr"])[0]["psnr"]
    for name, gains in ((bin_of(before), True), ("all", False)):
        yardsticks = Yardsticks(settings | {name: 4.0}, {"all": (1.0, 0.0)})
        measuring = Measuring(Brighter(0.0), CPU, names=("psnr",), yardsticks=yardsticks)
        record, _ = measuring.picture(pair(), "", crop=False)
        assert (record["yardsticks"]["gaussian"] != record["input"]) == gains


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("crop", [True, False])
def test_what_is_not_finite_is_no_picture(value, crop):
    class Bad(Brighter):
        def forward(self, image):
            return Deblurred((image / image * value,), None)

    with pytest.raises(DataError, match="not finite"):
        Measuring(Bad(0.0), CPU, names=("psnr",)).picture(pair(), "", crop=crop)


def test_pictures_are_whole_where_memory_allows_and_tiled_where_not(monkeypatch):
    how = {"names": ("psnr",), "tile": 64}
    free, least = [10**12], []

    def needed(network, side, way):
        least.append(side)
        return 10**6

    monkeypatch.setattr("train.evaluate.measure.free_bytes", lambda device, most: free[0])
    monkeypatch.setattr("train.evaluate.measure.forward_bytes", needed)
    measuring = Measuring(Brighter(0.0), CPU, auto=True, **how)
    assert measuring.picture(pair(), "", crop=False)[0]["tiles"] == 1
    free[0] = 1000
    assert measuring.picture(pair(), "", crop=False)[0]["tiles"] == 2
    assert least == [60]  # counted once: a square of as many pixels, on the network's grid
    assert Measuring(Brighter(0.0), CPU, **how).picture(pair(), "", crop=False)[0]["tiles"] == 2
    assert Measuring(Brighter(0.0), CPU, names=("psnr",)).picture(pair(), "", crop=False)[0]["tiles"] == 1


def test_aligned_numbers_come_first_and_what_was_not_aligned_is_named():
    record = {"input": {"psnr": 1.0}, "restored": {"psnr": 2.0}, "yardsticks": {"gaussian": {"psnr": 3.0}}}
    found = {
        name: Aligned(30.0 + n, 0.9, name != "restored", np.eye(3))
        for n, name in enumerate(("input", "restored", "gaussian"))
    }
    whole = with_aligned(record, found)
    assert whole["input"] == {"psnr_aligned": 30.0, "ssim_aligned": 0.9, "psnr": 1.0}
    assert whole["restored"]["psnr_aligned"] == 31.0
    assert whole["yardsticks"]["gaussian"]["psnr_aligned"] == 32.0
    assert whole["not aligned"] == ["restored"]
    assert with_aligned(record, {}) is record


@pytest.mark.parametrize("sign", [1, -1])
def test_the_part_that_is_shown_is_where_restoring_changed_most(sign):
    sharp = np.full((300, 400, 3), 100, np.uint8)
    blurry, restored = sharp.copy(), sharp.copy()
    (blurry if sign > 0 else restored)[210:230, 350:370] = 200
    top, left = telling_place(blurry, restored, sharp, size=100)
    assert top <= 210
    assert top + 100 >= 230
    assert left <= 350
    assert left + 100 >= 370
    assert telling_place(blurry[:50, :60], restored[:50, :60], sharp[:50, :60], size=100) == (0, 0)


def test_worst_best_and_the_panel_are_of_different_pictures():
    pictures = [{"key": f"p{n}", "input": {"psnr": 20.0}, "restored": {"psnr": 20.0 + (n * 7) % 10}} for n in range(10)]
    worst, best, panel = chosen_to_show({"headline": {"metric": "psnr"}, "pictures": pictures})
    gains = {each["key"]: each["restored"]["psnr"] - 20 for each in pictures}
    assert [gains[key] for key in worst] == [0, 1, 2]
    assert [gains[key] for key in best] == [9, 8, 7]
    assert [gains[key] for key in panel] == [0, 2, 4, 5, 7, 9]
    one = chosen_to_show({"headline": {"metric": "psnr"}, "pictures": pictures[:1]})
    assert one == (["p0"], [], ["p0"])
