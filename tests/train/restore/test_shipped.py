"""The model that comes with the program: there, small, of no machine, and better than the blurry picture."""

import statistics
import tomllib
from pathlib import Path

import pytest

from data.stream.validation import validation_pairs
from model.pretrained import SHIPPED
from train.config.file import configure
from train.config.sources import open_sets
from train.evaluate.metrics import measured
from train.restore.restorer import Restorer

ROOT = Path(__file__).parents[3]


def test_it_is_a_small_file_that_names_no_folder_of_the_machine_it_was_trained_on():
    content = SHIPPED.read_bytes()
    assert len(content) < 16e6
    assert not [place for place in (b"/tmp/", b"/home/", b"/root/", b"/work/") if place in content]


@pytest.mark.parametrize("tile", [None, 128])
def test_it_restores_severe_blur_of_photographs_it_has_not_seen_in_one_piece_and_in_tiles(tile):
    config, restorer, gains = configure([]), Restorer.load(None, "cpu"), []
    given = {"crop": 256, "margin": 80, "seed": 0, "tiers": ("severe",)}
    for pair in validation_pairs(open_sets(config)[1], config.blur, **given):
        blurry, sharp = pair["blurry"], pair["sharp"][None]
        restored = restorer(blurry, tile=tile)
        before, after = (measured(image[None], sharp, ["psnr"])[0]["psnr"] for image in (blurry, restored))
        gains.append(after - before)
    assert len(gains) == 13
    assert statistics.fmean(gains) > 0.3


def test_a_wheel_holds_every_file_that_the_program_reads():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {path for package, globs in patterns.items() for glob in globs for path in (ROOT / package).glob(glob)}
    read = [p for package in ("data", "model", "train") for p in (ROOT / package).rglob("*") if p.is_file()]
    left = [p for p in read if p not in packed and p.suffix not in (".py", ".pyc", ".sh")]
    assert left == []
    assert SHIPPED in packed
