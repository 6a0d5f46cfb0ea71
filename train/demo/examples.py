"""Photographs that come with the program, which no bundled training set holds: sharp ones to play with, and blurry
ones whose sharp original is known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.blur import BlurConfig, sample_rng, synthesize_pair
from data.image import decode_image
from data.shards.set import ShardSet
from train.config.sources import BUNDLED

SHARP = ("wine_02", "picture_0b_02", "aitzgorri_04", "wine_00", "aitzgorri_01")
BLURRY = (("wine_02", "moderate"), ("picture_0b_02", "severe"), ("aitzgorri_04", "severe"), ("wine_00", "extreme"))
SEED = 1
CREDIT = (
    "Photographs: Aitzol Berasategi, Trevor “Freespace” and Jakub Mede, 2018, CC-BY-4.0 "
    "(data/samples/ATTRIBUTION.md), cut into tiles."
)


class Example(NamedTuple):
    """A blurry photograph and the sharp one it was made of, uint8 RGB [H, W, 3]."""

    name: str
    blurry: np.ndarray
    sharp: np.ndarray


def sharp_photos() -> dict[str, np.ndarray]:
    """Sharp photographs by name, uint8 RGB [H, W, 3]."""
    tiles = ShardSet(BUNDLED / "val")
    numbers = {tiles.key(number): number for number in range(len(tiles))}
    found = {key: decode_image(tiles.read(numbers[key], tiles.image_member(numbers[key])), where=key) for key in SHARP}
    tiles.close()
    return found


def blurry_examples() -> list[Example]:
    """Severely blurred photographs, the same every time."""
    photos, found = sharp_photos(), []
    for key, tier in BLURRY:
        photo = photos[key]
        rng = sample_rng(SEED, 0, key, 0)
        pair = synthesize_pair(photo, (0, 0, len(photo)), rng, BlurConfig(), tier=tier)
        found.append(
            Example(f"{key.partition('_')[0]}, {tier} ({pair.meta['extent']:.0f} px)", pair.blurry, pair.sharp)
        )
    return found
