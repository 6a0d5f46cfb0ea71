"""Photographs that come with the program, which no bundled training set holds: sharp ones to play with, and blurry
ones whose sharp original is known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.blur import BlurConfig, sample_rng, synthesize_pair
from data.image import decode_image
from data.shards.set import ShardSet
from train.config.sources import BUNDLED

TITLES = {
    "wine_02": "room", "picture_0b_02": "fig", "aitzgorri_04": "mountain", "wine_00": "drum", "aitzgorri_01": "hedge",
}  # fmt: skip
BLURRY = {"room": "moderate", "fig": "severe", "mountain": "severe", "drum": "extreme"}
SEED = 1
CREDIT = (
    "Photographs: Aitzol Berasategi, Trevor “Freespace” and Jakub Mede, 2018, CC-BY-4.0 "
    "(data/samples/ATTRIBUTION.md), cut into tiles."
)


class Example(NamedTuple):
    """A blurry photograph of a severity tier and the sharp one it was made of, uint8 RGB [H, W, 3]."""

    tier: str
    blurry: np.ndarray
    sharp: np.ndarray


def sharp_photos() -> dict[str, np.ndarray]:
    """Sharp photographs by title, uint8 RGB [H, W, 3]."""
    tiles = ShardSet(BUNDLED / "val")
    numbers = {tiles.key(number): number for number in range(len(tiles))}
    found = {
        title: decode_image(tiles.read(numbers[key], tiles.image_member(numbers[key])), where=key)
        for key, title in TITLES.items()
    }
    tiles.close()
    return found


def blurry_examples() -> list[Example]:
    """Severely blurred photographs, the same every time."""
    photos, found = sharp_photos(), []
    for title, tier in BLURRY.items():
        photo, rng = photos[title], sample_rng(SEED, 0, title, 0)
        pair = synthesize_pair(photo, (0, 0, len(photo)), rng, BlurConfig(), tier=tier)
        found.append(Example(tier, pair.blurry, pair.sharp))
    return found
