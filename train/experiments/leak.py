"""No photograph of the validation set in the training set, told by what the pictures show and not by their names."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from data.shards.set import ShardSet
from data.stream.pairs import Sources

SIDE = 16  # of the grid of differences
BITS = 2 * SIDE * SIDE  # to the right neighbour, and to the lower one
NEAR = 40  # bits: copies that were scaled or compressed again differ in a few, other pictures in about half of all
ALIKE = 0.95  # least correlation of the small pictures' colours: smooth pictures share bits by chance


def check_no_leak(train: ShardSet, val: ShardSet) -> int:
    """How many bits the nearest pair of a training and a validation picture differs in.

    ValueError, with both keys, where a training picture shows what a validation picture shows: copies, also scaled,
    compressed, brighter or mirrored ones. Parts cut out of a picture are not found.
    """
    ours, theirs = fingerprints(train), fingerprints(val)
    nearest = BITS
    for number, print_ in enumerate(theirs):
        apart = np.array([print_.apart(each) for each in ours])
        place = int(apart.argmin())
        nearest = min(nearest, int(apart[place]))
        if apart[place] <= NEAR:
            raise ValueError(
                f"training picture {train.key(place)} shows what validation picture {val.key(number)} shows "
                f"({apart[place]} of {BITS} bits differ): take one of them out"
            )
    return nearest


class Fingerprint(NamedTuple):
    """What a picture shows, small: bits bool [512], whether brightness rises to the right and downwards between the
    cells of a 17×17 grid, of the picture and of its mirror image; colours [16, 16, 3], standardised."""

    bits: np.ndarray
    mirrored: np.ndarray
    colours: np.ndarray

    def apart(self, other: Fingerprint) -> int:
        """Bits in which two pictures, or one and the other's mirror image, differ; all where their colours do."""
        found = []
        for bits, colours in ((other.bits, other.colours), (other.mirrored, other.colours[:, ::-1])):
            alike = float(np.mean(self.colours * colours)) >= ALIKE
            found.append(int((self.bits != bits).sum()) if alike else BITS)
        return min(found)


def fingerprint(picture: np.ndarray) -> Fingerprint:
    """The fingerprint of one uint8 RGB picture [H, W, 3]."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE + 1, SIDE + 1), interpolation=cv2.INTER_AREA).astype(np.int16)
    colours = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float64)
    colours = (colours - colours.mean()) / max(float(colours.std()), 1.0)
    return Fingerprint(_rises(small), _rises(small[:, ::-1]), colours)


def fingerprints(shards: ShardSet) -> list[Fingerprint]:
    """Of every sharp picture of a set. DataError for one that cannot be read."""
    sources = Sources([shards])
    return [fingerprint(sources.photograph(0, number)[0]) for number in range(len(shards))]


def _rises(small: np.ndarray) -> np.ndarray:
    right, down = small[:-1, 1:] > small[:-1, :-1], small[1:, :-1] > small[:-1, :-1]
    return np.concatenate([right.ravel(), down.ravel()])
